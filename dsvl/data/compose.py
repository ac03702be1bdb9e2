"""Rounds of several encoded conversations -> one Example, by copying their ids: nothing is tokenised."""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from dsvl.data.encode import Phrases
from dsvl.data.store import Examples
from dsvl.data.stretches import offsets, running, spans
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
        self._ask, after_images = _text(phrases.ask), _text(phrases.after_images)
        first = [_joined([_text(ids), image]) for ids in phrases.first_header]
        others = [_joined([_text(ids), image]) for ids in phrases.header]

        @cache
        def shown(start: int, end: int) -> Positions:
            """Images `start` to `end`, and the text around them."""
            return _joined([first[start], *others[start + 1 : end], after_images])

        self._shown = shown
        self._follow = [_text(ids) for ids in phrases.follow_up]
        self._refs = [[_text(ids) for ids in table] for table in (phrases.ref, phrases.spaced_ref)]
        # Lengths, for arithmetic over all samples at once.
        self._first_length = np.array([len(ids) + len(after_images[0]) for ids, _, _ in first])
        self._others_sum = np.cumsum([0, *(len(ids) for ids, _, _ in others)])
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
            if fresh:
                pieces.append(self._shown(shown, shown + fresh))
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
        tokens[offsets(counts)[counts > 0]] += len(self._opening[0]) - len(self._turn[0])
        before = running(lines.fresh, counts) - lines.fresh
        # More images than there are headers for are cut off afterwards: their length is of no account.
        most = len(self._first_length) - 1
        begin, last = np.minimum(before, most), np.minimum(before + lines.fresh, most + 1)
        others = self._others_sum[last] - self._others_sum[np.minimum(begin + 1, last)]
        tokens += np.where(lines.fresh > 0, self._first_length[begin] + others, 0)
        shift = np.minimum(lines.shift, most)
        tokens += np.where(lines.follow, self._follow_length[shift], 0)
        return tokens + self._renumbered(lines, since=0)

    def targets(self, lines: Lines) -> np.ndarray:
        """(L,) int64: supervised targets of each line."""
        rounds = self.examples.rounds[lines.round].astype(np.int64)
        return rounds[:, 2] - rounds[:, 1] + self._renumbered(lines, since=1)

    def _renumbered(self, lines: Lines, *, since: int) -> np.ndarray:
        """(L,) int64: by how many tokens new numbers lengthen references, in all (0) or answers alone (1)."""
        examples, most = self.examples, self._ref_length.shape[1] - 1
        moved = np.flatnonzero(lines.shift)
        records = examples.record(lines.round[moved])
        refs = examples.counts["refs"][records]
        line = np.repeat(moved, refs)
        begin, end, image, spaced = examples.refs[spans(examples.starts["refs"][records], refs)].T
        bounds = examples.rounds[lines.round[line]]
        within = (bounds[:, since] <= begin) & (begin < bounds[:, 2])
        length = self._ref_length[spaced, np.minimum(image + lines.shift[line], most)]
        longer = np.where(within, length - (end - begin), 0)
        return np.bincount(line, longer, minlength=len(lines.round)).astype(np.int64)

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
