"""A search that learns from its trials, inside Tune: round by round, from their results alone.

What comes next is decided when a round has ended whole, whatever machine was faster; and a trial that has
ended is read from its folder, never started again. So a search that is killed goes on as if it had not been.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from ray.tune.search import Searcher


@dataclass(frozen=True)
class Outcome:
    """How a trial has ended."""

    state: Literal["finished", "stopped", "diverged", "failed"]
    """`failed` of something else than its own settings, and may be tried again."""
    metrics: Mapping[str, float]
    """The last of each."""


class Strategy(Protocol):
    """What decides which trials a search tries."""

    def next_round(self) -> list[dict[str, Any]]:
        """Values of the trials to try next, all those before having ended; none when the search is over."""
        ...

    def learn(self, values: Mapping[str, Any], outcome: Outcome) -> None:
        """What one of them has come to."""
        ...


class Rounds(Searcher):
    """Suggests the trials of a strategy."""

    def __init__(
        self, strategy: Strategy, known: Callable[[Mapping[str, Any]], Outcome | None]
    ) -> None:
        """`known` says how a trial has ended that need not be tried again."""
        super().__init__()
        self.strategy, self._known = strategy, known
        self._round: list[tuple[dict[str, Any], Outcome | None]] = []
        self._waiting: list[int] = []
        self._running: dict[str, int] = {}

    def suggest(self, trial_id: str) -> Any:
        """The values of the next trial; none while a round has not ended, `FINISHED` when all is done."""
        while not self._waiting:
            if self._running:
                return None
            for values, outcome in self._round:
                assert outcome is not None
                self.strategy.learn(values, outcome)
            self._round = [(values, self._known(values)) for values in self.strategy.next_round()]
            if not self._round:
                return Searcher.FINISHED
            self._waiting = [at for at, (_, outcome) in enumerate(self._round) if outcome is None]
        at = self._running[trial_id] = self._waiting.pop(0)
        return dict(self._round[at][0])

    def on_trial_result(self, trial_id: str, result: dict) -> None:
        """Nothing: only how a trial ends counts."""

    def on_trial_complete(
        self, trial_id: str, result: dict | None = None, error: bool = False
    ) -> None:
        """A trial has ended, one way or another."""
        at = self._running.pop(trial_id)
        values = self._round[at][0]
        outcome = self._known(values)  # a stopped trial has no result of its own yet
        if outcome is None:
            outcome = Outcome("failed" if error else "stopped", result or {})
        self._round[at] = (values, outcome)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: what is known is in the trials' folders."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as nothing was saved."""
