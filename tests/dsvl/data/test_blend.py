"""Blends: nothing is lost, and what is put together in tokens is what encoding the whole would give."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl.config import BlendConfig, DataConfig, SetConfig
from dsvl.data.blend import Blender, order
from dsvl.data.encode import Encoder
from dsvl.data.images import ImageProcessor, StoredImage
from dsvl.data.store import open_store
from dsvl.data.types import IGNORED, Conversation, Encoded, Example, ImageRef, Part, Turn
from tests.dsvl.data.prepared import Sample, write

IMAGE_TOKENS, MAX_IMAGES = 3, 5
PROCESSOR = ImageProcessor(2, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


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


def prepared(folder: Path, chats: list[Conversation], encoder: Encoder):
    letters = sorted({ref.path for chat in chats for ref in chat.images})
    keys = {letter: f"{ord(letter):064x}" for letter in letters}
    pixels = np.zeros((3, 2, 2), np.uint8)
    images = {
        key: StoredImage(key, letter.encode(), letter, 2, 2, "image/png", pixels)
        for letter, key in keys.items()
    }
    kept = [
        Sample(chat, tuple(keys[ref.path] for ref in chat.images), "train", ()) for chat in chats
    ]
    write(folder, kept, encoder=encoder, images=images, processor=PROCESSOR)
    return open_store(folder)


@pytest.fixture(params=["paper", "original"])
def encoder(tokenizer, request):
    return Encoder(tokenizer, image_tokens=IMAGE_TOKENS, max_tokens=10_000, template=request.param)


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


WORDS = st.sampled_from(["red", "blue $1", "$1", "$1 is", "no.", "</s>", " ", "### Answer:\n", "é"])


@st.composite
def chats(draw):
    found = []
    for number in range(draw(st.integers(1, 7))):
        rounds, letters = [], ""
        for _ in range(draw(st.integers(1, 3))):
            images, question, answer = draw(st.integers(0, 2)), draw(WORDS), draw(WORDS)
            images = min(images, MAX_IMAGES - len(letters))
            letters += draw(st.text("abcdefgh", min_size=images, max_size=images))
            if not letters:  # nothing to refer to yet
                question, answer = question.replace("$1", "it"), answer.replace("$1", "it")
            rounds.append(("@" * images + question, answer))
        found.append(said(*rounds, images=letters, name=str(number)))
    return found


@settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(chats(), st.integers(1, 3), st.integers(0, 2), st.integers(0, 5))
def test_what_is_put_together_in_tokens_is_what_encoding_the_whole_gives(
    encoder, tmp_path_factory, found, fewest, more, number
):
    store = prepared(tmp_path_factory.mktemp("blend") / "set", found, encoder)
    blend = BlendConfig(sets=("a",), concat=(fewest, fewest + more))
    epoch = blended(store, data("a", blends={"a": blend}, max_images=MAX_IMAGES)).epoch(number)
    by_name = {chat.id: chat for chat in found}
    seen = Counter()
    for index in range(len(epoch)):
        sample = epoch[index]
        parts = [by_name[name] for name in sample.id.split("+")]
        seen.update(part.id for part in parts)
        keys = [f"{ord(ref.path):064x}" for ref in follows(parts).images]
        expected = encoder.encode(follows(parts), keys)
        fit = expected.rounds[expected.rounds[:, 3] <= MAX_IMAGES]
        assert_equal(sample, cut(expected, len(fit)))
        assert epoch.lengths[index] == len(sample.ids)
        assert epoch.targets[index] == (sample.labels != IGNORED).sum()
    if sum(len(chat.images) for chat in found) <= MAX_IMAGES:
        assert seen == Counter(by_name.keys()), "every conversation is in one sample"


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_an_order_is_a_permutation_of_seed_and_epoch_alone(n):
    first = order(n, seed=3, epoch=5)
    np.testing.assert_array_equal(np.sort(first), np.arange(n))
    np.testing.assert_array_equal(first, order(n, seed=3, epoch=5))


def test_orders_differ_between_epochs_and_seeds():
    orders = {tuple(order(50, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_an_order_never_changes_between_versions():
    assert order(8, seed=1234, epoch=0).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]
