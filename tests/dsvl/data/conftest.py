"""Conversations in a few letters, prepared and blended; what is put together, by slow definitions."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from dsvl.config import DataConfig, SetConfig
from dsvl.data.blend import Blender, Epoch
from dsvl.data.encode import Encoder
from dsvl.data.images import ImageProcessor, StoredImage
from dsvl.data.store import Prepared, open_store
from dsvl.data.types import Conversation, Encoded, Example, ImageRef, Part, Turn
from tests.dsvl.data.prepared import Sample, write

IMAGE_TOKENS, MAX_IMAGES = 3, 12
laws = settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PROCESSOR = ImageProcessor(2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture(params=["paper", "original"])
def encoder(tokenizer, request):
    """Of both templates."""
    return Encoder(tokenizer, image_tokens=IMAGE_TOKENS, max_tokens=10_000, template=request.param)


def said(*rounds, images: str, name: str, source: str = "a", system: str = "") -> Conversation:
    """A conversation whose images are letters; in a question `@` shows the next, `$k` refers to the k-th."""
    turns, shown = [], 0
    if system:
        turns.append(Turn("system", (Part("text", system),)))
    for question, answer in rounds:
        parts = []
        for role, text in (("user", question), ("assistant", answer)):
            content = []
            for piece in _pieces(text):
                if piece == "@":
                    content.append(Part("image", image=shown))
                    shown += 1
                elif piece.startswith("$"):
                    content.append(Part("ref", image=int(piece[1:]) - 1))
                else:
                    content.append(Part("text", piece))
            parts.append(Turn(role, tuple(content)))
        turns += parts
    assert shown == len(images)
    refs = tuple(ImageRef(letter) for letter in images)
    key = f"{source}/{name}"
    return Conversation(key, source, name, refs, tuple(turns), {"key": key})


def _pieces(text: str) -> list[str]:
    pieces, plain = [], ""
    letters = iter(text)
    for letter in letters:
        if letter in "@$":
            pieces += [plain] if plain else []
            plain = ""
            pieces.append(letter if letter == "@" else letter + next(letters))
        else:
            plain += letter
    return [*pieces, plain] if plain else pieces


def keys(chat: Conversation) -> tuple[str, ...]:
    """sha256 keys of its images, so to speak."""
    return tuple(f"{ord(ref.path):064x}" for ref in chat.images)


def prepared(folder: Path, chats: list[Conversation], encoder: Encoder) -> Prepared:
    """All of them, on the training side."""
    pixels = np.zeros((3, 2, 2), np.uint8)
    images = {
        key: StoredImage(key, b"", key, 2, 2, "image/png", pixels)
        for chat in chats
        for key in keys(chat)
    }
    kept = [Sample(chat, keys(chat), "train", ()) for chat in chats]
    write(folder, kept, encoder=encoder, images=images, processor=PROCESSOR, max_images=MAX_IMAGES)
    return open_store(folder)


def data(*sources: str, **options) -> DataConfig:
    sets = {
        name: SetConfig(reader="llava_json", annotations=("a.json",), images="i")
        for name in sources
    }
    return DataConfig(sets=sets, **{"max_tokens": 10_000, **options})


def blended(store, config: DataConfig, *, seed: int = 3) -> Blender:
    return Blender(store, "train", data=config, seed=seed)


def follows(parts: list[Conversation]) -> Conversation:
    """The slow definition of conversations one after another: one conversation, images renumbered."""
    turns, images = [], []
    for chat in parts:
        for turn in chat.turns:
            content = tuple(
                replace(part, image=part.image + len(images)) if part.type != "text" else part
                for part in turn.content
            )
            turns.append(Turn(turn.role, content))
        images += chat.images
    return replace(parts[0], images=tuple(images), turns=tuple(turns))


def cut(whole: Encoded, rounds: int) -> Example:
    """Its first rounds."""
    _, _, end, shown = whole.rounds[rounds - 1].tolist()
    parts = (whole.ids[:end], whole.labels[:end], whole.kinds[:end], whole.images[:shown])
    return Example(whole.id, *parts)


def assert_equal(found, expected):
    for name in ("ids", "labels", "kinds"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    assert found.images == expected.images


def contents(epoch: Epoch) -> Counter:
    """The samples of an epoch, in no order."""
    samples = [epoch[index] for index in range(len(epoch))]
    return Counter((sample.id, sample.ids.tobytes(), sample.images) for sample in samples)
