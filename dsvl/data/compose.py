"""Rounds of several encoded conversations -> one Example, by copying their ids: nothing is tokenised."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsvl.data.encode import Phrases
from dsvl.data.store import Examples
from dsvl.data.types import IGNORED, Example, Kind

Positions = tuple[np.ndarray, np.ndarray, np.ndarray]
"""ids, labels and kinds of adjacent positions."""


class Lines(NamedTuple):
    """Rounds of samples, L in all."""

    round: np.ndarray
    """(L,) int64: index into `Examples.rounds`."""
    fresh: np.ndarray
    """(L,) int64: how many of the sample's images are shown before it."""
    shift: np.ndarray
    """(L,) int64: the number, in the sample, of the first image of its conversation."""
    follow: np.ndarray
    """(L,) bool: whether its question must say which image it is about."""

    def take(self, at: np.ndarray) -> "Lines":
        """Those lines."""
        return Lines(*(column[at] for column in self))

    def slice(self, start: int, end: int) -> "Lines":
        """Lines `start` to `end`."""
        return Lines(*(column[start:end] for column in self))

    @classmethod
    def concatenate(cls, parts: "Sequence[Lines]") -> "Lines":
        """All lines of the parts."""
        return cls(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


class Composer:
    """Puts rounds together as if their conversations had been one when it was encoded."""

    def __init__(
        self, examples: Examples, phrases: Phrases, *, image_tokens: int, pad_id: int
    ) -> None:
        self.examples = examples
        image = _text([pad_id] * image_tokens)
        image[2][:] = Kind.IMAGE
        self._opening, self._turn = _text(phrases.opening), _text(phrases.turn)
        self._ask, self._after_images = _text(phrases.ask), _text(phrases.after_images)
        self._first = [_joined([_text(ids), image]) for ids in phrases.first_header]
        self._next = [_joined([_text(ids), image]) for ids in phrases.header]
        self._follow = [_text(ids) for ids in phrases.follow_up]
        self._refs = [[_text(ids) for ids in table] for table in (phrases.ref, phrases.spaced_ref)]
        # Lengths, for arithmetic over all samples at once.
        self._first_length = np.array([len(ids) for ids, _, _ in self._first])
        self._next_sum = np.cumsum([0, *(len(ids) for ids, _, _ in self._next)])
        self._follow_length = np.array([len(ids) for ids in phrases.follow_up])
        self._ref_length = np.array([[len(ids) for ids, _, _ in table] for table in self._refs])
        self._with_refs = bool(examples.counts["refs"].any())

    def compose(self, lines: Lines, images: np.ndarray) -> Example:
        """The sample of these lines and images (indices into `Examples.keys`, in order)."""
        examples = self.examples
        records = examples.record(lines.round)
        starts = examples.starts["ids"][records].tolist()
        pieces = [self._opening]
        shown = 0
        told = zip(
            examples.rounds[lines.round].tolist(), *(c.tolist() for c in lines[1:]), strict=True
        )
        for place, ((start, _, end, _), fresh, shift, follow) in enumerate(told):
            if place:
                pieces.append(self._turn)
            for number in range(shown, shown + fresh):
                pieces.append((self._next if number > shown else self._first)[number])
            if fresh:
                pieces.append(self._after_images)
            shown += fresh
            if follow:
                pieces += [self._ask, self._follow[shift]]
                start += len(self._ask[0])
            if shift and self._with_refs:
                for begin, stop, image, spaced in self._refs_of(int(records[place])):
                    if start <= begin < end:
                        pieces.append(self._copied(starts[place] + start, starts[place] + begin))
                        ids, labels, kinds = self._refs[spaced][image + shift]
                        trained = examples.labels[starts[place] + begin] != IGNORED
                        pieces.append((ids, ids if trained else labels, kinds))
                        start = stop
            pieces.append(self._copied(starts[place] + start, starts[place] + end))
        ids, labels, kinds = _joined(pieces)
        names = [examples.name(record) for record in dict.fromkeys(records.tolist())]
        keys = tuple([examples.keys[i] for i in images.tolist()])
        return Example("+".join(names), ids, labels, kinds, keys)

    def tokens(self, lines: Lines, counts: np.ndarray) -> np.ndarray:
        """(L,) int64: positions that each line adds to its sample; samples have `counts` lines each."""
        rounds = self.examples.rounds[lines.round].astype(np.int64)
        tokens = rounds[:, 2] - rounds[:, 0] + len(self._turn[0])
        first = np.cumsum(counts) - counts
        tokens[first[counts > 0]] += len(self._opening[0]) - len(self._turn[0])
        sums = np.concatenate([[0], np.cumsum(lines.fresh)])
        before = sums[:-1] - np.repeat(sums[first], counts)
        # More images than there are headers for are cut off afterwards: their length is of no account.
        most = len(self._first_length) - 1
        begin, last = np.minimum(before, most), np.minimum(before + lines.fresh, most + 1)
        others = self._next_sum[last] - self._next_sum[np.minimum(begin + 1, last)]
        headed = self._first_length[begin] + others + len(self._after_images[0])
        tokens += np.where(lines.fresh > 0, headed, 0)
        shift = np.minimum(lines.shift, most)
        tokens += np.where(lines.follow, self._follow_length[shift], 0)
        return tokens + self._renumbered(lines, since=0)

    def targets(self, lines: Lines) -> np.ndarray:
        """(L,) int64: supervised targets of each line."""
        rounds = self.examples.rounds[lines.round].astype(np.int64)
        return rounds[:, 2] - rounds[:, 1] + self._renumbered(lines, since=1)

    def _renumbered(self, lines: Lines, *, since: int) -> np.ndarray:
        """(L,) int64: by how many tokens new numbers lengthen references, in all (0) or answers alone (1)."""
        longer = np.zeros(len(lines.round), np.int64)
        if not self._with_refs:
            return longer
        moved = np.flatnonzero(lines.shift)
        records = self.examples.record(lines.round[moved])
        some = self.examples.counts["refs"][records] > 0
        for place, record in zip(moved[some].tolist(), records[some].tolist(), strict=True):
            bounds, shift = self.examples.rounds[lines.round[place]].tolist(), lines.shift[place]
            for begin, stop, image, spaced in self._refs_of(record):
                if bounds[since] <= begin < bounds[2]:
                    number = min(image + shift, self._ref_length.shape[1] - 1)
                    longer[place] += self._ref_length[spaced][number] - (stop - begin)
        return longer

    def _refs_of(self, record: int) -> list[list[int]]:
        start, count = (getattr(self.examples, n)["refs"][record] for n in ("starts", "counts"))
        return self.examples.refs[start : start + count].tolist()

    def _copied(self, start: int, end: int) -> Positions:
        examples = self.examples
        return examples.ids[start:end], examples.labels[start:end], examples.kinds[start:end]


def _text(ids: Sequence[int]) -> Positions:
    length = len(ids)
    return (
        np.array(ids, np.int32),
        np.full(length, IGNORED, np.int32),
        np.full(length, Kind.TEXT, np.int8),
    )


def _joined(pieces: Sequence[Positions]) -> Positions:
    ids, labels, kinds = zip(*pieces, strict=True)
    return np.concatenate(ids), np.concatenate(labels), np.concatenate(kinds)
