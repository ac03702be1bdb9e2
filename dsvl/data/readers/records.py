"""What all readers share: a record's name, the faults that reject it, random choices, names of images."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from dsvl.config import SetConfig
from dsvl.data.types import Conversation, ImageRef, Reason, Rejected, Row, Turn

_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Fault(Exception):  # noqa: N818 - a fact about the data, not of the program
    """A record that must be rejected."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail


@dataclass(frozen=True, slots=True)
class Chat:
    """What is read from one record."""

    images: Sequence[ImageRef]
    turns: Sequence[Turn]
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """A raw record that is an object, and what reading it takes."""

    id: str
    """That of its conversation, unique in its set."""
    row: Row
    value: Mapping[str, Any]
    config: SetConfig
    seed: int

    def choose(self, purpose: str, options: Sequence[str]) -> str:
        """One of the options, by the seed, the purpose and the record's id alone."""
        digest = hashlib.sha256(f"{self.seed}/{purpose}/{self.id}".encode()).digest()
        return options[int.from_bytes(digest[:8]) % len(options)]

    def image(self, named: object, *at: str | int) -> ImageRef:
        """The image that the record calls so, or whose bytes it holds at these keys and indices.

        Raises Fault where `named` is no name of an image.
        """
        if isinstance(named, Mapping) and "bytes" in named:  # as the library `datasets` has it
            named = named["bytes"] if named["bytes"] is not None else named.get("path")
        if isinstance(named, bytes):
            return ImageRef("/".join(map(str, (*self._within_images(), self.row.position, *at))))
        if isinstance(named, bool) or not isinstance(named, str | int):
            raise Fault("missing_image", f"image {at} is a {type(named).__name__}, not a path")
        name = str(named)
        if name.startswith("data:"):
            return ImageRef(name)
        if self.config.image_rewrite:
            name = re.sub(*self.config.image_rewrite, name)
        file = PurePath(self.row.file).stem
        return ImageRef(self.config.image_name.format(image=name, file=file))

    def images(self, named: object, *at: str | int) -> tuple[ImageRef, ...]:
        """The images of a field that holds one, a list of them, or none; raises Fault."""
        if isinstance(named, list):
            return tuple(self.image(name, *at, i) for i, name in enumerate(named))
        return () if named is None else (self.image(named, *at),)

    def _within_images(self) -> tuple[str, ...]:
        """The way from the set's images to the annotation file."""
        try:
            return PurePath(self.row.file).relative_to(self.config.images).parts
        except ValueError:
            raise ValueError(
                f"images={self.config.images!r}: {self.row.file} holds images itself; "
                "name it, or the folder that it is in"
            ) from None


def conversations(
    source: str,
    rows: Iterable[Row],
    parse: Callable[[Record], Chat],
    *,
    configs: Mapping[str, SetConfig],
    own: str,
    max_images: int,
    seed: int,
) -> Iterator[Conversation | Rejected]:
    """What `parse` makes of every row, in order; a Fault that it raises becomes a Rejected.

    `configs` has the settings of every file. A record is called `FILE:17 (its own id)`, counted from 0;
    `own` is the field of its id, unless the file is an object, which names its records. Its conversation
    has the id `SOURCE/OWN_ID`, or `SOURCE/FILE:17` without one; repeats get `#2`, `#3`, ...
    """
    taken: set[str] = set()
    for row in rows:
        place = f"{row.file}:{row.position}"
        named = row.key or (row.value.get(own) if isinstance(row.value, dict) else "")
        name = "" if isinstance(named, bool) or not isinstance(named, str | int) else str(named)
        name = name.encode("utf-8", "backslashreplace").decode()
        key = f"{source}/{name or place}"
        unique, repeat = key, 1
        while unique in taken:
            repeat += 1
            unique = f"{key}#{repeat}"
        taken.add(unique)
        place += f" ({name})" if name else ""
        try:
            if not isinstance(row.value, dict):
                kind = type(row.value).__name__
                raise Fault("bad_roles", f"the record is a {kind}, not an object")
            chat = parse(Record(unique, row, row.value, configs[row.file], seed))
            if len(chat.images) > max_images:
                found = f"{len(chat.images)} images; at most {max_images} may be"
                raise Fault("too_many_images", found)
        except Fault as bad:
            yield Rejected(source, place, bad.reason, bad.detail)
            continue
        images, turns = tuple(chat.images), tuple(chat.turns)
        yield Conversation(unique, source, place, images, turns, {"key": key, **chat.meta})


def valid(text: object) -> str | None:
    """The text, unless it is none that could be stored or tokenised: JSON can spell a lone surrogate."""
    return text if isinstance(text, str) and not _SURROGATE.search(text) else None


def instruction(held: object) -> str | None:
    """The system message that a record holds, if any; raises Fault where it is no text."""
    if held is None or held == "":
        return None
    if (text := valid(held)) is None:
        raise Fault("bad_roles", "the system message is no text")
    return text
