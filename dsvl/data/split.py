"""Which conversations are held out: decided before blending, so that no image is on both sides."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["train", "eval", "straddles_split"]


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


def assign_split(
    samples: Sequence[Links],
    *,
    declared: Mapping[str, Literal["auto", "train", "eval"]],
    eval_fraction: float,
    seed: int,
) -> list[Side]:
    """The side of every sample, so that no image and no record is on both.

    A set declared `train` or `eval` keeps its side. Samples of `auto` sets go with all that they
    are linked to, held out by a hash of the group. A group that holds over half of a set (links
    percolate) has its images hashed one by one instead. A sample whose images fall on both
    sides, or a training sample linked to one that is held out, `straddles_split`.
    """
    sides: list[Side] = [
        "eval" if declared[sample.source] == "eval" else "train" for sample in samples
    ]
    automatic = [i for i, sample in enumerate(samples) if declared[sample.source] == "auto"]
    sizes = Counter(samples[i].source for i in automatic)

    def side(key: str) -> Literal["train", "eval"]:
        digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
        return "eval" if int.from_bytes(digest[:8]) < eval_fraction * 2**64 else "train"

    for group in _components([samples[i].group_keys for i in automatic]):
        members = [samples[automatic[i]] for i in group]
        held = Counter(member.source for member in members)
        percolates = len(group) > 1 and any(2 * n > sizes[source] for source, n in held.items())
        shared = side(min(key for member in members for key in member.group_keys))
        for i, member in zip(group, members, strict=True):
            keys = member.images or (member.record,)
            found: set[Side] = {side(key) for key in keys} if percolates else {shared}
            sides[automatic[i]] = found.pop() if len(found) == 1 else "straddles_split"

    held_out = {
        key
        for sample, where in zip(samples, sides, strict=True)
        if where == "eval"
        for key in sample.group_keys
    }
    return [
        where if where != "train" or held_out.isdisjoint(sample.group_keys) else "straddles_split"
        for sample, where in zip(samples, sides, strict=True)
    ]


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
