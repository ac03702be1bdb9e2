"""Running a frozen stock decoder over text and images: as two streams, or as one interleaved sequence.

The modules are those of transformers, untouched; only the loop over layers is ours. M text tokens, F image
tokens and n wanted tokens of a batch as in `dsvl.data.layout`; D width, N query and K key heads of size H.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, LlamaModel, MistralModel, Qwen2Model
from transformers.models.llama.modeling_llama import rotate_half

from dsvl.attention import KeyValues, attend_spans, check_window, whole
from dsvl.cache import Cache, KnownImages, StreamCache
from dsvl.data.layout import Layout, Span
from dsvl.data.types import Kind

STREAMED = (LlamaModel, MistralModel, Qwen2Model)
"""Decoders whose layers are made of the same parts; any other runs interleaved."""

Before = Callable[[int, torch.Tensor], torch.Tensor]
"""Number of a layer and (1, M + F, D) -> (1, M + F, D)."""


def sum_apart(decoder: Any) -> None:
    """Have gradients of what enters a norm summed up by themselves, before that of the residual is added.

    Under ZeRO 3 hooks of DeepSpeed have it so. Without this the order would be another at other stages, and
    with it the last bit.
    """
    for module in decoder.modules():
        if isinstance(module, type(decoder.norm)):
            module.register_forward_pre_hook(_alone)


def _alone(_: nn.Module, entering: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.view_as(tensor) for tensor in entering)


class Streams:
    """All text tokens of a batch first, all image tokens after them, without padding.

    For schemes under which an image token sees only itself. Its row then needs neither query nor scores; and
    in the last layer only what is wanted is computed, an image being no more than its keys and values.
    """

    def __init__(self, decoder: nn.Module, *, scheme: str) -> None:
        """`decoder` is the stock model without its head."""
        self.decoder: Any = decoder
        self.scheme = scheme
        self.window = _window(self.decoder.config.to_dict())
        dropout = self.decoder.config.attention_dropout
        if dropout:
            raise ValueError(
                f"attention_dropout={dropout}: attention scheme {scheme!r} supports none; "
                "set it to 0.0 in the decoder's config.json"
            )

    def cache(self, samples: int) -> StreamCache:
        """An empty cache for so many samples."""
        return StreamCache(samples, len(self.decoder.layers))

    def __call__(
        self,
        text: torch.Tensor,
        images: torch.Tensor,
        layout: Layout,
        *,
        cache: Cache | None = None,
        known: KnownImages | None = None,
        recompute: bool = False,
        before: Before | None = None,
    ) -> torch.Tensor:
        """(M, D) and (F, D) embedded tokens -> (n, D) final states, normalised, in the order of `wanted`.

        Args:
            text: the embedded text tokens.
            images: the projected image tokens, without those of known images.
            layout: where they lie.
            cache: earlier tokens of the same samples, to which these are added.
            known: images that do not pass through the decoder; needs a cache.
            recompute: keep nothing of a layer for the backward pass but its input.
            before: what is done to the tokens ahead of each layer, and recomputed with it.

        Raises:
            ValueError: if a sample is longer than the decoder's sliding window.
        """
        past = [(0, 0)] * len(layout.samples) if cache is None else cache.past
        lengths = (
            sum(earlier) + b - a + d - c
            for earlier, (a, b, c, d) in zip(past, layout.samples, strict=True)
        )
        check_window(self.window, max(lengths, default=0), scheme=self.scheme)
        hidden = torch.cat([text, images])[None]
        places = torch.cat([layout.text_rotary, layout.image_rotary])
        turns = self.decoder.rotary_emb(hidden, position_ids=places[None])
        if cache is not None:
            assert isinstance(cache, StreamCache)
            cache.begin(layout)
        for number, layer in enumerate(self.decoder.layers):
            arguments = (number, layer, hidden, turns, layout, cache, known, before)
            if recompute and hidden.requires_grad:
                hidden = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                hidden = self._layer(*arguments)
        states = self.decoder.norm(hidden)[0]
        if cache is not None:
            cache.end()
        if known is not None:
            known.keep()
        return states

    def _layer(
        self,
        number: int,
        layer: Any,
        hidden: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        layout: Layout,
        cache: StreamCache | None,
        known: KnownImages | None,
        before: Before | None,
    ) -> torch.Tensor:
        """(1, M + F, D) -> (1, M + F, D), or (1, n, D) in the last layer."""
        if before is not None:
            hidden = before(number, hidden)
        attention, texts = layer.self_attn, len(layout.text)
        cos, sin = turns

        def heads(projected: torch.Tensor) -> torch.Tensor:
            return projected.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        normed = layer.input_layernorm(hidden)
        key, value = heads(attention.k_proj(normed)), heads(attention.v_proj(normed))
        if number < len(self.decoder.layers) - 1:
            spans, asking, own = layout.spans, slice(0, texts), value[:, :, texts:]
        else:
            spans = layout.wanted_spans
            count = spans[-1].end if spans else 0
            asking, own = layout.wanted[:count], value[:, :, layout.wanted[count:]]
            hidden = hidden[:, layout.wanted]
        query = heads(attention.q_proj(normed[:, asking]))
        query = _turned(query, cos[:, asking], sin[:, asking])

        text = _turned(key[:, :, :texts], cos[:, :texts], sin[:, :texts]), value[:, :, :texts]
        images = key[:, :, texts:], value[:, :, texts:]
        if known is not None:
            images = known.join(number, images)
        images = _turned(images[0], cos[:, texts:], sin[:, texts:]), images[1]
        if cache is None:
            outputs = self._within(query, spans, text, images, layout)
        else:
            cache.extend(number, text, images)
            outputs = self._after(query, spans, cache, number)
        if not spans:
            # Where no text asks, its projections take part with no rows: ZeRO 3 expects every rank to
            # differentiate every module.
            outputs.append(whole(query, *text))
        outputs.append(own.repeat_interleave(query.shape[1] // own.shape[1], dim=1))
        mixed = torch.cat(outputs, dim=2).transpose(1, 2).flatten(2)
        hidden = hidden + attention.o_proj(mixed)
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))

    def _within(
        self,
        query: torch.Tensor,
        spans: tuple[Span, ...],
        text: KeyValues,
        images: KeyValues,
        layout: Layout,
    ) -> list[torch.Tensor]:
        """Attend within the batch."""

        def sliced(keys: KeyValues, start: int, end: int) -> KeyValues:
            return keys[0][:, :, start:end], keys[1][:, :, start:end]

        return attend_spans(
            query,
            spans,
            text=lambda sample: sliced(text, *layout.samples[sample][:2]),
            images=lambda sample: sliced(images, *layout.samples[sample][2:]),
            scheme=self.scheme,
        )

    def _after(
        self, query: torch.Tensor, spans: tuple[Span, ...], cache: StreamCache, number: int
    ) -> list[torch.Tensor]:
        """Attend to what a cache holds, the batch included."""
        if cache.stepping:
            return [cache.step(number, query, scheme=self.scheme)]
        return attend_spans(
            query,
            spans,
            text=lambda sample: cache.text(number, sample),
            images=lambda sample: cache.images(number, sample),
            scheme=self.scheme,
        )


def _window(config: dict[str, Any]) -> int | None:
    """Positions that some layer of a decoder looks back, its own included; None where all see everything."""
    layers = config.get("layer_types") or ["sliding_attention"]
    return config.get("sliding_window") if "sliding_attention" in layers else None


def _turned(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(1, K, T, H) turned by (1, T, H) rotary tables."""
    return heads * cos[:, None] + rotate_half(heads) * sin[:, None]


