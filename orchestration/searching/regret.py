"""What to choose under an uncertain law: the rate and horizon with the least expected regret.

A rate too high costs more than one too low, so that the choice lies below the law's best rate, the further
the less is known. Regret is by how much a loss exceeds the least one of the same sample of the law.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from orchestration.scaling import Ladder, Trunk
from orchestration.searching.laws import Law, fit

PER_OCTAVE = 4
"""Rates of a surface: what lies between them costs a hundredth of a percent."""
OCTAVES = 4
"""To both sides of the best rate, between which a choice is made."""
WORST = 0.3
"""Regret counts no more than this: a run that has failed is stopped."""
GATE_OCTAVES, GATE_LOSS = 0.5, 0.01
"""How far the smaller sizes may be off at a size for the law to be trusted beyond it."""


@dataclass(frozen=True)
class Choice:
    """A rate and horizon."""

    lr: float
    horizon: float
    regret: float
    """Expected, as a share of the loss."""


@dataclass(frozen=True, eq=False)
class Surface:
    """Losses of one size over rates and horizons, for every sample of a law."""

    law: Law
    size: str
    lrs: np.ndarray
    """(M,), as all that follows."""
    horizons: np.ndarray

    @cached_property
    def log_loss(self) -> np.ndarray:
        """(S, M)."""
        return self.law.log_loss(self.size, self.horizons, self.lrs)

    @cached_property
    def regret(self) -> np.ndarray:
        """(S, M)."""
        least = self.log_loss.min(axis=1, keepdims=True)
        return np.minimum(np.expm1(self.log_loss - least), WORST)

    @cached_property
    def expected(self) -> np.ndarray:
        """Mean regret of each point."""
        return self.regret.mean(axis=0)

    def choose(self, eps: float, highest: float = np.inf) -> Choice:
        """The shortest horizon whose expected regret is within `eps` of the least, at its best rate.

        `highest` is the greatest rate that may be chosen.
        """
        allowed = self.lrs <= max(highest, self.lrs.min())
        expected = np.where(allowed, self.expected, np.inf)
        horizon = self.horizons[expected <= expected.min() + eps].min()
        at = np.where(self.horizons == horizon, expected, np.inf).argmin()
        return Choice(float(self.lrs[at]), float(horizon), float(self.expected[at]))

    def worth(self, lr: float, horizons: tuple[float, ...]) -> float:
        """By how much a trunk, branched at horizons, is expected to lower the regret of what is then chosen.

        Each sample in turn is taken for the truth, what it would show is drawn, and all are weighed by it.
        """
        shown = self.law.log_loss(self.size, np.array(horizons), np.full(len(horizons), lr))
        shown = self.law.whiten(shown)
        truth = shown + np.random.default_rng(0).standard_normal(shown.shape)
        weights = _normalised(truth @ shown.T - (shown**2).sum(axis=1) / 2)
        return float(self.expected.min() - (weights @ self.regret).min(axis=1).mean())

    def gain(self, horizon: float) -> np.ndarray:
        """By how much the least loss falls with more epochs, each horizon at its best rate, (S,)."""
        upto = np.where(self.horizons == horizon, self.log_loss, np.inf).min(axis=1)
        longer = np.where(self.horizons > horizon, self.log_loss, np.inf).min(axis=1)
        return np.where(np.isfinite(longer), -np.expm1(longer - upto), 0.0)


def surface(law: Law, size: str, rates: tuple[float, float]) -> Surface:
    """All horizons, and the rates about the law's best ones within a range."""
    horizons = law.ladder.horizons
    middle = np.log2(law.probable_rate(size, law.ladder.middle))
    octaves = np.arange(-OCTAVES * PER_OCTAVE, OCTAVES * PER_OCTAVE + 1) / PER_OCTAVE
    lrs = np.unique(np.clip(np.exp2(middle + octaves), *rates))
    grid = np.meshgrid(lrs, horizons)
    return Surface(law, size, grid[0].ravel(), grid[1].ravel())


def chance_to_win(law: Law, trunk: Trunk, others: list[tuple[float, float]], eps: float) -> float:
    """Probability that a trunk's further horizons end more than `eps` below all that has been reached.

    `others` are rates and horizons of the same size that have been.
    """
    run, reached = trunk.run, len(trunk.losses)
    of_run = law.log_loss(run.size, np.array(run.horizons), np.full(len(run.horizons), run.lr))
    shown = law.whiten(of_run[:, :reached] - np.log(trunk.losses))
    weights = _normalised(-(shown**2).sum(axis=-1) / 2)
    best = of_run[:, :reached].min(axis=1)
    if others:
        lrs, horizons = np.array(others).T
        best = np.minimum(best, law.log_loss(run.size, horizons, lrs).min(axis=1))
    wins = of_run[:, reached:].min(axis=1) < best - eps
    return float(weights @ wins)


@dataclass(frozen=True)
class Gate:
    """How well the sizes below a size foretell it."""

    size: str
    octaves: float
    """By which their best rate is off."""
    loss: float | None
    """Share by which their least loss is off; none where there is one such size: it does not say how losses
    move with size."""

    @property
    def passed(self) -> bool:
        """Whether the law may be trusted for larger sizes."""
        return abs(self.octaves) <= GATE_OCTAVES and abs(self.loss or 0.0) <= GATE_LOSS

    def __str__(self) -> str:
        verdict = "holds" if self.passed else "is violated"
        rate = (
            f"the best rate of {self.size} by {self.octaves:+.2f} octaves (at most {GATE_OCTAVES})"
        )
        if self.loss is None:
            return f"the law {verdict}: the smaller size misses {rate}"
        loss = f"its loss by {self.loss:+.2%} (at most {GATE_LOSS:.0%})"
        return f"the law {verdict}: smaller sizes miss {rate} and {loss}"


def gate(ladder: Ladder, trunks: list[Trunk], size: str) -> Gate:
    """Leaves a size out, foretells it, and compares with what is known with it.

    The loss is compared where the size was observed: nothing else there is known.
    """
    own = [trunk for trunk in trunks if trunk.run.size == size]
    others = [trunk for trunk in trunks if ladder.place(trunk.run.size) < ladder.place(size)]
    without, known = fit(ladder, others), fit(ladder, others + own)
    horizon = max(h for trunk in own for h in trunk.reached)
    foretold, best = (law.probable_rate(size, horizon) for law in (without, known))
    octaves = float(np.log2(foretold / best))
    if len({trunk.run.size for trunk in others}) < 2:
        return Gate(size, octaves, None)
    loss = without.probable_loss(size, horizon, best) / known.probable_loss(size, horizon, best)
    return Gate(size, octaves, loss - 1)


def _normalised(log_weights: np.ndarray) -> np.ndarray:
    weights = np.exp(log_weights - log_weights.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
