"""A search by Optuna's tree-structured Parzen estimator, for one objective or for several."""

from collections.abc import Mapping
from math import isnan, nan
from typing import Any

import optuna
from optuna.trial import TrialState

from orchestration.config import Experiment
from orchestration.domains import Domain, LogUniform, Uniform
from orchestration.searching.rounds import Outcome

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Parzen:
    """A strategy: rounds of as many draws as run at once, each from what those before have come to."""

    def __init__(self, experiment: Experiment) -> None:
        """Nothing has been tried yet."""
        assert experiment.search is not None
        self._search, self._at_once = experiment.search, experiment.trials_at_once
        sampler = optuna.samplers.TPESampler(seed=self._search.seed, constant_liar=True)
        self._study = optuna.create_study(
            sampler=sampler,
            directions=[
                "minimize" if s > 0 else "maximize" for s in self._search.objectives.values()
            ],
        )
        self._asked: dict[str, list[optuna.Trial]] = {}
        self._known: dict[str, Outcome] = {}

    def next_round(self) -> list[dict[str, Any]]:
        """Values that have not been tried; what is drawn again is known at once."""
        fresh: dict[str, dict[str, Any]] = {}
        while not fresh and (left := self._search.samples - len(self._study.trials)) > 0:
            for _ in range(min(left, self._at_once)):
                trial = self._study.ask()
                values = self._search.values(
                    lambda path, trial=trial: _drawn(trial, path, self._search.space[path])
                )
                if (name := repr(values)) in self._known:
                    self._tell(trial, self._known[name])
                else:
                    self._asked.setdefault(name, []).append(trial)
                    fresh[name] = values
        return list(fresh.values())

    def learn(self, values: Mapping[str, Any], outcome: Outcome) -> None:
        """Tell the estimator."""
        name = repr(dict(values))
        self._known[name] = outcome
        for trial in self._asked.pop(name):
            self._tell(trial, outcome)

    def _tell(self, trial: optuna.Trial, outcome: Outcome) -> None:
        found = [outcome.metrics.get(name, nan) for name in self._search.objectives]
        if outcome.state == "failed":
            self._study.tell(trial, state=TrialState.FAIL)
        elif any(map(isnan, found)):
            self._study.tell(trial, state=TrialState.PRUNED)  # worse than any that has a value
        else:
            self._study.tell(trial, found)


def _drawn(trial: optuna.Trial, path: str, domain: Domain) -> Any:
    match domain:
        case Uniform() | LogUniform():
            far = isinstance(domain, LogUniform)
            return trial.suggest_float(path, domain.low, domain.high, log=far)
        case _:  # a value may be a list
            return domain.values[trial.suggest_categorical(path, range(len(domain.values)))]
