"""Checkpoints as folders: which there are, which of them are whole, and which stay.

`dsvl.checkpoint` says what lies in one. A checkpoint is a folder `step-NNNNNN`; any other name is none.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsvl.config import CheckpointConfig
from dsvl.data.folders import discard, sha256

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
NAME = re.compile(r"step-([0-9]{6,})")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose every file has the size and sha256 that its manifest states."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        """How many updates it holds."""
        return self.manifest["step"]


def held(folder: Path) -> dict[int, Path]:
    """Step -> folder of every checkpoint, whole or not, the newest first."""
    found = {
        int(name[1]): path for path in folder.glob("step-*") if (name := NAME.fullmatch(path.name))
    }
    return dict(sorted(found.items(), reverse=True))


def newest(folder: Path, *, at_most: float = math.inf) -> Checkpoint | None:
    """The newest checkpoint that is whole, of those with `at_most` so many updates.

    Damaged ones are named in the log and passed over.

    Raises:
        ValueError: if there are some, and none of them is whole.
    """
    fault = None
    for step, path in held(folder).items():
        if step > at_most:
            continue
        fault = find_fault(path)
        if fault is None:
            return Checkpoint(path, read_manifest(path))
        log.warning("checkpoint %s is damaged (%s); trying the one before", path, fault)
    if fault is not None:
        raise ValueError(
            f"{folder}: no checkpoint is whole, of the first {fault}; restore one, or remove the folder to "
            "train from the beginning"
        )
    return None


def find_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, entry in manifest["files"].items():
        if not (path / name).is_file():
            return f"{name} is missing"
        try:
            found = _entry(path / name)
        except OSError as error:
            return f"{name}: {error}"
        if found != entry:
            return f"{name} is not what its sha256 says"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """What a checkpoint's manifest states.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not what was written, or is that of another checkpoint or version.
    """
    return checked((path / MANIFEST).read_bytes(), step=int(path.name.removeprefix("step-")))


def checked(text: bytes, *, step: int) -> dict[str, Any]:
    """What the manifest of the checkpoint of a step states; raises ValueError likewise."""
    manifest = json.loads(text)
    if not isinstance(manifest, dict):
        raise ValueError("is no mapping")
    digest = manifest.pop("sha256", None)
    if (version := manifest.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(f"schema_version {version}, not {SCHEMA_VERSION}")
    if digest != _digest(manifest):
        raise ValueError("is not what its sha256 says")
    if manifest["step"] != step:
        raise ValueError(f"is that of step {manifest['step']}")
    return manifest


def write_manifest(path: Path, stated: Mapping[str, Any]) -> None:
    """Write what a checkpoint's manifest states, beside the sha256 of just that."""
    manifest = {"schema_version": SCHEMA_VERSION, **stated}
    sealed = {"sha256": _digest(manifest), **manifest}
    (path / MANIFEST).write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def publish(unfinished: Path, target: Path, stated: Mapping[str, Any]) -> None:
    """Write the manifest of a folder whose files are on the disk, and rename it: both survive a power cut."""
    write_manifest(unfinished, stated)
    sync(unfinished / MANIFEST)
    sync(unfinished)
    if target.exists():
        _remove(target)
    unfinished.rename(target)
    sync(target.parent)


def written(path: Path) -> dict[str, Any]:
    """Bring a file to the disk; returns what the manifest states of it."""
    sync(path)
    return _entry(path)


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, would survive a power cut."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def free_bytes(folder: Path) -> int:
    """What the disk has left for a checkpoint, when what killed saves have left is gone."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)
    return shutil.disk_usage(folder).free


def remove_old(
    folder: Path, config: CheckpointConfig, *, step: int, stay: Collection[int] = ()
) -> None:
    """Leave the newest checkpoints, those with the lowest held-out loss, and those that are to stay.

    Any after `step`, the one just written, goes: a run that went back, perhaps as it was damaged, left it.
    """
    found = held(folder)
    losses = {
        number: held_out_loss(path) if config.keep_best else math.inf
        for number, path in found.items()
    }
    for number in superseded(losses, config, step=step, stay=stay):
        _remove(found[number])


def superseded(
    losses: Mapping[int, float], config: CheckpointConfig, *, step: int, stay: Collection[int] = ()
) -> list[int]:
    """Which checkpoints go, of those with these held-out losses, by step: see `remove_old`."""
    newest_first = sorted(losses, reverse=True)
    others = [number for number in newest_first if number <= step and number not in stay]
    measured = [number for number in others if losses[number] < math.inf]
    best = sorted(measured, key=losses.__getitem__)[: config.keep_best]
    later = [number for number in newest_first if number > step]
    return later + [number for number in others[config.keep :] if number not in best]


def held_out_loss(path: Path) -> float:
    """What was measured when a checkpoint was saved; infinite if nothing was, or its manifest is damaged."""
    try:
        return loss_in(read_manifest(path))
    except (OSError, ValueError):
        return math.inf


def loss_in(manifest: Mapping[str, Any]) -> float:
    """The held-out loss that a manifest states; infinite if it states none."""
    loss = manifest["metrics"].get("eval/loss", math.inf)
    return loss if math.isfinite(loss) else math.inf


def _remove(path: Path) -> None:
    """Remove a checkpoint at once; files that someone has open on a network's disk go with the next save."""
    try:
        discard(path)
    except OSError as error:
        log.warning("checkpoint %s is not removed altogether: %s", path, error)


def _entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _digest(stated: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()
