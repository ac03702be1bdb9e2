"""What one setting changes, by pairs of trials."""

import math

import pytest

from orchestration.searching.effects import MOST, Tried, effects, spread

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


def test_what_one_schedule_alone_has_is_no_difference_from_the_other():
    plain, short, long = (
        Tried({"optim.lr": 1e-3, "optim.schedule": schedule, **decay}, metric, updates=10)
        for schedule, decay, metric in (
            ("cosine", {}, 1.0),
            ("wsd", {"optim.decay_fraction": 0.1}, 0.9),
            ("wsd", {"optim.decay_fraction": 0.2}, 0.8),
        )
    )
    under = {"optim.schedule": {"optim.decay_fraction"}}
    found = effects([plain, short, long], {}, relative=True, under=lambda path: under.get(path, ()))
    assert [(one.path, one.pairs) for one in found] == [
        ("optim.schedule", 2),
        ("optim.decay_fraction", 1),
    ]
    assert found[0].change == pytest.approx(-0.15)
    assert found[1].change == pytest.approx(0.8 / 0.9 - 1)


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


def test_one_pair_has_no_interval():
    tried = [Tried({"train.precision": p}, m, 1) for p, m in (("fp32", 0.5), ("bf16", 0.475))]
    (one,) = effects(tried, {}, relative=True)
    assert spread(one, relative=True) == "-5.00 %"
    more = [Tried(one.values | {"optim.lr": 1.0}, one.metric, 1) for one in tried]
    several = effects(
        [*(Tried(t.values | {"optim.lr": 2.0}, 0.5, 1) for t in tried), *more], {}, relative=True
    )
    told = [spread(one, relative=True) for one in several if one.path == "train.precision"]
    assert told == ["-2.50 % (-34.27 to +29.27, 95 %)"]
