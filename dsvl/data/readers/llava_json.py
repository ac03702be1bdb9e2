"""LLaVA JSON: a list of {"id", "image": name or names, "conversations": [{"from", "value"}]}.

The k-th `<image>` marker is the k-th image; images without any marker open the first question.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsvl.data.types import Conversation, ImageRef, Part, Reason, Rejected, Turn

MARKER = "<image>"
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _Fault(Exception):  # noqa: N818
    """A record that must be rejected."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason: Reason = reason
        self.detail = detail


def read(
    source: str, *, paths: Mapping[str, Path], max_images: int
) -> Iterator[Conversation | Rejected]:
    """The records of annotation files, given as name -> path, in order; see `readers.read`.

    A record is called `NAME:17 (its own id)`, counted from 0. Its conversation has the id
    `SOURCE/OWN_ID`, or `SOURCE/NAME:17` without one; repeats get `#2`, `#3`, ...
    """
    taken: set[str] = set()
    for name, path in paths.items():
        for position, record in enumerate(_load(path)):
            place = f"{name}:{position}"
            own = _own_id(record)
            key = f"{source}/{own or place}"
            unique, repeat = key, 1
            while unique in taken:
                repeat += 1
                unique = f"{key}#{repeat}"
            taken.add(unique)
            place += f" ({own})" if own else ""
            try:
                images = _images(record, max_images=max_images)
                turns = _turns(record, images=len(images))
            except _Fault as bad:
                yield Rejected(source, place, bad.reason, bad.detail)
                continue
            yield Conversation(unique, source, place, images, turns, {"key": key})


def _load(path: Path) -> list[Any]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such annotation file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: is not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, a number or a nesting too large
        raise ValueError(f"{path}:1: is not JSON: {error}") from error
    if not isinstance(records, list):
        kind = type(records).__name__
        raise ValueError(f"{path}:1: must hold a list of records, but holds a {kind}")
    return records


def _own_id(record: Any) -> str:
    own = record.get("id") if isinstance(record, dict) else None
    if isinstance(own, bool) or not isinstance(own, str | int):
        return ""
    return str(own).encode("utf-8", "backslashreplace").decode()


def _images(record: Any, *, max_images: int) -> tuple[ImageRef, ...]:
    if not isinstance(record, dict):
        raise _Fault("bad_roles", f"the record is a {type(record).__name__}, not an object")
    named = record.get("image")
    names = named if isinstance(named, list) else [] if named is None else [named]
    for index, name in enumerate(names):
        if not isinstance(name, str):
            kind = type(name).__name__
            raise _Fault("missing_image", f"image {index + 1} is a {kind}, not a path")
    if len(names) > max_images:
        raise _Fault("too_many_images", f"{len(names)} images; at most {max_images} may be")
    return tuple(ImageRef(name) for name in names)


def _turns(record: Mapping[str, Any], *, images: int) -> tuple[Turn, ...]:
    messages = record.get("conversations")
    if not isinstance(messages, list) or not messages:
        raise _Fault("unpaired_round", "there is no list of conversations, or it is empty")
    roles, texts = zip(*(_message(i, message) for i, message in enumerate(messages)), strict=True)
    for index, role in enumerate(roles):
        expected = ("user", "assistant")[index % 2]
        if role != expected:
            raise _Fault("bad_roles", f"message {index} is from the {role}, not the {expected}")
    if len(roles) % 2:
        raise _Fault("unpaired_round", f"{len(roles)} messages: the last question has no answer")
    for index, answer in enumerate(texts[1::2]):
        if not answer.strip():
            raise _Fault("empty_answer", f"message {2 * index + 1} is blank")
        if MARKER in answer:
            raise _Fault("marker_mismatch", f"message {2 * index + 1} is an answer with {MARKER}")
    markers = sum(question.count(MARKER) for question in texts[::2])
    if markers and markers != images:
        raise _Fault("marker_mismatch", f"{markers} {MARKER} markers for {images} images")

    turns: list[Turn] = []
    placed = 0
    for index, (role, text) in enumerate(zip(roles, texts, strict=True)):
        if role == "assistant":
            turns.append(Turn("assistant", (Part("text", text),)))
            continue
        parts: list[Part] = []
        if index == 0 and not markers:
            parts += [Part("image", image=image) for image in range(images)]
        for number, piece in enumerate(_pieces(text)):
            if number:
                parts.append(Part("image", image=placed))
                placed += 1
            if piece:
                parts.append(Part("text", piece))
        turns.append(Turn("user", tuple(parts)))
    return tuple(turns)


def _message(index: int, message: Any) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise _Fault("bad_roles", f"message {index} is a {type(message).__name__}, not an object")
    speaker, text = message.get("from"), message.get("value")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise _Fault("bad_roles", f"message {index} is from {ascii(speaker)[:100]}")
    # A lone surrogate, which JSON can spell, is no text that could be stored or tokenised.
    if isinstance(text, str) and not _SURROGATE.search(text):
        return role, text
    reason = "empty_answer" if role == "assistant" else "unpaired_round"
    raise _Fault(reason, f"message {index}, from the {role}, has no valid text")


def _pieces(question: str) -> list[str]:
    """The text between the markers, in one line, without the blanks that they leave at its ends."""
    pieces = question.replace("\r\n", " ").replace("\n", " ").split(MARKER)
    for ends, strip in ((range(len(pieces)), str.lstrip), (range(len(pieces))[::-1], str.rstrip)):
        for number, index in enumerate(ends):
            if number or (len(pieces) > 1 and not pieces[index].strip()):
                pieces[index] = strip(pieces[index])
            if pieces[index]:
                break
    return pieces
