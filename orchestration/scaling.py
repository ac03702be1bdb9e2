"""The law of loss across model sizes, epochs and learning rates: its form, its derivative, what it is told.

Of N parameters, E epochs and a learning rate,

    loss = (floor + size N^-a + data N^d D(E)^-b + overfit E^2) (1 + penalty(x)) and a size's own deviation,

where D(E) = 1 + R (1 - exp(-(E - 1) / R)) epochs of new data are worth as much as E of the same
(Muennighoff et al. 2023), and x is how many octaves the rate lies above the best one of that size and
horizon. That best one is a power law of both with a slight bend, the scale of the embedding, and again a
deviation of the size's own. N and E count relative to the geometric means of a ladder.

Losses are those of annealed runs alone: unfinished ones of another schedule rank differently.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import fsum, isfinite, log

import numpy as np

TERMS = (
    "floor", "size", "size_power", "data", "data_size_power", "data_power", "repeats", "overfit",
    "rate", "rate_size_power", "rate_bend", "rate_horizon_power", "rate_embedding_power",
    "low", "high",
)  # fmt: skip
"""Parameters of the law, in order; deviations of each size follow: of its ln best rate, of the power that
moves that rate with the horizon, and of its ln loss.

`floor`, `size`, `data`, `repeats`, `overfit`, `rate`, `low` and `high` are logarithms.
"""
FLOOR, SIZE, ALPHA, DATA, DELTA, BETA, REPEATS, OVERFIT = range(8)
RATE, RATE_SIZE, BEND, RATE_HORIZON, EMBEDDING, LOW, HIGH = range(8, 15)
CLIFF_AT, CLIFF = 2.2, 1.5
"""Octaves above the best rate at which training begins to fail, and the excess of loss that it costs per
octave squared: the 1,911 runs of Step Law lose 2.3 % at two octaves, 142 % at three."""


@dataclass(frozen=True)
class Size:
    """A rung of the ladder."""

    name: str
    parameters: float
    cost: float
    """Of an epoch, in any unit that all sizes share."""
    embedding_rms: float = 1.0
    """Root mean square of the token embedding, the scale on which a projected image arrives."""


@dataclass(frozen=True)
class Run:
    """A trunk: one training at a constant rate, annealed in a branch at each of its horizons."""

    size: str
    lr: float
    horizons: tuple[float, ...]
    """Epochs, ascending."""


@dataclass(frozen=True)
class Trunk:
    """What is known of a run."""

    run: Run
    losses: tuple[float, ...]
    """Held-out loss at the end of each branch so far, in the order of the horizons; not finite: diverged."""
    ended: bool = True
    """Whether nothing more will come: finished, stopped or diverged."""

    @property
    def diverged(self) -> bool:
        """Whether its last loss is none."""
        return bool(self.losses) and not isfinite(self.losses[-1])

    @property
    def reached(self) -> tuple[float, ...]:
        """Horizons with a loss."""
        return self.run.horizons[: len(self.losses)]


@dataclass(frozen=True)
class Ladder:
    """Sizes from the smallest to the target, and the epochs that a training may take."""

    sizes: tuple[Size, ...]
    horizons: tuple[float, ...]
    decay: float = 0.2
    """Share of a horizon that its branch anneals for."""

    def __post_init__(self) -> None:
        parameters, horizons = [size.parameters for size in self.sizes], list(self.horizons)
        if len(parameters) < 2 or parameters != sorted(set(parameters)):
            raise ValueError(f"sizes of {parameters} parameters: name two or more, ascending")
        if not horizons or horizons != sorted(set(horizons)) or horizons[0] <= 0:
            raise ValueError(f"horizons={horizons}: must be positive and ascending")

    @property
    def target(self) -> Size:
        """The size that all others are trained for."""
        return self.sizes[-1]

    def place(self, name: str) -> int:
        """Which rung a size is."""
        return next(place for place, size in enumerate(self.sizes) if size.name == name)

    def cost(self, size: str, horizons: Sequence[float]) -> float:
        """Epochs of the target that a trunk costs with its branches; nothing where there is none."""
        epochs = horizons[-1] + self.decay * sum(horizons[:-1]) if horizons else 0.0
        return epochs * self.sizes[self.place(size)].cost / self.target.cost

    def spent(self, trunks: Sequence[Trunk]) -> float:
        """Epochs of the target that trunks have cost."""
        return fsum(self.cost(trunk.run.size, trunk.reached) for trunk in trunks)

    @cached_property
    def log_size(self) -> np.ndarray:
        """Logarithm of N of each size, relative to their geometric mean."""
        logs = np.log([size.parameters for size in self.sizes])
        return logs - logs.mean()

    @cached_property
    def log_embedding(self) -> np.ndarray:
        """The same of the scale of the embedding."""
        logs = np.log([size.embedding_rms for size in self.sizes])
        return logs - logs.mean()

    @cached_property
    def middle(self) -> float:
        """Geometric mean of the horizons."""
        return float(np.exp(np.log(self.horizons).mean()))

    @property
    def rates(self) -> slice:
        """Where a vector of parameters has the deviations of each size's best ln rate."""
        return slice(len(TERMS), len(TERMS) + len(self.sizes))

    @property
    def powers(self) -> slice:
        """Where it has those of the power of the horizon."""
        return slice(self.rates.stop, self.rates.stop + len(self.sizes))

    @property
    def offsets(self) -> slice:
        """Where it has those of each size's ln loss."""
        return slice(self.powers.stop, self.powers.stop + len(self.sizes))


