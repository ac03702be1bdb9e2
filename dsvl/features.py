"""What the frozen tower makes of the images of a prepared set, kept beside it: training then runs no tower.

A folder `features/DIGEST` within the set has a file for each of `encoded/pixels/`, row by row of the same
images. The digest names the tower and its precision. They are the bits that the tower gives in a step where a
batch changes nothing about an image in it, as on one thread of a CPU; else they agree within rounding.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

from dsvl.config import VisionConfig
from dsvl.data.store import Prepared
from dsvl.vision import VisionTower

BATCH = 16
"""Images that pass through the tower at once."""


def folder_of(prepared: Path, config: VisionConfig, *, tower: str, precision: str) -> Path:
    """Where the features of this tower are; `tower` is the digest of its weights."""
    identity = json.dumps([tower, config.kind, config.class_token, precision])
    return prepared / "features" / hashlib.sha256(identity.encode()).hexdigest()[:16]


@torch.no_grad()
def write(tower: VisionTower, prepared: Prepared, shard: int, folder: Path) -> bool:
    """Write the features of a shard of images, and return true, unless that is done."""
    path = folder / f"{shard:05}.npy"
    if path.is_file():
        return False
    device = next(tower.parameters()).device
    pixels = prepared.pixel_shard(shard)
    found = []
    for first in range(0, len(pixels), BATCH):
        some = np.stack(
            [prepared.processor.normalise(image) for image in pixels[first : first + BATCH]]
        )
        found.append(tower(torch.from_numpy(some).to(device)).cpu())
    features = torch.cat(found)
    if features.dtype == torch.bfloat16:  # of which numpy knows nothing
        features = features.view(torch.uint16)
    folder.mkdir(parents=True, exist_ok=True)
    making = folder / f".{path.name}-{os.getpid()}"
    with making.open("wb") as file:
        np.save(file, features.numpy())
    making.rename(path)
    return True


class Features:
    """The features of a prepared set's images, by key."""

    def __init__(self, prepared: Prepared, folder: Path) -> None:
        """Raises FileNotFoundError, saying what to do, unless all of them are there."""
        self._place = prepared.place
        paths = [folder / f"{shard:05}.npy" for shard in range(prepared.shards)]
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{missing[0]}: no such file: the features of {len(missing)} of {len(paths)} shards are "
                "missing; prepare the data with engine.stored_features=true, or set that to false"
            )
        self._shards = [np.asarray(np.load(path, mmap_mode="r")) for path in paths]
        self.shape: tuple[int, ...] = self._shards[0].shape[1:] if paths else prepared.vision_shape
        """Of the features of an image; without any, of its pixels."""

    def __call__(self, key: str) -> np.ndarray:
        """(tokens, width) float32 of the image with this sha256 key."""
        shard, row = self._place(key)
        stored = self._shards[shard][row]
        if stored.dtype == np.uint16:  # the upper half of a float32
            return (stored.astype(np.uint32) << 16).view(np.float32)
        return stored.astype(np.float32)
