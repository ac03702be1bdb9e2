"""Ray Tune's own searchers and schedulers, which know the target alone, in the worlds of the searches.

They are the classes of `ray.tune.search` and `ray.tune.schedulers`; `Controller` stands for Tune's, with no
Ray running and in no time: it calls them when and as Tune does for a function that reports once an epoch.
Four trials run at once (in brackets one), and every epoch takes as long. A trial is a cosine run of the
target; a stopped one has cost the epochs it ran. A search recommends the least loss of a finished run, or of
a stopped one if none has finished.

As a longer schedule has annealed less at the same epoch, schedulers compare trials at equal shares of their
horizons, never at equal epochs. Where that still drops the longer ones, all trials have one horizon, itself
the best one of the ladder in worlds of development, a favour. Each but PB2 has whichever of the two had the
least median regret in worlds 1000 to 1011, standard and hard; a scheduler for each horizon, as
`orchestration.searching.schedulers.Peers` has, was no better for any, as 60 epochs are a handful of trials.

That is also why HyperBand, whose first bracket stops nobody, and median stopping, which needs three trials
to compare with, do little more here than draw at random. PB2, whose horizon cannot be searched, gets a
population of four, with 15 epochs each. BOHB is Ray's `TuneBOHB` over hpbandster 0.7.4, which still works
with ConfigSpace 1.2, and is measured where the extra `bohb` is installed: one of its packages is compiled.
"""

import logging
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from types import SimpleNamespace
from typing import Any

import numpy as np
from ray import tune
from ray.train._internal.session import _TrainingResult
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    HyperBandForBOHB,
    HyperBandScheduler,
    MedianStoppingRule,
    TrialScheduler,
)
from ray.tune.schedulers.pb2 import PB2
from ray.tune.search import ConcurrencyLimiter, Searcher
from ray.tune.search.bohb import TuneBOHB
from ray.tune.search.optuna import OptunaSearch

from tests.benchmarks.worlds import LADDER, World

TARGET = LADDER.target.name
USUAL = (1e-4, 2e-3)
"""Rates that rivals try who know the target alone: nearly all worlds have their best one there, a favour."""
BUDGET = 60.0
AT_ONCE = 4
SHARES = 9
"""Of a horizon: its first, third and last are the rungs of successive halving by three."""
DIVERGED = 10.0
"""The loss that a run reports, and ends with, when it has none: searchers cannot learn from NaN."""
Found = tuple[float, float, float]
"""Learning rate, horizon, cost."""


class Random(Searcher):
    """Independent draws from a space; Ray's own generator of them needs an experiment on a disk."""

    def __init__(self, space: dict, seed: int) -> None:
        super().__init__(metric="loss", mode="min")
        self._space, self._draw = space, np.random.default_rng([seed, 5])

    def suggest(self, trial_id: str) -> dict:
        return {
            name: domain.sample(random_state=self._draw) for name, domain in self._space.items()
        }

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """Nothing is learnt."""


class Controller:
    """What schedulers see of Tune's controller, and the world in which it trains.

    A trial's checkpoint is the rates of its epochs. Its loss is that of a run at their geometric mean, so
    that a population whose trials change rates, and take over those of others, has one too.
    """

    def __init__(
        self, world: World, searcher: Searcher, scheduler: TrialScheduler, *, brackets: bool
    ) -> None:
        self.world, self.searcher = world, searcher
        self.scheduler: Any = scheduler
        self.brackets = brackets
        self.search_alg = SimpleNamespace(searcher=searcher)
        self.trials: list[Trial] = []
        self.waiting: Trial | None = None
        self.spent = 0
        self.seen: list[tuple[bool, float, float, float]] = []
        """Of each epoch: whether the run is unfinished, its loss, rate and horizon."""

    def get_trials(self) -> list[Trial]:
        return list(self.trials)

    def get_live_trials(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.is_finished()]

    def stop_trial(self, trial: Trial) -> None:
        if trial.is_finished():
            return
        if trial.status == Trial.RUNNING:
            self.scheduler.on_trial_complete(self, trial, trial.last_result)
            self.searcher.on_trial_complete(trial.trial_id, result=trial.last_result)
        else:
            self.scheduler.on_trial_remove(self, trial)
            self.searcher.on_trial_complete(trial.trial_id)
        trial.set_status(Trial.TERMINATED)

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        trial.set_status(Trial.PAUSED)

    def _schedule_trial_save(self, trial: Trial, result: dict | None = None) -> tuple[float, ...]:
        return _rates(trial)

    def search(self) -> Found:
        """Train until the budget is spent, or what it is left with suffices for no further trial."""
        while running := self._started():
            for trial in running:
                if self.spent < BUDGET:
                    self._epoch(trial)
            if self.spent >= BUDGET:
                break
        _, _, lr, horizon = min(self.seen)
        return lr, horizon, float(self.spent)

    def _started(self) -> list[Trial]:
        """The trials that run, after as many have been started as can be."""
        at_once = 1 if self.brackets else AT_ONCE
        while len(running := [t for t in self.trials if t.status == Trial.RUNNING]) < at_once:
            if not any(trial.status == Trial.PENDING for trial in self.trials):
                self._add()
            chosen = self.scheduler.choose_trial_to_run(self)
            if chosen is None:
                return running
            chosen.set_status(Trial.RUNNING)
            if _epochs(chosen) == chosen.config["horizon"]:
                self.stop_trial(chosen)
        return running

    def _add(self) -> None:
        """A new trial, if the budget has room for the one that is suggested."""
        if self.waiting is None:
            number = f"{len(self.trials):05d}"
            if (config := self.searcher.suggest(number)) is None:
                return
            self.waiting = Trial("world", config=config, trial_id=number, stub=True)
        needed = sum(
            trial.config["horizon"] - _epochs(trial)
            for trial in (*self.get_live_trials(), self.waiting)
        )
        if self.spent + (1 if self.brackets else needed) <= BUDGET:
            self.trials.append(self.waiting)
            self.scheduler.on_trial_add(self, self.waiting)
            self.waiting = None

    def _epoch(self, trial: Trial) -> None:
        horizon = trial.config["horizon"]
        rates: Any = (*_rates(trial), trial.config["lr"])
        lr, epoch = float(np.exp(np.mean(np.log(rates)))), len(rates)
        loss = self.world.midway(TARGET, lr, horizon, epoch)
        ended = epoch == horizon or not isfinite(loss)
        self.spent += 1
        result = {
            "loss": loss if isfinite(loss) else DIVERGED,
            "epoch": epoch,
            "share": SHARES * epoch / horizon,
            "training_iteration": epoch,
        }
        self.seen.append((epoch < horizon, result["loss"], lr, horizon))
        saved: Any = trial.run_metadata.checkpoint_manager
        saved._latest_checkpoint_result = _TrainingResult(rates, result)
        decision = self.scheduler.on_trial_result(self, trial, result)
        if decision != TrialScheduler.STOP:
            self.searcher.on_trial_result(trial.trial_id, result)
        trial.update_last_result(result)
        if decision == TrialScheduler.STOP or (decision == TrialScheduler.CONTINUE and ended):
            self.stop_trial(trial)
        elif decision == TrialScheduler.PAUSE:
            self.pause_trial(trial)


