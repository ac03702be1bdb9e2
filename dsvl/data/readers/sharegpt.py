"""ShareGPT, and what LLaMA-Factory's `dataset_info.json` says of such a file.

A record has a list of messages with a speaker and a text, images for the `<image>` markers in questions,
and perhaps a system message. `fields` of the set name its columns and tags, as LLaMA-Factory calls
them; a `dataset_info.json` among the annotations names them for the files that it lists.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dsvl.data.readers import llava_json
from dsvl.data.readers.exact import restored
from dsvl.data.readers.records import Chat, Record, valid
from dsvl.data.readers.rounds import alternating, marked
from dsvl.data.types import ImageRef, Part, Turn

INFO = "dataset_info.json"
FIELDS = {
    "messages": "conversations",
    "images": "images",
    "system": "system",
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "system_tag": "system",
}
"""The columns and tags of LLaMA-Factory, where nothing else is said."""


def parse(record: Record) -> Chat:
    """The conversation of a record; raises Fault."""
    fields = FIELDS | record.config.fields.given()
    images = record.images(record.value.get(fields["images"]), fields["images"])
    if chat := restored(record, images, export):
        return chat
    said = alternating(
        record.value.get(fields["messages"]),
        speaker=fields["role_tag"],
        content=fields["content_tag"],
        roles={
            fields["system_tag"]: "system",
            fields["assistant_tag"]: "assistant",
            fields["user_tag"]: "user",
        },
    )
    turns = marked(said, images=len(images))
    system = valid(record.value.get(fields["system"]))
    if system and turns[0].role != "system":
        turns = (Turn("system", (Part("text", system),)), *turns)
    return Chat(images, turns)


def export(images: Sequence[ImageRef], turns: Sequence[Turn]) -> dict[str, Any]:
    """The record that says the same under the usual names; references to images in words."""
    record = {"conversations": llava_json.export(images, turns)["conversations"]}
    return record | ({"images": [image.path for image in images]} if images else {})


def described(info: object, file: str) -> dict[str, str]:
    """The `fields` that a `dataset_info.json` gives to an annotation file.

    Raises ValueError where it does not list the file, or as another format.
    """
    entries = info.values() if isinstance(info, Mapping) else ()
    name = file.rsplit("/", 1)[-1]
    found: list[Mapping[str, Any]] = [
        entry
        for entry in entries
        if isinstance(entry, Mapping) and str(entry.get("file_name")).rsplit("/", 1)[-1] == name
    ]
    if len(found) != 1 or found[0].get("formatting") != "sharegpt":
        raise ValueError(
            f"{INFO}: must list {name} once, with formatting: sharegpt; "
            "for formatting: alpaca use reader: alpaca"
        )
    parts = (found[0].get(part) for part in ("columns", "tags"))
    return {
        key: value
        for part in parts
        if isinstance(part, Mapping)
        for key, value in part.items()
        if key in FIELDS and isinstance(value, str)
    }
