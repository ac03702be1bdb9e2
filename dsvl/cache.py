"""What a decoder keeps of conversations: keys and values of their text and of their images, apart.

B samples, K key heads, G query heads a key head, H head size, C positions of room.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention

from dsvl.attention import KeyValues
from dsvl.data.layout import Layout


class Cache(Protocol):
    """What a decoder keeps of its samples, in a form of its own."""

    past: list[tuple[int, int]]
    """Text and image tokens of each sample."""

    def mark(self) -> Any:
        """Where it stands, for `rewind`."""
        ...

    def rewind(self, mark: Any) -> None:
        """Forget what was added since."""
        ...

    def drop(self, counts: Sequence[int]) -> None:
        """Forget the last so many tokens of each sample, all of them text."""
        ...

    def select(self, samples: Sequence[int]) -> None:
        """Keep these samples alone, in this order."""
        ...


class StreamCache:
    """Keys and values of B samples in all layers, for `dsvl.decoder.Streams`."""

    def __init__(self, samples: int, layers: int) -> None:
        """Begin with nothing."""
        self.past = [(0, 0)] * samples
        """Text and image tokens of each sample."""
        self.stepping = False
        """Whether the tokens being added are one text token a sample."""
        self._text = [_Buffer() for _ in range(layers)]
        self._images = [_Buffer() for _ in range(layers)]

    def mark(self) -> Any:
        """As `Cache`."""
        return self.past

    def rewind(self, mark: Any) -> None:
        """As `Cache`; what lies beyond is room, as before."""
        self.past = mark

    def drop(self, counts: Sequence[int]) -> None:
        """As `Cache`; what lies beyond is room, as before."""
        self.past = [(a - count, b) for (a, b), count in zip(self.past, counts, strict=True)]

    def select(self, samples: Sequence[int]) -> None:
        """As `Cache`."""
        self.past = [self.past[sample] for sample in samples]
        for buffer in (*self._text, *self._images):
            if buffer.held[0].shape[0]:
                buffer.held = buffer.held[0][samples], buffer.held[1][samples]

    def begin(self, layout: Layout) -> None:
        """Tokens are about to be added, layer by layer."""
        self._texts = _Growth([a for a, _ in self.past], [(a, b) for a, b, _, _ in layout.samples])
        self._pictures = _Growth(
            [b for _, b in self.past], [(a, b) for _, _, a, b in layout.samples]
        )
        self.stepping = self._texts.one_each and not self._pictures.tokens
        if self.stepping:
            device = layout.text.device
            self._where_B = torch.tensor(self._texts.before, device=device)
            self._seen = [growth.seen(device) for growth in (self._texts, self._pictures)]

    def extend(self, number: int, text: KeyValues, images: KeyValues) -> None:
        """Add to a layer the keys and values (1, K, M, H) and (1, K, F, H) of the new tokens."""
        streams = (self._text, text, self._texts), (self._images, images, self._pictures)
        for buffers, new, growth in streams:
            if not growth.tokens:
                continue
            buffers[number].make_room(new, growth)
            if self.stepping:
                buffers[number].put_one_each(new, self._where_B)
            else:
                buffers[number].put(new, growth)

    def end(self) -> None:
        """All layers have the new tokens."""
        self.past = list(zip(self._texts.after, self._pictures.after, strict=True))

    def text(self, number: int, sample: int) -> KeyValues:
        """(1, K, C, H) keys and values of a sample's text in a layer, room included."""
        return self._text[number].of(sample)

    def images(self, number: int, sample: int) -> KeyValues:
        """The same of its images."""
        return self._images[number].of(sample)

    def step(self, number: int, query: torch.Tensor, *, scheme: str) -> torch.Tensor:
        """Attend from one new text token a sample to all of it: (1, N, B, H) -> (1, N, B, H)."""
        streams = [(self._text[number], self._seen[0])]
        if any(self._pictures.after):
            streams.append((self._images[number], self._seen[1]))
        heads = self._text[number].heads
        query_BKGH = query[0].transpose(0, 1).unflatten(1, (heads, -1))
        groups = [[stream] for stream in streams] if scheme == "mmca" else [streams]
        output_BKGH = sum(_over(query_BKGH, group) for group in groups)
        assert isinstance(output_BKGH, torch.Tensor)
        return output_BKGH.flatten(1, 2).transpose(0, 1)[None]


@dataclass(frozen=True, slots=True)
class _Seen:
    """Which keys each sample sees: the first `longest`, or of these where the mask says so."""

    longest: int
    mask: torch.Tensor | None
    """(B, longest)."""


@dataclass(frozen=True, slots=True)
class _Growth:
    """What is added to each sample: `places` (start, end) of the new tokens, after `before` earlier ones."""

    before: list[int]
    places: list[tuple[int, int]]

    @property
    def after(self) -> list[int]:
        return [n + b - a for n, (a, b) in zip(self.before, self.places, strict=True)]

    @property
    def tokens(self) -> int:
        return sum(b - a for a, b in self.places)

    @property
    def one_each(self) -> bool:
        return all(b - a == 1 for a, b in self.places)

    def seen(self, device: torch.device) -> _Seen:
        counts = self.after
        longest = max(counts)
        if min(counts) == longest:
            return _Seen(longest, None)
        places = torch.arange(longest, device=device)
        return _Seen(longest, places < torch.tensor(counts, device=device)[:, None])


