"""Which of several are beaten by none, where more than one thing counts."""

from collections.abc import Sequence
from math import isnan


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """Where the points are of which no other one is better in one thing and worse in none; less is better.

    A point with something unknown (nan) is on no front.
    """
    known = [at for at, point in enumerate(points) if not any(map(isnan, point))]
    return [at for at in known if not any(_beats(points[by], points[at]) for by in known)]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)
