"""What a search has taken, held to what it may take."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from orchestration.config import Experiment
from orchestration.records.journal import read, seconds
from orchestration.space import Budget

Spent = dict[str, float]
"""Field of `search.budget` -> what has been taken of it."""
log = logging.getLogger(__name__)


def spent(experiment: Experiment, root: Path) -> Spent:
    """What the sweep whose trials lie in a folder has taken so far, by their journals and its own."""
    search, price = experiment.search, experiment.cluster.gpu_hour_price
    assert search is not None
    folders = [path.parent for path in root.glob("*/values.json")]
    hours = search.workers * sum(seconds(read(folder)[0]) for folder in folders) / 3600
    return {
        "trials": len(folders),
        "hours": seconds(read(root)[0]) / 3600,
        "gpu_hours": hours,
        "money": hours * (price or 0.0),
    }


class Budgeted(Searcher):
    """Suggests what another searcher does, while there is something left of `search.budget`."""

    def __init__(
        self,
        searcher: Searcher,
        budget: Budget,
        *,
        spent: Callable[[], Spent],
        begun: Callable[[Mapping[str, Any]], bool],
    ) -> None:
        """`spent` says what has been taken until now, `begun` whether a trial has been before."""
        super().__init__()
        self._searcher, self._budget = searcher, budget.model_dump(exclude_none=True)
        self._spent, self._begun = spent, begun
        self._over = False

    def suggest(self, trial_id: str) -> Any:
        """The next trial, `FINISHED` if it would be a new one and nothing is left."""
        values = Searcher.FINISHED if self._over else self._searcher.suggest(trial_id)
        if not isinstance(values, dict) or self._begun(values) or self._left():
            return values
        self._over = True
        return Searcher.FINISHED

    def _left(self) -> bool:
        so_far = self._spent() if self._budget else {}
        over = {name: most for name, most in self._budget.items() if so_far[name] >= most}
        for name, most in over.items():
            log.info("search.budget.%s=%g is spent: no further trial begins", name, most)
        return not over

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Hand on."""
        self._searcher.on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """Hand on."""
        self._searcher.on_trial_complete(trial_id, result, error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what was taken is in the trials' folders."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing was saved."""
