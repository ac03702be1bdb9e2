"""Worlds in which models of a ladder of sizes train in no time, and what each of them hides.

A world is drawn from a seed. Its losses have an optimum in rate and in epochs that moves with size, by a
law and by deviations of each size from it. What a wrong rate costs is a table measured on the 1,911 runs of
Step Law (arXiv:2503.04715), interpolated, and no formula. In hard worlds deviations are thrice as large, and
sizes overfit to different degrees by another power, which the law does not know. In shifting ones, sizes
disagree about how the best rate moves with epochs, so that short runs mislead about long ones.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.interpolate import PchipInterpolator

from orchestration.scaling import Ladder, Size

LADDER = Ladder(
    sizes=tuple(
        Size(name, parameters=billions * 1e9, cost=billions)
        for name, billions in {
            "135m": 0.135, "360m": 0.36, "1.3b": 1.3, "7b": 7.0, "13b": 13.0, "70b": 70.0
        }.items()
    ),
    horizons=(2, 5, 10, 15, 20, 30),
)  # fmt: skip
RATES = (5e-5, 5e-2)
"""Learning rates that a ladder is searched in: nearly all sizes of all worlds have their best one there."""
OCTAVES = (-3, -2, -1, 0, 1, 2, 3)
EXCESS = (0.0176, 0.0116, 0.0036, 0, 0.0052, 0.0231, 1.42)
"""Median excess of the loss so many octaves from the best rate."""
TABLE = PchipInterpolator(OCTAVES, np.sign(OCTAVES) * np.sqrt(EXCESS))
DIVERGES = 1.0
"""A run whose loss would be twice that at the best rate has none."""


@dataclass(frozen=True)
class Kind:
    """How far a world is from a law: standard deviations."""

    rate: float = 0.17
    """Of each size's ln best rate."""
    loss: float = 0.0015
    bend: float = 0.02
    """Of the square of ln size in ln best rate."""
    noise: float = 0.002
    """Of a run's loss; half of its variance is its trunk's."""
    horizon: float = 0.0
    """Of each size's power of the horizon in the best rate."""
    overfit: float = 0.0
    """Of ln of each size's overfitting; half of it, of the power of the horizon that this grows with."""


KINDS = {
    "standard": Kind(),
    "hard": Kind(rate=0.5, loss=0.004, bend=0.05, noise=0.004, overfit=0.4),
    "shifting": Kind(horizon=0.15),
}
BIAS = 0.001
"""Standard deviation of what a branch ends with beside a training of its own, by size and horizon."""
CURVATURE = 0.3
"""Standard deviation of ln of how much a wrong rate costs, from world to world."""


