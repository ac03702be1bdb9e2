"""Many conversations at once: each goes on from its own answers, round by round, in one batch.

What the decoder knows of them is kept from round to round, and images that several of them show are encoded
once. Greedy, so that the answers are those of each conversation by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dsvl.cache import ImageStore
from dsvl.data.collate import collate
from dsvl.data.encode import Encoder
from dsvl.data.types import IGNORED, Example, Kind
from dsvl.decoder import Interleaved
from dsvl.generate import generate
from dsvl.model import VisualChat


@dataclass(frozen=True, slots=True)
class Question:
    """What a round puts to the model: all that follows on the answer before."""

    ids: np.ndarray
    """(S,) int32."""
    kinds: np.ndarray
    """(S,) int8 of Kind."""
    images: tuple[str, ...]
    """sha256 keys of those that it shows."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says."""

    ids: tuple[int, ...]
    """Without the token that ends it."""
    ended: bool
    """Whether it came to its end, and was not cut off."""


def answers_of(example: Example) -> Iterator[tuple[int, int]]:
    """Where each trained answer of an example starts and ends, its closing token included."""
    trained = np.flatnonzero(example.labels != IGNORED)
    for run in np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1):
        if len(run):
            yield int(run[0]), int(run[-1]) + 1


def questions_of(example: Example, *, image_tokens: int) -> list[Question]:
    """What stands before each answer of an example."""
    start = shown = 0
    questions = []
    for answer, end in answers_of(example):
        kinds = example.kinds[start:answer]
        images = int((kinds == Kind.IMAGE).sum()) // image_tokens
        keys = example.images[shown : shown + images]
        questions.append(Question(example.ids[start:answer], kinds, keys))
        start, shown = end, shown + images
    return questions


def converse(
    model: VisualChat,
    encoder: Encoder,
    conversations: Sequence[Sequence[Question]],
    *,
    pixels: Callable[[str], np.ndarray],
    max_new_tokens: int,
    device: torch.device,
    store: ImageStore | None = None,
) -> list[list[Answer]]:
    """Answer every round of a batch of conversations.

    Args:
        model: in evaluation mode.
        encoder: its tokenizer, room and template.
        conversations: what each of them asks, round by round.
        pixels: sha256 key -> (3, P, P) float32, as the tower takes it.
        max_new_tokens: most tokens of an answer.
        device: where the model is.
        store: images that are known already; used where the decoder can.

    Returns:
        The answers of each: fewer than it has rounds where `encoder.max_tokens` leaves no room for another.
    """
    store = None if isinstance(model.decoder, Interleaved) else store
    answers: list[list[Answer]] = [[] for _ in conversations]
    unread: list[list[int]] = [[] for _ in conversations]
    going = list(range(len(conversations)))
    cache = model.decoder.cache(len(going))
    for number in range(max(map(len, conversations), default=0)):
        held = [
            sum(past) + len(unread[which]) for past, which in zip(cache.past, going, strict=True)
        ]
        rows = [
            row
            for row, which in enumerate(going)
            if number < len(conversations[which])
            and held[row] + len(conversations[which][number].ids) + max_new_tokens
            <= encoder.max_tokens
        ]
        if not rows:
            break
        if len(rows) < len(going):
            going = [going[row] for row in rows]
            if number:
                cache.select(rows)
            else:
                cache = model.decoder.cache(len(going))
        asked = [
            _after(unread[which], conversations[which][number], name=str(which)) for which in going
        ]
        batch = collate(
            asked, pixels=pixels, image_tokens=encoder.image_tokens, pad_id=encoder.pad_id
        )
        before = [sum(past) for past in cache.past]
        written: list[list[int]] = [[] for _ in going]
        for tokens in generate(
            model,
            batch.to(device),
            end=encoder.end,
            max_new_tokens=max_new_tokens,
            cache=cache,
            store=store,
        ):
            for ids, token in zip(written, tokens, strict=True):
                if token is not None:
                    ids.append(token)
        # Rows that had ended went on as long as any other: what they wrote since is forgotten.
        read = sum(cache.past[0]) - before[0] - len(asked[0].ids)
        cache.drop([read - min(read, len(ids)) for ids in written])
        for which, ids in zip(going, written, strict=True):
            answers[which].append(Answer(tuple(ids), len(ids) < max_new_tokens))
            unread[which] = [*ids, encoder.end][min(read, len(ids)) :]
    return answers


def _after(unread: Sequence[int], question: Question, *, name: str) -> Example:
    """A question behind what the decoder has not read of the answer before."""
    ids = np.concatenate([np.array(unread, np.int32), question.ids])
    kinds = np.concatenate([np.full(len(unread), Kind.TEXT, np.int8), question.kinds])
    return Example(name, ids, np.full_like(ids, IGNORED), kinds, question.images)
