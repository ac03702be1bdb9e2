"""Which conversations are held out: decided before blending, so that no image is on both sides."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Side = Literal["train", "eval", "straddles_split"]
MOST_OF_REST = 0.5
"""Share of what does not hang together that may be held out to spare what does."""


@dataclass(frozen=True, slots=True)
class Links:
    """What ties a sample to others: they may not stand on different sides of the split."""

    source: str
    """The set it comes from."""
    record: str
    """Its raw record, `SOURCE/ID`; samples of one record share it."""
    images: tuple[str, ...]
    """sha256 keys."""

    @property
    def group_keys(self) -> tuple[str, ...]:
        """Everything that links it, without repeats."""
        return (*dict.fromkeys(self.images), self.record)


@dataclass(frozen=True, slots=True)
class Percolation:
    """A group with over half of a set, what each way to split it costs, and the way that was taken."""

    samples: int
    shares: dict[str, float]
    """Set -> share of it that is in the group."""
    straddling: int
    """Samples that are lost if images are split one by one."""
    held_out_of_rest: float | None
    """Share of the other groups of these sets to hold out if the group is trained on as a whole, None where
    there are no others; above `MOST_OF_REST` it is too much of too little."""
    way: Literal["by_image", "together"]


@dataclass(frozen=True, slots=True)
class Split:
    """The side of every sample."""

    sides: list[Side]
    percolations: list[Percolation] = field(default_factory=list)


def assign_split(
    samples: Sequence[Links],
    *,
    declared: Mapping[str, Literal["auto", "train", "eval"]],
    eval_fraction: float,
    seed: int,
) -> Split:
    """The side of every sample, so that no image and no record is on both.

    A set declared `train` or `eval` keeps its side. Samples of `auto` sets go with all that they are linked
    to, held out by a hash of the group. A group that holds over half of a set (links percolate) is trained
    on as a whole, and more of the rest is held out instead, if the rest is large enough: that loses nothing.
    Else its images are hashed one by one. A sample whose images fall on both sides, or a training sample
    linked to one that is held out, `straddles_split`.
    """
    sides: list[Side] = [
        "eval" if declared[sample.source] == "eval" else "train" for sample in samples
    ]
    automatic = [i for i, sample in enumerate(samples) if declared[sample.source] == "auto"]
    sizes = Counter(samples[i].source for i in automatic)
    fractions = dict.fromkeys(sizes, eval_fraction)

    def side(key: str, fraction: float = eval_fraction) -> Literal["train", "eval"]:
        digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
        return "eval" if int.from_bytes(digest[:8]) < fraction * 2**64 else "train"

    def apart(sample: Links) -> Side:
        found: set[Side] = {side(key) for key in sample.images or (sample.record,)}
        return found.pop() if len(found) == 1 else "straddles_split"

    ordinary, percolations = [], []
    for group in _components([samples[i].group_keys for i in automatic]):
        members = [automatic[i] for i in group]
        held = Counter(samples[i].source for i in members)
        if len(members) == 1 or not any(2 * n > sizes[source] for source, n in held.items()):
            ordinary.append(members)
            continue
        for i in members:
            sides[i] = apart(samples[i])
        rests = {source: 1 - n / sizes[source] for source, n in held.items()}
        needed = eval_fraction / min(rests.values()) if all(rests.values()) else None
        percolations.append(
            Percolation(
                samples=len(members),
                shares={source: n / sizes[source] for source, n in held.items()},
                straddling=sum(sides[i] == "straddles_split" for i in members),
                held_out_of_rest=needed,
                way="by_image" if needed is None or needed > MOST_OF_REST else "together",
            )
        )
        if needed is not None and needed <= MOST_OF_REST:
            for i in members:
                sides[i] = "train"
            for source in held:
                fractions[source] = max(fractions[source], needed)
    for members in ordinary:
        key = min(key for i in members for key in samples[i].group_keys)
        shared = side(key, max(fractions[samples[i].source] for i in members))
        for i in members:
            sides[i] = shared

    held_out = {
        key
        for sample, where in zip(samples, sides, strict=True)
        if where == "eval"
        for key in sample.group_keys
    }
    leak_free: list[Side] = [
        where if where != "train" or held_out.isdisjoint(sample.group_keys) else "straddles_split"
        for sample, where in zip(samples, sides, strict=True)
    ]
    return Split(leak_free, percolations)


def _components(keys: Sequence[Sequence[str]]) -> list[list[int]]:
    """Indices of the samples that share keys, directly or through others."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, own in enumerate(keys):
        for key in own:
            parent[root(i)] = root(first.setdefault(key, i))
    groups = defaultdict(list)
    for i in range(len(keys)):
        groups[root(i)].append(i)
    return list(groups.values())
