"""What readers make of the records of a set, in files: a shard each, to be taken up by any machine."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from dsvl.data.folders import complete
from dsvl.data.store import SAMPLES
from dsvl.data.types import Conversation, Rejected

RECORDS = 256
"""Records a shard."""
SPOOLED = pa.schema(
    {
        "record": pa.string(),
        "merged": pa.list_(pa.string()),
        "reason": pa.string(),  # of a rejected record, which has no more than this and what is above
        "detail": pa.string(),
        "id": pa.string(),
        "key": pa.string(),
        "paths": pa.list_(pa.binary()),  # JSON can spell paths that are no valid text
        "messages": SAMPLES.field("messages").type,
        "meta": pa.string(),
    }
)


def spool(records: Iterable[Conversation | Rejected], folder: Path) -> None:
    """Write the records of a set to `folder`, in their order, 00000.parquet first."""
    with complete(folder) as making:
        rows = map(_row, records)
        for number in count():
            some = list(islice(rows, RECORDS))
            if not some:
                break
            pq.write_table(pa.Table.from_pylist(some, SPOOLED), making / f"{number:05}.parquet")


def _row(record: Conversation | Rejected) -> dict[str, Any]:
    if isinstance(record, Rejected):
        detail = record.detail.encode(errors="backslashreplace").decode()
        return {"record": record.record, "reason": record.reason, "detail": detail}
    messages = [
        {
            "role": turn.role,
            "supervise": turn.supervise,
            "content": [asdict(part) for part in turn.content],
        }
        for turn in record.turns
    ]
    return {
        "record": record.record,
        "merged": list(record.merged),
        "id": record.id,
        "key": record.meta["key"],
        "paths": [image.path.encode(errors="surrogatepass") for image in record.images],
        "messages": messages,
        "meta": json.dumps({"record": record.record, **record.meta}),
    }


class Row(NamedTuple):
    """A record that is kept."""

    place: int
    """In its shard."""
    images: Sequence[str]
    """sha256 keys, in the order of the conversation's images."""
    split: str
    group_keys: Sequence[str]
    """What ties it to its side of the split."""


def samples(records: Path, source: str, kept: Sequence[Row]) -> pa.Table:
    """The conversations that are kept of a spooled shard, schema `SAMPLES`."""
    table = pq.read_table(records, columns=["id", "messages", "meta"])
    table = table.take([row.place for row in kept])
    columns = {
        **dict(zip(table.column_names, table.columns, strict=True)),
        "source": [source] * len(kept),
        "images": [row.images for row in kept],
        "split": [row.split for row in kept],
        "group_keys": [row.group_keys for row in kept],
    }
    return pa.table({name: columns[name] for name in SAMPLES.names}, SAMPLES)


def path_of(spooled: bytes) -> str:
    """A path as the annotation has it."""
    return spooled.decode(errors="surrogatepass")


def path_digest(folder: str, spooled: bytes) -> bytes:
    """16 bytes that name an image, as a `data:` URI may be long."""
    return hashlib.blake2b(folder.encode() + b"\0" + spooled, digest_size=16).digest()
