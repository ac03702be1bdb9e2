"""Sides of the split and orders of epochs."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl.data.split import Links, assign_split

AUTO = {"a": "auto", "b": "auto"}


def links(source: str, record: str, images: str = "") -> Links:
    return Links(source, f"{source}/{record}", tuple(images))


def split(samples, declared=AUTO, eval_fraction=0.5, seed=0):
    return whole_split(samples, declared, eval_fraction, seed).sides


def whole_split(samples, declared=AUTO, eval_fraction=0.5, seed=0):
    return assign_split(samples, declared=declared, eval_fraction=eval_fraction, seed=seed)


SAMPLES = st.lists(
    st.builds(
        links,
        st.sampled_from("abc"),
        st.sampled_from("0123456789"),
        st.text("ABCDEFGH", max_size=3),
    ),
    max_size=20,
)


@given(
    SAMPLES,
    st.fixed_dictionaries(dict.fromkeys("abc", st.sampled_from(["auto", "train", "eval"]))),
    st.floats(0.1, 0.9),
    st.integers(0, 9),
)
def test_no_image_and_no_record_is_on_both_sides(samples, declared, fraction, seed):
    sides = split(samples, declared, fraction, seed)
    keys = {"train": set(), "eval": set(), "straddles_split": set()}
    for sample, side in zip(samples, sides, strict=True):
        keys[side] |= set(sample.group_keys)
        if declared[sample.source] == "eval":
            assert side == "eval"
        if declared[sample.source] == "train":
            assert side != "eval"
    assert keys["train"].isdisjoint(keys["eval"])
    assert split(samples, declared, fraction, seed) == sides


@given(SAMPLES.filter(bool), st.randoms())
def test_sides_do_not_depend_on_the_order_of_the_samples(samples, random):
    declared = {"a": "auto", "b": "auto", "c": "eval"}
    shuffled = random.sample(range(len(samples)), len(samples))
    sides = split(samples, declared)
    assert split([samples[i] for i in shuffled], declared) == [sides[i] for i in shuffled]


def test_linked_samples_go_together_and_none_is_lost():
    pairs = [links("a", f"{i}", (chr(i), chr(i + i % 2))) for i in range(1000, 2000)]
    sides = split(pairs, eval_fraction=0.1)
    assert Counter(sides).keys() == {"train", "eval"}
    assert 50 < Counter(sides)["eval"] < 200
    assert all(
        sides[i] == sides[i + 1] for i in range(len(pairs) - 1)
        if set(pairs[i].images) & set(pairs[i + 1].images)
    )  # fmt: skip


def test_where_links_percolate_images_are_split_and_straddlers_named():
    rng = np.random.default_rng(0)
    pairs = [links("a", f"{i}", map(chr, rng.integers(1000, 1200, 2))) for i in range(1000)]
    counts = Counter(split(pairs, eval_fraction=0.2))
    assert 100 < counts["straddles_split"] < 450
    assert counts["eval"] > 10
    assert counts["train"] > 400


def test_what_percolates_is_trained_on_whole_where_the_rest_can_be_held_out_instead():
    chain = [links("a", f"{i}", chr(1000 + i) + chr(1001 + i)) for i in range(600)]
    rest = [links("a", f"{i}", chr(5000 + i)) for i in range(600, 1000)]
    found = whole_split(chain + rest, eval_fraction=0.1)
    assert set(found.sides[:600]) == {"train"}
    assert 50 < Counter(found.sides)["eval"] < 150, "a tenth of the set, all of it from the rest"
    (cost,) = found.percolations
    assert (cost.way, cost.samples, cost.shares) == ("together", 600, {"a": 0.6})
    assert cost.held_out_of_rest == pytest.approx(0.1 / 0.4)
    assert 60 < cost.straddling < 160, "2 f (1 - f) of the pairs of a chain"

    (cost,) = whole_split(chain + rest[:30], eval_fraction=0.1).percolations
    assert (cost.way, cost.held_out_of_rest > 1) == ("by_image", True)
    (cost,) = whole_split(chain, eval_fraction=0.1).percolations
    assert (cost.way, cost.held_out_of_rest) == ("by_image", None)


def test_a_set_that_does_not_percolate_is_whole_beside_one_that_does():
    chain = [links("a", f"{i}", chr(1000 + i) + chr(1001 + i)) for i in range(200)]
    alone = [links("b", f"{i}", chr(5000 + i)) for i in range(200)]
    sides = split(chain + alone)
    assert "straddles_split" in sides[:200]
    assert set(sides[200:]) == {"train", "eval"}


def test_declared_sets_keep_their_side_and_training_loses_shared_images():
    samples = [links("a", "1", "XY"), links("a", "2", "Z"), links("b", "1", "Y")]
    sides = split(samples, {"a": "train", "b": "eval"})
    assert sides == ["straddles_split", "train", "eval"]


def test_the_seed_moves_the_split():
    samples = [links("a", f"{i}", chr(1000 + i)) for i in range(100)]
    assert split(samples, seed=1) != split(samples, seed=2)
