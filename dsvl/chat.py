"""One conversation with a model: show images, ask, clear."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dsvl.cache import ImageStore
from dsvl.config import require
from dsvl.data.collate import collate
from dsvl.data.encode import Encoder
from dsvl.data.store import Prepared
from dsvl.data.types import IGNORED, Example, Kind, Part, Turn
from dsvl.decoder import Interleaved
from dsvl.generate import Sampling, generate
from dsvl.model import VisualChat
from dsvl.template import text


class TooLongError(ValueError):
    """The conversation has no room for another answer."""


class Chat:
    """A multi-round conversation over any number of images.

    What the decoder knows of it is kept from round to round: a round costs its own tokens only. An image that
    any conversation on the same `store` has shown costs nothing.
    """

    def __init__(
        self,
        model: VisualChat,
        tokenizer: PreTrainedTokenizerFast,
        *,
        device: torch.device,
        max_tokens: int,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        store: ImageStore | None = None,
    ) -> None:
        """Begin an empty conversation of at most `max_tokens` positions, answers included."""
        require(max_new_tokens > 0, "max_new_tokens", max_new_tokens, "must be positive")
        self.model, self.device = model, device
        self.encoder = Encoder(
            tokenizer,
            image_tokens=model.config.image_tokens,
            max_tokens=max_tokens,
            template=model.config.template,
        )
        self.max_new_tokens, self.sampling = max_new_tokens, sampling
        self.store = None if isinstance(model.decoder, Interleaved) else store
        self.clear()

    def clear(self) -> None:
        """Forget everything said and shown."""
        self.turns: list[Turn] = []
        self.images = 0
        """How many have been shown."""
        self._cache = self.model.decoder.cache(1)
        self._unread: list[int] = []
        """Ids at the end of the last answer that the decoder has not read."""
        self._before: list[tuple[Any, list[int], int]] = []
        """Where every round began: a mark of the cache, unread ids, images shown."""

    def undo(self) -> bool:
        """Forget the last question and its answer; False where there is none."""
        if not self._before:
            return False
        mark, self._unread, self.images = self._before.pop()
        self._cache.rewind(mark)
        self.turns = self.turns[:-2]
        return True

    @property
    def tokens(self) -> int:
        """Positions that are taken, of `max_tokens`."""
        return sum(self._cache.past[0]) + len(self._unread)

    def ask(self, question: str, *, images: Sequence[np.ndarray] = ()) -> str:
        """Ask about new images, each (3, P, P) as the tower wants it, and all earlier ones.

        The conversation is left as it was where this raises.

        Raises:
            ValueError: if an image is no array of finite float32, or has another shape.
            TooLongError: if the conversation would become longer than `max_tokens`.
        """
        return "".join(self.stream(question, images=images))

    def stream(
        self, question: str, *, images: Sequence[np.ndarray] = ()
    ) -> Generator[str, None, None]:
        """As `ask`, piece by piece as the answer is written."""
        size = self.model.config.vision.image_size
        for number, image in enumerate(images, start=self.images + 1):
            kind = image.dtype if isinstance(image, np.ndarray) else type(image)
            require(
                kind == np.float32,
                f"image {number}: type",
                str(kind),
                "must be a numpy array of float32, as dsvl.data.images.pixels gives it",
            )
            require(
                image.shape == (3, size, size),
                f"image {number}: shape",
                image.shape,
                f"must be {(3, size, size)}, as dsvl.data.images.pixels gives it for this tower",
            )
            strange = int((~np.isfinite(image)).sum())
            require(
                strange == 0, f"image {number}: infinite or NaN values", strange, "must be finite"
            )
        numbers = range(self.images, self.images + len(images))
        content = (*(Part("image", image=n) for n in numbers), Part("text", text=question))
        turns = [*self.turns, Turn("user", content)]
        ids, kinds = self.encoder.prompt(turns)
        unread = np.array(self._unread, np.int32)
        ids = np.concatenate([unread, ids])
        kinds = np.concatenate([np.full(len(unread), Kind.TEXT, np.int8), kinds])
        length = sum(self._cache.past[0]) + len(ids)
        if length + self.max_new_tokens > self.encoder.max_tokens:
            raise TooLongError(
                f"the conversation has {length} tokens and an answer may add {self.max_new_tokens}, "
                f"but at most {self.encoder.max_tokens} fit; clear it to go on"
            )
        keys = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in images)
        batch = collate(
            [Example("chat", ids, np.full_like(ids, IGNORED), kinds, keys)],
            pixels=dict(zip(keys, images, strict=True)).__getitem__,
            image_tokens=self.encoder.image_tokens,
            pad_id=self.encoder.pad_id,
        )
        mark = self._cache.mark()
        written: list[int] = []
        told = ""
        try:
            for (token,) in generate(
                self.model,
                batch.to(self.device),
                end=self.encoder.end,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling and self.sampling.numbered(len(self.turns) // 2),
                cache=self._cache,
                store=self.store,
            ):
                assert token is not None
                written.append(token)
                said = self.encoder.decode(written)
                half = said.endswith("\N{REPLACEMENT CHARACTER}")  # of a character, perhaps
                if said != told and not half:
                    yield said[len(told) :]
                    told = said
            if (said := self.encoder.decode(written)) != told:
                yield said[len(told) :]
        except GeneratorExit:
            pass  # whoever stops listening has heard an answer all the same
        except BaseException:
            self._cache.rewind(mark)
            raise
        self._before.append((mark, self._unread, self.images))
        answer = Part("text", text=self.encoder.decode(written))
        self.turns = [*turns, Turn("assistant", (answer,))]
        self.images += len(images)
        self._unread = [*written, self.encoder.end][sum(self._cache.past[0]) - length :]


def transcript(
    model: VisualChat,
    tokenizer: PreTrainedTokenizerFast,
    prepared: Prepared,
    *,
    count: int,
    max_tokens: int,
    device: torch.device,
    alive: Callable[[], object] = lambda: None,
) -> list[dict]:
    """The first `count` held-out conversations, with the model's own answers beside the true ones.

    The model chats: its later answers follow its own earlier ones. A conversation ends early where there
    is no room for another answer. Every rank must call it. `alive` is called after every answer and every
    piece of one.

    Returns:
        A dict a conversation: `id`, `images` (sha256 keys) and `rounds`, each with the indices of the
        `images` that it introduces, the `question`, the true `answer` and the `model`'s.
    """
    model.eval()
    transcripts = []
    for name, keys, turns in prepared.conversations("eval", count):
        chat = Chat(model, tokenizer, device=device, max_tokens=max_tokens)
        rounds = []
        for turn, following in pairwise(turns):
            if following.role != "assistant":
                continue
            shown = [part.image for part in turn.content if part.type == "image"]
            question, answer = text(turn.content), text(following.content)
            said = ""
            try:
                for piece in chat.stream(
                    question, images=[prepared.pixels(keys[k]) for k in shown]
                ):
                    said += piece
                    alive()
            except TooLongError:  # a finished training does not fail for an illustration
                break
            alive()
            rounds.append({"images": shown, "question": question, "answer": answer, "model": said})
        transcripts.append({"id": name, "images": list(keys), "rounds": rounds})
    model.train()
    return transcripts
