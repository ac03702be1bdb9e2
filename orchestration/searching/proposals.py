"""Which trials a search tries, in which order, and which of them begin where another one branches."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from orchestration.config import Experiment
from orchestration.space import EPOCHS


@dataclass(frozen=True)
class Proposal:
    """A trial to come."""

    values: Mapping[str, Any]
    """Dotted field -> value."""
    trunk: Mapping[str, Any] | None = None
    """The values of the trial whose plateau it shares."""
    branches: tuple[int, ...] = ()
    """Epochs of the trials that share its own."""

    def settings(self, trunk_folder: Path | None) -> dict[str, Any]:
        """What the trial's experiment is to have beside the values, which changes nothing of its result."""
        trunk = None if trunk_folder is None else str(trunk_folder)
        return {"checkpoint.branch_epochs": self.branches, "checkpoint.trunk": trunk}


def proposals(experiment: Experiment) -> list[Proposal]:
    """All trials of a search, the same whenever it is asked; trunks come before their branches."""
    search = experiment.search
    assert search is not None
    return _branched(experiment, search.points())


def _branched(experiment: Experiment, points: Sequence[dict[str, Any]]) -> list[Proposal]:
    """Trials that differ in their epochs alone share a plateau where the schedule has one."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for values in points:
        others = {path: value for path, value in values.items() if path != EPOCHS}
        alike.setdefault(repr(others), []).append(values)
    found = []
    for group in alike.values():
        own = [Proposal(values) for values in group]
        if len(group) > 1 and experiment.trial(group[0]).optim.branching:
            longest, *rest = sorted(group, key=lambda values: -values[EPOCHS])
            lengths = tuple(sorted(values[EPOCHS] for values in rest))
            own = [Proposal(longest, branches=lengths)]
            own += [Proposal(values, trunk=longest) for values in rest]
        found += own
    return found


class Listed(Searcher):
    """Suggests the trials of a list in their order; a branch once its trunk has trained for as long."""

    def __init__(self, listed: Sequence[Proposal]) -> None:
        """Nothing has been tried yet."""
        super().__init__()
        self._waiting = list(listed)
        self._running: dict[str, Mapping[str, Any]] = {}
        self._trained: list[tuple[Mapping[str, Any], float]] = []

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """The values of the next trial; none while all that are left wait for their trunks."""
        for proposal in self._waiting:
            if proposal.trunk is None or self._epochs(proposal.trunk) >= proposal.values[EPOCHS]:
                self._waiting.remove(proposal)
                self._running[trial_id] = proposal.values
                return dict(proposal.values)
        return None

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """A trial has trained for an epoch more."""
        self._trained.append((self._running[trial_id], result["epoch"]))

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """A trial has ended, one way or another: nobody waits for it any more."""
        self._trained.append((self._running[trial_id], math.inf))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep that starts again lists its trials anew, and knows their results."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing was saved."""

    def _epochs(self, values: Mapping[str, Any]) -> float:
        return max((epochs for trial, epochs in self._trained if trial == values), default=0)
