"""The search across sizes as trials, on losses that a law gives at once."""

import random
from collections.abc import Callable, Mapping
from math import inf, isfinite, log2, nan
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from orchestration.compose import load
from orchestration.config import Experiment
from orchestration.problems import ConfigError
from orchestration.searching.climb import Climb, confirmations, proposal
from orchestration.searching.rounds import Outcome, Rounds, Strategy
from orchestration.searching.schedulers import scheduler
from orchestration.space import EPOCHS, SEED
from tests.orchestration.conftest import CONFIGS

BEST = {"small": 0.04, "medium": 0.03, "large": 0.02}
SIZES = list(BEST)
Known = dict[str, Outcome]


def repair(*overrides: str) -> Experiment:
    """One epoch at a tenth of the best rate, to be repaired."""
    epochs = "search.space={train.epochs: {kind: grid, values: [1, 2, 4]}}"
    own = ("optim.lr=2e-3", "train.epochs=1", "search.target_epochs=40", epochs)
    return load(CONFIGS / "experiment/digits_repair.yaml", (*own, *overrides))


def loss(values: Mapping[str, Any]) -> float:
    """Least at three epochs or more, and at rates that fall with size; a rate far too high diverges."""
    size, octaves = values["model.size"], log2(values["optim.lr"] / BEST[values["model.size"]])
    if octaves > 3:
        return inf
    best = 1.0 - 0.1 * SIZES.index(size) + 0.3 * values[EPOCHS] ** -0.5
    return best * (1 + 0.01 * octaves**2)


class Cluster:
    """Ends the trials that a search suggests, in an order of its own, and dies after so many."""

    def __init__(
        self, seed: int, known: Known, loss: Callable[[Mapping[str, Any]], float] = loss
    ) -> None:
        self.draw, self.known, self.loss = random.Random(seed), known, loss
        self.trained: list[dict[str, Any]] = []

    def run(self, strategy: Strategy, *, trials: float = inf, failing: str = "none") -> None:
        rounds = Rounds(strategy, lambda values: self.known.get(str(dict(values))))
        running: dict[str, dict[str, Any]] = {}
        while len(self.trained) < trials:
            while len(running) < 4 and isinstance(
                values := rounds.suggest(name := f"{len(self.trained)}-{len(running)}"), dict
            ):
                running[name] = values
                if self.draw.random() < 0.3:
                    break
            if not running:
                assert values == Searcher.FINISHED
                return
            name = self.draw.choice(list(running))
            values = running.pop(name)
            failed = failing in str(values)
            if not failed:
                found = self.loss(values)
                state = "finished" if isfinite(found) else "diverged"
                self.known[str(values)] = Outcome(state, {"eval/loss": found})
            self.trained.append(values)
            rounds.on_trial_complete(name, error=failed)


def climbed(experiment: Experiment, seed: int = 0, **how: Any) -> tuple[Climb, list[dict]]:
    cluster, search = Cluster(seed, {}), Climb(experiment)
    cluster.run(search, **how)
    return search, cluster.trained


def unordered(trials: list[dict]) -> list[str]:
    return sorted(map(str, trials))


@pytest.fixture(scope="module")
def whole() -> tuple[Climb, list[dict]]:
    return climbed(repair())


def test_sizes_follow_one_another_and_then_pairs_of_one_seed_each(whole):
    _, trials = whole
    found = [values for values in trials if SEED not in values]
    order = [SIZES.index(values["model.size"]) for values in found]
    assert order == sorted(order)
    assert set(order) == {0, 1, 2}
    pairs = [values for values in trials if SEED in values]
    assert trials[len(found) :] == pairs
    assert sorted(values[SEED] for values in pairs) == sorted([*range(1235, 1240)] * 2)


def test_a_trial_begins_where_the_next_shorter_one_with_its_rate_branched_off(whole):
    experiment, (_, trials) = repair(), whole
    done: list[dict] = []
    for values in trials:
        trunk = proposal(experiment, values).trunk
        if values[EPOCHS] > 1 and SEED not in values:
            assert trunk in done
            assert trunk[EPOCHS] < values[EPOCHS]
            assert trunk | {EPOCHS: 0} == values | {EPOCHS: 0}
        else:
            assert trunk is None
        done.append(values)


def test_the_recommendation_is_near_the_best_and_within_the_budget(whole):
    search, _ = whole
    found = search.recommended()
    assert found is not None
    assert found.size == "large"
    assert found.horizon == 4
    assert abs(log2(found.lr / BEST["large"])) < 1
    assert found.cost <= 40


