"""Raw annotation files -> conversations: one module a family, one table at the foot."""

from collections.abc import Iterator
from pathlib import Path

from dsvl.config import SetConfig
from dsvl.data.readers import llava_json
from dsvl.data.types import Conversation, Rejected


def read(
    source: str, *, config: SetConfig, root: str | Path, max_images: int
) -> Iterator[Conversation | Rejected]:
    """Every raw record of a set, once and in order: as a conversation or as rejected.

    Relative annotation paths start at `root`. No image is opened.
    Raises FileNotFoundError, or ValueError naming file and line, where a whole file is unreadable.
    """
    paths = {name: Path(root) / name for name in config.annotations}
    return READERS[config.reader](source, paths=paths, max_images=max_images)


READERS = {
    "llava_json": llava_json.read,
}
