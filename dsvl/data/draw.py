"""Conversations put together to samples: some after one another, or each about what others are about.

Draws are pure functions of a key and of the ids of what is drawn. Conversations have N rows; S samples have
L lines in all, a line for each of their rounds.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsvl.config import DataConfig
from dsvl.data.compose import Lines
from dsvl.data.store import Examples
from dsvl.data.stretches import offsets, running, spans


class Drawn(NamedTuple):
    """Samples of a blend."""

    record: np.ndarray
    """(S,) int64: the conversation that a sample is as it stands, or -1."""
    lead: np.ndarray
    """(S,) int64: a conversation of it, which names the sample in random draws."""
    counts: np.ndarray
    """(S,) int64: its lines, none where it is a conversation as it stands."""
    lines: Lines
    """(L,) of all samples, end to end."""
    image_counts: np.ndarray
    """(S,) int64: its images; the same holds."""
    images: np.ndarray
    """(I,) int64: indices into `Examples.keys`."""

    def take(self, samples: np.ndarray) -> "Drawn":
        """Those samples, in that order."""
        at = spans(offsets(self.counts)[samples], self.counts[samples])
        shown = spans(offsets(self.image_counts)[samples], self.image_counts[samples])
        return Drawn(
            self.record[samples],
            self.lead[samples],
            self.counts[samples],
            self.lines.take(at),
            self.image_counts[samples],
            self.images[shown],
        )

    @classmethod
    def concatenate(cls, parts: "Sequence[Drawn]") -> "Drawn":
        """All samples of the parts."""
        columns = {
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in cls._fields
            if name != "lines"
        }
        return cls(lines=Lines.concatenate([part.lines for part in parts]), **columns)


def mix(*words: np.ndarray | int) -> np.ndarray:
    """uint64, evenly spread: a hash of integers or arrays of them, by the finaliser of splitmix64."""
    mixed = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        for word in words:
            mixed = mixed * np.uint64(3) ^ np.asarray(word).astype(np.uint64)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return np.asarray(mixed)


def groups_of(records: int, fewest: int, most: int) -> int:
    """How many groups of `fewest` to `most` records there are, as near to the mean as it can be."""
    near = round(2 * records / (fewest + most))
    return max(-(-records // most), min(near, max(records // fewest, 1))) if records else 0


def sizes_of(records: int, groups: int, fewest: int, most: int, *, key: np.ndarray) -> np.ndarray:
    """(groups,) sizes that sum to `records`: drawn evenly, then some changed by one until they do.

    The last is smaller than `fewest` where no other way is.
    """
    if groups * fewest > records:
        return np.array([fewest] * (groups - 1) + [records - fewest * (groups - 1)])
    spread = np.uint64(most - fewest + 1)
    sizes = fewest + (mix(key, 1, np.arange(groups)) % spread).astype(np.int64)
    surplus = int(sizes.sum()) - records
    room = sizes - fewest if surplus > 0 else most - sizes
    units = np.repeat(np.arange(groups), room)
    chosen = np.argsort(mix(key, 2, np.arange(len(units))), kind="stable")[: abs(surplus)]
    np.add.at(sizes, units[chosen], -np.sign(surplus))
    return sizes


def whole(examples: Examples, records: np.ndarray, data: DataConfig) -> Drawn:
    """Conversations as they stand, but for those that are too long: they have lines, to be cut."""
    long = examples.lengths[records] > data.max_tokens
    if data.max_rounds is not None:
        long |= examples.counts["rounds"][records] > data.max_rounds
    cut = concatenated(examples, records[long], np.ones(long.sum(), np.int64))
    counts, shown = np.zeros(len(records), np.int64), np.zeros(len(records), np.int64)
    counts[long], shown[long] = cut.counts, cut.image_counts
    record = np.where(long, -1, records)
    return cut._replace(record=record, lead=records, counts=counts, image_counts=shown)


def concatenated(examples: Examples, records: np.ndarray, sizes: np.ndarray) -> Drawn:
    """Conversations one after another, `sizes` of them to a sample."""
    sample = np.repeat(np.arange(len(sizes)), sizes)
    rounds, images = examples.counts["rounds"][records], examples.counts["images"][records]
    before = running(images, sizes) - images  # images of the sample that earlier records have shown
    line = spans(examples.starts["rounds"][records], rounds)
    lines = Lines(
        round=line,
        fresh=examples.shows[line],
        shift=np.repeat(before, rounds),
        follow=np.zeros(len(line), bool),
    )
    return Drawn(
        record=np.full(len(sizes), -1),
        lead=records[offsets(sizes)],
        counts=np.bincount(sample, weights=rounds, minlength=len(sizes)).astype(np.int64),
        lines=lines,
        image_counts=np.bincount(sample, weights=images, minlength=len(sizes)).astype(np.int64),
        images=examples.images[spans(examples.starts["images"][records], images)].astype(np.int64),
    )


class Joins:
    """Conversations over several images, each after some that are about one of its images alone.

    The LLaVA-Otter blend (paper, section 5.1): every image but the last must have a conversation of its own.
    """

    def __init__(self, examples: Examples, records: np.ndarray, *, followups: bool) -> None:
        self._examples, self._followups = examples, followups
        records = records[~examples.alone[records]]
        shown = examples.counts["images"][records]
        single, several = records[shown == 1], records[shown > 1]
        single_image = examples.images[examples.starts["images"][single]]
        by_image = single[np.argsort(single_image, kind="stable")]
        sorted_images = np.sort(single_image)

        # A slot is an image of a conversation over several.
        slots = examples.counts["images"][several]
        pair = np.repeat(np.arange(len(several)), slots)
        place = np.arange(len(pair)) - np.repeat(offsets(slots), slots)
        image = examples.images[spans(examples.starts["images"][several], slots)]
        first = np.searchsorted(sorted_images, image, "left")
        candidates = np.searchsorted(sorted_images, image, "right") - first
        last = place == np.repeat(slots, slots) - 1
        twice = _repeats(pair, image)
        lacking = np.bincount(
            pair, weights=((candidates == 0) & ~last) | twice, minlength=len(slots)
        )
        fits = lacking == 0

        kept = fits[pair]
        self.pairs = several[fits]
        """(S,): conversations over several images, which the samples are built around."""
        self._slots = slots[fits]
        self._images = image[kept].astype(np.int64)
        self._least = np.where(last, 0, 1)[kept]
        self._candidates = candidates[kept]
        self._candidate = by_image[spans(first[kept], candidates[kept])]

    def make(self, key: np.ndarray) -> Drawn:
        """A sample of each, in their order."""
        examples, pairs = self._examples, self.pairs
        sample_of_slot = np.repeat(np.arange(len(pairs)), self._slots)
        place_of_slot = np.arange(len(sample_of_slot)) - np.repeat(
            offsets(self._slots), self._slots
        )
        hashes = examples.hashes[pairs]

        # Of an image's conversations: the first few in a random order; for the last image perhaps none.
        spread = (self._candidates - self._least + 1).astype(np.uint64)
        drawn = mix(hashes[sample_of_slot], key, 3, place_of_slot) % spread
        wanted = self._least + drawn.astype(np.int64)
        slot = np.repeat(np.arange(len(sample_of_slot)), self._candidates)
        chance = mix(examples.hashes[self._candidate], hashes[sample_of_slot[slot]], key)
        by_chance = np.lexsort([chance, slot])
        candidate = self._candidate[by_chance]
        rank = np.arange(len(slot)) - np.repeat(offsets(self._candidates), self._candidates)
        told = rank < wanted[slot]
        later = (rank == wanted[slot]) & self._followups

        # Of the rounds about all images: some, in their order.
        rounds = examples.counts["rounds"][pairs]
        asked = 1 + (mix(hashes, key, 4) % rounds.astype(np.uint64)).astype(np.int64)
        sample = np.repeat(np.arange(len(pairs)), rounds)
        own = spans(examples.starts["rounds"][pairs], rounds)
        number = np.arange(len(own)) - np.repeat(offsets(rounds), rounds)
        by_chance = np.lexsort([mix(hashes[sample], key, 5, number), sample])
        keep = np.zeros(len(own), bool)
        keep[by_chance[number < asked[sample]]] = True

        def spoken(which: np.ndarray, section: int) -> tuple[np.ndarray, ...]:
            """Sort keys and rounds of whole conversations."""
            count = examples.counts["rounds"][candidate[which]]
            spread = np.repeat(which, count)
            line = spans(examples.starts["rounds"][candidate[which]], count)
            return (
                sample_of_slot[slot[spread]],
                np.full(len(line), section),
                place_of_slot[slot[spread]],
                rank[spread],
                line,
            )

        about = (sample[keep], np.ones(keep.sum(), np.int64), *np.zeros((2, keep.sum()), np.int64))
        parts = [
            spoken(np.flatnonzero(told), 0),
            (*about, own[keep]),
            spoken(np.flatnonzero(later), 2),
        ]
        sample, section, place, rank, line = (np.concatenate(p) for p in zip(*parts, strict=True))
        at = np.lexsort([line, rank, place, section, sample])
        sample, section, place, rank, line = (c[at] for c in (sample, section, place, rank, line))

        counts = np.bincount(sample, minlength=len(pairs))
        # The first conversation about an image shows it, in the round in which it does by itself.
        fresh = np.where((section == 0) & (rank == 0), examples.shows[line], 0)
        # The first round about all images shows those that no conversation has shown.
        opens = (section == 1) & np.concatenate(
            [[True], (section != 1)[:-1] | (np.diff(sample) > 0)]
        )
        introduced = np.bincount(sample, weights=fresh, minlength=len(pairs)).astype(np.int64)
        fresh[opens] = (self._slots - introduced)[sample[opens]]
        return Drawn(
            record=np.full(len(pairs), -1),
            lead=pairs,
            counts=counts,
            lines=Lines(line, fresh, shift=np.where(section == 1, 0, place), follow=section == 2),
            image_counts=self._slots,
            images=self._images,
        )


def _repeats(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """(n,) bool: whether the group has the value more than once."""
    at = np.lexsort([value, group])
    same = (np.diff(group[at]) == 0) & (np.diff(value[at]) == 0)
    repeated = np.zeros(len(at), bool)
    repeated[at[1:]] |= same
    repeated[at[:-1]] |= same
    return repeated
