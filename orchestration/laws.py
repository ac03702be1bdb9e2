"""Fits the law of `scaling` to trunks: the most probable one, and many that are as good.

Residuals are relative, and robust (soft L1). Each parameter has a Gaussian prior; how far sizes deviate
from the law, and points from a size, is estimated with it (expectation maximisation). What is uncertain is
told by a parametric bootstrap: data and priors are drawn anew, and all is fitted again. Drawing runs out of
those there are would say nothing of a size that has two, or none, as the target has when it matters. A run's
branches share their trunk's luck, so noise is drawn by run: by point, intervals would be too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import log

import numpy as np

from orchestration.scaling import CLIFF_AT, TERMS, Ladder, Points, Trunk, rate_basis

PRIORS = {
    "floor": (log(0.5), 0.5),
    "size": (log(0.25), 0.7),
    "size_power": (0.15, 0.1),
    "data": (log(0.4), 0.7),
    "data_size_power": (0.0, 0.15),
    "data_power": (0.35, 0.15),
    "repeats": (log(12), 0.4),
    "overfit": (log(0.006), 1.5),
    "rate": (0.0, 3.0),
    "rate_size_power": (0.1, 0.25),
    "rate_bend": (0.0, 0.03),
    "rate_horizon_power": (0.2, 0.15),
    "rate_embedding_power": (0.5, 0.5),
    "low": (log(0.0040), 0.4),
    "high": (log(0.0050), 0.4),
}
"""Mean and standard deviation. Losses count in the least one seen, rates in the middle one tried; low and
high in excess at one octave, from 17 cells of Step Law; no known law of rates is outside its first sd's."""
NOISE, RATES, OFFSETS = 0.002, 0.25, 0.003
"""What is expected of a point's noise, a size's own ln rate and its own ln loss (standard deviations)."""
BELIEF = {"noise": 10.0, "rates": 4.0, "offsets": 4.0}
"""How many points, or sizes, that expectation counts for."""
CORRELATED = 0.5
"""Share of the noise's variance that the branches of a trunk have in common."""
FAR, FAR_AT, FAR_SD = 1.03, 1.5, 0.2
"""From so many times a size's least loss at a horizon on, a loss only says that its rate is octaves off."""
WIDE_RATE, WIDE_OFFSET = 1.0, 0.03
"""Standard deviations of ln rate and ln loss of a size that the ladder says nothing about."""
ROUNDS = 4
"""Of expectation maximisation."""
STEPS, TOLERANCE = 12, 0.05
"""Of a fit at most, and which gain of its sum of squares is none."""


