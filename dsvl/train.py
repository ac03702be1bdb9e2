"""The training loop, as a generator: the library yields a Step, the caller decides what to do with it."""

import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np

from dsvl.config import EngineConfig, TrainConfig
from dsvl.data.blend import Blender, deal, order
from dsvl.data.collate import collate
from dsvl.data.store import Prepared
from dsvl.data.types import Batch, Example
from dsvl.engine import Engine
from dsvl.norms import Norms
from dsvl.optim import learning_rate
from dsvl.stragglers import Stragglers

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """One optimiser update."""

    number: int
    """How many updates the model has had, this one included."""
    epoch: int
    """Which pass over the data it belongs to, from 0."""
    ends_epoch: bool
    loss: float
    """Mean over the supervised tokens of the global batch, nats."""
    lr: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Text and image positions of the global batch."""
    targets: int
    """Those that were trained."""
    images: int
    seconds: float
    skipped: bool = False
    """Whether the batch was left out, so that the model is as it was."""
    inspected: dict[str, float] = field(default_factory=dict)
    """On some updates: norms part by part, and how far apart the workers are."""

    def metrics(self) -> dict[str, float]:
        """Under their names in every journal and tracker."""
        if self.skipped:
            return {"train/skipped": 1.0}
        return {
            "train/loss": self.loss,
            "train/lr": self.lr,
            "train/grad_norm": self.grad_norm,
            "throughput/tokens_per_s": self.tokens / self.seconds,
            "throughput/images_per_s": self.images / self.seconds,
            **self.inspected,
        }


class Plan:
    """Which samples every update takes: a pure function of (seed, step), whatever the number of workers."""

    def __init__(self, samples: int, train: TrainConfig) -> None:
        """Raises ValueError if an epoch has fewer samples than one batch."""
        self.samples, self.train = samples, train
        self.steps_per_epoch = samples // train.batch
        if not self.steps_per_epoch:
            raise ValueError(
                f"train.batch={train.batch}: must not exceed the {samples} training samples; set it lower"
            )
        self.steps = self.steps_per_epoch * train.epochs
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def epoch(self, step: int) -> int:
        """The epoch that update `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> np.ndarray:
        """(batch,) samples of update `step`, as indices into those of its epoch.

        What is left of an epoch, less than a batch, is not trained in it; another epoch draws it anew.
        """
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                order(self.samples, seed=self.train.seed, epoch=epoch),
            )
        return self._order[index * self.train.batch : (index + 1) * self.train.batch]


def steps(
    engine: Engine,
    prepared: Prepared,
    blender: Blender,
    *,
    train: TrainConfig,
    config: EngineConfig,
    start: int = 0,
    skip: Collection[int] = (),
    inspect_every: int | None = None,
) -> Iterator[Step]:
    """Train on what the blender makes of prepared data, from update `start` to the end.

    Yields after every optimiser update, and in place of those whose numbers are to be skipped. Those whose
    numbers are multiples of `inspect_every` are inspected.
    """
    plan = Plan(len(blender), train)
    norms, stragglers = Norms(engine), Stragglers(engine.device)

    def share(step: int) -> _Share:
        samples, indices = blender.epoch(plan.epoch(step)), plan.indices(step)
        passes = deal(samples.lengths[indices], len(indices) // config.micro_batch)
        own = [] if step + 1 in skip else passes[engine.rank :: engine.workers]
        return _Share(
            [batch_of(prepared, [samples[i] for i in indices[part]]) for part in own],
            tokens=int(samples.lengths[indices].sum()),
            targets=int(samples.targets[indices].sum()),
            images=int(samples.images[indices].sum()),
        )

    began = time.perf_counter()
    with closing(ahead(share, range(start, plan.steps))) as shares:
        for step, (micro_batches, tokens, targets, images) in enumerate(shares, start):
            lr = learning_rate(step, plan.steps, engine.optim_config)
            loss = grad_norm = 0.0
            skipped = step + 1 in skip
            inspect = inspect_every is not None and (step + 1) % inspect_every == 0 and not skipped
            if not skipped:
                with stragglers.update(), norms if inspect else nullcontext():
                    loss, grad_norm = engine.update(micro_batches, targets=targets, lr=lr)
            yield Step(
                number=step + 1,
                epoch=plan.epoch(step),
                ends_epoch=(step + 1) % plan.steps_per_epoch == 0,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                tokens=tokens,
                targets=targets,
                images=images,
                seconds=time.perf_counter() - began,
                skipped=skipped,
                inspected=norms.metrics(grad_norm) | stragglers.metrics() if inspect else {},
            )
            began = time.perf_counter()


class _Share(NamedTuple):
    """What a rank passes through the model in an update, and what the global batch holds."""

    micro_batches: list[Batch]
    tokens: int
    targets: int
    images: int


def ahead(make: Callable[[int], T], numbers: Iterable[int]) -> Generator[T]:
    """What is made of each number, in order: by a thread, each while the one before it is in use."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming = None
        for number in numbers:
            before, coming = coming, pool.submit(make, number)
            if before:
                yield before.result()
        if coming:
            yield coming.result()


def batch_of(prepared: Prepared, examples: Sequence[Example]) -> Batch:
    """Examples of a prepared set as one batch."""
    return collate(
        examples,
        pixels=prepared.vision_input,
        image_tokens=prepared.image_tokens,
        pad_id=prepared.pad_id,
        no_image=prepared.vision_shape,
    )
