"""Scenarios are made of what plans and searches say, and more machines never cost time."""

from itertools import pairwise

import pytest

from orchestration.compose import load
from orchestration.plan import plan
from orchestration.planning.cost import flops_of_a_step
from tests.benchmarks.costs import Costs
from tests.benchmarks.simulating import ASSUMED, REPAIR, preparation, repaired, rounds_of

COSTS = Costs(
    read=1e-4, check=1e-3, image=1e-2, merge=1e-4, dispatch=1e-3, driver_bytes=2e3, trial=20, update=0.1,
    trial_cores=30,
)  # fmt: skip


def test_a_preparation_is_as_fast_as_its_slowest_part_allows():
    few, many = (preparation(COSTS, n, images=1_000_000, lasts=1e9) for n in (1, 100))
    assert few["longest"] == "check"
    assert many["hours"]["check"] - ASSUMED.starts / 3600 < few["hours"]["check"] / 10
    assert many["hours"]["merge"] == few["hours"]["merge"] == pytest.approx(100 / 3600)
    at_work = few["hours"]["check"] - ASSUMED.starts / 3600
    assert at_work == pytest.approx(1_000_000 * 1.1e-2 / 16 / 3600, rel=0.02)


def test_the_simulated_search_is_the_one_that_is_planned():
    experiment = load(REPAIR)
    rounds = rounds_of(experiment, seed=0, nodes=8)
    steps = plan(experiment).steps_per_epoch
    whole = sum(flops_of_a_step(experiment).values()) / experiment.cluster.workers
    epochs = sum(trial.training.updates * trial.training.seconds for r in rounds for trial in r)
    rate = experiment.cluster.gpu_tflops * 1e12 * experiment.cluster.utilisation
    assert epochs * rate / whole / steps <= experiment.search.target_epochs
    assert len(rounds[0]) == 8  # rates at the smallest size


def test_more_nodes_never_slow_a_search_down():
    experiment = load(REPAIR)
    days = [repaired(experiment, COSTS, nodes, lasts=1e9)["days"] for nodes in (1, 8, 16, 64)]
    assert all(fewer >= more for fewer, more in pairwise(days))
