"""SparklesDialogue: {"dialogue": [{"role", "content", "images": [{"image_id"}]}]}.

Texts speak of images as `IMAGE#14`, followed by a marker where the image is shown. Such names become
references, and an image belongs to the round that shows it first.
"""

import re

from dsvl.data.readers.records import Chat, Fault, Record
from dsvl.data.readers.rounds import alternating, one_line, spoken
from dsvl.data.types import ImageRef, Part, Turn

SHOWN = "<Img><ImageHere></Img>"
_NAME = re.compile(r"IMAGE#(\w+)", re.ASCII)  # all of its word: IMAGE#14 is no part of IMAGE#1417


def parse(record: Record) -> Chat:
    """The dialogue of a record; raises Fault."""
    messages = record.value.get("dialogue")
    said = alternating(
        messages,
        speaker="role",
        content="content",
        roles={"user": "user", "assistant": "assistant"},
    )
    assert isinstance(messages, list)
    numbers: dict[str, int] = {}
    images: list[ImageRef] = []
    turns: list[Turn] = []
    for index, (role, content) in enumerate(said):
        text = spoken(role, content, index)
        shown = messages[index].get("images") or []
        if role == "assistant" and (shown or SHOWN in text):
            raise Fault("marker_mismatch", f"message {index} is an answer that shows an image")
        if not isinstance(shown, list) or text.count(SHOWN) not in (0, len(shown)):
            count = len(shown) if isinstance(shown, list) else type(shown).__name__
            raise Fault(
                "marker_mismatch",
                f"message {index}: {text.count(SHOWN)} markers for {count} images",
            )
        parts: list[Part] = []
        for place, image in enumerate(shown):
            named = image.get("image_id") if isinstance(image, dict) else None
            ref = record.image(named, "dialogue", index, "images", place)
            if str(named) not in numbers:
                numbers[str(named)] = len(images)
                images.append(ref)
                parts.append(Part("image", image=numbers[str(named)]))
        text = text.replace(SHOWN, "")
        parts += _with_references(one_line(text) if role == "user" else text, numbers, index)
        turns.append(Turn(role, tuple(parts)))
    return Chat(images, turns)


def _with_references(text: str, numbers: dict[str, int], index: int) -> list[Part]:
    parts = []
    for number, piece in enumerate(_NAME.split(text)):  # texts and names take turns
        if number % 2 == 0:
            parts += [Part("text", piece)] if piece else []
        elif piece in numbers:
            parts.append(Part("ref", image=numbers[piece]))
        else:
            detail = f"message {index} speaks of IMAGE#{piece}, which was not shown before"
            raise Fault("marker_mismatch", detail)
    return parts