def rate_basis(ladder: Ladder, place: np.ndarray, horizon: np.ndarray) -> np.ndarray:
    """What the parameters are multiplied with for ln of the best rate at M points, (M, parameters)."""
    basis = np.zeros((len(place), ladder.offsets.stop))
    size = ladder.log_size[place]
    basis[:, RATE], basis[:, RATE_SIZE], basis[:, BEND] = 1, -size, size**2
    points, epochs = np.arange(len(place)), np.log(horizon / ladder.middle)
    basis[:, RATE_HORIZON] = -epochs
    basis[:, EMBEDDING] = ladder.log_embedding[place]
    basis[points, ladder.rates.start + place] = 1
    basis[points, ladder.powers.start + place] = -epochs
    return basis


@dataclass(frozen=True, eq=False)
class Points:
    """M places of the surface, for laws of (..., parameters)."""

    ladder: Ladder
    place: np.ndarray
    """Which size."""
    horizon: np.ndarray
    log_lr: np.ndarray

    @cached_property
    def basis(self) -> np.ndarray:
        """See `rate_basis`."""
        return rate_basis(self.ladder, self.place, self.horizon)

    def octaves(self, law: np.ndarray) -> np.ndarray:
        """How far the rates lie above the best ones, (..., M)."""
        return (self.log_lr - law @ self.basis.T) / log(2)

    def log_loss(self, law: np.ndarray) -> np.ndarray:
        """Natural logarithm of the loss, (..., M)."""
        terms, _, _ = self._terms(law)
        penalty, _, _ = _penalty(law, self.octaves(law))
        offset = law[..., self.ladder.offsets.start + self.place]
        return np.log(terms.sum(axis=0)) + np.log1p(penalty) + offset

    def slopes(self, law: np.ndarray) -> np.ndarray:
        """Derivatives of `log_loss` by each parameter, (..., M, parameters)."""
        terms, worth, growth = self._terms(law)
        floor, size, data, overfit = terms / terms.sum(axis=0)
        log_size = self.ladder.log_size[self.place]
        penalty, by_octave, by_low = _penalty(law, self.octaves(law))
        found = (-by_octave / log(2) / (1 + penalty))[..., None] * self.basis
        found[..., FLOOR], found[..., SIZE] = floor, size
        found[..., DATA], found[..., OVERFIT] = data, overfit
        found[..., ALPHA], found[..., DELTA] = -log_size * size, log_size * data
        found[..., BETA] = -np.log(worth) * data
        found[..., REPEATS] = -law[..., None, BETA] * growth / worth * data
        found[..., LOW] = by_low / (1 + penalty)
        found[..., HIGH] = (penalty - by_low - _cliff(self.octaves(law))) / (1 + penalty)
        found[..., np.arange(len(self.place)), self.ladder.offsets.start + self.place] = 1
        return found

    def _terms(self, law: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The four terms of the loss at the best rate, stacked; D(E); its derivative by ln R."""
        p, size = law[..., None, :], self.ladder.log_size[self.place]
        repeats, more = np.exp(p[..., REPEATS]), self.horizon - 1
        fading = np.exp(-more / repeats)
        worth = 1 + repeats * (1 - fading)
        terms = (
            np.exp(p[..., FLOOR]),
            np.exp(p[..., SIZE] - p[..., ALPHA] * size),
            np.exp(p[..., DATA] + p[..., DELTA] * size - p[..., BETA] * np.log(worth)),
            np.exp(p[..., OVERFIT]) * (self.horizon / self.ladder.middle) ** 2,
        )
        growth = repeats * (1 - fading) - more * fading
        return np.stack(np.broadcast_arrays(*terms)), worth, growth


def _penalty(law: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Excess of the loss x octaves from the best rate, its slope, and what of it is due to `low`.

    Below it is Huber's, above a square and then a cliff.
    """
    low, high = np.exp(law[..., None, LOW]), np.exp(law[..., None, HIGH])
    near, below, above = np.clip(x, -1, 0), np.minimum(x, 0), np.maximum(x, 0)
    by_low = low * near * (2 * below - near)
    slope = 2 * low * near + 2 * high * above + 2 * CLIFF * np.maximum(x - CLIFF_AT, 0)
    return by_low + high * above**2 + _cliff(x), slope, by_low


def _cliff(x: np.ndarray) -> np.ndarray:
    return CLIFF * np.maximum(x - CLIFF_AT, 0) ** 2
