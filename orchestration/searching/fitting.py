"""What a law is fitted by: residuals of what was seen and of what is believed, and their least squares.

Residuals are relative, and robust (soft L1). Each parameter has a Gaussian prior; how far sizes deviate from
the law, and points from a size, is estimated with it (expectation maximisation). Hundreds of laws are fitted
at once, as arrays, where a library solves one problem at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log

import numpy as np

from orchestration.scaling import CLIFF_AT, TERMS, Ladder, Points, Trunk

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
"""Mean and standard deviation. Losses count in the least one seen, rates in the middle one tried; `low` and
`high` are the excess at one octave in 17 cells of Step Law (arXiv:2503.04715)."""
NOISE, RATES, POWERS, OFFSETS = 0.002, 0.25, 0.1, 0.003
"""Standard deviations expected of a point's noise, and of a size's own ln rate, power and ln loss."""
BELIEF = {"noise": 10.0, "rates": 4.0, "powers": 4.0, "offsets": 4.0}
"""How many points, or sizes, that expectation counts for."""
CORRELATED = 0.5
"""Share of the noise's variance that the branches of a trunk have in common."""
FAR, FAR_AT, FAR_SD = 1.03, 1.5, 0.2
"""From so many times a size's least loss at a horizon on, a loss only says that its rate is octaves off."""
WIDE_RATE, WIDE_OFFSET = 1.0, 0.03
"""Standard deviations of ln rate and ln loss of a size that the ladder says nothing about."""
ROUNDS = 4
"""Of expectation maximisation."""
STEPS, TOLERANCE = 20, 0.01
"""Of a fit at most, and which gain of its sum of squares is none."""


@dataclass(frozen=True)
class Spreads:
    """Standard deviations that are estimated with the law."""

    noise: float = NOISE
    rates: float | np.ndarray = RATES
    powers: float | np.ndarray = POWERS
    offsets: float | np.ndarray = OFFSETS


class Problem:
    """Residuals of data and priors, with their derivative."""

    def __init__(
        self, ladder: Ladder, trunks: Sequence[Trunk], correlated: float, wide: str | None
    ) -> None:
        trunks = sorted(trunks, key=lambda trunk: (trunk.run.size, trunk.run.lr, trunk.losses))
        rows = [
            (number, ladder.place(trunk.run.size), horizon, log(trunk.run.lr), loss)
            for number, trunk in enumerate(trunks)
            for horizon, loss in zip(trunk.run.horizons, trunk.losses, strict=False)
        ]
        columns = np.array(rows, dtype=float).reshape(-1, 5).T
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
        of_peers = np.where(peers, loss, np.inf)
        best = of_peers.argmin(axis=1)
        near = loss < FAR * of_peers.min(axis=1)
        self.near, self.far = points(near), points(~near)
        self.log_loss = np.log(loss[near])
        # Those that diverged are beyond the cliff; of others, which side they are on is seen, not fitted.
        side = np.where(finite, np.sign(columns[3] - columns[3][best]), 1)[~near]
        self.side, self.away = side, np.where(finite[~near], FAR_AT, CLIFF_AT)
        self.whiten = Whitening(columns[0][near], correlated)
        self.points, self.observed = len(self.log_loss), np.unique(place[near])
        scales = {name: float(self.log_loss.min()) for name in ("floor", "size", "data", "overfit")}
        scales["rate"] = float(columns[3].mean())
        means = [PRIORS[name][0] + scales.get(name, 0.0) for name in TERMS]
        self.means = np.array(means + [0.0] * 3 * len(ladder.sizes))

    def deviations(self, spreads: Spreads) -> np.ndarray:
        """Standard deviations of all priors, (..., parameters) of spreads of (...)."""
        sizes = len(self.ladder.sizes)
        rates, powers, offsets = (
            np.repeat(np.asarray(spread)[..., None], sizes, axis=-1)
            for spread in (spreads.rates, spreads.powers, spreads.offsets)
        )
        if self.wide is not None:
            rates[..., self.wide], offsets[..., self.wide] = WIDE_RATE, WIDE_OFFSET
        terms = np.array([PRIORS[name][1] for name in TERMS])
        terms = np.broadcast_to(terms, (*rates.shape[:-1], len(TERMS)))
        return np.concatenate([terms, rates, powers, offsets], axis=-1)

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
            far = np.maximum(self.away - self.side * self.far.octaves(law), 0) / FAR_SD
            return near, far

        def energy(law: np.ndarray) -> np.ndarray:
            data = _robust(np.concatenate(residuals(law), axis=-1))[0]
            return (data**2).sum(-1) + (((law - means) / sds) ** 2).sum(-1)

        def expansion(law: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            near, far = residuals(law)
            by_near = self.whiten(self.near.slopes(law)) / spreads.noise
            by_octave = (self.side[:, None] / (FAR_SD * log(2))) * self.far.basis
            by_far = (far > 0)[..., None] * by_octave
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
        """A step of expectation maximisation: what deviates as far as is known, and how far it is not."""
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
            powers=deviation(self.ladder.powers, POWERS, BELIEF["powers"]),
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
            powers=drawn(spreads.powers, BELIEF["powers"]),
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
        self.shared = (
            1 - self.own / np.sqrt(1 - correlated + self.counts * correlated)
        ) / self.counts

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
