"""Stored features are what the tower makes of an image, whatever the precision and the batch."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dsvl import features
from dsvl.config import VisionConfig
from dsvl.data.encode import Encoder
from dsvl.data.images import StoredImage
from dsvl.data.store import open_store
from dsvl.digits import chats
from dsvl.model import DTYPES
from dsvl.vision import VisionTower
from tests.dsvl.data.prepared import write

TOWER = VisionConfig(
    checkpoint=str(Path(chats.__file__).parent / "checkpoints/vision"),
    image_size=8,
    patch_size=4,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
)


@pytest.fixture
def prepared(tokenizer, tmp_path):
    """Five images in shards of three."""
    lot = np.random.default_rng(0)
    images = {
        key: StoredImage(
            key, key.encode(), key, 8, 8, "image/png", lot.integers(0, 256, (3, 8, 8), np.uint8)
        )
        for key in (f"{number:064x}" for number in range(5))
    }
    encoder = Encoder(tokenizer, image_tokens=4, max_tokens=99)
    write(tmp_path / "set", [], encoder=encoder, images=images, shard=3)
    return open_store(tmp_path / "set")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_features_come_back_as_the_tower_makes_them(
    prepared, tmp_path, precision, monkeypatch, request
):
    monkeypatch.setattr(features, "BATCH", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    tower = VisionTower(TOWER, dtype=DTYPES[precision]).eval()
    assert [features.write(tower, prepared, shard, tmp_path / "f") for shard in (0, 1)] == [
        True
    ] * 2
    assert not features.write(tower, prepared, 1, tmp_path / "f"), "what is there is kept"
    stored = features.Features(prepared, tmp_path / "f")
    for number in range(5):
        key = f"{number:064x}"
        expected = tower(torch.from_numpy(prepared.pixels(key))[None])[0]
        found = torch.from_numpy(stored(key))
        assert found.dtype == torch.float32
        assert torch.equal(found.to(expected.dtype), expected)
    assert sorted(path.name for path in (tmp_path / "f").iterdir()) == ["00000.npy", "00001.npy"]


def test_missing_features_are_refused(prepared, tmp_path):
    features.write(VisionTower(TOWER, dtype=torch.float32), prepared, 1, tmp_path / "f")
    with pytest.raises(FileNotFoundError, match=r"00000\.npy.* 1 of 2 shards .*stored_features"):
        features.Features(prepared, tmp_path / "f")


def test_the_folder_names_the_tower_and_the_precision(tmp_path):
    places = {
        features.folder_of(tmp_path, TOWER, tower=tower, precision=precision)
        for tower in ("one", "another")
        for precision in ("fp32", "bf16")
    }
    assert len(places) == 4
