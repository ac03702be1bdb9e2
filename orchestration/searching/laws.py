"""The law of `scaling`, fitted to trunks: the most probable one, and many that are as good.

What is uncertain is told by a parametric bootstrap: data and priors are drawn anew, and all is fitted again.
Drawing runs out of those there are would say nothing of a size that has two, or none, as the target has when
it matters. A run's branches share their trunk's luck, so noise is drawn by run: by point, intervals would be
too narrow.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from orchestration.scaling import Ladder, Points, Trunk, rate_basis
from orchestration.searching.fitting import CORRELATED, ROUNDS, Problem, Spreads, Whitening


@dataclass(frozen=True, eq=False)
class Law:
    """A fitted law: the most probable parameters, and samples of what else they may be."""

    most_probable: np.ndarray
    """(parameters,)."""
    spreads: Spreads
    count: int
    """Of samples."""
    seed: int
    problem: Problem

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
    problem = Problem(ladder, trunks, correlated, wide)
    law, spreads = problem.means[None], Spreads()
    for _ in range(ROUNDS):
        law, curvature, residuals = problem.solve(law, spreads)
        spreads = problem.spreads(law[0], curvature[0], residuals[0], spreads)
    law, _, _ = problem.solve(law, spreads)
    return Law(law[0], spreads, samples, seed, problem)
