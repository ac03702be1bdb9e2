"""Folders that are whole or not there, whenever a process is killed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