class InterleavedCache(DynamicCache):
    """The stock cache of B rows, and what its positions hold."""

    def __init__(self, rows: int) -> None:
        """Begin with nothing."""
        super().__init__()
        self.kinds: torch.Tensor | None = None
        """(B, S) of Kind, padding included."""
        self.past = [(0, 0)] * rows
        """Text and image tokens of each row."""

    def begin(self) -> None:
        """Drop what some layers hold beyond `kinds`, as after a forward that was broken off."""
        held = 0 if self.kinds is None else self.kinds.shape[1]
        layer: Any
        for layer in self.layers:
            if surplus := layer.get_seq_length() - held:
                layer.crop(-surplus)

    def mark(self) -> Any:
        """As `Cache`."""
        return self.past, self.kinds

    def rewind(self, mark: Any) -> None:
        """As `Cache`; `begin` drops the rest."""
        self.past, self.kinds = mark

    def drop(self, counts: Sequence[int]) -> None:
        """As `Cache`; their positions become padding."""
        assert self.kinds is not None
        self.past = [(a - count, b) for (a, b), count in zip(self.past, counts, strict=True)]
        self.kinds = self.kinds.clone()
        for row, count in zip(self.kinds, counts, strict=True):
            row[len(row) - count :] = Kind.PAD

    def select(self, samples: Sequence[int]) -> None:
        """As `Cache`."""
        assert self.kinds is not None
        kept = torch.tensor(samples, device=self.kinds.device)
        self.past, self.kinds = [self.past[sample] for sample in samples], self.kinds[kept]
        self.batch_select_indices(kept)


