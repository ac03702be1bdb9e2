"""Examples -> Batch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dsvl.config import require
from dsvl.data.layout import lay_out
from dsvl.data.types import IGNORED, Batch, Example, Kind


def collate(
    examples: Sequence[Example],
    *,
    pixels: Callable[[str], np.ndarray],
    image_tokens: int,
    pad_id: int,
    rows: Sequence[int] | None = None,
    no_image: Sequence[int] = (3, 0, 0),
) -> Batch:
    """Lay examples out in rows, padded on the right to the longest, and gather their images.

    Args:
        examples: of any lengths.
        pixels: sha256 key -> (3, P, P) float32 pixels, or (image_tokens, hidden_size) features.
        image_tokens: positions of an image.
        pad_id: what fills `ids` where there is no text.
        rows: the row of each example, ascending from 0, to pack several into one; else each has its own.
        no_image: without any image `pixels` is (0, *no_image), an image more or less.

    Raises ValueError without any example; and, naming it, where an example is empty or its image positions
    and its images disagree.
    """
    require(len(examples) > 0, "examples", len(examples), "a batch needs at least one")
    for number, example in enumerate(examples):
        if not len(example.ids):
            raise ValueError(
                f"row {number} ({example.id}): no tokens, so nothing to predict from; leave it out or "
                "begin it with a token"
            )
        positions = int((example.kinds == Kind.IMAGE).sum())
        if positions != len(example.images) * image_tokens:
            raise ValueError(
                f"row {number} ({example.id}): {positions} image positions, which is room for "
                f"{positions / image_tokens:g} images of {image_tokens} tokens, "
                f"but {len(example.images)} images"
            )
    row = np.arange(len(examples)) if rows is None else np.asarray(rows)
    sizes = np.array([len(example.ids) for example in examples])
    lengths = np.bincount(row, weights=sizes).astype(np.int64)
    filled = np.arange(lengths.max()) < lengths[:, None]  # (B, S)

    def padded(columns: Sequence[np.ndarray], fill: int, dtype: type) -> np.ndarray:
        table = np.full(filled.shape, fill, dtype)
        table[filled] = np.concatenate(columns)
        return table

    labels = padded([example.labels for example in examples], IGNORED, np.int64)
    kinds = padded([example.kinds for example in examples], Kind.PAD, np.int8)
    packing = padded([np.full(size, n) for n, size in enumerate(sizes)], -1, np.int64)
    # A position predicts the label after it, unless that begins another example.
    predicts = np.zeros_like(filled)
    predicts[:, :-1] = (labels[:, 1:] != IGNORED) & (packing[:, 1:] == packing[:, :-1])
    shown = tuple(key for example in examples for key in example.images)
    return Batch(
        ids=torch.from_numpy(padded([e.ids for e in examples], pad_id, np.int64)),
        labels=torch.from_numpy(labels),
        images=shown,
        pixels=torch.from_numpy(np.stack([pixels(key) for key in shown]))
        if shown
        else torch.zeros(0, *no_image),
        layout=lay_out(kinds, predicts, samples=None if rows is None else packing),
    )
