"""One conversation with a model: show images, ask, clear."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from dsvl.data.collate import collate
from dsvl.data.encode import Encoder
from dsvl.data.store import Prepared
from dsvl.data.types import IGNORED, Example, Part, Turn
from dsvl.generate import greedy
from dsvl.model import VisualChat
from dsvl.template import text
from dsvl.train import to_device


class TooLongError(ValueError):
    """The conversation has no room for another answer."""


class Chat:
    """A multi-round conversation over any number of images; the whole of it is the prompt of every answer."""

    def __init__(
        self,
        model: VisualChat,
        tokenizer: PreTrainedTokenizerFast,
        *,
        device: torch.device,
        max_tokens: int,
        max_new_tokens: int = 64,
    ) -> None:
        """Begin an empty conversation of at most `max_tokens` positions, answers included."""
        self.model, self.device = model, device
        self.encoder = Encoder(
            tokenizer, image_tokens=model.config.image_tokens, max_tokens=max_tokens
        )
        self.max_new_tokens = max_new_tokens
        self.clear()

    def clear(self) -> None:
        """Forget everything said and shown."""
        self.turns: list[Turn] = []
        self.images: list[np.ndarray] = []

    def ask(self, question: str, *, images: Sequence[np.ndarray] = ()) -> str:
        """Ask about new images, each (3, P, P) as the tower wants it, and all earlier ones.

        Raises:
            TooLongError: if the conversation would become longer than `max_tokens`; it is left as it was.
        """
        first = len(self.images)
        shown = [*self.images, *images]
        content = (
            *(Part("image", image=i) for i in range(first, len(shown))),
            Part("text", text=question),
        )
        turns = [*self.turns, Turn("user", content)]
        ids, kinds = self.encoder.prompt(turns)
        if len(ids) + self.max_new_tokens > self.encoder.max_tokens:
            raise TooLongError(
                f"the conversation has {len(ids)} tokens and an answer may add {self.max_new_tokens}, "
                f"but at most {self.encoder.max_tokens} fit; clear it to go on"
            )
        keys = tuple(str(i) for i in range(len(shown)))
        example = Example("chat", ids, np.full_like(ids, IGNORED), kinds, keys)
        batch = collate(
            [example],
            pixels=lambda key: shown[int(key)],
            image_tokens=self.encoder.image_tokens,
            pad_id=self.encoder.pad_id,
        )
        (new,) = greedy(
            self.model,
            to_device(batch, self.device),
            end=self.encoder.end,
            max_new_tokens=self.max_new_tokens,
        )
        answer = self.encoder.decode(new)
        self.turns = [*turns, Turn("assistant", (Part("text", text=answer),))]
        self.images = shown
        return answer


def transcript(
    model: VisualChat,
    tokenizer: PreTrainedTokenizerFast,
    prepared: Prepared,
    *,
    count: int,
    max_tokens: int,
    device: torch.device,
) -> list[dict]:
    """The first `count` held-out conversations, with the model's own answers beside the true ones.

    The model chats: its later answers follow its own earlier ones. A conversation ends early where there
    is no room for another answer. Every rank must call it.

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
            try:
                said = chat.ask(question, images=[prepared.pixels(keys[k]) for k in shown])
            except TooLongError:  # a finished training does not fail for an illustration
                break
            rounds.append({"images": shown, "question": question, "answer": answer, "model": said})
        transcripts.append({"id": name, "images": list(keys), "rounds": rounds})
    model.train()
    return transcripts
