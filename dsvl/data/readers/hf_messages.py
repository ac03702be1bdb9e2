"""Hugging Face chat messages: {"messages": [{"role", "content"}], "images": [...]}.

A content is a text, or a list of parts {"type": "text", "text"} and {"type": "image"}. A part may name its
image itself (`image`, `path`, `url`, `base64`, or an `image_url` as OpenAI has it); those that do not
take the next of `images`. Images that no part places open the first question.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsvl.data.readers.exact import restored, words
from dsvl.data.readers.records import Chat, Fault, Record
from dsvl.data.readers.rounds import Role, alternating, one_line, worded
from dsvl.data.types import ImageRef, Part, Turn

ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def parse(record: Record) -> Chat:
    """The conversation of a record; raises Fault."""
    fields = record.config.fields
    messages, column = fields.messages or "messages", fields.images or "images"
    listed = record.images(record.value.get(column), column)
    if chat := restored(record, listed, export):
        return chat
    said = alternating(record.value.get(messages), speaker="role", content="content", roles=ROLES)
    images: list[ImageRef] = []
    taken = 0
    turns: list[Turn] = []
    for index, (role, content) in enumerate(said):
        pieces = content if isinstance(content, list) else [{"type": "text", "text": content}]
        parts: list[Part] = []
        for place, piece in enumerate(pieces):
            kind = piece.get("type") if isinstance(piece, dict) else None
            if kind == "text":
                text = worded(role, piece.get("text"), index)
                if text:
                    parts.append(Part("text", one_line(text) if role == "user" else text))
            elif kind in ("image", "image_url") and role == "user":
                parts.append(Part("image", image=len(images)))
                named = _named(piece)
                if named is None:
                    if taken == len(listed):
                        raise Fault("marker_mismatch", f"only {taken} images for more parts")
                    images.append(listed[taken])
                    taken += 1
                else:
                    where = (messages, index, "content", place, named[0])
                    images.append(record.image(named[1], *where))
            else:
                detail = f"message {index}, from the {role}, has a part of type {ascii(kind)[:100]}"
                raise Fault("marker_mismatch", detail)
        if role == "assistant" and not "".join(part.text for part in parts).strip():
            raise Fault("empty_answer", f"message {index} is blank")
        turns += [Turn(role, tuple(parts))] if parts or role != "system" else []
    if taken < len(listed):
        if images:
            raise Fault("marker_mismatch", f"{len(listed)} images, but {taken} parts for them")
        images = list(listed)
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        opening = [Part("image", image=image) for image in range(len(images))]
        turns[first] = Turn("user", (*opening, *turns[first].content))
    return Chat(images, turns)


def export(images: Sequence[ImageRef], turns: Sequence[Turn]) -> dict[str, Any]:
    """The record that says the same; references to images in words."""
    return {
        "messages": [{"role": turn.role, "content": _content(turn)} for turn in turns],
        "images": [image.path for image in images],
    }


def _content(turn: Turn) -> str | list[dict[str, str]]:
    if len(turn.content) == 1 and turn.content[0].type != "image":
        return words(turn.content[0])
    return [
        {"type": "image"} if part.type == "image" else {"type": "text", "text": words(part)}
        for part in turn.content
    ]


def _named(piece: Mapping[str, Any]) -> tuple[str, object] | None:
    """Where a part names its image, and what it says there."""
    for key in ("image", "path", "url", "image_url", "base64"):
        named = piece.get(key)
        if key == "image_url" and isinstance(named, Mapping):
            named = named.get("url")
        if key == "base64" and isinstance(named, str):
            named = f"data:;base64,{named}"
        if named is not None:
            return key, named
    return None