def test_rates_stay_within_what_the_search_goes_over():
    narrow = "search.space={optim.lr: {kind: loguniform, low: 5e-3, high: 3.1e-2}}"
    search, trials = climbed(repair(narrow))
    rates = {values["optim.lr"] for values in trials if SEED not in values}
    assert min(rates) >= 5e-3
    assert max(rates) <= 3.1e-2
    assert repair(narrow).search.proposes(trials[-1])
    assert 0.01 < search.recommended().lr <= 3.1e-2


def test_what_is_tried_does_not_depend_on_which_trial_was_faster(whole):
    for seed in (1, 2):
        assert unordered(climbed(repair(), seed)[1]) == unordered(whole[1])


def test_a_search_that_is_killed_and_begun_again_tries_what_is_left_and_nothing_twice(whole):
    draw = random.Random(0)
    for _ in range(3):
        known: Known = {}
        first, again = Cluster(0, known), Cluster(1, known)
        first.run(Climb(repair()), trials=draw.randrange(1, len(whole[1])))
        again.run(Climb(repair()))
        assert unordered(first.trained + again.trained) == unordered(whole[1])


def test_of_a_run_that_failed_nothing_more_is_asked_and_the_others_go_on(whole):
    rate = sorted({v["optim.lr"] for v in whole[1] if v["model.size"] == "small"})[3]
    search, trials = climbed(repair(), failing=f"'optim.lr': {rate}, 'train.epochs': 2")
    assert [v[EPOCHS] for v in trials if v["optim.lr"] == rate and SEED not in v] == [1, 2]
    assert search.recommended() is not None
    assert {v["model.size"] for v in trials} == set(SIZES)


def test_a_search_of_which_a_size_always_fails_ends():
    search, trials = climbed(repair(), failing="'medium'")
    assert {values["model.size"] for values in trials} == {"small", "medium"}
    assert len([v for v in trials if v["model.size"] == "medium"]) <= 6
    assert search.next_round() == []


def test_a_rate_that_diverged_gets_no_longer_run(whole):
    _, trials = whole
    diverged = {(v["model.size"], v["optim.lr"]) for v in trials if loss(v) == inf}
    assert all(v[EPOCHS] == 1 for v in trials if (v["model.size"], v["optim.lr"]) in diverged)
    assert diverged or max(v["optim.lr"] for v in trials) <= 8 * max(BEST.values())


def test_confirming_pairs_hold_the_experiment_as_it_stands_to_what_was_found(whole):
    experiment, found = repair(), whole[0].recommended()
    assert found is not None
    pairs = confirmations(experiment, found)
    for before, after in zip(pairs[::2], pairs[1::2], strict=True):
        assert before[SEED] == after[SEED] != experiment.train.seed
        as_it_stands = experiment.with_overrides({SEED: before[SEED], "search": None})
        assert experiment.trial(before).identity() == as_it_stands.identity()
        trained = experiment.trial(after)
        assert (trained.optim.lr, trained.train.epochs) == (found.lr, found.horizon)
        assert trained.optim.schedule == "wsd"


def test_a_trial_whose_first_loss_doubles_or_is_none_is_stopped_but_none_that_confirms():
    decides = scheduler(repair())

    def told(name: str, value: float, **config: Any) -> str:
        trial: Any = SimpleNamespace(trial_id=name, config=config)
        return decides.on_trial_result(None, trial, {"eval/loss": value})

    go_on, stop = TrialScheduler.CONTINUE, TrialScheduler.STOP
    losses = [("a", 1.0), ("a", 0.2), ("a", 1.9), ("b", 5.0), ("a", 2.1), ("b", nan)]
    assert [told(*seen) for seen in losses] == [go_on, go_on, go_on, go_on, stop, stop]
    assert [told("c", value, **{SEED: 1}) for value in (1.0, 9.0, nan)] == [go_on, go_on, go_on]


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("model.size=small", "model.size"),
        ("train.epochs=3", "train.epochs"),
        ("search.samples=2", "search"),
        ("search.metric=eval/accuracy", "search"),
        ("search.scheduler.kind=asha", "search"),
        ("search.across=null", "search"),
        ("search.space={optim.eps: {kind: choice, values: [1e-8, 1e-6]}}", "search"),
    ],
)
def test_what_cannot_be_searched_across_sizes_is_refused(override, where):
    with pytest.raises(ConfigError, match=where):
        repair(override)
