"""What is compared is the same: pixels, answers that are trained, and samples that are read."""

import json

import numpy as np
import pytest

from dsvl.data.types import IGNORED
from tests.benchmarks import loading, opening
from tests.benchmarks.case import ORIGINAL, OURS


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Conversations, and what the original and ours make of them."""
    folder = tmp_path_factory.mktemp("loading")
    chats = opening.write_set(folder, 6)
    return chats, opening.AsTheOriginal(folder, chats), opening.AsPrepared(folder, chats)


def test_both_ways_give_the_same_pixels(opened):
    chats, theirs, ours = opened
    assert len(theirs) == len(ours) == len(chats) == 6
    keys = set()
    for index in range(6):
        image, _ = ours[index]
        pixels, *_ = theirs[index]
        assert (image.width, image.height) == (640, 480)
        found = ours.processor.normalise(image.fitted)
        assert found.shape == (3, opening.EDGE, opening.EDGE)
        assert found.std() > 0.1
        np.testing.assert_allclose(found, pixels, atol=1e-6)
        keys.add(image.key)
    assert len(keys) == 6


def test_both_ways_train_the_answers(opened):
    chats, theirs, ours = opened
    for index, chat in enumerate(chats):
        answers = ["".join(p.text for p in t.content) for t in chat.turns if t.role == "assistant"]
        expected = "</s>".join([*answers, ""])
        _, ids, labels = theirs[index]
        assert len(ids) == len(labels)
        _, example = ours[index]
        for found in (labels, example.labels.tolist()):
            assert ours.encoder.decode([label for label in found if label != IGNORED]) == expected


def test_samples_come_back_as_they_were_written(tmp_path):
    examples = loading.write_prepared(tmp_path / "prepared", 40).train
    assert [examples[index].id for index in range(39)] == [f"made/{n}" for n in range(1, 40)]
    assert all(len(examples[n].ids) > opening.IMAGE_TOKENS for n in range(39))


def test_one_command_measures_and_leaves_a_table(tmp_path, capsys):
    few = ["--images", "4", "--samples", "50", "--rounds", "1"]
    loading.main([*few, "--write", str(tmp_path)])
    found = json.loads((tmp_path / "loading.json").read_text(encoding="utf-8"))
    assert found["images"]["ways"].keys() == {ORIGINAL, OURS}
    rates = found["samples"]["samples_per_s"].values()
    assert all(least > 0 for _, least, _ in rates)
    assert loading.table(found) == (tmp_path / "loading.md").read_text(encoding="utf-8")
    assert loading.table(found) in capsys.readouterr().out
