"""Conversations to and from LLaVA JSON, ShareGPT and Hugging Face chat messages, without loss, in files."""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dsvl.config import SetConfig
from dsvl.data.readers import hf_messages, llava_json, sharegpt
from dsvl.data.readers.exact import KEY, Export, exported
from dsvl.data.readers.records import Chat, Record, conversations
from dsvl.data.types import Conversation, Rejected, Row

LINES = (".jsonl", ".ndjson")
"""Endings of files with a record a line."""
ROWS = 1000
"""Of a Parquet file, that are held at once."""

_SAID = pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))
_PARTS = pa.list_(pa.struct({"type": pa.string(), "text": pa.string()}))
_NAMES = pa.list_(pa.string())
_ALWAYS = {"id": pa.string(), KEY: pa.string()}
TABLES = {
    "llava_json": pa.schema({"image": _NAMES, "conversations": _SAID, **_ALWAYS}),
    "sharegpt": pa.schema({"conversations": _SAID, "images": _NAMES, **_ALWAYS}),
    "hf_messages": pa.schema(
        {
            "messages": pa.list_(pa.struct({"role": pa.string(), "content": _PARTS})),
            "images": _NAMES,
            **_ALWAYS,
        }
    ),
}
"""The columns of each format in Parquet."""

Format = Literal["llava_json", "sharegpt", "hf_messages"]


def to_record(conversation: Conversation, format: Format) -> dict[str, Any]:
    """The record of a conversation, for JSON; `from_record` gives back id, images and turns.

    Where the format cannot say all of it, references for instance, the record carries the turns beside.
    Without an id of its own the conversation gets none.
    """
    export, parse = FORMATS[format]
    config = _config(format)

    def read(record: Mapping[str, Any]) -> Chat:
        return parse(Record("", Row("", 0, "", record), record, config, seed=0))

    record = exported(conversation.images, conversation.turns, export, read)
    name = conversation.id.removeprefix(f"{conversation.source}/")
    return record if name == conversation.record else {"id": name, **record}


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


def write(path: Path, records: Iterable[Mapping[str, Any]], format: Format) -> None:
    """Write records of a format one by one, as JSON, or by the file's ending JSON lines or Parquet.

    In a table every value of a column is of one type: names of images are lists, contents are parts.
    """
    if path.suffix == ".parquet":
        with pq.ParquetWriter(path, TABLES[format]) as table:
            rows = map(_row, records)
            while some := list(islice(rows, ROWS)):
                table.write_table(pa.Table.from_pylist(some, TABLES[format]))
        return
    begin, between, end = ("", "\n", "\n") if path.suffix in LINES else ("[\n", ",\n", "\n]\n")
    with open(path, "w", encoding="utf-8") as file:
        file.write(begin)
        for number, record in enumerate(records):
            file.write(between * bool(number) + json.dumps(record, ensure_ascii=False))
        file.write(end)


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    row = dict(record)
    if isinstance(row.get("image"), str):
        row["image"] = [row["image"]]
    if "messages" in row:
        row["messages"] = [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message["content"], str)
            else message
            for message in row["messages"]
        ]
    return row | ({KEY: json.dumps(row[KEY])} if KEY in row else {})


def _config(format: Format) -> SetConfig:
    return SetConfig(reader=format, annotations=("record",), images=".")


FORMATS: dict[Format, tuple[Export, Callable[[Record], Chat]]] = {
    "llava_json": (llava_json.export, llava_json.parse),
    "sharegpt": (sharegpt.export, sharegpt.parse),
    "hf_messages": (hf_messages.export, hf_messages.parse),
}
