"""How conversations become the samples of an epoch: put together, drawn, weighed and ordered.

Every draw is a pure function of (seed, epoch, id), and an epoch is arithmetic on a few arrays: it takes no
tokenizer and no image, so blends can change over data that are prepared once.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from dsvl.config import BlendConfig, DataConfig
from dsvl.data.compose import Composer
from dsvl.data.draw import Drawn, Joins, concatenated, groups_of, mix, sizes_of, whole
from dsvl.data.store import Examples, Prepared
from dsvl.data.stretches import offsets, running, spans, totals
from dsvl.data.types import Example


class Samples(Protocol):
    """Examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class Epoch:
    """The samples of one epoch, by index."""

    def __init__(self, composer: Composer, drawn: Drawn, blends: np.ndarray) -> None:
        self._composer, self._drawn = composer, drawn
        self.blends = blends
        """(S,) int64: the blend that a sample is of, by its place among them."""
        self._lines, self._images = offsets(drawn.counts), offsets(drawn.image_counts)
        examples, whole = composer.examples, drawn.record >= 0
        record = drawn.record[whole]
        self.lengths = totals(composer.tokens(drawn.lines, drawn.counts), drawn.counts)
        """(S,) int64: positions, images included."""
        self.lengths[whole] = examples.lengths[record]
        self.targets = totals(composer.targets(drawn.lines), drawn.counts)
        """(S,) int64: supervised targets."""
        self.targets[whole] = examples.targets[record]
        self.rounds = drawn.counts.copy()
        """(S,) int64."""
        self.rounds[whole] = examples.counts["rounds"][record]
        self.images = drawn.image_counts.copy()
        """(S,) int64: how many images."""
        self.images[whole] = examples.counts["images"][record]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        """Sample `index`, 0 <= index < S."""
        drawn, composer = self._drawn, self._composer
        if drawn.record[index] >= 0:
            return composer.examples[int(drawn.record[index])]
        line, image = self._lines[index], self._images[index]
        return composer.compose(
            drawn.lines.slice(line, line + drawn.counts[index]),
            drawn.images[image : image + drawn.image_counts[index]],
        )

    def take(self, samples: np.ndarray) -> "Epoch":
        """Those samples, in that order."""
        return Epoch(self._composer, self._drawn.take(samples), self.blends[samples])

    def said(self) -> Iterator[tuple[bytes, bytes]]:
        """The ids of question and answer of every round of every sample, as bytes."""
        for index in range(len(self)):
            yield from self._composer.examples.said(self._members(index))

    def _members(self, index: int) -> np.ndarray:
        record, examples = int(self._drawn.record[index]), self._composer.examples
        if record >= 0:
            first = examples.starts["rounds"][record]
            return np.arange(first, first + examples.counts["rounds"][record])
        line = self._lines[index]
        return self._drawn.lines.round[line : line + self._drawn.counts[index]]


class Blender:
    """The samples of every epoch of one side of the split."""

    def __init__(
        self, prepared: Prepared, split: Literal["train", "eval"], *, data: DataConfig, seed: int
    ) -> None:
        """Blends as `data.blends` says; conversations that it does not name are samples by themselves."""
        examples = getattr(prepared, split)
        self._composer = Composer(
            examples,
            prepared.phrases,
            image_tokens=prepared.image_tokens,
            pad_id=prepared.pad_id,
        )
        self._data, self._seed = data, seed
        self.blends = data.all_blends()
        self._makers = [
            _maker(blend, examples, data=data, sources=prepared.sources)
            for blend in self.blends.values()
        ]
        self.sizes = shares(
            self.blends.values(),
            made=[maker.size for maker in self._makers],
            temperature=data.temperature,
        )
        """Samples of each blend in an epoch: always the same."""
        self._epoch = -1
        self._drawn: Epoch | None = None

    def __len__(self) -> int:
        return sum(self.sizes)

    def epoch(self, number: int) -> Epoch:
        """The samples of epoch `number`, blend by blend; the last one asked for is kept."""
        if self._drawn is None or number != self._epoch:
            drawn = [
                self._draw(maker, size, number)
                for maker, size in zip(self._makers, self.sizes, strict=True)
            ]
            blends = np.repeat(np.arange(len(drawn)), self.sizes)
            self._epoch, self._drawn = (
                number,
                Epoch(self._composer, Drawn.concatenate(drawn), blends),
            )
        return self._drawn

    def _draw(self, maker: "_Maker", size: int, epoch: int) -> Drawn:
        """`size` samples: whole passes over what the blend makes, and some of another pass."""
        hashes, parts, wanted = self._composer.examples.hashes, [], size
        while wanted or not parts:
            key = mix(self._seed, epoch, len(parts))
            samples = self._capped(maker.make(key))
            if wanted < maker.size:
                chosen = np.argsort(mix(hashes[samples.lead], key), kind="stable")[:wanted]
                samples = samples.take(np.sort(chosen))
            parts.append(samples)
            wanted -= len(samples.record)
        return Drawn.concatenate(parts)

    def _capped(self, drawn: Drawn) -> Drawn:
        """Without the last rounds of samples that are longer than the caps allow."""
        data, counts = self._data, drawn.counts
        first = np.repeat(offsets(counts), counts)
        images = running(drawn.lines.fresh, counts)
        # All three grow from round to round, so that what is kept is the beginning.
        keep = running(self._composer.tokens(drawn.lines, counts), counts) <= data.max_tokens
        keep &= images <= data.max_images
        if data.max_rounds is not None:
            keep &= np.arange(len(first)) - first < data.max_rounds
        if keep.all():
            return drawn
        lines = drawn.lines.take(np.flatnonzero(keep))
        kept = totals(keep, counts)
        shown = totals(lines.fresh, kept)
        at = spans(offsets(drawn.image_counts), shown)
        return drawn._replace(counts=kept, lines=lines, image_counts=shown, images=drawn.images[at])


