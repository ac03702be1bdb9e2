"""The search across sizes: what to train next, what to stop, what to recommend.

Sizes are observed from the smallest on, each about the rates that the smaller ones foretell; then, if the
law has foretold the last of them, a few trunks at the target are each chosen to lower the expected regret
most for their cost, and else the target is swept. All follows from the observations alone, in whatever
order they come, so that a search that was killed goes on as if it had not been.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import isfinite

import numpy as np

from orchestration.scaling import Ladder, Run, Size, Trunk
from orchestration.searching.laws import Law, fit, interval
from orchestration.searching.regret import Choice, Gate, Surface, chance_to_win, gate, surface
from orchestration.searching.verdicts import at_the_edge

FIRST_RATES, RATES, FEWEST = 8, 6, 3
"""Rates at the smallest size, over the whole range; at others at most; at others at least."""
SWEEP_RATES, SWEEP_STEP = 3, 1.25
"""Of the target, where the law is violated: how many, and octaves between them."""
OCTAVES = (-1.5, -1, -0.5, 0.5, 1, 1.5)
"""From the choice, at which further trunks at the target may be."""
WORTH = 1e-4
"""Regret that a trunk at the target has to save, or else the search is over."""
LOSES = 0.05
"""A trunk goes on unless its chance to win falls below this."""
BELOW = 4.0
"""So many times lower than a rate that diverged is one that no other vouches for."""
BRANCH = 0.001
"""Standard deviation of what a branch ends with, beside a training of its own."""
TWICE = 2.0
"""A loss so many times the least one of its size and horizon has diverged."""


@dataclass(frozen=True)
class Recommendation:
    """What to train at the target, and why."""

    size: str
    lr: float
    horizon: float
    loss: float
    loss_interval: tuple[float, float]
    """90 % of what a training of its own may end with, on average over seeds."""
    lr_interval: tuple[float, float]
    """90 % of what the best rate of that horizon may be."""
    regret: float
    """Expected excess over the least loss there is."""
    cost: float
    """Epochs of the target that all runs have taken."""
    swept: bool
    """Whether the target was swept, as the law was violated."""
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class AcrossSizes:
    """A search over learning rates and epochs of the last size of a ladder."""

    ladder: Ladder
    rates: tuple[float, float]
    """Between which learning rates are tried, at any size."""
    budget: float = 60.0
    """Epochs of the target that all runs together may take."""
    verify: int = 3
    """Trunks at the target."""
    share: float = 0.1
    """Of the budget, for each smaller size at most."""
    eps: float = 0.001
    """Share of the loss that is not worth another epoch, nor another run."""
    samples: int = 100
    seed: int = 0

    def propose(self, trunks: Sequence[Trunk]) -> list[Run]:
        """Runs to start next: none while one has not ended, and none when the search is over."""
        if not all(trunk.ended for trunk in trunks):
            return []
        for size in self.ladder.sizes[:-1]:
            upto = self._upto(size, trunks)
            if not any(trunk.run.size == size.name for trunk in trunks):
                return list(self._observe(size, upto))
            if beyond := self._extend(size, upto):
                return beyond
        return self._at_target(trunks)

    def stop(self, trunks: Sequence[Trunk], trunk: Trunk) -> str | None:
        """Why a trunk, one of all, should not go on to its next horizon, if so."""
        if not trunk.losses:
            return None
        run, reached = trunk.run, trunk.reached[-1]
        peers = [
            loss
            for other in trunks
            if other.run.size == run.size
            for horizon, loss in zip(other.reached, other.losses, strict=True)
            if horizon == reached and isfinite(loss)
        ]
        if trunk.diverged:
            return "it diverges"
        if trunk.losses[-1] > TWICE * (least := min(peers)):
            return f"a loss of {trunk.losses[-1]:.3g} after {reached:g} epochs, where others have {least:.3g}"
        if run.size != self.ladder.target.name or len(trunk.losses) == len(run.horizons):
            return None
        ended = [other for other in trunks if other.ended and other.run != run]
        others = [
            (other.run.lr, horizon)
            for other in ended
            if other.run.size == run.size
            for horizon, loss in zip(other.reached, other.losses, strict=True)
            if isfinite(loss)
        ]
        chance = chance_to_win(self.law(ended), trunk, others, self.eps)
        if chance < LOSES:
            return f"{chance:.1%} chance that more than {reached:g} epochs at {run.lr:.2g} are the best"
        return None

    def recommend(self, trunks: Sequence[Trunk]) -> Recommendation:
        """What to train at the target after all that has been seen."""
        target, law, swept = self.ladder.target.name, self.law(trunks), self._violated(trunks)
        choice = self.choice(trunks)
        loss = law.loss(target, choice.horizon, choice.lr)
        loss = loss * (1 + BRANCH * np.random.default_rng(self.seed).standard_normal(len(loss)))
        best = interval(law.best_rate(target, choice.horizon))
        reasons = [str(found) for found in [self.gate(trunks)] if found]
        reasons.append(
            f"the best rate of {target} for {choice.horizon:g} epochs is between {best[0]:.2g} and "
            f"{best[1]:.2g} (90 %); {choice.lr:.2g} has the least expected regret, {choice.regret:.2%}"
        )
        if tried := [trunk.run.lr for trunk in trunks if trunk.run.size == target]:
            edge = at_the_edge(tried, law.probable_rate(target, choice.horizon))
            if edge.holds:
                reasons.append(f"{edge.evidence}: try {edge.experiment}")
        return Recommendation(
            target, _round(choice.lr), choice.horizon, float(np.median(loss)), interval(loss), best,
            choice.regret, self.ladder.spent(trunks), swept, tuple(reasons),
        )  # fmt: skip

    def surface(self, trunks: Sequence[Trunk]) -> Surface:
        """Losses of the target as all that has been seen foretells them."""
        return surface(self.law(trunks), self.ladder.target.name, self.rates)

    def choice(self, trunks: Sequence[Trunk]) -> Choice:
        """The rate and horizon of the target: none higher than what is known to train there, once it is."""
        own = [trunk for trunk in trunks if trunk.run.size == self.ladder.target.name]
        trained = [trunk.run.lr for trunk in own if not trunk.diverged]
        failed = [trunk.run.lr / BELOW for trunk in own if trunk.diverged]
        highest = max(trained, default=min(failed, default=np.inf))
        return self.surface(trunks).choose(self.eps, highest)

    def _upto(self, size: Size, trunks: Sequence[Trunk]) -> list[Trunk]:
        place = self.ladder.place(size.name)
        return [trunk for trunk in trunks if self.ladder.place(trunk.run.size) <= place]

    def _observe(self, size: Size, smaller: Sequence[Trunk]) -> Iterator[Run]:
        """As many rates, up to as long a horizon, as a size's share of the budget has room for."""
        allowed, whole = self.share * self.budget, self.ladder.horizons
        prefixes = [whole[:count] for count in range(len(whole), 0, -1)]
        horizons = next(
            (p for p in prefixes if FEWEST * self.ladder.cost(size.name, p) <= allowed),
            prefixes[-1],
        )
        if not smaller:
            low, high = np.log(self.rates)
            step = (high - low) / FIRST_RATES
            offset = np.random.default_rng(self.seed).uniform(0.25, 0.75)
            lrs = [_round(lr) for lr in np.exp(low + step * (np.arange(FIRST_RATES) + offset))]
        else:
            room = int(allowed / self.ladder.cost(size.name, horizons))
            count = min(max(room, FEWEST), RATES)
            best = self.law(smaller).probable_rate(size.name, float(np.median(horizons)))
            lrs = self._about(best, np.arange(count) - (count - 1) / 2)
        for lr in lrs:
            yield Run(size.name, lr, horizons)

    def _extend(self, size: Size, trunks: Sequence[Trunk]) -> list[Run]:
        """A rate beyond the edge of those tried, where the best of them lies there: laws apart, seen."""
        own = [trunk for trunk in trunks if trunk.run.size == size.name]
        tried, horizons = sorted(trunk.run.lr for trunk in own), own[0].run.horizons
        seen = [trunk for trunk in own if trunk.losses and not trunk.diverged]
        common = min((len(trunk.losses) for trunk in seen), default=0)
        losses = {trunk.run.lr: _mean(trunk.losses[:common]) for trunk in seen}
        best = min(losses, key=losses.__getitem__, default=tried[0])
        beyond = {tried[0]: tried[0] / 2, tried[-1]: tried[-1] * 2}.get(best)
        low, high = self.rates
        return (
            [Run(size.name, _round(beyond), horizons)] if beyond and low <= beyond <= high else []
        )

    def _at_target(self, trunks: Sequence[Trunk]) -> list[Run]:
        target = self.ladder.target.name
        own = [trunk for trunk in trunks if trunk.run.size == target]
        left = self.budget - self.ladder.spent(trunks)
        law = self.law(trunks)
        if self._violated(trunks):
            if not own:
                return self._sweep(law, left)
            more = self._extend(self.ladder.target, trunks)
            return [run for run in more if self.ladder.cost(target, run.horizons) <= left]
        if len(own) >= self.verify:
            return []
        on = self.surface(trunks)
        choice = self.choice(trunks)
        horizons = self.ladder.horizons
        prefixes = [horizons[:count] for count in range(1, len(horizons) + 1)]
        if not own:
            upto = tuple(h for h in horizons if h <= choice.horizon)
            while upto and self.ladder.cost(target, upto) > left:
                upto = upto[:-1]
            return [Run(target, _round(choice.lr), upto)] if upto else []
        options = [
            (on.worth(lr, upto), self.ladder.cost(target, upto), Run(target, lr, upto))
            for octave in OCTAVES
            for lr in [_round(choice.lr * 2.0**octave)]
            if self.rates[0] <= lr <= self.rates[1] and all(lr != seen.run.lr for seen in own)
            for upto in prefixes
            if self.ladder.cost(target, upto) <= left
        ]
        worthy = [option for option in options if option[0] > WORTH]
        return [max(worthy, key=lambda option: option[0] / option[1])[2]] if worthy else []

    def _sweep(self, law: Law, left: float) -> list[Run]:
        """Trunks over rates about what the ladder says, though it may be wrong, as long as can be paid."""
        target, horizons = self.ladder.target.name, self.ladder.horizons
        prefixes = [horizons[:count] for count in range(len(horizons), 0, -1)]
        upto = next(
            (p for p in prefixes if SWEEP_RATES * self.ladder.cost(target, p) <= left), prefixes[-1]
        )
        best = law.probable_rate(target, float(np.median(upto)))
        octaves = SWEEP_STEP * (np.arange(SWEEP_RATES) - (SWEEP_RATES - 1) / 2)
        return [Run(target, lr, upto) for lr in self._about(best, octaves)]

    def _about(self, best: float, octaves: np.ndarray) -> list[float]:
        """Rates so far from the best one, together moved into the range of rates."""
        low, high = np.log2(self.rates) - np.log2(best)
        moved = octaves + np.clip(0, low - octaves.min(), high - octaves.max())
        return sorted({_round(best * 2.0**octave) for octave in np.clip(moved, low, high)})

    def _violated(self, trunks: Sequence[Trunk]) -> bool:
        found = self.gate(trunks)
        return found is not None and not found.passed

    def gate(self, trunks: Sequence[Trunk]) -> Gate | None:
        """Of the largest size below the target; none where nothing is below that, or it is not observed."""
        if len(self.ladder.sizes) < 3:
            return None
        last = self.ladder.sizes[-2]
        below = self._upto(last, trunks)
        if not any(trunk.run.size == last.name and trunk.losses for trunk in below):
            return None
        return _gate(self.ladder, frozenset(below), last.name)

    def law(self, trunks: Sequence[Trunk]) -> Law:
        """What all that has been seen says of losses."""
        wide = self.ladder.target.name if self._violated(trunks) else None
        return _law(self.ladder, frozenset(trunks), self.samples, self.seed, wide)


@lru_cache(maxsize=32)
def _law(
    ladder: Ladder, trunks: frozenset[Trunk], samples: int, seed: int, wide: str | None
) -> Law:
    return fit(ladder, list(trunks), samples=samples, seed=seed, wide=wide)


@lru_cache(maxsize=32)
def _gate(ladder: Ladder, trunks: frozenset[Trunk], size: str) -> Gate:
    return gate(ladder, list(trunks), size)


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / max(len(losses), 1)


def _round(lr: float) -> float:
    """To three digits: what a person can read, a run's name can hold and a restart finds again."""
    return float(f"{lr:.3g}")
