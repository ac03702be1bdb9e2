"""A small ladder, and trunks that obey a law on it."""

from collections.abc import Sequence

import numpy as np

from orchestration.scaling import TERMS, Ladder, Points, Run, Size, Trunk
from orchestration.searching.laws import Law, fit

LADDER = Ladder(
    sizes=tuple(
        Size(name, parameters=1e9 * billions, cost=billions)
        for name, billions in {"tiny": 0.1, "small": 1, "medium": 7, "target": 70}.items()
    ),
    horizons=(2, 5, 10, 20, 40),
)
TRUE = {
    "floor": np.log(0.6), "size": np.log(0.3), "size_power": 0.15, "data": np.log(0.5),
    "data_size_power": 0.05, "data_power": 0.35, "repeats": np.log(12.0), "overfit": np.log(0.004),
    "rate": np.log(1e-3), "rate_size_power": 0.3, "rate_bend": 0.0, "rate_horizon_power": 0.2,
    "rate_embedding_power": 0.0, "low": np.log(0.004), "high": np.log(0.005),
}  # fmt: skip
"""The least loss is that of 20 epochs, at any size."""


def law(ladder: Ladder = LADDER, **changes: float) -> np.ndarray:
    """The parameters of TRUE, no size deviating from it."""
    terms = [(TRUE | changes)[name] for name in TERMS]
    return np.concatenate([terms, np.zeros(ladder.offsets.stop - len(TERMS))])


def best_rate(size: str, horizon: float, true: np.ndarray | None = None) -> float:
    """The rate with the least loss."""
    true = law() if true is None else true
    points = Points(LADDER, np.array([LADDER.place(size)]), np.array([horizon]), np.zeros(1))
    return float(np.exp2(-points.octaves(true)[0]))


def trunk(
    size: str,
    lr: float,
    horizons: Sequence[float] = LADDER.horizons,
    *,
    true: np.ndarray | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Trunk:
    """What a run at a rate comes to; its noise is half its trunk's and half its branches'."""
    place = np.full(len(horizons), LADDER.place(size))
    points = Points(
        LADDER, place, np.array(horizons, dtype=float), np.full(len(horizons), np.log(lr))
    )
    random = np.random.default_rng([seed, LADDER.place(size), int(1e8 * lr)])
    luck = random.standard_normal() + random.standard_normal(len(horizons))
    losses = np.exp(points.log_loss(law() if true is None else true) + noise * luck / np.sqrt(2))
    return Trunk(Run(size, lr, tuple(horizons)), tuple(map(float, losses)))


def observed(
    sizes: Sequence[str] = ("tiny", "small", "medium"),
    *,
    true: np.ndarray | None = None,
    noise: float = 0.002,
    seed: int = 0,
) -> list[Trunk]:
    """Five trunks a size, an octave apart about its best rate."""
    return [
        trunk(size, best_rate(size, 10, true) * 2.0**octave, true=true, noise=noise, seed=seed)
        for size in sizes
        for octave in (-2, -1, 0, 1, 2)
    ]


def fitted(**about: float) -> Law:
    """The law of what `observed` shows."""
    return fit(LADDER, observed(**about), samples=100)
