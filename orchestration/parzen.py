"""A search by Optuna's tree-structured Parzen estimator."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from orchestration.config import Experiment
from orchestration.rounds import Outcome
from orchestration.space import Domain, LogUniform, Uniform

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Parzen:
    """A strategy: rounds of as many draws as run at once, each from what those before have come to."""

    def __init__(self, experiment: Experiment) -> None:
        """Nothing has been tried yet."""
        assert experiment.search is not None
        self._search, self._at_once = experiment.search, experiment.trials_at_once
        sampler = optuna.samplers.TPESampler(seed=self._search.seed, constant_liar=True)
        self._study = optuna.create_study(
            sampler=sampler, direction="minimize" if self._search.mode == "min" else "maximize"
        )
        self._asked: dict[str, list[optuna.Trial]] = {}
        self._known: dict[str, Outcome] = {}

    def next_round(self) -> list[dict[str, Any]]:
        """Values that have not been tried; what is drawn again is known at once."""
        fresh: dict[str, dict[str, Any]] = {}
        while not fresh and (left := self._search.samples - len(self._study.trials)) > 0:
            for _ in range(min(left, self._at_once)):
                trial = self._study.ask(self._distributions)
                values = {
                    path: _value(domain, trial.params[path])
                    for path, domain in self._search.space.items()
                }
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

    @property
    def _distributions(self) -> dict[str, BaseDistribution]:
        return {path: _distribution(domain) for path, domain in self._search.space.items()}

    def _tell(self, trial: optuna.Trial, outcome: Outcome) -> None:
        metric = outcome.metrics.get(self._search.metric)
        if outcome.state == "failed":
            self._study.tell(trial, state=TrialState.FAIL)
        elif metric is None or metric != metric:
            self._study.tell(trial, state=TrialState.PRUNED)  # worse than any that has a value
        else:
            self._study.tell(trial, metric)


def _distribution(domain: Domain) -> BaseDistribution:
    match domain:
        case Uniform() | LogUniform():
            return FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))
        case _:
            return CategoricalDistribution(range(len(domain.values)))  # a value may be a list


def _value(domain: Domain, drawn: Any) -> Any:
    return drawn if isinstance(domain, Uniform | LogUniform) else domain.values[drawn]
