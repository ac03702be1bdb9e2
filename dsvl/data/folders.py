"""Folders that are whole or not there, whenever a process is killed, and that one at a time fills."""

import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A folder to fill, which is given its name when the block ends; the first to finish wins."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    making.chmod(0o755)  # mkdtemp makes it private
    try:
        yield making
        try:
            making.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Be the only one that prepares `folder`, until the block or the process ends.

    Waits for another that does, and removes what killed ones have left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("data: another process prepares %s; waiting for its end", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(left)
        yield


def discard(folder: Path) -> None:
    """Remove a folder that `complete` has made; whenever that ends, no half of it keeps the name."""
    making = tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent)
    shutil.rmtree(folder.rename(making))


def link(file: Path, name: Path) -> None:
    """Give a file another name, or copy it where the storage has no links."""
    try:
        os.link(file, name)
    except OSError:
        shutil.copy2(file, name)


def sha256(path: str | Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
