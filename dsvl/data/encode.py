"""Conversation -> Example: token ids, labels and kinds of their final length."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from dsvl.data.types import IGNORED, Conversation, Encoded, Example, Kind, Rejected, Turn
from dsvl.template import (
    AFTER_IMAGES,
    BETWEEN_IMAGES,
    QUESTION,
    TEMPLATES,
    Piece,
    follow_up,
    header,
    prompt,
    reference,
    render,
)


def load_tokenizer(checkpoint: str) -> PreTrainedTokenizerFast:
    """The tokenizer exactly as the checkpoint's `tokenizer.json` has it (a folder or a hub name).

    Raises ValueError where it has no end-of-sequence token, as no answer could end then; FileNotFoundError
    where there is no such checkpoint.
    """
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"{checkpoint}: neither a folder with a tokenizer nor on the hub ({reason}); name one of them"
        ) from error
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


@dataclass(frozen=True)
class Phrases:
    """The ids of what the template puts around rounds, so that rounds can be joined without a tokenizer."""

    opening: list[int]
    """Before the first round."""
    turn: list[int]
    """Before every other."""
    first_header: list[list[int]]
    """Before the k-th image of a sample, where it is the first of its round; k counts from 0."""
    header: list[list[int]]
    """The same, where it is another."""
    after_images: list[int]
    ask: list[int]
    """The heading of a question."""
    follow_up: list[list[int]]
    """What a question about the k-th image alone begins with, where several have been shown."""
    ref: list[list[int]]
    """A reference to the k-th image."""
    spaced_ref: list[list[int]]
    """The same after a blank."""


class Encoder:
    """Turns conversations into examples with `image_tokens` positions an image.

    Every piece of the template is tokenised on its own and without special tokens, so that the
    labels are exactly the answers and their ends; text that spells a special token stays text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        *,
        image_tokens: int,
        max_tokens: int,
        template: str = "paper",
    ) -> None:
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.max_tokens = max_tokens
        self.template = template
        self.pad_id = pad_id(tokenizer)

    def encode(self, conversation: Conversation, keys: Sequence[str]) -> Encoded | Rejected:
        """The example of a conversation whose images have these sha256 keys, in its order.

        It may be longer than `max_tokens`, as blending drops rounds from its end. Rejects it as
        `too_long` where its first round is.
        """
        turns = conversation.turns
        pieces = list(render(turns, self.template))
        positions = self._positions(pieces)
        end, shown = positions.rounds[0, 2:].tolist()
        if end > self.max_tokens:
            detail = (
                f"its first round has {end} tokens, {shown * self.image_tokens} of them for "
                f"{shown} images; at most {self.max_tokens} fit"
            )
            return Rejected(conversation.source, conversation.record, "too_long", detail)
        return Encoded(
            id=conversation.id,
            ids=positions.ids,
            labels=positions.labels,
            kinds=positions.kinds,
            images=tuple(keys[piece.image] for piece in pieces if piece.type == "image"),
            source=conversation.source,
            alone=turns[0].role == "system",
            rounds=positions.rounds,
            refs=positions.refs,
        )

    def prompt(
        self, turns: Sequence[Turn], *, whole: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(S,) int32 ids and (S,) int8 kinds of what follows on the last answer, or of all if there is none.

        A generation goes on from them; what came before is not tokenised a second time, unless the `whole`
        conversation is wanted.
        """
        pieces = list(prompt(turns, self.template))
        ends = [] if whole else [at for at, piece in enumerate(pieces) if piece.type == "end"]
        positions = self._positions(pieces[ends[-1] + 1 if ends else 0 :])
        return positions.ids, positions.kinds

    def phrases(self, max_images: int) -> Phrases:
        """Those of samples with at most so many images."""
        style = TEMPLATES[self.template]
        of_images = [
            [form(image) for image in range(max_images)]
            for form in (
                header,
                lambda image: BETWEEN_IMAGES + header(image),
                follow_up,
                reference,
                lambda image: " " + reference(image),
            )
        ]
        once = [style.system, AFTER_IMAGES, QUESTION]
        ids = self._tokens([text for texts in (once, *of_images) for text in texts])
        opening, after_images, ask = ids[:3]
        tables = [ids[i : i + max_images] for i in range(3, len(ids), max_images)]
        return Phrases(
            opening=self._begin + opening,
            turn=self._begin if style.begins_rounds else [],
            first_header=tables[0],
            header=tables[1],
            after_images=after_images,
            ask=ask,
            follow_up=tables[2],
            ref=tables[3],
            spaced_ref=tables[4],
        )

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

    @property
    def _begin(self) -> list[int]:
        begin = self.tokenizer.bos_token_id
        return [begin] if isinstance(begin, int) else []

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids

    def _positions(self, pieces: Sequence[Piece]) -> "_Positions":
        tokens = iter(self._tokens([piece.text for piece in pieces if piece.text]))
        fixed = {
            "begin": self._begin,
            "image": [self.pad_id] * self.image_tokens,
            "end": [self.end],
        }
        ids: list[int] = []
        labels: list[int] = []
        kinds: list[int] = []
        rounds: list[list[int]] = []
        refs: list[tuple[int, int, int, bool]] = []
        shown = 0
        for piece in pieces:
            here = len(ids)
            run = next(tokens) if piece.text else fixed[piece.type]
            ids += run
            labels += run if piece.supervise else [IGNORED] * len(run)
            kinds += [Kind.IMAGE if piece.type == "image" else Kind.TEXT] * len(run)
            if piece.type == "image":
                shown += 1
            elif piece.type == "ask":
                rounds.append([here])
            elif piece.type == "ref":
                refs.append((here, len(ids), piece.image, piece.text.startswith(" ")))
            if piece.supervise and len(rounds[-1]) == 1:
                rounds[-1].append(here)
            if piece.type == "end":
                rounds[-1] += [len(ids), shown]
        answered = [found for found in rounds if len(found) == 4]
        return _Positions(
            np.array(ids, np.int32),
            np.array(labels, np.int32),
            np.array(kinds, np.int8),
            np.array(answered, np.int32).reshape(-1, 4),
            np.array(refs, np.int32).reshape(-1, 4),
        )


class _Positions(NamedTuple):
    ids: np.ndarray
    labels: np.ndarray
    kinds: np.ndarray
    rounds: np.ndarray
    refs: np.ndarray


class Passage(NamedTuple):
    """Positions of an example that are an image, or text that is trained throughout or not at all."""

    text: str
    tokens: int
    trained: bool
    image: int
    """The number of the image from 1; 0 for text."""


def passages(example: Example, tokenizer: PreTrainedTokenizerFast) -> Iterator[Passage]:
    """The example as the model sees it, in order; no two adjacent texts are alike in `trained`."""
    trained = example.labels != IGNORED
    image = 0
    for start, end in _runs(example.kinds, trained):
        if example.kinds[start] == Kind.IMAGE:
            image += 1
            yield Passage("", end - start, False, image)
        else:
            text = tokenizer.decode(example.ids[start:end], clean_up_tokenization_spaces=False)
            assert isinstance(text, str)
            yield Passage(text, end - start, bool(trained[start]), 0)


def show(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    """The example as text: trained tokens between ⟦ and ⟧, images as `[image 2: 4 tokens]`."""
    shown = []
    for text, tokens, trained, image in passages(example, tokenizer):
        text = f"[image {image}: {tokens} tokens]" if image else text
        shown.append(f"⟦{text}⟧" if trained else text)
    return "".join(shown)


def _runs(*columns: np.ndarray) -> Iterable[tuple[int, int]]:
    """Start and end of every stretch of positions over which no column changes."""
    changes = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), len(columns[0])]
    return pairwise(edges)
