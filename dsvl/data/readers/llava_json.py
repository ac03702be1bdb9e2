"""LLaVA JSON: {"id", "image": name or names, "conversations": [{"from", "value"}]}, all rounds of it.

The k-th `<image>` marker is the k-th image; images without any marker open the first question.
"""

from collections.abc import Sequence
from typing import Any

from dsvl.data.readers.exact import restored, words
from dsvl.data.readers.records import Chat, Record
from dsvl.data.readers.rounds import MARKER, Role, alternating, marked
from dsvl.data.types import ImageRef, Turn

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def parse(record: Record) -> Chat:
    """The conversation of a record; raises Fault."""
    images = record.images(record.value.get("image"), "image")
    if chat := restored(record, images, export):
        return chat
    said = alternating(
        record.value.get("conversations"), speaker="from", content="value", roles=ROLES
    )
    return Chat(images, marked(said, images=len(images)))


def export(images: Sequence[ImageRef], turns: Sequence[Turn]) -> dict[str, Any]:
    """The record that says the same; references to images in words."""
    names = [image.path for image in images]
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    record: dict[str, Any] = {"image": names[0] if len(names) == 1 else names} if names else {}
    record["conversations"] = [
        {"from": speakers[turn.role], "value": _marked_text(turn)} for turn in turns
    ]
    return record


def _marked_text(turn: Turn) -> str:
    """What a turn says, markers on lines of their own where it begins or ends with images."""
    pieces = [MARKER if part.type == "image" else words(part) for part in turn.content]
    shows = [part.type == "image" for part in turn.content]
    first = shows.index(False) if False in shows else len(shows)
    last = len(shows) - (shows[::-1].index(False) if False in shows else 0)
    opening, middle, closing = pieces[:first], pieces[first:last], pieces[last:]
    return "\n".join([*opening, *(["".join(middle)] if middle else []), *closing])