@dataclass
class World:
    """Losses of all sizes at all rates and horizons."""

    seed: int
    kind: Kind = field(default_factory=Kind)
    ladder: Ladder = LADDER

    def __post_init__(self) -> None:
        draw = np.random.default_rng([self.seed, 1])
        sizes, horizons = len(self.ladder.sizes), len(self.ladder.horizons)
        self.floor, self.size = draw.uniform(0.55, 0.75), draw.uniform(0.25, 0.45)
        self.size_power, self.data = draw.uniform(0.08, 0.2), draw.uniform(0.35, 0.7)
        self.data_power, self.repeats = draw.uniform(0.25, 0.45), draw.uniform(8, 16)
        self.overfit = np.exp(draw.uniform(np.log(8e-4), np.log(0.05)))
        self.data_size_power = draw.uniform(0, 0.15)
        self.rate_power, self.horizon_power = draw.uniform(0, 0.6), draw.uniform(0, 0.35)
        self.rate = draw.uniform(4e-4, 2e-3)
        self.bend = self.kind.bend * draw.standard_normal()
        self.own_rate = self.kind.rate * draw.standard_normal(sizes)
        self.own_loss = self.kind.loss * draw.standard_normal(sizes)
        self.bias = BIAS * draw.standard_normal((sizes, horizons))
        self.curvature = np.exp(CURVATURE * draw.standard_normal())
        self.own_power = self.kind.horizon * draw.standard_normal(sizes)
        self.own_overfit = self.overfit * np.exp(self.kind.overfit * draw.standard_normal(sizes))
        self.overfit_power = 2 + self.kind.overfit / 2 * draw.standard_normal()
        self.log_size = np.log([size.parameters / 7e9 for size in self.ladder.sizes])

    def octaves(self, size: str, lr: np.ndarray | float, horizon: np.ndarray | float) -> np.ndarray:
        """How far a rate lies above the best one."""
        place = self.ladder.place(size)
        log_size = self.log_size[place]
        best = (
            np.log(self.rate)
            - self.rate_power * log_size
            + self.bend * log_size**2
            - (self.horizon_power + self.own_power[place]) * np.log(np.asarray(horizon) / 5)
            + self.own_rate[place]
        )
        return (np.log(lr) - best) / np.log(2)

    def loss(self, size: str, lr: np.ndarray | float, horizon: np.ndarray | float) -> np.ndarray:
        """What a training of its own ends with, on average over seeds."""
        place = self.ladder.place(size)
        log_size, more = self.log_size[place], np.asarray(horizon) - 1
        worth = 1 + self.repeats * (1 - np.exp(-more / self.repeats))
        best = (
            self.floor
            + self.size * np.exp(-self.size_power * log_size)
            + self.data * np.exp(self.data_size_power * log_size) * worth**-self.data_power
            + self.own_overfit[place] * (np.asarray(horizon) / 10) ** self.overfit_power
        )
        penalty = self.curvature * _table(self.octaves(size, lr, horizon)) ** 2
        return best * (1 + self.own_loss[place]) * (1 + penalty)

    def annealed(self, size: str, lr: float, horizon: float, *, seed: int = 0) -> float:
        """What a branch at a horizon ends with in a run of its own luck; NaN if it diverges."""
        if self.curvature * _table(self.octaves(size, lr, horizon)) ** 2 > DIVERGES:
            return float("nan")
        place, at = self.ladder.place(size), self.ladder.horizons.index(horizon)
        run = (self.seed, 2, place, int(1e9 * lr), seed)
        luck = np.random.default_rng(run).standard_normal()
        luck += np.random.default_rng((*run, at)).standard_normal()
        noise = self.kind.noise * luck / np.sqrt(2)
        return float(self.loss(size, lr, horizon)) * (1 + self.bias[place, at]) * (1 + noise)

    def midway(self, size: str, lr: float, horizon: float, epoch: float, *, seed: int = 0) -> float:
        """Loss of a cosine run after some of its epochs: not annealed yet, the less the higher its rate."""
        octaves = self.octaves(size, lr, epoch)
        share = 0.5 * (1 + np.cos(np.pi * epoch / horizon))
        if self.curvature * _table(octaves) ** 2 > DIVERGES:
            return float("nan")
        run = (self.seed, 3, self.ladder.place(size), int(1e9 * lr), int(10 * epoch), seed)
        noise = 1 + self.kind.noise * np.random.default_rng(run).standard_normal()
        excess = 1 + 0.08 * share * np.exp2(0.5 * octaves)
        return float(self.loss(size, lr, epoch)) * excess * noise

    @cached_property
    def best(self) -> np.ndarray:
        """Least loss of the target at each horizon."""
        rates = np.geomspace(*RATES, 2001)
        target = self.ladder.target.name
        return np.array([self.loss(target, rates, h).min() for h in self.ladder.horizons])

    def best_rate(self, size: str, horizon: float) -> float:
        """The rate with the least loss."""
        return float(np.exp2(-self.octaves(size, 1.0, horizon)))

    def regret(self, lr: float, horizon: float) -> float:
        """How much worse than the best the target becomes, as a share of the loss."""
        return float(self.loss(self.ladder.target.name, lr, horizon) / self.best.min() - 1)

    def gain(self, horizon: float) -> float:
        """How much lower the target's loss gets with more epochs, each horizon at its best rate."""
        at = self.ladder.horizons.index(horizon)
        longer = self.best[at + 1 :]
        return float(1 - longer.min() / self.best[at]) if len(longer) else 0.0

    def fewest_epochs(self, eps: float) -> float:
        """The shortest horizon that no longer one betters by more than `eps`."""
        return next(h for h in self.ladder.horizons if self.gain(h) <= eps)


def _table(octaves: np.ndarray) -> np.ndarray:
    """Signed root of the excess; beyond the table it goes on as between its last two octaves."""
    within = np.clip(octaves, OCTAVES[0], OCTAVES[-1])
    beyond = octaves - within
    slopes = TABLE(OCTAVES[1]) - TABLE(OCTAVES[0]), TABLE(OCTAVES[-1]) - TABLE(OCTAVES[-2])
    return TABLE(within) + beyond * np.where(beyond < 0, *slopes)
