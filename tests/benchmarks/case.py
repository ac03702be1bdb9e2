"""A case: the same work done in several ways, and how much better ours has to be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.measure import Ready, Run

OURS = "dsvl"
ORIGINAL = "as the original"
CAUSAL = "plain causal attention"


@dataclass(frozen=True)
class Target:
    """How many times faster than a rival ours has to be, and how many times less memory it has to need."""

    faster: float
    smaller: float | None = None


@dataclass(frozen=True)
class Case:
    """The same work done in several ways, `OURS` and its rivals."""

    name: str
    title: str
    ways: Mapping[str, Ready]
    targets: Mapping[str, Target]
    """Rival -> target."""
    same: str
    """The rival whose results are ours but for rounding."""
    rounds: int = 6
    positions: int = 0
    """Text and image tokens of a run, for throughput."""
    flops: Mapping[str, float] = field(default_factory=dict)
    """Way -> floating-point operations that its results need, whatever it computes."""
    aligned: Callable[[Any], Any] = lambda result: result
    """Puts the results of `same` into the order of ours."""
    note: str = ""


def at_once(run: Run) -> Ready:
    """A run that needs nothing made ready."""
    return lambda: run
