"""Ray Tune's searches in worlds: they pay for what they see, and do what their names say."""

import random
from collections.abc import Iterator
from itertools import groupby

import numpy as np
import pytest
from ray import tune

from tests.benchmarks.tuning import BOHB, BUDGET, TARGET, TUNED, Found, Tuned, bohb
from tests.benchmarks.worlds import World

SEED = 1000
"""Of the first world that may be looked at while developing."""


class Watched(World):
    """A world that writes down which epochs of which runs were trained, and tells nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.trained: list[tuple[float, float, int, float]] = []

    def midway(self, size: str, lr: float, horizon: float, epoch: float, *, seed: int = 0) -> float:
        assert size == TARGET
        loss = super().midway(size, lr, horizon, epoch, seed=seed)
        self.trained.append(
            (float(f"{lr:.9g}"), horizon, int(epoch), np.nan_to_num(loss, nan=np.inf))
        )
        return loss

    def annealed(self, *args: object, **kwargs: object) -> float:
        raise AssertionError("a branch was looked at")

    best_rate = regret = gain = fewest_epochs = annealed

    def runs(self) -> Iterator[list[tuple[float, float, int, float]]]:
        """The epochs of each rate and horizon, in the order in which they were trained."""
        by_run = sorted(self.trained, key=lambda epoch: epoch[:2])
        return (list(run) for _, run in groupby(by_run, key=lambda epoch: epoch[:2]))


def searched(name: str, seed: int = SEED) -> tuple[Watched, Found]:
    world = Watched(seed)
    return world, TUNED[name](world)


@pytest.mark.parametrize("name", TUNED)
def test_a_search_pays_for_every_epoch_and_stays_within_the_budget(name):
    for seed in range(SEED, SEED + 3):
        world, (_, _, cost) = searched(name, seed)
        assert BUDGET / 2 < cost <= BUDGET
        assert cost == len(world.trained)


@pytest.mark.parametrize("name", TUNED)
def test_a_search_recommends_the_best_run_that_it_has_finished(name):
    world, (lr, horizon, _) = searched(name)
    finished = [run for run in world.trained if run[2] == run[1]]
    assert (lr, horizon) == pytest.approx(min(finished, key=lambda run: run[3])[:2])


@pytest.mark.parametrize("name", TUNED)
def test_a_search_is_that_of_its_world_whatever_was_drawn_before(name):
    first, found = searched(name)
    random.seed(1)
    np.random.seed(1)
    second, again = searched(name)
    assert found == again
    assert first.trained == second.trained


@pytest.mark.parametrize("name", [name for name in TUNED if "PB2" not in name])
def test_a_run_is_trained_from_its_first_epoch_on(name):
    for run in searched(name)[0].runs():
        assert [epoch for _, _, epoch, _ in run] == list(range(1, len(run) + 1))


@pytest.mark.parametrize("name", sorted({"random + ASHA", "TPE + ASHA", BOHB} & set(TUNED)))
def test_schedulers_stop_runs_before_their_end(name):
    world, _ = searched(name)
    assert any(len(run) < run[0][1] for run in world.runs())


def test_without_a_scheduler_every_run_is_finished():
    world = Watched(SEED)
    Tuned()(world)
    assert all(len(run) == run[0][1] or run[-1][3] == np.inf for run in world.runs())


def test_a_population_takes_over_runs_and_goes_on_at_other_rates():
    world, _ = searched("PB2, 15 epochs")
    started = {lr for lr, _, epoch, _ in world.trained if epoch == 1}
    assert len(started) == 4
    assert any(min(abs(lr / np.array([*started]) - 1)) > 1e-6 for lr, *_ in world.trained)


@pytest.mark.skipif(BOHB not in TUNED, reason="the extra bohb is not installed")
@pytest.mark.filterwarnings("ignore")
def test_bohb_has_a_model_with_the_versions_that_are_installed():
    searcher = bohb({"lr": tune.loguniform(1e-4, 2e-3), "horizon": tune.choice([15])}, SEED)
    for trial in map(str, range(12)):
        config = searcher.suggest(trial)
        assert config
        loss = abs(np.log(config["lr"] / 5e-4))
        result = {"loss": loss, "hyperband_info": {"budget": 1}}
        searcher.on_trial_result(trial, result)
        searcher.on_trial_complete(trial, result)
    picks = [searcher.searcher.bohber.get_config(None)[1]["model_based_pick"] for _ in range(20)]  # pyright: ignore
    assert any(picks)
