"""What one setting changes, all else equal: the trials of a sweep in pairs.

A learning-rate schedule is judged length by length, as it is worth more or less the longer a training is.
That is the offset between schedules: their losses are compared by pairs alone, never in one ranking.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from orchestration.space import EPOCHS, SCHEDULE, SEED

MOST = 6
"""Values of a setting, beyond which its pairs say nothing that a curve would not say better."""


@dataclass(frozen=True)
class Tried:
    """A trial that has ended."""

    values: Mapping[str, Any]
    """Searched field -> value."""
    metric: float
    updates: int
    """That it has made itself: a branch leaves out those of its trunk."""


@dataclass(frozen=True)
class Effect:
    """One value of a setting against another."""

    path: str
    value: Any
    against: Any
    epochs: int | None
    """Of the trials, where they are told apart by that."""
    pairs: int
    change: float
    """Mean over pairs: of a loss as a share of it, else a difference."""
    interval: tuple[float, float] | None
    """95 %, of two pairs at least."""
    updates: float
    """That all with the value have made, over those of the others."""

    @property
    def what(self) -> str:
        """In words."""
        length = "" if self.epochs is None else f", {self.epochs} epochs"
        return f"{self.path} {self.value} against {self.against}{length}"


def effects(
    tried: Sequence[Tried],
    own: Mapping[str, Any],
    *,
    relative: bool,
    under: Callable[[str], Collection[str]] = lambda path: (),
) -> list[Effect]:
    """Every value of every setting against the experiment's own, or the first one tried.

    `own` holds the searched fields as the experiment has them; `relative` is whether the metric is a loss;
    `under` says what is searched with some values of a setting alone, and need not be alike.
    """
    found = []
    for path in dict.fromkeys(path for trial in tried for path in trial.values if path != SEED):
        with_it = [trial for trial in tried if path in trial.values]
        values = _distinct(trial.values[path] for trial in with_it)
        if not 1 < len(values) <= MOST:
            continue
        against = next((v for v in values if repr(v) == repr(own.get(path))), values[0])
        for value in values:
            if repr(value) == repr(against):
                continue
            pairs = _pairs(with_it, path, value, against, apart={path, *under(path)})
            lengths = _distinct(first.values.get(EPOCHS) for first, _ in pairs)
            if path == SCHEDULE and len(lengths) > 1:
                for epochs in sorted(lengths):
                    own_pairs = [pair for pair in pairs if pair[0].values[EPOCHS] == epochs]
                    found += _effect(path, value, against, epochs, own_pairs, relative)
            found += _effect(path, value, against, None, pairs, relative)
    return found


def spread(effect: Effect, *, relative: bool) -> str:
    """A change with its interval, in percent where it is relative."""
    unit, scale = (" %", 100) if relative else ("", 1)
    written = "{:+.2f}" if relative else "{:+.4f}"
    told = [written.format(scale * value) for value in (effect.change, *(effect.interval or ()))]
    return f"{told[0]}{unit}" + (f" ({told[1]} to {told[2]}, 95 %)" if effect.interval else "")


def paired(values: Sequence[float]) -> list[float] | None:
    """Mean of values, or paired differences, and its 95 % interval by Student's t; none of fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(count)
    half = float(stdtrit(count - 1, 0.975)) * error
    return [mean, mean - half, mean + half]


def _pairs(
    tried: Sequence[Tried], path: str, value: Any, against: Any, *, apart: Collection[str]
) -> list[tuple[Tried, Tried]]:
    """Trials with the value, each with those that have the other value and all else alike."""
    others: dict[str, list[Tried]] = {}
    for trial in tried:
        if repr(trial.values[path]) == repr(against) and math.isfinite(trial.metric):
            others.setdefault(repr(_without(trial, apart)), []).append(trial)
    return [
        (trial, other)
        for trial in tried
        if repr(trial.values[path]) == repr(value) and math.isfinite(trial.metric)
        for other in others.get(repr(_without(trial, apart)), ())
    ]


def _effect(
    path: str,
    value: Any,
    against: Any,
    epochs: int | None,
    pairs: Sequence[tuple[Tried, Tried]],
    relative: bool,
) -> list[Effect]:
    if not pairs:
        return []
    changes = [a.metric / b.metric - 1 if relative else a.metric - b.metric for a, b in pairs]
    made, others = (sum(pair[side].updates for pair in pairs) for side in (0, 1))
    ratio = made / others if others else math.nan
    known = paired(changes)
    mean, interval = (known[0], (known[1], known[2])) if known else (changes[0], None)
    return [Effect(path, value, against, epochs, len(pairs), mean, interval, ratio)]


def _without(trial: Tried, apart: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in trial.values.items() if name not in apart}


def _distinct(values: Any) -> list[Any]:
    """Each once; a value may be a list."""
    return list({repr(value): value for value in values}.values())
