"""Which parameters the optimiser sees, and the learning rate at each step."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from dsvl.config import OptimConfig


def groups(
    parameters: Mapping[str, nn.Parameter],
    config: OptimConfig,
    *,
    embedding: torch.Tensor | None = None,
) -> list[dict]:
    """Parameter groups for AdamW: matrices are decayed, biases and norms are not.

    `lr_ratio` of a group is its rate over `optim.lr`; all follow the same schedule. `embedding` is the one of
    the parameters that has `optim.embedding_lr`.
    """
    members: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        rate = None
        if parameter is embedding:
            rate = config.embedding_lr
        elif name.startswith("projection."):
            rate = config.projection_lr
        ratio = 1.0 if rate is None else rate / config.lr
        decay = config.weight_decay if len(shape(parameter)) > 1 else 0.0
        members.setdefault((ratio, decay), []).append(parameter)
    return [
        {"params": group, "weight_decay": decay, "lr_ratio": ratio}
        for (ratio, decay), group in members.items()
    ]


def shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Of a whole parameter, where ZeRO 3 may have divided it already."""
    return tuple(vars(parameter).get("ds_shape", parameter.shape))


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of update `step` (0 .. steps - 1): a linear rise, then the schedule's course to zero.

    `wsd` is warm-up, a plateau, and a linear decay over the last `decay_fraction` (Hu et al. 2024).
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = math.ceil(config.warmup_fraction * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    match config.schedule:
        case "constant":
            share = 1.0
        case "linear":
            share = 1.0 - done
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * done))
        case "wsd":
            share = min(1.0, (steps - step) / (steps - config.plateau_end(steps)))
    return config.lr * share