def _rates(trial: Trial) -> tuple[float, ...]:
    checkpoint: Any = trial.checkpoint
    return checkpoint or ()


def _epochs(trial: Trial) -> int:
    return len(_rates(trial))


def optuna(space: dict, seed: int) -> Searcher:
    """The tree-structured Parzen estimator."""
    searcher = OptunaSearch(seed=seed)
    searcher.set_search_properties("loss", "min", space)
    return ConcurrencyLimiter(searcher, AT_ONCE)


def bohb(space: dict, seed: int) -> Searcher:
    """The searcher of BOHB."""
    searcher = TuneBOHB(seed=seed)
    searcher.set_search_properties("loss", "min", space)
    return ConcurrencyLimiter(searcher, AT_ONCE)


def asha() -> TrialScheduler:
    return AsyncHyperBandScheduler("share", max_t=SHARES, grace_period=1, reduction_factor=3)


def hyperband() -> TrialScheduler:
    return HyperBandScheduler("share", max_t=SHARES)


def hyperband_for_bohb() -> TrialScheduler:
    return HyperBandForBOHB("share", max_t=SHARES)


def median() -> TrialScheduler:
    return MedianStoppingRule("share", grace_period=1)


def pb2() -> TrialScheduler:
    """All that have run three epochs since, wait for each other; the worst takes over from the best."""
    bounds: dict = {"lr": list(USUAL)}
    return PB2(
        "epoch",
        perturbation_interval=3,
        hyperparam_bounds=bounds,
        synch=True,
        log_config=False,
    )


@dataclass(frozen=True)
class Tuned:
    """A searcher and a scheduler of Ray's, in a world."""

    searcher: Callable[[dict, int], Searcher] = Random
    scheduler: Callable[[], TrialScheduler] = FIFOScheduler
    horizons: tuple[float, ...] = LADDER.horizons
    brackets: bool = False
    """Trials run one by one, or no bracket of HyperBand ends within the budget; elsewhere four at once, and
    none starts that could not be finished with all others, of which brackets have more."""

    def __call__(self, world: World) -> Found:
        space = {"lr": tune.loguniform(*USUAL), "horizon": tune.choice(self.horizons)}
        scheduler = self.scheduler()
        scheduler.set_search_properties("loss", "min")
        # ASHA, PB2 and BOHB draw from the global generators.
        random.seed(world.seed)
        np.random.seed(world.seed)
        with warnings.catch_warnings(action="ignore"):
            searcher = self.searcher(space, world.seed)
            return Controller(world, searcher, scheduler, brackets=self.brackets).search()


TUNED: dict[str, Callable[[World], Found]] = {
    "random + ASHA": Tuned(scheduler=asha),
    "random + median stopping, 20 epochs": Tuned(scheduler=median, horizons=(20,)),
    "HyperBand, 20 epochs": Tuned(scheduler=hyperband, horizons=(20,), brackets=True),
    "TPE": Tuned(optuna),
    "TPE + ASHA": Tuned(optuna, asha),
    "PB2, 15 epochs": Tuned(scheduler=pb2, horizons=(15,)),
}
"""Searches that Ray Tune has."""
BOHB = "BOHB, 15 epochs"
if find_spec("hpbandster"):
    TUNED[BOHB] = Tuned(bohb, hyperband_for_bohb, horizons=(15,), brackets=True)
for noisy in ("ray.tune", "optuna", "hpbandster"):
    # They tell of every trial and population, and of what diverged.
    logging.getLogger(noisy).setLevel(logging.ERROR)