def shares(
    blends: Collection[BlendConfig], *, made: Sequence[int], temperature: float
) -> list[int]:
    """How many samples an epoch has of each blend, of which one pass makes `made`.

    A blend's size is its `samples`, or `epochs` passes. The epoch has as many samples as all sizes together,
    divided in proportion to weight * size ** (1 / temperature), and rounded so that none is lost.
    """
    sizes = np.array(
        [
            round(blend.epochs * found) if blend.samples is None else min(blend.samples, found)
            for blend, found in zip(blends, made, strict=True)
        ]
    )
    weights = np.array([blend.weight for blend in blends])
    parts = weights * sizes.astype(float) ** (1 / temperature) * (sizes > 0)
    exact = sizes.sum() * parts / max(parts.sum(), 1e-300)
    whole = np.floor(exact).astype(int)
    lacking = sizes.sum() - whole.sum()
    whole[np.argsort(whole - exact, kind="stable")[:lacking]] += 1
    return whole.tolist()


def order(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """(n,) int64: the order of `n` samples in an epoch; seeds and epochs are not negative."""
    # Raw bits sorted, not Generator.permutation, whose stream numpy may change between versions.
    bits = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    return np.argsort(bits, kind="stable")


def deal(lengths: np.ndarray, parts: int) -> list[np.ndarray]:
    """The samples of a batch in `parts` of equal number and of tokens as equal as can be, each ascending.

    The longest go first, each to the part with the fewest tokens that has room. Parts come with the most
    tokens first, so that workers which take them in turn have passes of similar length at the same time.
    """
    room = len(lengths) // parts
    members: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for sample in np.argsort(-lengths, kind="stable").tolist():
        part = min((p for p in range(parts) if len(members[p]) < room), key=tokens.__getitem__)
        members[part].append(sample)
        tokens[part] += int(lengths[sample])
    heaviest = sorted(range(parts), key=tokens.__getitem__, reverse=True)
    return [np.sort(members[part]) for part in heaviest]


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes all samples of a blend, always as many."""

    size: int
    make: Callable[[np.ndarray], Drawn]
    """Of the key of the draws."""


def _maker(
    blend: BlendConfig, examples: Examples, *, data: DataConfig, sources: list[str]
) -> _Maker:
    wanted = [sources.index(name) for name in blend.sets if name in sources]
    records = np.flatnonzero(np.isin(examples.sources, wanted))
    if blend.join:
        joins = Joins(examples, records, followups=blend.followups)
        return _Maker(len(joins.pairs), joins.make)
    apart = examples.alone[records]
    joinable, alone = records[~apart], records[apart]
    groups = groups_of(len(joinable), *blend.concat)

    def make(key: np.ndarray) -> Drawn:
        parts = [whole(examples, alone, data)]
        if groups == len(joinable):
            parts.append(whole(examples, joinable, data))
        else:
            drawn = joinable[np.argsort(mix(examples.hashes[joinable], key), kind="stable")]
            sizes = sizes_of(len(drawn), groups, *blend.concat, key=key)
            parts.append(concatenated(examples, drawn, sizes))
        return Drawn.concatenate(parts)

    return _Maker(len(alone) + groups, make)
