"""Examples -> Batch."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from dsvl.data.types import IGNORED, Batch, Example, Kind


def collate(
    examples: Sequence[Example],
    *,
    pixels: Callable[[str], np.ndarray],
    image_tokens: int,
    pad_id: int,
) -> Batch:
    """Pad examples on the right to the longest and gather their images in order of appearance.

    `pixels` gives the (3, P, P) float32 pixels of a sha256 key. Without any image the batch has
    `pixels` of shape (0, 3, 0, 0), as nothing tells P.
    Raises ValueError, naming the row, where its image positions and its images disagree.
    """
    lengths = np.array([len(example.ids) for example in examples])
    filled = np.arange(lengths.max()) < lengths[:, None]  # (B, S)

    def padded(columns: Sequence[np.ndarray], fill: int, dtype: type) -> np.ndarray:
        table = np.full(filled.shape, fill, dtype)
        table[filled] = np.concatenate(columns)
        return table

    kinds = padded([example.kinds for example in examples], Kind.PAD, np.int8)
    is_image = kinds == Kind.IMAGE
    for row, (example, positions) in enumerate(zip(examples, is_image.sum(1), strict=True)):
        if positions != len(example.images) * image_tokens:
            raise ValueError(
                f"row {row} ({example.id}): {positions} image positions, which is room for "
                f"{positions / image_tokens:g} images of {image_tokens} tokens, "
                f"but {len(example.images)} images"
            )
    images = [pixels(key) for example in examples for key in example.images]
    return Batch(
        ids=torch.from_numpy(padded([e.ids for e in examples], pad_id, np.int64)),
        labels=torch.from_numpy(padded([e.labels for e in examples], IGNORED, np.int64)),
        kinds=torch.from_numpy(kinds),
        pixels=torch.from_numpy(np.stack(images)) if images else torch.zeros(0, 3, 0, 0),
        image_positions=torch.from_numpy(np.flatnonzero(is_image)),
    )
