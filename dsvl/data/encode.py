"""Conversation -> Example: token ids, labels and kinds of their final length."""

import hashlib
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from dsvl import template
from dsvl.data.types import IGNORED, Conversation, Example, Kind, Rejected, Turn


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerFast:
    """The tokenizer exactly as the checkpoint's `tokenizer.json` has it (a folder or a hub name).

    Raises ValueError where it has no end-of-sequence token, as no answer could end then.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{checkpoint}: the tokenizer has no eos_token, which ends every answer; "
            "name it in tokenizer_config.json"
        )
    return tokenizer


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that fills padding and image positions: never read, as `kinds` tells them apart."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next(token for token in candidates if isinstance(token, int))


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What decides the ids of a text: tokenizers that agree in it encode alike."""
    vocabulary = tokenizer.backend_tokenizer.to_str()
    return {
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "special_tokens": [tokenizer.bos_token_id, tokenizer.eos_token_id, pad_id(tokenizer)],
    }


class Encoder:
    """Turns conversations into examples with `image_tokens` positions an image.

    Every piece of the template is tokenised on its own and without special tokens, so that the
    labels are exactly the answers and their ends; text that spells a special token stays text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, *, image_tokens: int, max_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.max_tokens = max_tokens
        self.pad_id = pad_id(tokenizer)

    def encode(self, conversation: Conversation, keys: Sequence[str]) -> Example | Rejected:
        """The example of a conversation whose images have these sha256 keys, in its order.

        Rejects it as `too_long` where it has more than `max_tokens` positions.
        """
        pieces = list(template.render(conversation.turns))
        ids, labels, kinds = self._positions(pieces)
        images = tuple(keys[piece.image] for piece in pieces if piece.type == "image")
        if len(ids) > self.max_tokens:
            detail = (
                f"{len(ids)} tokens, {len(images) * self.image_tokens} of them for "
                f"{len(images)} images; at most {self.max_tokens} fit"
            )
            return Rejected(conversation.source, conversation.record, "too_long", detail)
        return Example(conversation.id, ids, labels, kinds, images)

    def prompt(self, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
        """(S,) int32 ids and (S,) int8 kinds of what follows on the last answer, or of all if there is none.

        A generation goes on from them; what came before is never tokenised a second time.
        """
        pieces = list(template.prompt(turns))
        ends = [place for place, piece in enumerate(pieces) if piece.type == "end"]
        first = ends[-1] + 1 if ends else 0
        ids, _, kinds = self._positions(pieces[first:], begins=not ends)
        return ids, kinds

    @property
    def end(self) -> int:
        """The id that closes an answer."""
        end = self.tokenizer.eos_token_id
        assert isinstance(end, int)
        return end

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids."""
        text = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _positions(
        self, pieces: Sequence[template.Piece], *, begins: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        texts = [piece.text for piece in pieces if piece.type == "text"]
        tokens = iter(
            self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
        )
        bos = self.tokenizer.bos_token_id if begins else None
        ids, labels, kinds = ([], [], []) if bos is None else ([bos], [IGNORED], [Kind.TEXT])
        for piece in pieces:
            if piece.type == "image":
                run = [self.pad_id] * self.image_tokens
            else:
                run = next(tokens) if piece.type == "text" else [self.tokenizer.eos_token_id]
            ids += run
            labels += run if piece.supervise else [IGNORED] * len(run)
            kinds += [Kind.IMAGE if piece.type == "image" else Kind.TEXT] * len(run)
        return np.array(ids, np.int32), np.array(labels, np.int32), np.array(kinds, np.int8)


def show(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """The example as text: trained tokens between ⟦ and ⟧, images as `[image 2: 4 tokens]`."""
    trained = example.labels != IGNORED
    shown, image = [], 0
    for start, end in _runs(example.kinds, trained):
        if example.kinds[start] == Kind.IMAGE:
            image += 1
            shown.append(f"[image {image}: {end - start} tokens]")
            continue
        text = tokenizer.decode(example.ids[start:end], clean_up_tokenization_spaces=False)
        shown.append(f"⟦{text}⟧" if trained[start] else text)
    return "".join(shown)


def _runs(*columns: np.ndarray) -> Iterable[tuple[int, int]]:
    """Start and end of every stretch of positions over which no column changes."""
    changes = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(columns[0])]
    return pairwise(edges)
