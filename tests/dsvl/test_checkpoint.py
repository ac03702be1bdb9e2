"""What a checkpoint says of the frozen parts; saving and resuming are tried in `test_train`."""

import shutil

import pytest

from dsvl import checkpoint


def test_a_frozen_part_is_known_by_the_bytes_of_its_weights(checkpoints, tmp_path):
    copy = shutil.copytree(checkpoints / "vision", tmp_path / "copy")
    digest = checkpoint.digest(str(copy))
    assert digest == checkpoint.digest(str(checkpoints / "vision"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert checkpoint.digest(str(copy)) != digest


def test_a_frozen_part_without_weights_that_can_be_told_is_refused(checkpoints, tmp_path):
    copy = shutil.copytree(checkpoints / "vision", tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"copy: has no \*\.safetensors.*save_pretrained"):
        checkpoint.digest(str(copy))
