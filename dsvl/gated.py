"""Gated cross-attention (Flamingo, arXiv:2204.14198, section 2.2): images beside the sequence, not in it.

The decoder reads text alone, placed by counting text alone. Ahead of every few of its layers stands a
trained block in which text looks at images. Its gates start at zero, and with them the model is the
decoder without images, bit for bit.

A text token sees the last image before it and no other (section 2.3). Text before the first image sees
none: nothing is added to it there.

M text tokens, F image tokens and n wanted tokens of a batch as in `dsvl.data.layout`; B samples, D width of
the decoder, N heads of size H, I tokens of an image.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from dsvl.attention import KeyValues
from dsvl.cache import Cache, KnownImages, StreamCache
from dsvl.config import ModelConfig
from dsvl.data.layout import Layout, Run, Span
from dsvl.decoder import STREAMED, Streams

Look = Callable[[torch.Tensor, KeyValues], torch.Tensor]
"""(1, N, M, H) queries of the text, keys and values (1, N, F, H) of the images -> (1, N, M, H)."""


class Block(nn.Module):
    """Cross-attention to images, then a feed-forward net, each behind a gate.

    As in Flamingo: layers without biases, the feed-forward net four times as wide; heads as the decoder has.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.attention_gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, text_1MD: torch.Tensor, images_1FD: torch.Tensor, look: Look) -> torch.Tensor:
        """(1, M, D) text and (1, F, D) images -> (1, M, D)."""
        query_1NMH, key_1NFH, value_1NFH = (
            vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for vectors in (
                self.query(self.norm(text_1MD)),
                *self.key_value(images_1FD).chunk(2, dim=-1),
            )
        )
        seen_1MD = look(query_1NMH, (key_1NFH, value_1NFH)).transpose(1, 2).flatten(2)
        text_1MD = text_1MD + self.attention_gate.tanh() * self.output(seen_1MD)
        return text_1MD + self.feed_forward_gate.tanh() * self.feed_forward(text_1MD)


def blocks(config: ModelConfig) -> nn.ModuleList:
    """The blocks of a model, drawn at random; none under the schemes without parameters."""
    language = config.language
    return nn.ModuleList(
        Block(language.hidden_size, language.num_attention_heads)
        for _ in range(config.cross_blocks)
    )


class GatedCache:
    """What `Gated` keeps of B samples: their text as the decoder knows it, and the last image of each."""

    def __init__(self, samples: int, *, layers: int, blocks: int) -> None:
        """Begin with nothing."""
        self.past = [(0, 0)] * samples
        self.text = StreamCache(samples, layers)
        self.images: list[KeyValues | None] = [None] * blocks
        """In each block keys and values (B, N, I, H); zeros for a sample that has seen none."""

    def mark(self) -> Any:
        """As `Cache`."""
        return self.past, self.images, self.text.mark()

    def rewind(self, mark: Any) -> None:
        """As `Cache`."""
        self.past, self.images, text = mark
        self.text.rewind(text)

    def drop(self, counts: Sequence[int]) -> None:
        """As `Cache`."""
        self.text.drop(counts)
        self.past = [(a - count, b) for (a, b), count in zip(self.past, counts, strict=True)]

    def select(self, samples: Sequence[int]) -> None:
        """As `Cache`."""
        self.text.select(samples)
        self.past = [self.past[sample] for sample in samples]
        self.images = [held and (held[0][samples], held[1][samples]) for held in self.images]


class Gated:
    """A stock decoder over the text of a batch, with a block before every `cross_every`-th layer."""

    def __init__(
        self, decoder: nn.Module, blocks: nn.ModuleList, *, every: int, image_tokens: int
    ) -> None:
        """`decoder` is the stock model without its head; the first block stands ahead of layer `every`.

        Raises:
            ValueError: if the loop over layers does not know the decoder.
        """
        if not isinstance(decoder, STREAMED):
            raise ValueError(
                f"model.attention='gated_cross' runs {', '.join(each.__name__ for each in STREAMED)}, "
                f"not {type(decoder).__name__}; choose another attention or another decoder"
            )
        self.streams = Streams(decoder, scheme="gated_cross")
        self.blocks, self.every, self.image_tokens = blocks, every, image_tokens

    def cache(self, samples: int) -> GatedCache:
        """An empty cache for so many samples."""
        layers = len(self.streams.decoder.layers)
        return GatedCache(samples, layers=layers, blocks=len(self.blocks))

    def __call__(
        self,
        text: torch.Tensor,
        images: torch.Tensor,
        layout: Layout,
        *,
        cache: Cache | None = None,
        known: KnownImages | None = None,
        recompute: bool = False,
    ) -> torch.Tensor:
        """As `Streams`, but an image has no states.

        Raises:
            ValueError: if the state of an image is wanted, as where an answer follows it at once.
        """
        if len(layout.wanted) > (layout.wanted_spans[-1].end if layout.wanted_spans else 0):
            raise ValueError(
                "model.attention='gated_cross': an image has no place in the sequence to predict the "
                "next token from; put text between an image and an answer"
            )
        assert cache is None or isinstance(cache, GatedCache)
        views = _Views(layout, cache, image_tokens=self.image_tokens)

        def before(number: int, hidden: torch.Tensor) -> torch.Tensor:
            count, between = divmod(number + 1, self.every)
            if between:
                return hidden

            def look(query: torch.Tensor, fresh: KeyValues) -> torch.Tensor:
                new = fresh if known is None else known.join(count - 1, fresh)
                return views.attend(count - 1, query, new)

            return self.blocks[count - 1](hidden, images[None], look)

        states = self.streams(
            text,
            images[:0],
            _text_alone(layout),
            cache=None if cache is None else cache.text,
            recompute=recompute,
            before=before,
        )
        if cache is not None:
            cache.past, cache.images = views.past, views.images
        if known is not None:
            known.keep()
        return states