class _Buffer:
    """Keys and values (B, K, C, H) of one layer, filled from the left."""

    def __init__(self) -> None:
        self.held: KeyValues = (torch.empty(0, 0, 0, 0), torch.empty(0, 0, 0, 0))

    @property
    def heads(self) -> int:
        return self.held[0].shape[1]

    def of(self, sample: int) -> KeyValues:
        return self.held[0][sample : sample + 1], self.held[1][sample : sample + 1]

    def make_room(self, new: KeyValues, growth: _Growth) -> None:
        room, needed = self.held[0].shape[2], max(growth.after)
        if needed <= room:
            return
        _, heads, _, size = new[0].shape
        shape = (len(growth.places), heads, max(needed, 2 * room), size)
        wider = new[0].new_zeros(shape), new[1].new_zeros(shape)
        for wide, held in zip(wider, self.held, strict=True):
            if room:
                wide[:, :, :room] = held
        self.held = wider

    def put(self, new: KeyValues, growth: _Growth) -> None:
        for held, tensor in zip(self.held, new, strict=True):
            for sample, (start, (a, b)) in enumerate(
                zip(growth.before, growth.places, strict=True)
            ):
                held[sample, :, start : start + b - a] = tensor[0, :, a:b]

    def put_one_each(self, new: KeyValues, where_B: torch.Tensor) -> None:
        samples = torch.arange(len(where_B), device=where_B.device)
        for held, tensor in zip(self.held, new, strict=True):
            held[samples, :, where_B] = tensor[0].transpose(0, 1)


def _over(query_BKGH: torch.Tensor, streams: Sequence[tuple[_Buffer, _Seen]]) -> torch.Tensor:
    """One softmax over the seen keys of all the streams; zero for a sample that sees none."""
    key_BKCH, value_BKCH = (
        torch.cat([buffer.held[i][:, :, : seen.longest] for buffer, seen in streams], dim=2)
        if len(streams) > 1
        else streams[0][0].held[i][:, :, : streams[0][1].longest]
        for i in (0, 1)
    )
    masks = [seen.mask for _, seen in streams]
    if all(mask is None for mask in masks):
        return scaled_dot_product_attention(query_BKGH, key_BKCH, value_BKCH)
    samples, device = len(query_BKGH), query_BKGH.device
    mask_BC = torch.cat(
        [
            torch.ones(samples, seen.longest, dtype=torch.bool, device=device)
            if seen.mask is None
            else seen.mask
            for _, seen in streams
        ],
        dim=1,
    )
    empty_B1 = ~mask_BC.any(1, keepdim=True)
    # A sample without a key to see is given all, and its result is then thrown away.
    output_BKGH = scaled_dot_product_attention(
        query_BKGH, key_BKCH, value_BKCH, attn_mask=(mask_BC | empty_B1)[:, None, None]
    )
    return output_BKGH.masked_fill(empty_B1[:, :, None, None], 0.0)


LayerImages = tuple[KeyValues, ...]
"""An image in every layer: keys, before they are turned by a place, and values, each (1, K, tokens, H)."""


class ImageStore:
    """Images as a frozen decoder sees them under MMCA: the same in every conversation and at every place.

    Holds the most recently used ones within a limit. It belongs to one model as it is: once projection or
    adapters are trained further, the images in it are no longer theirs.
    """

    def __init__(self, *, limit_bytes: int) -> None:
        """Begin empty."""
        self.limit_bytes = limit_bytes
        self._held: OrderedDict[str, LayerImages] = OrderedDict()
        self._bytes = 0

    def __contains__(self, key: str) -> bool:
        """Whether an image is held."""
        return key in self._held

    def get(self, key: str) -> LayerImages:
        """The image of a key that is held."""
        self._held.move_to_end(key)
        return self._held[key]

    def put(self, key: str, image: LayerImages) -> None:
        """Hold an image, and let go of those that have not been used for longest."""
        self._bytes += _bytes(image) - _bytes(self._held.get(key, ()))
        self._held[key] = image
        while self._bytes > self.limit_bytes and self._held:
            self._bytes -= _bytes(self._held.popitem(last=False)[1])


def _bytes(image: LayerImages) -> int:
    return sum(tensor.nbytes for layer in image for tensor in layer)


class KnownImages:
    """The images of a batch of new tokens, of which a store holds some."""

    def __init__(
        self, keys: Sequence[str], store: ImageStore, *, tokens: int, anew: Sequence[bool]
    ) -> None:
        """`keys` in the order of the batch, each of `tokens` positions; those `anew` are not looked up."""
        self.keys, self.store, self.tokens = keys, store, tokens
        self.held = [
            store.get(key) if key in store and not again else None
            for key, again in zip(keys, anew, strict=True)
        ]
        self._fresh: list[list[KeyValues]] = [[] for held in self.held if held is None]

    def join(self, number: int, fresh: KeyValues) -> KeyValues:
        """Keys and values of a layer for those that the store lacks -> for all of them; remembers the new."""
        if not self.keys:
            return fresh
        parts = zip(*(tensor.split(self.tokens, dim=2) for tensor in fresh), strict=True)
        pieces: list[KeyValues] = []
        news = iter(self._fresh)
        for held in self.held:
            if held is None:
                piece = next(parts)
                next(news).append((piece[0].clone(), piece[1].clone()))
            else:
                piece = held[number]
            pieces.append(piece)
        key, value = (torch.cat([piece[i] for piece in pieces], dim=2) for i in (0, 1))
        return key, value

    def keep(self) -> None:
        """Put what was new into the store."""
        fresh = (key for key, held in zip(self.keys, self.held, strict=True) if held is None)
        for key, layers in zip(fresh, self._fresh, strict=True):
            self.store.put(key, tuple(layers))
