"""Where text and images lie in a batch, found on the CPU before the model runs.

Under MMCA an image token sees only itself and a text token sees the text and the images before it in its
sample. So the decoder takes all text tokens of a batch first and all image tokens after them, without
padding, and attention is a few dense calls on slices. A `Layout` says which.

M text tokens, F image tokens, n tokens whose final state is wanted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from dsvl.data.types import Kind


class Run(NamedTuple):
    """Adjacent queries that see the same images: the first `images` image tokens of their sample."""

    start: int
    end: int
    images: int


@dataclass(frozen=True, slots=True)
class Span:
    """Adjacent queries of one sample, which see its first `text` text tokens.

    The last query sees all of these, the one before it all but the last, and so on.
    """

    sample: int
    start: int
    end: int
    text: int
    runs: tuple[Run, ...]
    """Cuts the queries where an image stands between them."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch of (B, S) positions as two streams. Positions are counted in the flattened B * S."""

    kinds: torch.Tensor
    """(B, S) int8 of `Kind`."""
    packing: torch.Tensor | None
    """(B, S) int64: which sample of its row a position belongs to, where rows hold several."""
    plain: bool
    """Whether rows hold one sample each, padded on the right: then no query ever reaches padding."""
    text: torch.Tensor
    """(M,) int64: position of each text token."""
    images: torch.Tensor
    """(F,) int64: position of each image token that passes through the decoder."""
    text_rotary: torch.Tensor
    """(M,) int64: place of each text token within its sample, which rotary embeddings turn by."""
    image_rotary: torch.Tensor
    """The same for the image tokens, those already known included."""
    wanted: torch.Tensor
    """(n,) int64: indices into the M + F tokens whose final states are wanted, text tokens first."""
    wanted_positions: torch.Tensor
    """(n,) int64: position of each wanted token."""
    samples: tuple[tuple[int, int, int, int], ...]
    """Where a sample's text tokens start and end in M, and its image tokens, known ones included."""
    spans: tuple[Span, ...]
    """Every text token as a query, a span a sample."""
    wanted_spans: tuple[Span, ...]
    """The wanted text tokens as queries, numbered within `wanted`."""

    def to(self, device: torch.device) -> "Layout":
        """The same on another device."""
        tensors = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **tensors)


def lay_out(
    kinds: np.ndarray,
    wanted: np.ndarray,
    *,
    samples: np.ndarray | None = None,
    known: np.ndarray | None = None,
    past: Sequence[tuple[int, int]] | None = None,
) -> Layout:
    """The layout of a batch.

    Args:
        kinds: (B, S) of `Kind`; padding may stand anywhere.
        wanted: (B, S) bool, the positions whose final states are wanted.
        samples: (B, S) int, which sample of its row a position belongs to, where rows are packed; samples
            of a row lie one after another, and none sees another.
        known: (B, S) bool, image tokens whose keys and values are at hand: they are seen, but do not pass
            through the decoder, and have no final state.
        past: text and image tokens of each row that a cache holds already.
    """
    rows, length = kinds.shape
    row = np.repeat(np.arange(rows), length)
    kind = kinds.reshape(-1)
    filled = np.flatnonzero(kind != Kind.PAD)
    within = np.zeros_like(row) if samples is None else samples.reshape(-1)
    # What follows is about the T tokens that are no padding, in their order.
    row, kind, within, asked = row[filled], kind[filled], within[filled], wanted.reshape(-1)[filled]
    is_text = kind == Kind.TEXT
    starts = _changes(row, within)
    sample = np.cumsum(starts) - 1 if len(starts) else starts
    first = np.flatnonzero(starts)
    edges = [*first.tolist(), len(filled)]
    before = np.zeros((len(first), 2), np.int64)  # text and image tokens in the cache
    if past is not None:
        before = np.asarray(past, np.int64).reshape(-1, 2)[row[first]]

    # Text and image tokens of the same sample up to each token, itself included.
    text_count = np.cumsum(is_text) - np.concatenate([[0], np.cumsum(is_text)])[first][sample]
    image_count = np.cumsum(~is_text) - np.concatenate([[0], np.cumsum(~is_text)])[first][sample]
    rotary = text_count + image_count - 1 + before.sum(1)[sample]
    text_seen = text_count + before[sample, 0]
    images_seen = image_count + before[sample, 1]

    text, images = np.flatnonzero(is_text), np.flatnonzero(~is_text)
    fresh = images if known is None else images[~known.reshape(-1)[filled[images]]]
    text_at, image_at = np.cumsum(is_text), np.cumsum(~is_text)
    bounds = tuple(
        (
            int(text_at[a] - is_text[a]),
            int(text_at[b - 1]),
            int(image_at[a] - (not is_text[a])),
            int(image_at[b - 1]),
        )
        for a, b in pairwise(edges)
    )
    order = np.concatenate([text, fresh])
    asked_text = text[asked[text]]
    chosen = np.concatenate([asked_text, fresh[asked[fresh]]])
    assert len(chosen) == wanted.sum(), "padding and known images have no final state"
    index = np.empty(len(filled), np.int64)
    index[order] = np.arange(len(order))

    def spans(queries: np.ndarray, cuts: np.ndarray) -> tuple[Span, ...]:
        """Queries (tokens, ascending) in adjacent groups, each cut where the images seen change."""
        found = []
        for a, b in _stretches(cuts):
            inner = _stretches(_changes(images_seen[queries[a:b]]))
            last = queries[b - 1]
            runs = tuple(Run(a + c, a + d, int(images_seen[queries[a + c]])) for c, d in inner)
            found.append(Span(int(sample[last]), a, b, int(text_seen[last]), runs))
        return tuple(found)

    apart = _changes(text_at[asked_text] - np.arange(len(asked_text)), sample[asked_text])
    return Layout(
        kinds=torch.from_numpy(kinds),
        packing=None if samples is None else torch.from_numpy(samples),
        plain=samples is None and not (np.diff((kinds != Kind.PAD).astype(np.int8)) > 0).any(),
        text=torch.from_numpy(filled[text]),
        images=torch.from_numpy(filled[fresh]),
        text_rotary=torch.from_numpy(rotary[text]),
        image_rotary=torch.from_numpy(rotary[images]),
        wanted=torch.from_numpy(index[chosen]),
        wanted_positions=torch.from_numpy(filled[chosen]),
        samples=bounds,
        spans=spans(text, _changes(sample[text])),
        wanted_spans=spans(asked_text, apart),
    )


def _changes(*columns: np.ndarray) -> np.ndarray:
    """(T,) bool: where any column differs from the place before; true at the first."""
    changed = np.ones(len(columns[0]), bool)
    changed[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return changed


def _stretches(starts: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of every stretch that begins where `starts` is true."""
    return list(pairwise([*np.flatnonzero(starts).tolist(), len(starts)]))
