"""Undoes updates that would ruin a model: not finite, or far beyond the others.

The run goes back to its newest checkpoint, and trains on from there without the batch at fault. What is
judged is the same on every rank, and what the judgement rests on is part of every checkpoint, so that a
resumed run skips what an unbroken one skips.
"""

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from dsvl.config import EngineConfig, TrainConfig
from dsvl.data.blend import Blender
from dsvl.data.store import Prepared
from dsvl.engine import Engine
from dsvl.train import Step, steps

WINDOW = 32
"""Norms that the next one is held against; before there are as many, none is a spike."""
log = logging.getLogger(__name__)


class Guard:
    """What was normal so far, and which updates were skipped."""

    def __init__(self, train: TrainConfig) -> None:
        """Begin with nothing."""
        self.train = train
        self.norms: deque[float] = deque(maxlen=WINDOW)
        self.skipped: set[int] = set()
        """Numbers of updates, from 1."""

    def fault(self, step: Step) -> str | None:
        """What is wrong with an update, or None; a sound one becomes part of what is normal."""
        if step.skipped:
            return None
        sound = math.isfinite(step.grad_norm)
        if not math.isfinite(step.loss) or not (sound or self.train.precision == "fp16"):
            return f"its loss is {step.loss} and its gradient's norm {step.grad_norm}"
        if not sound:
            return None  # in fp16 the loss scaler has left it out, and lowered its scale
        if self.train.spike is not None and len(self.norms) == WINDOW:
            usual = statistics.median(self.norms)
            if step.grad_norm > self.train.spike * usual:
                return f"its gradient's norm is {step.grad_norm:.3g}, where {usual:.3g} is usual"
        self.norms.append(step.grad_norm)
        return None

    def skip(self, step: Step, fault: str) -> None:
        """Leave an update out from now on.

        Raises:
            FloatingPointError: if too many have been: the model diverged.
        """
        self.skipped.add(step.number)
        if len(self.skipped) > self.train.max_skipped:
            raise FloatingPointError(
                f"update {step.number} diverged: {fault}, and {len(self.skipped) - 1} were skipped before "
                f"(train.max_skipped); lower optim.lr, or look at what is wrong with the data"
            )
        log.warning("update %d is undone and its batch skipped: %s", step.number, fault)

    def state(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {"norms": list(self.norms), "skipped": sorted(self.skipped)}

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to what `state` gave; updates that were found to be skipped since stay skipped."""
        self.norms = deque(state.get("norms", ()), maxlen=WINDOW)
        self.skipped |= set(state.get("skipped", ()))


def guarded(
    engine: Engine,
    prepared: Prepared,
    blender: Blender,
    *,
    train: TrainConfig,
    config: EngineConfig,
    start: int,
    guard: Guard,
    back: Callable[[str], int],
    inspect_every: int | None = None,
) -> Iterator[Step]:
    """As `dsvl.train.steps`, without updates that the guard finds fault with.

    `back` is told the fault, puts engine and guard into the state of the newest checkpoint, and returns how
    many updates that has. Updates after it are yielded again.
    """
    while True:
        for step in steps(
            engine,
            prepared,
            blender,
            train=train,
            config=config,
            start=start,
            skip=guard.skipped,
            inspect_every=inspect_every,
        ):
            if fault := guard.fault(step):
                guard.skip(step, fault)
                start = back(f"update {step.number}: {fault}")
                break
            yield step
        else:
            return
