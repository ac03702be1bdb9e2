"""What a plain format cannot say of a conversation, written beside it so that nothing is lost.

Plain formats have no references to images, LLaVA JSON no system message and, as ShareGPT, no text that
spells its marker. A record that would be read back as something else carries its turns under `KEY`, and
they are taken from there as long as they say what the record itself says.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dsvl.data.readers.records import Chat, Fault, Record, valid
from dsvl.data.types import ImageRef, Part, Turn

KEY = "dsvl_turns"
Export = Callable[[Sequence[ImageRef], Sequence[Turn]], dict[str, Any]]


def written(turns: Sequence[Turn]) -> list[Any]:
    """Turns as JSON has them."""
    return [
        [turn.role, [[p.type, p.text if p.type == "text" else p.image] for p in turn.content]]
        for turn in turns
    ]


def restored(record: Record, images: Sequence[ImageRef], export: Export) -> Chat | None:
    """The conversation that a record carries, if it is one, and `export` would write the same record."""
    turns = _turns(record.value.get(KEY))
    if turns is None or not _sound(turns, images=len(images)):
        return None
    same = all(
        _plain(record.value.get(key)) == _plain(said) for key, said in export(images, turns).items()
    )
    return Chat(images, turns) if same else None


def words(part: Part) -> str:
    """A text, or a reference in words."""
    return f"image {part.image + 1}" if part.type == "ref" else part.text


def exported(
    images: Sequence[ImageRef],
    turns: Sequence[Turn],
    export: Export,
    read: Callable[[Mapping[str, Any]], Chat],
) -> dict[str, Any]:
    """The record of a conversation, which carries its turns if `read` would not find them in it."""
    record = export(images, turns)
    try:
        chat = read(record)
        same = tuple(chat.images) == tuple(images) and tuple(chat.turns) == tuple(turns)
    except Fault:
        same = False
    return record if same else record | {KEY: written(turns)}


def _plain(value: object) -> object:
    """The shortest way to say it: tables have lists of one, parts that are texts, and keys for nothing."""
    match value:
        case {"type": "text", "text": str(text)}:
            return text
        case dict():
            return {key: _plain(held) for key, held in value.items() if held is not None}
        case [one]:
            return _plain(one)
        case list():
            return [_plain(held) for held in value]
    return value


def _turns(carried: object) -> list[Turn] | None:
    if isinstance(carried, str):  # as a table has it
        try:
            carried = json.loads(carried)
        except (ValueError, RecursionError):
            return None
    if not isinstance(carried, list):
        return None
    turns = []
    for turn in carried:
        match turn:
            case ["system" | "user" | "assistant" as role, list(content)]:
                parts = [_part(part) for part in content]
                found = tuple(part for part in parts if part)
                if len(found) < len(parts):
                    return None
                turns.append(Turn(role, found))
            case _:
                return None
    return turns


def _part(carried: object) -> Part | None:
    match carried:
        case ["text", str(text)] if valid(text):
            return Part("text", text)
        case ["image" | "ref" as kind, int(image)] if not isinstance(image, bool):
            return Part(kind, image=image)
    return None


def _sound(turns: Sequence[Turn], *, images: int) -> bool:
    """Whether rounds are whole, and images shown once, in order, in questions and before they are meant."""
    first = int(bool(turns) and turns[0].role == "system")
    rounds, rest = divmod(len(turns) - first, 2)
    roles = [turn.role for turn in turns[first:]]
    if not rounds or rest or roles != ["user", "assistant"] * rounds:
        return False
    shown = 0
    for turn in turns:
        here = [part.image for part in turn.content if part.type == "image"]
        if here != list(range(shown, shown + len(here))) or (here and turn.role != "user"):
            return False
        shown += len(here)
        if any(not 0 <= part.image < shown for part in turn.content if part.type == "ref"):
            return False
        if turn.role == "assistant" and not "".join(map(words, turn.content)).strip():
            return False
    return shown == images