class Interleaved:
    """The stock decoder's own forward over B rows of S positions, the scheme being its attention function.

    For plain causal attention, under which image tokens see all that came before them, and for decoders that
    `Streams` does not know.
    """

    def __init__(self, decoder: nn.Module) -> None:
        """`decoder` is the stock model without its head, its attention implementation set to a scheme."""
        self.decoder: Any = decoder
        self.scheme = self.decoder.config._attn_implementation

    def cache(self, samples: int) -> InterleavedCache:
        """An empty cache for so many rows of one sample each."""
        return InterleavedCache(samples)

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
        """As `Streams`, but no image is known.

        Raises:
            ValueError: if rows of several samples come with a cache, which keeps a sample a row; if a row,
                earlier tokens included, is longer than the decoder's sliding window.
        """
        assert known is None
        rows, length = layout.kinds.shape
        if cache is not None and len(layout.samples) != rows:
            raise ValueError(
                f"{len(layout.samples)} samples in {rows} rows: attention={self.scheme} with this decoder "
                "generates from a row a sample; leave `rows` out of collate()"
            )
        embedded = text.new_zeros(rows * length, text.shape[-1])
        embedded = embedded.index_copy(0, layout.text, text).index_copy(0, layout.images, images)
        places = layout.kinds.new_zeros(rows * length, dtype=torch.int64)
        places[layout.text], places[layout.images] = layout.text_rotary, layout.image_rotary
        kinds = None if layout.plain and cache is None and self.scheme == "causal" else layout.kinds
        if cache is not None:
            assert isinstance(cache, InterleavedCache)
            cache.begin()
            if cache.kinds is not None:
                kinds = torch.cat([cache.kinds, layout.kinds], dim=1)
        if recompute and not self.decoder.is_gradient_checkpointing:
            self.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        hidden = self.decoder(
            inputs_embeds=embedded.view(rows, length, -1),
            position_ids=places.view(rows, length),
            kinds=kinds,
            samples=layout.packing,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        if cache is not None:
            cache.kinds = kinds
            cache.past = [
                (texts + b - a, pictures + d - c)
                for (texts, pictures), (a, b, c, d) in zip(cache.past, layout.samples, strict=True)
            ]
        return hidden.flatten(0, 1)[layout.wanted_positions]


def decoder_for(decoder: nn.Module, *, scheme: str) -> Streams | Interleaved:
    """The fastest exact way to run a stock decoder under a scheme."""
    if scheme != "causal" and isinstance(decoder, STREAMED):
        return Streams(decoder, scheme=scheme)
    return Interleaved(decoder)
