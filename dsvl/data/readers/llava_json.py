"""LLaVA JSON: {"id", "image": name or names, "conversations": [{"from", "value"}]}, all rounds of it.

The k-th `<image>` marker is the k-th image; images without any marker open the first question.
"""

from dsvl.data.readers.records import Chat, Record
from dsvl.data.readers.rounds import Role, alternating, marked

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def parse(record: Record) -> Chat:
    """The conversation of a record; raises Fault."""
    images = record.images(record.value.get("image"), "image")
    said = alternating(
        record.value.get("conversations"), speaker="from", content="value", roles=ROLES
    )
    return Chat(images, marked(said, images=len(images)))
