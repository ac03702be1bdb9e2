"""Simulated clusters obey what is known of real ones in closed form."""

import math

import numpy as np
import pytest

from tests.benchmarks.fleet import Fleet, Training, Trial, pool, search, train


def test_tasks_without_chance_take_as_many_turns_as_slots_need():
    spent = pool(103, Fleet(nodes=5, slots=4, starts=7.0), seconds=2.0)
    assert spent.seconds == pytest.approx(7 + math.ceil(103 / 20) * 2)
    assert spent.busy == pytest.approx(103 * 2)


def test_no_more_tasks_end_than_the_driver_hands_out():
    spent = pool(1000, Fleet(nodes=500), seconds=1.0, dispatch=0.1)
    assert spent.seconds == pytest.approx(1000 * 0.1 + 1.0)


def test_every_task_is_done_whatever_is_lost_and_lost_work_is_done_again():
    fleet = Fleet(nodes=8, slots=2, starts=5.0, lifetime=100.0)
    spent = pool(2000, fleet, seconds=3.0, spread=0.5, seed=3)
    unharmed = pool(2000, Fleet(nodes=8, slots=2, starts=5.0), seconds=3.0, spread=0.5, seed=3)
    assert spent.lost > 0
    assert spent.busy == pytest.approx(unharmed.busy)
    assert spent.seconds > unharmed.seconds


def test_lost_nodes_are_as_many_as_their_lifetime_says():
    fleet = Fleet(nodes=10, lifetime=50.0)
    lost = [pool(1000, fleet, seconds=1.0, seed=seed) for seed in range(20)]
    seconds, nodes = sum(spent.seconds for spent in lost), sum(spent.lost for spent in lost)
    assert nodes == pytest.approx(10 * seconds / 50.0, rel=0.1)


def test_a_training_that_loses_nobody_takes_its_updates_and_its_saves():
    training = Training(updates=100, seconds=2.0, every=10, save=3.0, start=20.0)
    spent = train(training, Fleet(nodes=4), draw=np.random.default_rng(0))
    assert spent.seconds == pytest.approx(20 + 100 * 2 + 10 * 3)


def test_failures_cost_what_the_theory_of_checkpoints_says():
    """Daly (2006): a segment of work w takes (e^(w / m) - 1) (m + r) on average, m between failures."""
    training = Training(updates=1000, seconds=1.0, every=50, save=5.0, notice=10.0)
    fleet = Fleet(nodes=10, starts=30.0, lifetime=2000.0)
    times = [train(training, fleet, draw=np.random.default_rng(s)).seconds for s in range(1000)]
    between = 2000.0 / 10
    expected = 20 * math.expm1(55.0 / between) * (between + 40.0)
    assert np.mean(times) == pytest.approx(expected, rel=0.02)


def test_one_slow_node_holds_up_a_training_and_no_pool():
    slow = {"slow": 1.0, "slowness": 2.0}
    training = Training(updates=10, seconds=1.0, every=100)
    assert train(training, Fleet(4, **slow), draw=np.random.default_rng(0)).seconds == 20
    some = Fleet(nodes=100, slow=0.02, slowness=10.0)
    assert pool(10_000, some, seconds=1.0, seed=1).seconds < 1.2 * 100


def test_a_round_of_a_search_waits_for_its_slowest_trial():
    short, long = (Training(updates=n, seconds=1.0, every=1000) for n in (10, 30))
    spent = search([[Trial(short, 2), Trial(long, 2)], [Trial(short, 2)] * 3], Fleet(nodes=4))
    assert spent.seconds == 30 + 20
    assert spent.waits == pytest.approx([1 / 3, 1 / 4])
    assert spent.busy == 2 * (10 + 30 + 3 * 10)


def test_a_trial_that_no_cluster_of_that_size_can_hold_is_refused():
    with pytest.raises(ValueError, match="takes 8 nodes of 4"):
        search([[Trial(Training(1, 1.0, 1), 8)]], Fleet(nodes=4))
