"""What is said of an epoch: against its samples, counted one by one."""

import json
import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl.data.blend import Blender
from dsvl.data.encode import load_tokenizer
from dsvl.data.store import open_store
from dsvl.data.types import IGNORED
from orchestration import cli
from orchestration.compose import load
from orchestration.plan import prepared_folder
from orchestration.preparing.statistics import BAR, BINS, BLOCKS, SIDES, _bars, _width, measure

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def experiment(mixed):
    return load(mixed)


@pytest.fixture(scope="module")
def measured(experiment):
    return measure(experiment, prepared_folder(experiment))


def epoch_of(experiment, side):
    store, seed = open_store(prepared_folder(experiment)), experiment.seed_of(side)
    return Blender(store, side, data=experiment.data, seed=seed).epoch(0)


@pytest.mark.parametrize("side", SIDES)
def test_every_number_is_that_of_the_samples_one_by_one(experiment, measured, side):
    epoch = epoch_of(experiment, side)
    tokenizer = load_tokenizer(experiment.model.language.checkpoint)
    total = sum(len(epoch[index].ids) for index in range(len(epoch)))
    for place, sides in enumerate(measured["blends"].values()):
        own = [epoch[index] for index in np.flatnonzero(epoch.blends == place).tolist()]
        told = sides[side]
        assert told["samples"] == len(own)
        assert told["share_of_samples"] == pytest.approx(len(own) / len(epoch))
        assert told["supervised"] == sum((one.labels != IGNORED).sum() for one in own)
        lengths = sorted(len(one.ids) for one in own)
        assert told["share_of_tokens"] == pytest.approx(sum(lengths) / total)
        ends = [(one.labels == tokenizer.eos_token_id).sum() for one in own]  # an answer each
        for length, values in (
            ("tokens", lengths),
            ("images", sorted(len(one.images) for one in own)),
            ("rounds", sorted(ends)),
        ):
            found, width = told[length], measured["bins"][length]
            assert found["sum"] == sum(values)
            bins = Counter(value // width for value in values)
            assert found["histogram"] == [bins[b] for b in range(len(found["histogram"]))]
            if values:
                assert found["mean"] == pytest.approx(sum(values) / len(values))
                assert found["median"] == values[(len(values) - 1) // 2]
                assert found["p95"] == values[-(-95 * len(values) // 100) - 1]
                assert found["max"] == values[-1]
            else:
                assert found == {"sum": 0, "histogram": []}


def test_sets_are_told_as_in_the_manifest_and_no_record_is_lost(experiment, measured):
    manifest = json.loads((prepared_folder(experiment) / "manifest.json").read_text())
    assert measured["sets"] == manifest["sources"]
    for of in measured["sets"].values():
        assert of["raw"] == of["used"] + of["merged"] + sum(of["dropped"].values()) + of["held_out"]
    assert measured["sets"]["hostile"]["dropped"] == {"unpaired_round": 1}


def test_a_sample_is_shortened_if_it_would_have_more_rounds_without_caps(experiment, measured):
    uncut = epoch_of(experiment.with_overrides({"data.max_rounds": None}), "train")
    place = list(experiment.data.all_blends()).index("joined")
    joined = uncut.rounds[uncut.blends == place]
    told = measured["blends"]["joined"]["train"]
    assert 0 < told["shortened"] == (joined > 4).sum() < told["samples"]
    assert told["rounds"]["sum"] == np.minimum(joined, 4).sum()
    assert measured["blends"]["hostile"]["train"]["shortened"] == 0


@given(st.integers(0, 10**9))
def test_bins_are_few_whole_and_round(largest):
    width = _width(largest)
    assert largest / width <= BINS
    assert str(width).rstrip("0") in ("1", "2", "5")
    assert width == 1 or largest / width > BINS / 2.5 - 1e-9


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=16).filter(any))
def test_a_bar_is_as_long_as_its_share_and_never_missing(counts):
    first = next(place for place, count in enumerate(counts) if count)
    for line, count in zip(_bars(counts, 1), counts[first:], strict=True):
        exact = BAR * count / max(counts)
        assert -1 <= line.count("█") - exact <= 1 / 8
        assert bool(set(line) & set(BLOCKS[1:])) == (count > 0)
        assert line.endswith(f" {count:,}")


def test_the_command_tells_it_to_people_and_to_programs(mixed, measured, capsys):
    assert cli.main(["stats", str(mixed), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == measured
    assert cli.main(["stats", str(mixed)]) == 0
    text = capsys.readouterr().out
    samples = measured["blends"]["joined"]["train"]["samples"]
    assert re.search(rf"^joined +train +{samples} ", text, re.MULTILINE)
    assert "dropped of hostile: 1 unpaired_round" in text
    assert "tokens a sample: joined, train" in text
    assert "hostile, eval" not in text
