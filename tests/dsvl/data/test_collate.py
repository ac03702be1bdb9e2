"""Examples -> Batch."""

import numpy as np
import pytest
import torch

from dsvl.data.collate import collate
from dsvl.data.encode import Encoder
from dsvl.data.types import IGNORED, Conversation, Example, ImageRef, Kind, Part, Turn

PIXELS = {key: np.full((3, 2, 2), value, np.float32) for value, key in enumerate("abcd")}


def example(kinds: str, images: str = "", name: str = "set/1") -> Example:
    """From a word of t (text) and i (image); its ids count up from 10."""
    ids = np.arange(10, 10 + len(kinds), dtype=np.int32)
    values = [Kind.IMAGE if kind == "i" else Kind.TEXT for kind in kinds]
    labels = np.where(np.array(values) == Kind.TEXT, ids, IGNORED).astype(np.int32)
    return Example(name, ids, labels, np.array(values, np.int8), tuple(images))


def batch_of(*examples: Example):
    return collate(examples, pixels=PIXELS.__getitem__, image_tokens=2, pad_id=3)


def test_examples_are_padded_on_the_right():
    batch = batch_of(example("ttt"), example("tiitt", "a"))
    assert batch.ids.tolist() == [[10, 11, 12, 3, 3], [10, 11, 12, 13, 14]]
    assert batch.labels.tolist() == [[10, 11, 12, -100, -100], [10, -100, -100, 13, 14]]
    assert batch.kinds.tolist() == [[1, 1, 1, 0, 0], [1, 2, 2, 1, 1]]
    assert (batch.ids.dtype, batch.kinds.dtype) == (torch.int64, torch.int8)
    assert batch.targets == 4


def test_positions_and_pixels_follow_rows_then_places():
    batch = batch_of(example("tiitii", "ba"), example("t"), example("iit", "d"))
    assert batch.layout.images.tolist() == [1, 2, 4, 5, 12, 13]
    assert batch.pixels[:, 0, 0, 0].tolist() == [1, 0, 3]


def test_each_image_lands_in_its_own_slot(tokenizer):
    parts = (Part("image", image=0), Part("image", image=1), Part("text", "Which?"))
    turns = (Turn("user", parts), Turn("assistant", (Part("text", "c"),)))
    chat = Conversation("s/1", "s", "r", (ImageRef("c.png"), ImageRef("b.png")), turns)
    encoded = Encoder(tokenizer, image_tokens=2, max_tokens=999).encode(chat, ["c", "b"])
    batch = batch_of(encoded, example("iit", "a"))
    slots = torch.full((batch.ids.numel(),), -1.0)
    slots[batch.layout.images] = batch.pixels[:, 0, 0, 0].repeat_interleave(2)
    assert slots[slots >= 0].tolist() == [2, 2, 1, 1, 0, 0]
    first, second = (slots == 2).nonzero().max(), (slots == 1).nonzero().min()
    between = tokenizer.decode(batch.ids.flatten()[first + 1 : second])
    assert between == "\n### Image 2:\n"


def test_no_examples_and_empty_ones_are_refused():
    with pytest.raises(ValueError, match="examples=0: a batch needs at least one"):
        batch_of()
    with pytest.raises(ValueError, match=r"row 1 \(set/9\): no tokens"):
        batch_of(example("tt"), example("", name="set/9"))


def test_a_batch_of_text_has_no_images():
    batch = batch_of(example("tt"), example("t"))
    assert len(batch.pixels) == len(batch.layout.images) == 0


@pytest.mark.parametrize(("kinds", "images"), [("tiit", "ab"), ("tiit", ""), ("tiii", "a")])
def test_a_mismatch_of_images_names_the_row_and_both_counts(kinds, images):
    with pytest.raises(ValueError, match=rf"row 1 \(set/9\).*but {len(images)} images"):
        batch_of(example("tt"), example(kinds, images, name="set/9"))