@dataclass(frozen=True)
class Spreads:
    """Standard deviations that are estimated with the law."""

    noise: float = NOISE
    rates: float | np.ndarray = RATES
    offsets: float | np.ndarray = OFFSETS


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law: the most probable parameters, and samples of what else they may be."""

    most_probable: np.ndarray
    """(parameters,)."""
    spreads: Spreads
    count: int
    """Of samples."""
    seed: int
    problem: "_Problem"

    @property
    def ladder(self) -> Ladder:
        """What it was fitted to."""
        return self.problem.ladder

    @cached_property
    def samples(self) -> np.ndarray:
        """(S, parameters), drawn when they are first asked for."""
        random, law = np.random.default_rng(self.seed), self.most_probable
        drawn, _, _ = self.problem.solve(
            np.repeat(law[None], self.count, axis=0),
            self.problem.draw(self.spreads, self.count, random),
            noise=random.standard_normal((self.count, self.problem.points)),
            prior=random.standard_normal((self.count, len(law))),
        )
        return drawn

    def log_loss(self, size: str, horizons: np.ndarray, lrs: np.ndarray) -> np.ndarray:
        """Natural logarithms of the loss at M points for each sample, (S, M)."""
        return self._points(size, horizons, lrs).log_loss(self.samples)

    def loss(self, size: str, horizon: float, lr: float) -> np.ndarray:
        """The loss at one point for each sample, (S,)."""
        return np.exp(self.log_loss(size, np.array([horizon]), np.array([lr]))[:, 0])

    def probable_loss(self, size: str, horizon: float, lr: float) -> float:
        """The loss at one point under the most probable law."""
        points = self._points(size, np.array([horizon]), np.array([lr]))
        return float(np.exp(points.log_loss(self.most_probable)[0]))

    def best_rate(self, size: str, horizon: float) -> np.ndarray:
        """The best learning rate for each sample, (S,)."""
        return np.exp(self.samples @ self._rate(size, horizon))

    def probable_rate(self, size: str, horizon: float) -> float:
        """The best learning rate under the most probable law."""
        return float(np.exp(self.most_probable @ self._rate(size, horizon)))

    def whiten(self, residuals: np.ndarray) -> np.ndarray:
        """Residuals of the branches of one run, (S, branches), made independent and of unit variance."""
        one_run = Whitening(np.zeros(residuals.shape[-1]), self.problem.correlated)
        return one_run(residuals[..., None])[..., 0] / self.spreads.noise

    def _points(self, size: str, horizons: np.ndarray, lrs: np.ndarray) -> Points:
        place = np.full(len(horizons), self.ladder.place(size))
        return Points(self.ladder, place, horizons, np.log(lrs))

    def _rate(self, size: str, horizon: float) -> np.ndarray:
        return rate_basis(self.ladder, np.array([self.ladder.place(size)]), np.array([horizon]))[0]


def interval(values: np.ndarray, share: float = 0.9) -> tuple[float, float]:
    """Between which samples lie but for equal shares on both sides."""
    low, high = np.quantile(values, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def fit(
    ladder: Ladder,
    trunks: Sequence[Trunk],
    *,
    samples: int = 200,
    seed: int = 0,
    correlated: float = CORRELATED,
    wide: str | None = None,
) -> Law:
    """The law of what trunks have shown, in whatever order they are given.

    `wide` is a size that the ladder says nothing about: its deviations may be anything.

    Raises:
        ValueError: if no trunk has a finite loss.
    """
    problem = _Problem(ladder, trunks, correlated, wide)
    law, spreads = problem.means[None], Spreads()
    for _ in range(ROUNDS):
        law, curvature, residuals = problem.solve(law, spreads)
        spreads = problem.spreads(law[0], curvature[0], residuals[0], spreads)
    law, _, _ = problem.solve(law, spreads)
    return Law(law[0], spreads, samples, seed, problem)


class _Problem:
    """Residuals of data and priors, with their derivative."""

    def __init__(
        self, ladder: Ladder, trunks: Sequence[Trunk], correlated: float, wide: str | None
    ) -> None:
        trunks = sorted(trunks, key=lambda trunk: (trunk.run.size, trunk.run.lr, trunk.losses))
        points = [
            (number, ladder.place(trunk.run.size), horizon, log(trunk.run.lr), loss)
            for number, trunk in enumerate(trunks)
            for horizon, loss in zip(trunk.run.horizons, trunk.losses, strict=False)
        ]
        columns = np.array(points, dtype=float).reshape(-1, 5).T
        finite = np.isfinite(columns[4])
        if not finite.any():
            raise ValueError("no run has a loss: nothing can be learnt of the law")
        self.ladder, self.correlated = ladder, correlated
        self.wide = None if wide is None else ladder.place(wide)
        loss = np.where(finite, columns[4], np.inf)
        place, horizon = columns[1].astype(int), columns[2]

        def points(of: np.ndarray) -> Points:
            return Points(ladder, place[of], horizon[of], columns[3][of])

        peers = (place[:, None] == place) & (horizon[:, None] == horizon)
        near = loss < FAR * np.where(peers, loss, np.inf).min(axis=1)
        self.near, self.far, self.failed = points(near), points(~near & finite), points(~finite)
        self.log_loss = np.log(loss[near])
        self.whiten = Whitening(columns[0][near], correlated)
        self.points, self.observed = len(self.log_loss), np.unique(place[near])
        scales = {name: float(self.log_loss.min()) for name in ("floor", "size", "data", "overfit")}
        scales["rate"] = float(columns[3].mean())
        means = [PRIORS[name][0] + scales.get(name, 0.0) for name in TERMS]
        self.means = np.array(means + [0.0] * 2 * len(ladder.sizes))

    def deviations(self, spreads: Spreads) -> np.ndarray:
        """Standard deviations of all priors, (..., parameters) of spreads of (...)."""
        sizes = len(self.ladder.sizes)
        rates, offsets = (
            np.repeat(np.asarray(spread)[..., None], sizes, axis=-1)
            for spread in (spreads.rates, spreads.offsets)
        )
        if self.wide is not None:
            rates[..., self.wide], offsets[..., self.wide] = WIDE_RATE, WIDE_OFFSET
        terms = np.array([PRIORS[name][1] for name in TERMS])
        return np.concatenate([np.broadcast_to(terms, (*rates.shape[:-1], len(terms))), rates, offsets], -1)

    def solve(
        self, law: np.ndarray, spreads: Spreads, *, noise: float | np.ndarray = 0.0,
        prior: float | np.ndarray = 0.0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
        """The most probable laws from those given, (S, parameters), by Levenberg and Marquardt.

        `noise` and `prior`, standard normal, are added to what was seen and what is believed. Also returns
        half the curvature of the loss at each law, and the residuals of near points.
        """
        sds = self.deviations(spreads)
        means = self.means + sds * prior

        def residuals(law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Of near points, and of all that are out of the way but not as far as they should be."""
            apart = self.near.log_loss(law) - self.log_loss
            near = self.whiten(apart[..., None])[..., 0] / spreads.noise + noise
            distant = FAR_AT - np.abs(self.far.octaves(law))
            failed = CLIFF_AT - self.failed.octaves(law)
            return near, np.maximum(np.concatenate([distant, failed], axis=-1), 0) / FAR_SD

        def energy(law: np.ndarray) -> np.ndarray:
            data = _robust(np.concatenate(residuals(law), axis=-1))[0]
            return (data**2).sum(-1) + (((law - means) / sds) ** 2).sum(-1)

        def expansion(law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            near, far = residuals(law)
            by_near = self.whiten(self.near.slopes(law)) / spreads.noise
            away = np.concatenate([np.sign(self.far.octaves(law)), np.ones((*law.shape[:-1], len(self.failed.place)))], -1)
            by_far = (away * (far > 0))[..., None] * np.concatenate([self.far.basis, self.failed.basis]) / (FAR_SD * log(2))
            values, weights = _robust(np.concatenate([near, far], axis=-1))
            slopes = np.concatenate([by_near, by_far], axis=-2) * weights[..., None]
            transposed = slopes.swapaxes(-1, -2)
            curvature = transposed @ slopes
            np.einsum("sii->si", curvature)[:] += 1 / sds**2
            gradient = (transposed @ values[..., None])[..., 0] + (law - means) / sds**2
            return curvature, gradient

        damping, before = np.full(len(law), 1e-3), energy(law)
        for _ in range(STEPS):
            curvature, slope = expansion(law)
            damped = curvature.copy()
            np.einsum("sii->si", damped)[:] *= 1 + damping[:, None]
            after = law - np.linalg.solve(damped, slope[..., None])[..., 0]
            reached = energy(after)
            better = reached < before
            gained = np.where(better, before - reached, 0)
            law = np.where(better[:, None], after, law)
            before, damping = np.minimum(before, reached), damping * np.where(better, 0.2, 10)
            if (better & (gained < TOLERANCE)).all():
                break
        return law, expansion(law)[0], _robust(residuals(law)[0])[0]

    def spreads(
        self, law: np.ndarray, curvature: np.ndarray, residuals: np.ndarray, before: Spreads
    ) -> Spreads:
        """What deviates, as far as it is known, plus how far it is not: a step of expectation maximisation."""
        covariance = np.linalg.inv(curvature)
        of_data = self.whiten(self.near.slopes(law)) / before.noise
        squares = residuals @ residuals + ((of_data @ covariance) * of_data).sum()
        known = [place for place in self.observed if place != self.wide]

        def deviation(part: slice, expected: float, belief: float) -> float:
            of = np.arange(part.start, part.stop)[known]
            return _spread(law[of] @ law[of] + covariance[of, of].sum(), len(of), expected, belief)

        return Spreads(
            noise=_spread(before.noise**2 * squares, self.points, NOISE, BELIEF["noise"]),
            rates=deviation(self.ladder.rates, RATES, BELIEF["rates"]),
            offsets=deviation(self.ladder.offsets, OFFSETS, BELIEF["offsets"]),
        )

    def draw(self, spreads: Spreads, count: int, random: np.random.Generator) -> Spreads:
        """Spreads of sizes as they may be as well, given how few sizes tell of them."""

        def drawn(spread: float | np.ndarray, belief: float) -> np.ndarray:
            known = belief + len(self.observed)
            return spread * np.sqrt(known / random.chisquare(known, count))

        return replace(
            spreads,
            rates=drawn(spreads.rates, BELIEF["rates"]),
            offsets=drawn(spreads.offsets, BELIEF["offsets"]),
        )


def _spread(squares: float, count: int, expected: float, belief: float) -> float:
    return float(np.sqrt((belief * expected**2 + squares) / (belief + count)))


class Whitening:
    """Makes noise independent and of unit variance, where points of the same run have a share in common."""

    def __init__(self, runs: np.ndarray, correlated: float) -> None:
        """`runs` numbers the run of each point, those of a run side by side."""
        _, self.starts, self.counts = np.unique(runs, return_index=True, return_counts=True)
        self.own = np.sqrt(1 - correlated)
        self.shared = (1 - self.own / np.sqrt(1 - correlated + self.counts * correlated)) / self.counts

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Whitened points, (..., M, columns), in place of (..., M, columns)."""
        shared = np.add.reduceat(points, self.starts, axis=-2) * self.shared[:, None]
        return (points - np.repeat(shared, self.counts, axis=-2)) / self.own


def _robust(residual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What has soft L1 loss when squared, and its derivative."""
    root = np.sqrt(1 + residual**2)
    value = np.sign(residual) * np.sqrt(2 * (root - 1))
    slope = np.divide(residual, root * value, out=np.ones_like(root), where=np.abs(residual) > 1e-6)
    return value, slope
