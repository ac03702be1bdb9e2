"""ShareGPT: a list of messages with a speaker and a text, and images for the `<image>` markers in questions.

A record may have a system message beside them. `fields` of the set name its columns and tags, as
LLaMA-Factory calls them.
"""

from collections.abc import Sequence
from typing import Any

from dsvl.data.readers import llava_json
from dsvl.data.readers.exact import restored
from dsvl.data.readers.records import Chat, Record, instruction
from dsvl.data.readers.rounds import alternating, marked
from dsvl.data.types import ImageRef, Part, Turn

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
    system = instruction(record.value.get(fields["system"]))
    if system and turns[0].role != "system":
        turns = (Turn("system", (Part("text", system),)), *turns)
    return Chat(images, turns)


def export(images: Sequence[ImageRef], turns: Sequence[Turn]) -> dict[str, Any]:
    """The record that says the same under the usual names; references to images in words."""
    record = {"conversations": llava_json.export(images, turns)["conversations"]}
    return record | ({"images": [image.path for image in images]} if images else {})
