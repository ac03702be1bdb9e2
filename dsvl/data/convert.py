"""Conversations to and from LLaVA JSON and Hugging Face chat messages, without loss."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from dsvl.config import SetConfig
from dsvl.data.readers import hf_messages, llava_json
from dsvl.data.readers.exact import Export, exported
from dsvl.data.readers.records import Chat, Record, conversations
from dsvl.data.types import Conversation, Rejected, Row

Format = Literal["llava_json", "hf_messages"]


def to_record(conversation: Conversation, format: Format) -> dict[str, Any]:
    """The record of a conversation, for JSON; `from_record` gives back id, images and turns.

    Where the format cannot say all of it, references for instance, the record carries the turns beside.
    """
    export, parse = FORMATS[format]
    config = _config(format)

    def read(record: Mapping[str, Any]) -> Chat:
        return parse(Record("", Row("", 0, "", record), record, config, seed=0))

    record = exported(conversation.images, conversation.turns, export, read)
    return {"id": conversation.id.removeprefix(f"{conversation.source}/"), **record}


def from_record(record: object, format: Format, *, source: str) -> Conversation | Rejected:
    """The conversation of a record, as the reader of its format has it."""
    _, parse = FORMATS[format]
    (found,) = conversations(
        source,
        [Row("record", 0, "", record)],
        parse,
        configs={"record": _config(format)},
        own="id",
        max_images=2**31,
        seed=0,
    )
    return found


def _config(format: Format) -> SetConfig:
    return SetConfig(reader=format, annotations=("record",), images=".")


FORMATS: dict[Format, tuple[Export, Callable[[Record], Chat]]] = {
    "llava_json": (llava_json.export, llava_json.parse),
    "hf_messages": (hf_messages.export, hf_messages.parse),
}
