"""A run's checkpoints: when the first is written, and where training goes on from, for all ranks alike."""

import math
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dsvl import checkpoint, checkpoint_folder
from dsvl.engine import Engine, from_rank_0
from dsvl.guard import Guard
from dsvl.train import Plan
from orchestration.config import Experiment
from orchestration.planning.cost import checkpoints_kept
from orchestration.records.journal import Journal
from orchestration.records.results import refuse_another, trunk_of
from orchestration.storing.mirroring import catch_up


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
        """Save the state before the first update unless there is something to go on from.

        It is what to go back to if the first updates go wrong, and a disk shows now that has no room for all
        that will be kept.

        Raises:
            OSError: if there is none.
            ValueError: if the run is a branch and no checkpoint of its trunk is early enough.
        """
        self._fetch(self.folder)
        folder = self.folder / "checkpoints"
        kept = checkpoints_kept(self.experiment) + 1  # the oldest goes when the newest is whole
        more = max(1, from_rank_0(lambda: kept - len(checkpoint_folder.held(folder))))
        checkpoint.require_room(self.engine, folder, checkpoints=more)
        if newest(self.folder) is None:
            self.save(self._on_trunk(), {})

    def due(self, step: int, *, ends_epoch: bool) -> bool:
        """Whether to save the state after an update."""
        config = self.experiment.checkpoint
        return (
            step % config.every == 0
            or step == self.plan.steps
            or step in self.branches
            or (ends_epoch and config.keep_best > 0)
        )

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
            stay=self.branches,
        )
        if self.journal and measured:
            self.journal.checkpoint(step, measured)

    def _fetch(self, run: Path, *, at_most: float = math.inf) -> None:
        """Bring the newest one here that the store has, if there is a store."""
        from_rank_0(
            lambda: catch_up(
                self.experiment, run, lambda mirror: mirror.fetch_newest(run, at_most=at_most)
            )
        )

    @cached_property
    def branches(self) -> set[int]:
        """Updates after which shorter trainings branch off, and longer ones."""
        if not (optim := self.experiment.optim).branching:
            return set()
        lengths = (*self.experiment.checkpoint.branch_epochs, self.experiment.train.epochs)
        return {optim.plateau_end(epochs * self.plan.steps_per_epoch) for epochs in lengths}

    def _on_trunk(self) -> int:
        """Begin with what the trunk, if there is one, has trained alike; returns how many updates."""
        if (trunk := trunk_of(self.experiment)) is None:
            return 0
        alike = min(
            self.experiment.optim.plateau_end(self.plan.steps),
            trunk.optim.plateau_end(trunk.train.epochs * self.plan.steps_per_epoch),
        )
        self._fetch(trunk.run_folder, at_most=alike)
        found = newest(trunk.run_folder, at_most=alike)
        if found is None:
            raise ValueError(
                f"{trunk.run_folder}: no checkpoint has at most {alike} updates, which this run shares "
                f"with it; train it with checkpoint.branch_epochs=[{self.experiment.train.epochs}]"
            )
        self.guard.restore(checkpoint.load(self.engine, found, frozen=self.frozen))
        return found.step

    def resume(self) -> int:
        """Put engine and guard into the state of the newest one, and return how many updates it holds."""
        start, state = load_newest(self.engine, self.experiment, self.folder, frozen=self.frozen)
        self.guard.restore(state)
        if self.journal:
            self.journal.start(
                identity=self.experiment.identity(),
                params=self.experiment.identity_fields(),
                step=start,
                steps=self.plan.steps,
                workers=self.engine.workers,
            )
        return start

    def go_back(self, fault: str) -> int:
        """The same, because of a fault that goes on record."""
        if self.journal:
            self.journal.undone(fault)
        return self.resume()


def newest(folder: Path, *, at_most: float = math.inf) -> checkpoint_folder.Checkpoint | None:
    """The run's newest valid checkpoint of `at_most` so many updates.

    Rank 0 chooses for all, as files may not have appeared on every machine yet: a collective.
    """
    return from_rank_0(lambda: checkpoint_folder.newest(folder / "checkpoints", at_most=at_most))


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
