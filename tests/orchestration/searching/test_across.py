"""The search across sizes, played on ladders that obey a law and ladders that do not."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from orchestration.scaling import Ladder, Run, Trunk
from orchestration.searching.across import AcrossSizes
from orchestration.searching.laws import interval
from tests.orchestration.ladders import LADDER, best_rate, law, trunk

SEARCH = AcrossSizes(LADDER, rates=(1e-5, 0.1), budget=80.0, samples=60)
LAWFUL = law()
ASTRAY = law()
ASTRAY[LADDER.rates.start + LADDER.place("medium")] = 1.3
ASTRAY[LADDER.rates.start + LADDER.place("target")] = -1.0


def train(run: Run, seen: list[Trunk], search: AcrossSizes, true: np.ndarray) -> Trunk:
    whole = trunk(run.size, run.lr, run.horizons, true=true, noise=0.002)
    for reached in range(1, len(run.horizons) + 1):
        begun = Trunk(run, whole.losses[:reached], ended=False)
        if search.stop([*seen, begun], begun):
            break
    return Trunk(run, begun.losses)


def played(search: AcrossSizes = SEARCH, true: np.ndarray = LAWFUL) -> list[list[Trunk]]:
    """What is known after every step."""
    steps: list[list[Trunk]] = [[]]
    while runs := search.propose(steps[-1]):
        steps.append([*steps[-1], *(train(run, steps[-1], search, true) for run in runs)])
    return steps


@pytest.fixture(scope="module")
def lawful() -> list[list[Trunk]]:
    return played()


@pytest.fixture(scope="module")
def astray() -> list[list[Trunk]]:
    return played(true=ASTRAY)


def at_target(trunks: list[Trunk]) -> list[Trunk]:
    return [seen for seen in trunks if seen.run.size == "target"]


def test_sizes_are_observed_from_the_smallest_to_the_target(lawful):
    order = [seen.run.size for seen in lawful[-1]]
    assert order == sorted(order, key=LADDER.place)
    assert set(order) == {"tiny", "small", "medium", "target"}


def test_the_recommendation_is_near_the_best_and_within_the_budget(lawful):
    told = SEARCH.recommend(lawful[-1])
    assert told.horizon == 20
    assert abs(np.log2(told.lr / best_rate("target", 20))) < 0.7
    true = trunk("target", told.lr, (20,)).losses[0]
    assert told.loss_interval[0] < true < told.loss_interval[1]
    assert told.lr_interval[0] < best_rate("target", 20) < told.lr_interval[1]
    assert told.cost == pytest.approx(LADDER.spent(lawful[-1]))
    assert told.cost <= 80
    assert not told.swept


def test_each_step_follows_from_what_was_seen_in_whatever_order(lawful):
    for before, after in pairwise(lawful):
        proposed = [seen.run for seen in after[len(before) :]]
        assert replace(SEARCH).propose(before[::-1]) == proposed
    assert SEARCH.propose(lawful[-1]) == []
    assert SEARCH.recommend(lawful[-1]) == SEARCH.recommend(lawful[-1][::-1])


def test_nothing_is_proposed_while_a_run_has_not_ended(lawful):
    *others, last = lawful[2]
    assert SEARCH.propose(lawful[2])
    assert SEARCH.propose([*others, Trunk(last.run, last.losses[:1], ended=False)]) == []


def test_trunks_at_the_target_are_as_few_as_asked():
    assert [len(at_target(played(replace(SEARCH, verify=count))[-1])) for count in (0, 1)] == [0, 1]


def test_the_first_trunk_at_the_target_goes_as_far_as_the_choice(lawful):
    before = next(step for step in reversed(lawful) if not at_target(step))
    choice = SEARCH.surface(before).choose(SEARCH.eps)
    first, *_ = at_target(lawful[-1])
    assert first.run.lr == pytest.approx(choice.lr, rel=0.01)
    assert first.run.horizons[-1] == choice.horizon


def test_no_size_below_the_target_takes_more_than_its_share(lawful):
    for size in ("tiny", "small", "medium"):
        own = [seen for seen in lawful[-1] if seen.run.size == size]
        assert len(own) >= 3
        assert LADDER.spent(own) <= 1.5 * SEARCH.share * SEARCH.budget


@pytest.mark.parametrize("octaves", [-3.5, 3.5])
def test_an_edge_is_extended(octaves):
    """Where the best rate of a size is not between those tried, rates beyond follow."""
    true = law()
    true[LADDER.rates.start + LADDER.place("small")] = octaves * np.log(2)
    steps = played(true=true)
    own = [[seen.run.lr for seen in step if seen.run.size == "small"] for step in steps]
    tried = next(lrs for lrs in own if lrs)
    best = best_rate("small", 10, true)
    assert not min(tried) < best < max(tried)
    assert min(own[-1]) < best < max(own[-1])


def test_where_the_law_is_violated_the_target_is_swept(astray):
    told = SEARCH.recommend(astray[-1])
    assert told.swept
    assert "is violated" in told.reasons[0]
    swept = sorted(seen.run.lr for seen in at_target(astray[-1]))
    assert len(swept) >= 3
    assert np.log2(swept[-1] / swept[0]) > 2
    lost = trunk("target", told.lr, (told.horizon,), true=ASTRAY).losses[0]
    least = trunk("target", best_rate("target", 20, ASTRAY), (20,), true=ASTRAY).losses[0]
    assert lost / least < 1.01


def test_a_trunk_that_diverges_or_cannot_win_is_stopped(lawful):
    ended = lawful[-1]
    lr = SEARCH.recommend(ended).lr
    failed = Trunk(Run("target", 16 * lr, (2, 5)), (float("nan"),), ended=False)
    assert "diverges" in (SEARCH.stop([*ended, failed], failed) or "")
    hopeless = trunk("target", 5 * lr)
    hopeless = Trunk(hopeless.run, hopeless.losses[:2], ended=False)
    assert "chance" in (SEARCH.stop([*ended, hopeless], hopeless) or "")
    before = next(step for step in reversed(lawful) if not at_target(step))
    hopeful = trunk("target", best_rate("target", 20))
    hopeful = Trunk(hopeful.run, hopeful.losses[:2], ended=False)
    assert SEARCH.stop([*before, hopeful], hopeful) is None


def test_an_edge_is_told_where_the_budget_ends_at_it(lawful):
    before = next(step for step in reversed(lawful) if not at_target(step))
    low = trunk("target", best_rate("target", 20) / 8)
    assert "were tried" in SEARCH.recommend([*before, low]).reasons[-1]
    assert "were tried" not in SEARCH.recommend(lawful[-1]).reasons[-1]


def test_two_sizes_are_a_ladder():
    """Nothing can be left out of one size, so that no gate stands before the target."""
    pair = Ladder(LADDER.sizes[:1] + LADDER.sizes[-1:], LADDER.horizons)
    seen: list[Trunk] = []
    search = replace(SEARCH, ladder=pair)
    while runs := search.propose(seen):
        seen += [train(run, seen, search, LAWFUL) for run in runs]
    told = search.recommend(seen)
    assert not told.swept
    least = trunk("target", best_rate("target", 20), (20,)).losses[0]
    assert trunk("target", told.lr, (told.horizon,)).losses[0] < 1.01 * least


def test_intervals_narrow_as_the_target_is_trained(lawful):
    before = next(step for step in reversed(lawful) if not at_target(step))
    widths = [
        np.log2(high / low)
        for step in (before, lawful[-1])
        for low, high in [interval(SEARCH.surface(step).law.best_rate("target", 20))]
    ]
    assert widths[1] < widths[0]


def test_no_rate_is_recommended_that_is_higher_than_what_has_trained(lawful):
    before = next(step for step in reversed(lawful) if not at_target(step))
    lr = best_rate("target", 20)
    low = trunk("target", lr / 8, (2,))
    failed = Trunk(Run("target", lr / 4, (2, 5)), (float("nan"),))
    assert SEARCH.recommend([*before, low]).lr <= lr / 8
    assert SEARCH.recommend([*before, failed]).lr <= lr / 16
