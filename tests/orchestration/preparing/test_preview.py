"""Samples shown as the model sees them, in a terminal, on a page and as a document."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl.data.blend import Blender, order
from dsvl.data.encode import load_tokenizer, show
from dsvl.data.store import open_store
from orchestration import cli
from orchestration.compose import load
from orchestration.plan import prepared_folder
from orchestration.preparing.preview import PLAIN, TRAINED, _in_turn, preview, render
from tests.orchestration.conftest import HOSTILE

pytestmark = pytest.mark.ray


class Page(HTMLParser):
    """The texts within <mark>, all text, and the tags with their attributes."""

    def __init__(self, path):
        super().__init__()
        self.marked, self.text, self.tags, self._in_mark = [], "", [], False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "mark":
            self._in_mark = True
            self.marked.append("")

    def handle_endtag(self, tag):
        self._in_mark = self._in_mark and tag != "mark"

    def handle_data(self, data):
        self.text += data
        if self._in_mark:
            self.marked[-1] += data


@pytest.fixture
def experiment(mixed):
    return load(mixed)


def answers(experiment, ids: str) -> list[str]:
    """The answers of a sample's conversations, in their order, as the prepared data have them."""
    told = dict()
    for name, _, turns in open_store(prepared_folder(experiment)).conversations("train"):
        texts = ("".join(part.text for part in turn.content) for turn in turns if turn.supervise)
        told[name] = [f"{text}</s>" for text in texts]
    return [answer for name in ids.split("+") for answer in told[name]]


def trained(told) -> list[str]:
    return [piece["text"] for piece in told["pieces"] if piece.get("trained")]


def test_what_is_trained_is_exactly_the_answers(experiment):
    for blend in ("joined", "hostile"):
        for told in preview(experiment, count=20, blend=blend, epoch=0)["samples"]:
            expected = answers(experiment, told["id"])
            assert trained(told) == expected[: len(trained(told))]
            assert len(trained(told)) == min(len(expected), experiment.data.max_rounds)
            assert told["supervised"] == sum(
                p["tokens"] for p in told["pieces"] if p.get("trained")
            )
            assert told["tokens"] == sum(piece["tokens"] for piece in told["pieces"])


def test_images_stand_in_their_order_with_what_they_are_called(experiment):
    for told in preview(experiment, count=5, blend="joined", epoch=0)["samples"]:
        shown = [piece for piece in told["pieces"] if "image" in piece]
        assert [piece["image"] for piece in shown] == list(range(1, len(told["images"]) + 1))
        assert {piece["tokens"] for piece in shown} == {experiment.model.image_tokens}
        assert all(re.fullmatch(r"digit-\d+\.png", image["path"]) for image in told["images"])
        assert all((image["width"], image["height"]) == (8, 8) for image in told["images"])


@pytest.mark.parametrize("number", [0, 3])
def test_samples_are_the_first_of_an_epoch_one_blend_after_another(experiment, number):
    seed = experiment.train.seed
    store = open_store(prepared_folder(experiment))
    epoch = Blender(store, "train", data=experiment.data, seed=seed).epoch(number)
    tokenizer = load_tokenizer(experiment.model.language.checkpoint)
    ranked = order(len(epoch), seed=seed, epoch=number)
    found = preview(experiment, count=4, blend=None, epoch=number)
    blends = list(experiment.data.all_blends())
    assert [told["blend"] for told in found["samples"]] == blends * 2
    one, two = (
        [epoch[index] for index in ranked.tolist() if epoch.blends[index] == place][:2]
        for place in (0, 1)
    )
    expected = [one[0], two[0], one[1], two[1]]
    assert [told["id"] for told in found["samples"]] == [example.id for example in expected]
    blocks = render(found, colour=False).split("\n\n--- ")
    for example, block in zip(expected, blocks, strict=True):
        assert block.endswith(show(example, tokenizer).replace("\x1b", r"\x1b"))


@given(st.lists(st.integers(0, 3)), st.randoms())
def test_blends_take_turns_as_long_as_they_have_samples(blends, random):
    samples = list(range(len(blends)))
    random.shuffle(samples)
    left = {blend: [s for s in samples if blends[s] == blend] for blend in sorted(set(blends))}
    expected = []
    while any(left.values()):
        expected += [own.pop(0) for own in left.values() if own]
    found = _in_turn(np.array(samples, np.int64), np.array(blends, np.int64))
    assert found.tolist() == expected


def test_in_a_terminal_the_coloured_text_is_what_is_trained_and_data_give_no_orders(experiment):
    found = preview(experiment, count=6, blend=None, epoch=0)
    text = render(found, colour=True)
    coloured = re.findall(re.escape(TRAINED) + "(.*?)" + re.escape(PLAIN), text, re.DOTALL)
    expected = [piece for told in found["samples"] for piece in trained(told)]
    assert coloured == [piece.replace("\x1b", r"\x1b") for piece in expected]
    assert "\x1b[31m" not in text
    assert r"\x1b[31m" in text


def test_the_page_shows_text_as_text_and_pictures_inline(mixed, experiment, tmp_path, capsys):
    path = tmp_path / "preview.html"
    assert cli.main(["preview", str(mixed), "--html", str(path), "--json", "--count", "6"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["page"] == str(path)
    page = Page(path)
    assert page.marked == [piece for told in document["samples"] for piece in trained(told)]
    assert f"Yes: {HOSTILE}" in page.text
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == sum(len(told["images"]) for told in document["samples"])
    assert all(picture["src"].startswith("data:image/png;base64,") for picture in pictures)
    assert "image 1: digit-" in pictures[0]["alt"]


def test_the_command_tells_it_to_people_without_colour_where_there_is_no_terminal(mixed, capsys):
    assert cli.main(["preview", str(mixed), "--blend", "hostile", "--count", "1"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "⟦Yes: <script>" in out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--blend", "joind"], "did you mean 'joined'?"),
        (["--blend", "digits_train"], "--blend digits_train: no such blend"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--count", "many"], "invalid int value: 'many'"),
        (["--epoch", "-1"], "--epoch -1: must be at least 0"),
        (["--html", "no/such/folder.html"], "No such file or directory"),
    ],
)
def test_a_request_that_cannot_be_met_ends_with_2(mixed, options, says, capsys):
    assert cli.main(["preview", str(mixed), *options]) == 2
    assert says in capsys.readouterr().err
