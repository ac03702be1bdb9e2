"""Which parameters the optimiser sees, and the learning rate at each step."""

import math
from collections.abc import Mapping

from torch import nn

from dsvl.config import OptimConfig


def groups(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> list[dict]:
    """Parameter groups for AdamW: matrices are decayed, biases and norms are not."""
    decayed = [p for p in parameters.values() if p.ndim > 1]
    others = [p for p in parameters.values() if p.ndim <= 1]
    return [
        {"params": members, "weight_decay": decay}
        for members, decay in ((decayed, config.weight_decay), (others, 0.0))
        if members
    ]


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of update `step` (0 .. steps - 1): a linear rise, then the schedule's course to zero.

    `wsd` is warm-up, a plateau, and a linear decay over the last `decay_fraction` (Hu et al. 2024).
    """
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
            share = min(1.0, (steps - step) / max(math.ceil(config.decay_fraction * steps), 1))
    return config.lr * share
