"""Whole conversations answered in a batch, each by its own rules."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dsvl.cache import ImageStore
from dsvl.chat import TooLongError
from dsvl.config import require
from dsvl.data.collate import collate
from dsvl.data.encode import Encoder
from dsvl.data.types import IGNORED, Example, Turn
from dsvl.decoder import Interleaved
from dsvl.generate import Sampling, generate
from dsvl.model import VisualChat


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation that wants an answer."""

    turns: Sequence[Turn]
    """All of it; the last is the user's."""
    images: Sequence[np.ndarray] = field(default=(), repr=False)
    """(3, P, P) float32 each, in the order in which they are shown."""
    max_new_tokens: int = 64
    """Most tokens of the answer; it also ends where the conversation is full."""
    sampling: Sampling | None = None
    """How to draw; greedy without it."""
    stop: Sequence[str] = ()
    """Texts before which an answer ends."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens > 0, "max_new_tokens", self.max_new_tokens, "must be positive")
        require(all(self.stop), "stop", self.stop, "must hold no empty text")


class Piece(NamedTuple):
    """What an answer goes on with."""

    text: str
    prompt_tokens: int
    """Positions of the question, images included."""
    answer_tokens: int
    """Written so far, the one that ends the answer not counted."""
    end: Literal["stop", "length"] | None = None
    """Why the answer ends with this piece."""


class Answers:
    """Answers many conversations at once with one model; images shown before cost nothing."""

    def __init__(
        self,
        model: VisualChat,
        tokenizer: PreTrainedTokenizerFast,
        *,
        device: torch.device,
        max_tokens: int,
        store: ImageStore,
    ) -> None:
        """`max_tokens` is most positions of a conversation, the answer included."""
        self.model, self.device = model, device
        self.encoder = Encoder(
            tokenizer,
            image_tokens=model.config.image_tokens,
            max_tokens=max_tokens,
            template=model.config.template,
        )
        self.store = None if isinstance(model.decoder, Interleaved) else store

    def read(self, question: Question) -> "Writing":
        """The beginning of an answer.

        Raises:
            TooLongError: if there is no room for a token of it.
        """
        ids, kinds = self.encoder.prompt(question.turns, whole=True)
        room = self.encoder.max_tokens - len(ids)
        if room < 1:
            raise TooLongError(
                f"the conversation has {len(ids)} tokens, but at most {self.encoder.max_tokens} fit, "
                "answer included; begin a new one, or show fewer images"
            )
        keys = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in question.images)
        prompt = Example("question", ids, np.full_like(ids, IGNORED), kinds, keys)
        return Writing(question, prompt, self.encoder, min(question.max_new_tokens, room))

    def write(self, answers: Sequence["Writing"]) -> Iterator[list[Piece | None]]:
        """Go on with all of them, token by token, until each has ended.

        Yields:
            For each answer what it goes on with, or None where that is nothing yet or no more.
        """
        shown = {
            key: image
            for answer in answers
            for key, image in zip(answer.prompt.images, answer.question.images, strict=True)
        }
        batch = collate(
            [answer.prompt for answer in answers],
            pixels=shown.__getitem__,
            image_tokens=self.encoder.image_tokens,
            pad_id=self.encoder.pad_id,
        )
        for tokens in generate(
            self.model,
            batch.to(self.device),
            end=self.encoder.end,
            max_new_tokens=[answer.most for answer in answers],
            sampling=[answer.question.sampling for answer in answers],
            store=self.store,
        ):
            yield [answer.take(token) for answer, token in zip(answers, tokens, strict=True)]
            if all(answer.ended for answer in answers):
                return
        yield [answer.take(None) for answer in answers]


class Writing:
    """An answer in the making."""

    def __init__(self, question: Question, prompt: Example, encoder: Encoder, most: int) -> None:
        """Begin with nothing; of `most` tokens."""
        self.question, self.prompt, self.most = question, prompt, most
        self.ended = False
        self._encoder = encoder
        self._ids: list[int] = []
        self._told = ""

    def take(self, token: int | None) -> Piece | None:
        """What can be told once this token is there; None ends the answer."""
        if self.ended:
            return None
        if token is not None:
            self._ids.append(token)
        said = self._encoder.decode(self._ids)
        stops = [at for stop in self.question.stop if (at := said.find(stop)) >= 0]
        if token is None or stops:
            return self._tell(said[: min(stops, default=None)], end="stop")
        if len(self._ids) == self.most:
            return self._tell(said, end="length")
        if said.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character, perhaps
            return None
        return self._tell(said[: len(said) - self._held_back(said)])

    def _held_back(self, said: str) -> int:
        """How many letters at the end may turn out to begin a text to stop at."""
        longest = max(map(len, self.question.stop), default=1) - 1
        return next(
            (
                count
                for count in range(min(longest, len(said)), 0, -1)
                if any(stop.startswith(said[-count:]) for stop in self.question.stop)
            ),
            0,
        )

    def _tell(self, said: str, end: Literal["stop", "length"] | None = None) -> Piece | None:
        new, self.ended = said[len(self._told) :], end is not None
        self._told += new
        if not new and end is None:
            return None
        return Piece(new, len(self.prompt.ids), len(self._ids), end)
