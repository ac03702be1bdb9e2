"""A run's checkpoints: when the first is written, and where training goes on from, for all ranks alike."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from dsvl import checkpoint
from dsvl.engine import Engine, from_rank_0
from dsvl.guard import Guard
from dsvl.train import Plan
from orchestration.config import Experiment
from orchestration.journal import Journal
from orchestration.results import refuse_another


@dataclass(frozen=True)
class Checkpoints:
    """Those of one run. Every method is a collective."""

    engine: Engine
    experiment: Experiment
    folder: Path
    """The run's."""
    _: KW_ONLY
    frozen: dict[str, str]
    """Digest of each frozen part."""
    plan: Plan
    guard: Guard
    journal: Journal | None
    """That of the run, on rank 0."""

    def begin(self) -> None:
        """Save the untrained state unless there is something to go on from.

        It is what to go back to if the first updates go wrong, and a disk that is full shows now.
        """
        if newest(self.folder) is None:
            self.save(0, {})

    def save(self, step: int, measured: dict[str, float]) -> None:
        """Write the state after an update, and what was measured then."""
        checkpoint.save(
            self.engine,
            self.folder / "checkpoints",
            step=step,
            position=divmod(step, self.plan.steps_per_epoch),
            identity=self.experiment.identity(),
            fields=self.experiment.identity_fields(),
            frozen=self.frozen,
            config=self.experiment.checkpoint,
            guard=self.guard.state(),
            metrics=measured,
        )

    def resume(self) -> int:
        """Put engine and guard into the state of the newest one, and return how many updates it holds."""
        start, state = load_newest(self.engine, self.experiment, self.folder, frozen=self.frozen)
        self.guard.restore(state)
        if self.journal:
            self.journal.start(
                identity=self.experiment.identity(),
                params=self.experiment.identity_fields(),
                step=start,
            )
        return start

    def go_back(self, fault: str) -> int:
        """The same, because of a fault that goes on record."""
        if self.journal:
            self.journal.undone(fault)
        return self.resume()


def newest(folder: Path) -> checkpoint.Checkpoint | None:
    """The run's newest valid checkpoint.

    Rank 0 chooses for all, as files may not have appeared on every machine yet: a collective.
    """
    return from_rank_0(lambda: checkpoint.newest(folder / "checkpoints"))


def load_newest(
    engine: Engine, experiment: Experiment, folder: Path, *, frozen: dict[str, str]
) -> tuple[int, dict[str, Any]]:
    """Load the run's newest valid checkpoint; returns how many updates it holds, and the guard's state.

    Raises:
        ValueError: if another experiment wrote it; the differing fields are named.
    """
    found = newest(folder)
    assert found is not None, "one is written before the first update"
    refuse_another(experiment, found.manifest, where=found.folder)
    return found.step, checkpoint.load(engine, found, frozen=frozen)
