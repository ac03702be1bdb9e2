"""Intervals by the bootstrap: what figures would be on other samples of the same kind (Efron, 1979).

Samples are drawn, not rounds: the rounds of a conversation stand or fall together. A figure is made of sums
of counts over samples, so that all figures share the draws.
"""

from collections.abc import Callable

import numpy as np

DRAWS = 1000
SHARE = 0.95
"""Of the draws, within an interval."""

Statistic = Callable[[np.ndarray], np.ndarray]
"""(..., C) sums over samples of C counts -> (...) the figure."""


def ratio(sums: np.ndarray) -> np.ndarray:
    """The first sum over the second: a mean, where the second counts what the first adds up."""
    return np.divide(
        sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] != 0
    )


def redrawn(counts: np.ndarray, *, seed: int = 0) -> np.ndarray:
    """(N, C) counts of N samples -> (DRAWS, C) their sums over N samples drawn with replacement.

    With the same seed, as many samples of another model are drawn alike: their differences are paired.
    """
    random, total = np.random.default_rng(seed), len(counts)
    draws = (random.integers(total, size=total) for _ in range(DRAWS))
    return np.stack([np.bincount(draw, minlength=total) @ counts for draw in draws])


def interval(value: float, drawn: np.ndarray) -> dict[str, float]:
    """A figure, and the bounds of 95 % of what it is in (DRAWS,) draws, those without it left out."""
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return {"value": value, "low": np.nan, "high": np.nan}
    low, high = np.quantile(drawn, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return {"value": value, "low": float(low), "high": float(high)}
