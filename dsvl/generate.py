"""Decoding, batched and token by token, with a cache that goes on from round to round."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsvl.cache import Cache, ImageStore, KnownImages
from dsvl.config import require
from dsvl.data.draw import mix
from dsvl.data.layout import lay_out
from dsvl.data.types import Batch, Kind
from dsvl.decoder import Interleaved
from dsvl.model import VisualChat


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; without it, it is the likeliest one."""

    temperature: float = 1.0
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Only so many of the likeliest; all when 0."""
    seed: int = 0
    """Each sample of a batch has a stream of draws of its own, made of this and its number in the batch; in a
    chat also of the number of the round. So equal prompts are answered differently."""

    def __post_init__(self) -> None:
        require(
            self.temperature > 0,
            "temperature",
            self.temperature,
            "must be positive; leave sampling out for the likeliest tokens",
        )
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must lie in (0, 1]")
        require(self.top_k >= 0, "top_k", self.top_k, "must not be negative")

    def numbered(self, number: int) -> "Sampling":
        """The same with another seed for each number."""
        return replace(self, seed=int(mix(self.seed, number)))


def greedy(model: VisualChat, batch: Batch, *, end: int, max_new_tokens: int) -> list[list[int]]:
    """Continue each prompt of a batch with its likeliest tokens.

    Returns:
        For each sample the new ids, without the closing `end` id, at most `max_new_tokens`.
    """
    written: list[list[int]] = [[] for _ in batch.layout.samples]
    for tokens in generate(model, batch, end=end, max_new_tokens=max_new_tokens):
        for ids, token in zip(written, tokens, strict=True):
            if token is not None:
                ids.append(token)
    return written


@torch.no_grad()
def generate(
    model: VisualChat,
    batch: Batch,
    *,
    end: int,
    max_new_tokens: int | Sequence[int],
    sampling: Sampling | Sequence[Sampling | None] | None = None,
    cache: Cache | None = None,
    store: ImageStore | None = None,
) -> Iterator[list[int | None]]:
    """Continue each prompt of a batch, yielding the next token of every sample as soon as it is known.

    Args:
        model: in evaluation mode. Where ZeRO 3 divides it, every rank must call this, with the same batch.
        batch: prompts; or what follows on those that the cache holds, a row a sample.
        end: the id that closes an answer.
        max_new_tokens: most tokens a sample; or of each sample.
        sampling: how to draw; greedy without it. Or that of each sample, whose seed then counts alone.
        cache: `model.decoder.cache(n)`, for n samples that go on; it comes to hold all but the last tokens,
            and of samples that have ended what came after.
        store: images known to the decoder, which are then neither encoded nor passed through it again.
            Not where the decoder runs interleaved.

    Yields:
        A token for each sample, or None where its answer has ended.

    Raises:
        ValueError: if there is a store for a decoder that cannot use one.
    """
    require(
        store is None or not isinstance(model.decoder, Interleaved),
        "model.attention",
        model.config.attention,
        "runs this decoder interleaved, where what is known of an image depends on what stands before it; "
        "leave `store` out of generate()",
    )
    samples, passing = len(batch.layout.samples), cache is None
    cache = model.decoder.cache(samples) if cache is None else cache
    kinds, packing = batch.kinds.cpu().numpy(), batch.layout.packing
    last = _last(kinds, None if packing is None else packing.cpu().numpy())
    keys, tokens = batch.images, model.config.image_tokens
    places = batch.layout.images.cpu().numpy().reshape(len(keys), tokens)
    known = np.zeros(kinds.size, bool)
    fresh, shown = range(len(keys)), None
    if store is not None:
        # The final state of a known image is not at hand: where it is wanted, the image passes once more.
        shown = KnownImages(
            keys,
            store,
            tokens=tokens,
            anew=np.any(last.reshape(-1)[places], axis=1).tolist(),
        )
        fresh = [k for k, held in enumerate(shown.held) if held is None]
        known[places[[k for k, held in enumerate(shown.held) if held is not None]]] = True
    layout = lay_out(
        kinds,
        last,
        samples=None if packing is None else packing.cpu().numpy(),
        known=known.reshape(kinds.shape),
        past=cache.past if any(map(any, cache.past)) else None,
    ).to(batch.ids.device)
    text, images = model.embed(replace(batch, layout=layout), fresh=fresh)
    if sampling is None or isinstance(sampling, Sampling):
        sampling = [sampling and sampling.numbered(n) for n in range(samples)]
    draws = [own and torch.Generator(text.device).manual_seed(own.seed) for own in sampling]
    limits = [max_new_tokens] * samples if isinstance(max_new_tokens, int) else max_new_tokens
    going, ended = list(range(samples)), [False] * samples
    for count in range(max(limits)):
        states = model.decoder(text, images, layout, cache=cache, known=shown)
        logits_BV = model.logits(states[layout.wanted_positions.argsort()])
        next_B = logits_BV.argmax(-1)
        for row, n in enumerate(going):
            if (own := sampling[n]) and (draw := draws[n]):
                next_B[row] = _draw(logits_BV[row], own, draw)
        if hasattr(model.head.weight, "ds_tensor"):
            # Divided among the ranks (ZeRO 3), all of which take part in every pass. Those that disagreed
            # on an end, by a bit of rounding, would wait for each other: rank 0 writes for all.
            dist.broadcast(next_B, 0)
        written: list[int | None] = [None] * samples
        for n, token in zip(going, next_B.tolist(), strict=True):
            ended[n] |= token == end
            written[n] = None if ended[n] else token
        if all(ended):
            return
        yield written
        ended = [done or count + 1 == most for done, most in zip(ended, limits, strict=True)]
        if all(ended):
            return
        staying = [row for row, n in enumerate(going) if not ended[n]]
        if passing and len(staying) < len(going):
            cache.select(staying)
            going, next_B = [going[row] for row in staying], next_B[staying]
        kinds = np.full((len(going), 1), Kind.TEXT, np.int8)
        layout = lay_out(kinds, kinds == Kind.TEXT, past=cache.past).to(text.device)
        text, images, shown = model.embedding(next_B), images[:0], None


def _last(kinds: np.ndarray, packing: np.ndarray | None) -> np.ndarray:
    """(B, S) bool: the last token of each sample."""
    filled = kinds != Kind.PAD
    follows = np.zeros_like(filled)
    follows[:, :-1] = filled[:, 1:]
    if packing is not None:
        follows[:, :-1] &= packing[:, 1:] == packing[:, :-1]
    return filled & ~follows


def _draw(logits_V: torch.Tensor, sampling: Sampling, draw: torch.Generator) -> torch.Tensor:
    """A token at random, from the sample's own stream, whatever else is in the batch."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    nothing = torch.empty(1, 0, dtype=torch.long, device=logits_V.device)
    shares_1V = warpers(nothing, logits_V[None]).softmax(-1)  # pyright: ignore[reportArgumentType]
    return torch.multinomial(shares_1V[0], 1, generator=draw)[0]