class _Views:
    """Which image each text token of a batch sees.

    Images are numbered: first those that a cache holds, one a sample, or a single one of zeros, whose values
    add nothing; then the new ones.
    """

    def __init__(self, layout: Layout, cache: GatedCache | None, *, image_tokens: int) -> None:
        self.cache, self.image_tokens = cache, image_tokens
        past = [(0, 0)] * len(layout.samples) if cache is None else cache.past
        self.images = [] if cache is None else list(cache.images)
        """What the cache holds once the forward has ended: until then it keeps what it held."""
        self.held = 1 if cache is None else len(past)

        def image(sample: int, seen: int) -> int:
            """The last of a sample's first `seen` image tokens."""
            new = seen - past[sample][1]
            if not new:
                return 0 if cache is None else sample
            return self.held + (layout.samples[sample][2] + new) // image_tokens - 1

        self.past = [
            (texts + b - a, images + d - c)
            for (texts, images), (a, b, c, d) in zip(past, layout.samples, strict=True)
        ]
        runs = [(span.sample, run) for span in layout.spans for run in span.runs]
        self.lengths = [run.end - run.start for _, run in runs]
        self.seen = [image(sample, run.images) for sample, run in runs]
        self.last = [image(sample, images) for sample, (_, images) in enumerate(self.past)]
        self.stepping = cache is not None and all(
            (b - a, d - c) == (1, 0) for a, b, c, d in layout.samples
        )
        """Whether the tokens being added are one text token a sample."""

    def attend(self, number: int, query: torch.Tensor, new: KeyValues) -> torch.Tensor:
        """In block `number`: (1, N, M, H) queries and (1, N, F, H) new images -> (1, N, M, H)."""
        earlier = None if self.cache is None else self.cache.images[number]
        if earlier is None:
            zeros = query.new_zeros(self.held, query.shape[1], self.image_tokens, query.shape[3])
            earlier = zeros, zeros
        if self.stepping:
            return scaled_dot_product_attention(query.transpose(0, 2), *earlier).transpose(0, 2)
        key, value = (
            torch.cat([held, tensor[0].unflatten(1, (-1, self.image_tokens)).transpose(0, 1)])
            for held, tensor in zip(earlier, new, strict=True)
        )
        if self.cache is not None:
            self.images[number] = key[self.last], value[self.last]
        queries, keys, values = query.split(self.lengths, dim=2), key.split(1), value.split(1)
        outputs = [
            scaled_dot_product_attention(asking, keys[k], values[k])
            for asking, k in zip(queries, self.seen, strict=True)
        ]
        return torch.cat(outputs, dim=2) if outputs else query


def _text_alone(layout: Layout) -> Layout:
    """The text of a batch as if there were no images."""
    runs = [(run.images, run.end - run.start) for span in layout.spans for run in span.runs]
    images, lengths = torch.tensor(runs, dtype=torch.int64).reshape(-1, 2).unbind(1)
    before = images.repeat_interleave(lengths)

    def whole(spans: Sequence[Span]) -> tuple[Span, ...]:
        return tuple(replace(span, runs=(Run(span.start, span.end, 0),)) for span in spans)

    return replace(
        layout,
        images=layout.images[:0],
        text_rotary=layout.text_rotary - before.to(layout.text_rotary.device, non_blocking=True),
        image_rotary=layout.image_rotary[:0],
        samples=tuple((start, end, 0, 0) for start, end, _, _ in layout.samples),
        spans=whole(layout.spans),
        wanted_spans=whole(layout.wanted_spans),
    )
