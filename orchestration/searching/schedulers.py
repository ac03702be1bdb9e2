"""Who competes with whom: Tune's schedulers, among trials that can be compared."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    TrialScheduler,
)

from orchestration.config import Experiment
from orchestration.searching.across import TWICE
from orchestration.space import EPOCHS, SCHEDULE, SEED, Asha, HyperBand, Median, NoScheduler


def scheduler(experiment: Experiment) -> TrialScheduler:
    """What decides which trials of a search go on."""
    assert experiment.search is not None
    chosen = experiment.search.scheduler
    if experiment.search.across:
        return Diverging()
    if isinstance(chosen, NoScheduler):
        return FIFOScheduler()
    return Peers(partial(_of_peers, chosen), epochs=experiment.train.epochs)


def _of_peers(chosen: Asha | HyperBand | Median) -> TrialScheduler:
    """Ray's, for trials that can be compared."""
    if chosen.kind == "median":
        return MedianStoppingRule(
            time_attr="epoch",
            grace_period=chosen.grace,
            min_samples_required=chosen.peers,
            # Else it pauses trials, which here means to start them anew; it compares with -inf first.
            min_time_slice=math.inf,  # pyright: ignore[reportArgumentType]
        )
    return AsyncHyperBandScheduler(
        time_attr="epoch",
        grace_period=chosen.grace,
        reduction_factor=chosen.reduction,
        max_t=1000,
        brackets=chosen.brackets if chosen.kind == "hyperband" else 1,
    )


class Diverging(FIFOScheduler):
    """Stops a trial whose loss is no number, or twice what it was when it was first measured.

    It is held to nothing but itself, so that what is stopped does not depend on which trial was faster; and
    to its first loss, not its least: on a plateau losses rise and fall, and annealing mends that. What
    confirms a recommendation runs to its end, whatever comes of it.
    """

    def __init__(self) -> None:
        """No trial has a loss yet."""
        super().__init__()
        self._first: dict[str, float] = {}

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict) -> str:
        """Compare with what the trial has reported at first."""
        loss = result["eval/loss"]
        falls = loss <= TWICE * self._first.setdefault(trial.trial_id, loss)
        return TrialScheduler.CONTINUE if falls or SEED in trial.config else TrialScheduler.STOP


class Peers(FIFOScheduler):
    """A scheduler for each model size, number of epochs and schedule, as only such trials can be compared.

    One ASHA over all would stop every trial of a small model; and as a longer training has annealed less at
    the same epoch, and one on a plateau not at all, every trial of these.
    """

    def __init__(self, make: Callable[[], TrialScheduler], *, epochs: int) -> None:
        """`make` makes the scheduler of a group of peers, `epochs` holds where they are not searched."""
        super().__init__()
        self._make, self._epochs = make, epochs
        self._properties: dict[str, Any] = {}
        self._schedulers: dict[tuple, TrialScheduler] = {}

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        """Remember what is optimised, for every scheduler to come."""
        self._properties = {"metric": metric, "mode": mode} | spec
        return True

    def _of(self, trial: Trial) -> TrialScheduler:
        peers = tuple(trial.config.get(path) for path in ("model.size", EPOCHS, SCHEDULE))
        if peers not in self._schedulers:
            self._schedulers[peers] = self._make()
            self._schedulers[peers].set_search_properties(**self._properties)
        return self._schedulers[peers]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Hand on to the scheduler of the trial's peers."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict) -> str:
        """Hand on to the scheduler of the trial's peers; a trial at its last epoch is not stopped."""
        decision = self._of(trial).on_trial_result(tune_controller, trial, result)
        at_its_end = result["epoch"] == trial.config.get(EPOCHS, self._epochs)
        return TrialScheduler.CONTINUE if at_its_end else decision

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict) -> None:
        """Hand on to the scheduler of the trial's peers."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Hand on to the scheduler of the trial's peers."""
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Hand on to the scheduler of the trial's peers."""
        self._of(trial).on_trial_remove(tune_controller, trial)
