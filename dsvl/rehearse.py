"""What needs the most memory comes first: the longest samples, as training and evaluation pass them."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from dsvl.config import EngineConfig
from dsvl.data.blend import Blender, Epoch
from dsvl.data.store import Prepared
from dsvl.engine import Engine
from dsvl.evaluate import evaluate
from dsvl.train import batch_of


def rehearse(
    engine: Engine,
    prepared: Prepared,
    blender: Blender,
    *,
    config: EngineConfig,
    epoch: int,
    held_out: Epoch,
    evaluation_batch: int,
) -> None:
    """Pass the longest samples of an epoch forward and backward, as a first update would, and evaluate.

    Memory that is too small shows now and not weeks later. The update has a rate of zero, and is to be
    followed by `dsvl.checkpoint.load`, as it leaves moments behind. What is evaluated, in one batch on every
    rank, is the longest of the held-out samples.

    Raises:
        ValueError: if the memory of a GPU is too small, or the model's loss is not finite.
    """
    samples = blender.epoch(epoch)
    longest, what = _longest(samples.lengths, config.micro_batch)
    remedy = "engine.micro_batch or data.max_tokens, or set engine.gradient_checkpointing=true"
    with _fits(f"{what}, the longest of an epoch,", remedy):
        batch = batch_of(prepared, [samples[i] for i in longest])
        loss, _ = engine.update(
            [batch] * engine.accumulation,
            targets=max(1, int(samples.targets[longest].sum())),
            lr=0.0,
        )
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss of {what} is {loss} before any update; look at the model's checkpoints, "
            "and at train.precision"
        )
    longest, what = _longest(held_out.lengths, evaluation_batch)
    with _fits(f"{what}, the longest that are evaluated together,", "evaluation.batch"):
        # Dealt out one by one: every rank is given each of them.
        each = held_out.take(longest.repeat(engine.workers))
        evaluate(engine.model, prepared, each, batch=evaluation_batch, device=engine.device)


def _longest(lengths: np.ndarray, count: int) -> tuple[np.ndarray, str]:
    """At most `count` samples, and what they are."""
    longest = np.argsort(lengths, kind="stable")[-count:]
    return longest, f"{len(longest)} samples of up to {lengths[longest].max()} tokens"


@contextmanager
def _fits(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{what} need more memory than the GPU has; lower {remedy}: {error}"
        ) from error
