"""Who gets what: blends their share of an epoch, samples their place in it, passes their samples."""

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl.config import BlendConfig
from dsvl.data.blend import deal, order, shares
from tests.dsvl.data.conftest import laws


def blend(**options) -> BlendConfig:
    return BlendConfig(sets=("a",), **options)


MADE = st.lists(st.integers(0, 10_000), min_size=1, max_size=6)


@laws
@given(MADE)
def test_by_themselves_blends_have_what_they_make(made):
    assert shares([blend()] * len(made), made=made, temperature=1.0) == made


@laws
@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 5)), min_size=1, max_size=6),
    st.sampled_from([1, 2, 4]),
)
def test_an_epoch_is_divided_by_weights_and_roots_of_sizes_and_none_is_lost(blends, temperature):
    made, weights = zip(*blends, strict=True)
    found = shares([blend(weight=w) for w in weights], made=made, temperature=temperature)
    assert sum(found) == sum(made)
    roots = [w * Fraction(n ** (1 / temperature)) for n, w in blends]
    for share, root, size in zip(found, roots, made, strict=True):
        exact = sum(made) * root / (sum(roots) or 1)
        assert abs(share - exact) < 1
        assert size > 0 or share == 0, "nothing is made of nothing"


@pytest.mark.parametrize(
    ("blends", "made", "temperature", "expected"),
    [
        ([{"weight": 3}, {}], [100, 100], 1, [150, 50]),
        ([{}, {}], [900, 100], 2, [750, 250]),
        ([{"weight": 2}, {}], [400, 100], 2, [400, 100]),
        ([{"samples": 30}, {"samples": 30}], [100, 20], 1, [30, 20]),
        ([{"epochs": 2.5}, {"epochs": 0.5}], [100, 20], 1, [250, 10]),
        ([{"epochs": 3}, {"weight": 3}], [100, 100], 1, [200, 200]),
        ([{}, {}], [0, 0], 2, [0, 0]),
    ],
)
def test_shares_of_an_epoch(blends, made, temperature, expected):
    named = [blend(**options) for options in blends]
    assert shares(named, made=made, temperature=temperature) == expected
    assert shares(named[::-1], made=made[::-1], temperature=temperature) == expected[::-1]


LENGTHS = st.lists(st.integers(1, 4096), min_size=1, max_size=6)


@laws
@given(LENGTHS, st.integers(1, 4))
def test_what_is_dealt_is_every_sample_once_in_equal_parts_the_longest_first(lengths, parts):
    lengths = np.array(lengths * parts)
    dealt = deal(lengths, parts)
    assert [len(part) for part in dealt] == [len(lengths) // parts] * parts
    assert sorted(np.concatenate(dealt).tolist()) == list(range(len(lengths)))
    assert all((np.diff(part) > 0).all() for part in dealt)
    tokens = [lengths[part].sum() for part in dealt]
    assert tokens == sorted(tokens, reverse=True)


@laws
@given(st.lists(st.integers(1, 100), min_size=6, max_size=6))
def test_no_way_to_deal_pairs_has_a_smaller_longest_part(lengths):
    lengths = np.array(lengths)
    every = (lengths[list(way)].reshape(3, 2).sum(1).max() for way in permutations(range(6)))
    assert lengths[deal(lengths, 3)[0]].sum() == min(every)


def test_batches_are_dealt_better_than_in_their_order():
    generator = np.random.default_rng(0)
    for _ in range(50):
        lengths = generator.integers(50, 4096, 128)
        longest = lengths[deal(lengths, 16)[0]].sum()
        assert longest <= lengths.reshape(16, 8).sum(1).max()
        assert longest <= 1.03 * lengths.sum() / 16


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_an_order_is_a_permutation_of_seed_and_epoch_alone(n):
    first = order(n, seed=3, epoch=5)
    np.testing.assert_array_equal(np.sort(first), np.arange(n))
    np.testing.assert_array_equal(first, order(n, seed=3, epoch=5))


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(order(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_an_order_never_changes_between_versions():
    assert order(8, seed=1234, epoch=0).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]
