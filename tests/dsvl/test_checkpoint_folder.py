"""Which checkpoints there are, which are whole, and which stay."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest

from dsvl import checkpoint_folder
from dsvl.checkpoint_folder import (
    find_fault,
    free_bytes,
    held,
    newest,
    publish,
    read_manifest,
    remove_old,
    write_manifest,
    written,
)
from dsvl.config import CheckpointConfig


def save(folder: Path, step: int, **metrics: float) -> Path:
    """A checkpoint of one small file."""
    unfinished = folder / f".step-{step:06d}-writing"
    unfinished.mkdir(parents=True)
    (unfinished / "values").write_text(f"after {step}")
    files = {"values": written(unfinished / "values")}
    target = folder / f"step-{step:06d}"
    publish(unfinished, target, {"step": step, "metrics": metrics, "files": files})
    return target


def steps(folder: Path) -> list[int]:
    return sorted(held(folder))


def test_every_bit_that_flips_in_a_manifest_is_a_fault_or_changes_nothing(tmp_path):
    whole = save(tmp_path, 400, loss=1e-05)
    stated, path = read_manifest(whole), whole / "manifest.json"
    content = path.read_bytes()
    harmless = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        fault = find_fault(whole)
        if fault is None:
            harmless += 1
            assert read_manifest(whole) == stated
        else:
            assert fault.startswith("manifest.json: ")
    assert harmless == 1, "of the exponent's letter"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "is no mapping"),
        ("{}", "schema_version None, not 3"),
        ('{"schema_version": 3, "step": 8, "files": {}}', "is not what its sha256 says"),
        ("\udcff", "codec can't decode"),
    ],
)
def test_a_manifest_that_is_none_is_named_and_the_one_before_is_used(tmp_path, caplog, text, says):
    save(tmp_path, 4)
    (save(tmp_path, 8) / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    assert newest(tmp_path).step == 4
    assert "step-000008 is damaged (manifest.json: " in caplog.text
    assert says in caplog.text


def test_a_checkpoint_under_the_name_of_another_is_not_whole(tmp_path):
    save(tmp_path, 4).rename(tmp_path / "step-000008")
    assert find_fault(tmp_path / "step-000008") == "manifest.json: is that of step 4"


def test_a_file_that_cannot_be_read_is_a_fault(tmp_path, monkeypatch):
    whole = save(tmp_path, 4)

    def failing(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint_folder, "sha256", failing)
    assert find_fault(whole).startswith("values: [Errno 5] Input/output error")


def test_folders_of_other_names_are_no_checkpoints(tmp_path):
    save(tmp_path, 400)
    for name in ("step-000500.bak", "step-", "step-x", "step-000600-old", "step--00700"):
        shutil.copytree(tmp_path / "step-000400", tmp_path / name)
    assert steps(tmp_path) == [400]
    assert newest(tmp_path).step == 400
    remove_old(tmp_path, CheckpointConfig(keep=1), step=400)
    assert len(list(tmp_path.iterdir())) == 6


def test_the_newest_checkpoints_stay_and_those_with_the_lowest_held_out_loss(tmp_path, monkeypatch):
    losses = {1: 0.5, 2: 0.2, 3: math.nan, 4: 0.3, 5: 0.9, 6: None}
    for step, loss in losses.items():
        save(tmp_path, step, **({} if loss is None else {"eval/loss": loss}))
    (tmp_path / "step-000002/manifest.json").write_text("{")

    def left(**settings):
        remove_old(tmp_path, CheckpointConfig(**settings), step=6)
        return steps(tmp_path)

    assert left(keep=2, keep_best=2) == [1, 4, 5, 6]
    assert left(keep=2, keep_best=1) == [4, 5, 6]
    monkeypatch.delattr(checkpoint_folder, "held_out_loss")  # nobody asks
    assert left(keep=1) == [6]


def test_checkpoints_after_the_one_just_written_go_and_take_no_place_of_those_that_stay(tmp_path):
    for step in (2, 4, 6, 8, 10):
        save(tmp_path, step, **{"eval/loss": 1 / step})
    remove_old(tmp_path, CheckpointConfig(keep=1, keep_best=2), step=6, stay={2, 10})
    assert steps(tmp_path) == [2, 4, 6]


def test_a_file_that_someone_has_open_ends_no_training_and_goes_later(
    tmp_path, monkeypatch, caplog
):
    for step in (4, 8):
        save(tmp_path, step)
    remove = shutil.rmtree

    def busy(path, ignore_errors=False):
        (Path(path) / "manifest.json").unlink()
        if not ignore_errors:
            raise OSError(16, "Device or resource busy", ".nfs0001")

    monkeypatch.setattr(shutil, "rmtree", busy)
    remove_old(tmp_path, CheckpointConfig(keep=1), step=8)
    assert steps(tmp_path) == [8]
    assert "step-000004 is not removed altogether" in caplog.text
    save(tmp_path, 8)  # anew, where one is that cannot be removed
    assert newest(tmp_path).step == 8
    assert len(list(tmp_path.glob(".step-*"))) == 2
    monkeypatch.setattr(shutil, "rmtree", remove)
    free_bytes(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000008"]


def test_a_checkpoint_gets_its_name_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    """What is synced, in which order, and whether the checkpoint has its name by then."""
    synced, sync = [], os.fsync

    def noted(opened):
        path = Path(os.readlink(f"/proc/self/fd/{opened}"))
        synced.append((path.name, (tmp_path / "step-000004").exists()))
        sync(opened)

    monkeypatch.setattr(os, "fsync", noted)
    save(tmp_path, 4)
    assert synced == [
        ("values", False),
        ("manifest.json", False),
        (".step-000004-writing", False),
        (tmp_path.name, True),
    ]


def test_a_manifest_is_told_apart_by_what_it_states_and_not_by_its_form(tmp_path):
    whole = save(tmp_path, 4)
    text = json.loads((whole / "manifest.json").read_text())
    (whole / "manifest.json").write_text(json.dumps(dict(reversed(text.items()))))
    assert find_fault(whole) is None
    write_manifest(whole, read_manifest(whole))
    assert find_fault(whole) is None
