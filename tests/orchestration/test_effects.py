"""What one setting changes, by pairs of trials, and what trials come to over seeds."""

import math

import pytest
from scipy import stats

from orchestration.effects import MOST, Tried, effects, over_seeds, paired, spread

RATES, LENGTHS, SEEDS = (1e-3, 1e-2), (1, 2), (1, 2, 3)


def loss(rate: float, epochs: int, seed: int, schedule: str) -> float:
    """WSD ends a tenth lower after one epoch, and a fifth after two."""
    gain = {"wsd": {1: 0.9, 2: 0.8}, "cosine": {1: 1.0, 2: 1.0}}[schedule][epochs]
    return gain * (1 + seed / 10 + epochs + 100 * rate)


def ladder(*schedules: str) -> list[Tried]:
    """Branches make a fifth of what their lengths would take."""
    return [
        Tried(
            {"optim.lr": lr, "train.epochs": n, "optim.schedule": schedule, "train.seed": seed},
            loss(lr, n, seed, schedule),
            updates=2 if schedule == "wsd" and n == 1 else 10 * n,
        )
        for lr in RATES
        for n in LENGTHS
        for schedule in schedules
        for seed in SEEDS
    ]


def test_a_schedule_is_held_to_another_pair_by_pair_and_length_by_length():
    found = effects(ladder("cosine", "wsd"), {"optim.schedule": "cosine"}, relative=True)
    rows = {one.epochs: one for one in found if one.path == "optim.schedule"}
    assert rows.keys() == {1, 2, None}
    assert all(one.what.startswith("optim.schedule wsd against cosine") for one in rows.values())
    assert [rows[n].pairs for n in (1, 2, None)] == [6, 6, 12]
    assert rows[1].change == pytest.approx(-0.1)
    assert rows[2].change == pytest.approx(-0.2)
    assert rows[None].change == pytest.approx(-0.15)
    assert rows[1].updates == pytest.approx(2 / 10)
    assert rows[2].updates == 1
    assert rows[None].updates == pytest.approx((2 + 20) / (10 + 20))


def test_what_is_compared_is_equal_in_all_else():
    found = effects(ladder("cosine"), {"optim.lr": 1e-2}, relative=False)
    (rate,) = (one for one in found if one.path == "optim.lr")
    assert (rate.value, rate.against, rate.pairs) == (1e-3, 1e-2, 6)
    assert rate.change == pytest.approx(100 * (1e-3 - 1e-2))
    assert rate.interval == pytest.approx((rate.change, rate.change))
    lonely = [*ladder("cosine"), Tried({"optim.lr": 1.0, "train.epochs": 9}, 0.1, 1)]
    again = effects(lonely, {"optim.lr": 1e-2}, relative=False)
    assert [one for one in again if one.path == "optim.lr"] == [rate]


def test_trials_without_a_number_and_settings_of_many_values_are_left_out():
    diverged = [Tried({"optim.lr": lr}, m, 1) for lr, m in ((1.0, math.nan), (2.0, 1.0))]
    assert effects(diverged, {}, relative=True) == []
    many = [Tried({"optim.lr": float(lr)}, 1.0, 1) for lr in range(MOST + 1)]
    assert effects(many, {}, relative=True) == []


def test_values_may_be_lists_and_an_own_value_that_was_not_tried_gives_way_to_the_first():
    tried = [Tried({"optim.betas": b}, m, 1) for b, m in (([0.0, 0.95], 2.0), ([0.9, 0.95], 1.0))]
    (found,) = effects(tried, {"optim.betas": [0.5, 0.5]}, relative=True)
    assert (found.against, found.change, found.interval) == ([0.0, 0.95], -0.5, None)


def test_over_seeds_a_mean_has_the_interval_of_its_seeds():
    found = over_seeds(ladder("cosine"))
    assert len(found) == 4
    assert all(one.seeds == 3 and "train.seed" not in one.values for one in found)
    first = [loss(1e-3, 1, seed, "cosine") for seed in SEEDS]
    low, high = stats.t.interval(0.95, 2, loc=sum(first) / 3, scale=stats.sem(first))
    assert found[0].mean == pytest.approx(sum(first) / 3)
    assert found[0].interval == pytest.approx((low, high))
    assert over_seeds([Tried({"optim.lr": 1.0}, 1.0, 1)]) == []


def test_one_pair_has_no_interval():
    assert paired([0.5]) is None
    assert paired([]) is None
    assert spread(-0.05, None, relative=True) == "-5.00 %"
    assert spread(-0.05, (-0.1, 0.0), relative=True) == "-5.00 % (-10.00 to +0.00, 95 %)"
    assert (
        spread(0.5, (0.25, 0.75), relative=False, signed=False) == "0.5000 (0.2500 to 0.7500, 95 %)"
    )
