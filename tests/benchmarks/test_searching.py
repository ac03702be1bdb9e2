"""The worlds in which searches are measured, and the measurement."""

import numpy as np
import pytest

from orchestration.searching.across import AcrossSizes
from tests.benchmarks.searching import RIVALS, area, measure, searched, table
from tests.benchmarks.worlds import EXCESS, KINDS, LADDER, OCTAVES, RATES, World

SEED = 1000
"""Of the first world that may be looked at while developing."""


@pytest.fixture(scope="module")
def world():
    return World(SEED)


def test_a_wrong_rate_costs_what_was_measured(world):
    best = world.best_rate("70b", 10)
    at_best = world.loss("70b", best, 10)
    for octave, excess in zip(OCTAVES, EXCESS, strict=True):
        found = world.loss("70b", best * 2.0**octave, 10) / at_best - 1
        assert found == pytest.approx(world.curvature * excess, abs=1e-12)


def test_the_best_rate_is_the_best_and_the_best_horizon_inside():
    inside = []
    for seed in range(SEED, SEED + 40):
        world = World(seed)
        lrs = np.geomspace(*RATES, 4000)
        found = lrs[world.loss("13b", lrs, 10).argmin()]
        assert found == pytest.approx(world.best_rate("13b", 10), rel=0.01)
        inside.append(2 < world.fewest_epochs(0.001) < 30)
    assert np.mean(inside) > 0.6


def test_a_run_has_its_luck_for_all_its_branches_and_the_same_every_time():
    world, lr = World(SEED), 3e-4
    assert world.annealed("70b", lr, 10) == world.annealed("70b", lr, 10)
    lucks = [
        [
            world.annealed("70b", lr, h) / world.loss("70b", lr, h)
            for h in (5, 10)
        ]
        for world in (World(seed) for seed in range(SEED, SEED + 200))
        for lr in [world.best_rate("70b", 10)]
    ]  # fmt: skip
    assert 0.2 < np.corrcoef(np.array(lucks).T)[0, 1] < 0.6
    assert np.std(lucks) == pytest.approx(np.hypot(0.002, 0.001), rel=0.15)


def test_rates_far_too_high_diverge(world):
    assert np.isnan(world.annealed("70b", 16 * world.best_rate("70b", 10), 10))
    assert np.isfinite(world.annealed("70b", 4 * world.best_rate("70b", 10), 10))


def test_an_unfinished_cosine_run_is_above_its_end_and_the_more_so_the_higher_its_rate(world):
    best = world.best_rate("70b", 10)
    low, high = (
        world.midway("70b", lr, 20, 10) / float(world.loss("70b", lr, 10))
        for lr in (best / 4, best * 2)
    )
    assert 1.01 < low < high


def test_standard_worlds_are_not_those_of_other_kinds():
    standard, hard, shifting = (World(SEED, kind) for kind in KINDS.values())
    assert standard.floor == hard.floor == shifting.floor
    assert standard.loss("70b", 1e-3, 30) != hard.loss("70b", 1e-3, 30)
    assert standard.loss("70b", 1e-3, 5) == pytest.approx(shifting.loss("70b", 1e-3, 5))
    assert standard.loss("70b", 1e-3, 30) != shifting.loss("70b", 1e-3, 30)


def test_regret_is_nothing_at_the_best_and_gains_end_there(world):
    best = LADDER.horizons[int(world.best.argmin())]
    assert world.regret(world.best_rate("70b", best), best) == pytest.approx(0, abs=1e-5)
    assert world.gain(best) <= 0
    assert world.gain(2) > 0.005


def test_rivals_pay_for_what_they_run(world):
    costs = {name: rival(world)[2] for name, rival in RIVALS.items()}
    assert costs["the paper's recipe"] == 0
    assert 30 < costs["random"] <= 60
    assert costs["target-only trunks, 1 rate"] == pytest.approx(40.4)


def test_a_search_meets_its_goals_in_a_world_of_development(world):
    *_, (trunks, told) = searched(world, AcrossSizes(LADDER, RATES))
    assert world.regret(told.lr, told.horizon) < 0.01
    assert told.cost <= 60
    assert {trunk.run.size for trunk in trunks} == {size.name for size in LADDER.sizes}


def test_an_area_is_the_chance_of_the_right_order():
    assert area([0.1, 0.4, 0.35, 0.8], [False, False, True, True]) == pytest.approx(0.75)
    assert area([0.5, 0.5], [False, True]) == pytest.approx(0.5)


def test_the_table_has_every_method(world):
    worlds = [measure(World(seed)) for seed in (SEED, SEED + 1)]
    text = "\n".join(table("standard", worlds))
    assert all(f"| {name} |" in text for name in [*RIVALS, "across sizes, 3 at the target"])
