"""Writing a prepared set (`store` says what it is): streamed to disk, then published at once."""

import fcntl
import hashlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dsvl.data.encode import Phrases
from dsvl.data.images import ImageProcessor, StoredImage
from dsvl.data.store import IMAGES, RAGGED, SAMPLES, SCHEMA_VERSION, SPLITS, sha256
from dsvl.data.types import Conversation, Encoded, Rejected

SHARD_BYTES = 256 << 20
GROUP_BYTES = 8 << 20
log = logging.getLogger(__name__)


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Be the only one that prepares `folder`, until the block or the process ends.

    Waits for another that does, and removes what killed ones have left.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("data: another process prepares %s; waiting for its end", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        for left in folder.parent.glob(f".{folder.name}-*"):
            shutil.rmtree(left)
        yield


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation that is kept, with what was found out about it."""

    conversation: Conversation
    images: tuple[str, ...]
    """sha256 keys, in the order of the conversation's images."""
    split: str
    group_keys: tuple[str, ...]
    """What ties it to its side of the split: image keys and its record."""


class Writer:
    """Writes a prepared set beside `folder` and gives it that name when it is complete.

    A context manager: what was written is removed unless `finish` was reached. One of several that
    may write the same set needs a `claim` on it, as the last to finish replaces what there is.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        processor: ImageProcessor,
        image_tokens: int,
        pad_id: int,
        phrases: Phrases,
    ) -> None:
        self.folder = Path(folder)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        making = tempfile.mkdtemp(prefix=f".{self.folder.name}-", dir=self.folder.parent)
        self._making = Path(making)
        self._making.chmod(0o755)  # mkdtemp makes it private
        self._settings = {
            "processor": asdict(processor),
            "image_tokens": image_tokens,
            "pad_id": pad_id,
            "phrases": asdict(phrases),
        }
        for name in ("samples", "images", "encoded"):
            (self._making / name).mkdir()
        edge = processor.size
        self._columns = {
            name: _Column(self._making / "encoded" / f"{name}.npy", dtype=dtype, shape=shape)
            for name, dtype, shape in (
                ("ids", "<i4", ()),
                ("labels", "<i4", ()),
                ("kinds", "i1", ()),
                ("images", "<i4", ()),
                ("names", "u1", ()),
                ("rounds", "<i4", (4,)),
                ("refs", "<i4", (4,)),
                ("offsets", "<i8", (len(RAGGED),)),
                ("targets", "<i8", ()),
                ("hashes", "<u8", ()),
                ("sources", "<i4", ()),
                ("alone", "?", ()),
                ("image_keys", "S64", ()),
                ("pixels", "u1", (3, edge, edge)),
            )
        }
        self._index: dict[str, int] = {}
        self._rows: dict[str, int] = {}
        self._sources: dict[str, int] = {}
        self._shards = _Shards(self._making / "images")
        self._mark_offsets()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for column in self._columns.values():
                column.file.close()
            self._shards.close()
        finally:
            shutil.rmtree(self._making, ignore_errors=True)

    def image(self, image: StoredImage, *, source_id: str) -> None:
        """Store an image, unless one with these bytes is stored already."""
        if image.key in self._index:
            return
        self._index[image.key] = len(self._index)
        self._columns["image_keys"].append(np.array([image.key.encode()]))
        self._columns["pixels"].append(image.fitted[None])
        self._shards.append(image, source_id)

    def example(self, example: Encoded) -> None:
        """Store an encoded sample, whose images are stored."""
        self._rows[example.id] = len(self._rows)
        indices = [self._index[key] for key in example.images]
        for name, values in (
            ("ids", example.ids),
            ("labels", example.labels),
            ("kinds", example.kinds),
            ("images", np.array(indices, np.int32)),
            ("names", np.frombuffer(example.id.encode(), np.uint8)),
            ("rounds", example.rounds),
            ("refs", example.refs),
            ("targets", np.array([(example.rounds[:, 2] - example.rounds[:, 1]).sum()])),
            ("hashes", np.array([id_hash(example.id)], np.uint64)),
            ("sources", np.array([self._sources.setdefault(example.source, len(self._sources))])),
            ("alone", np.array([example.alone])),
        ):
            self._columns[name].append(values)
        self._mark_offsets()

    def finish(
        self,
        samples: Iterable[Sample],
        *,
        quarantine: Sequence[Rejected],
        bad_images: Iterable[Mapping[str, Any]],
        raw: Mapping[str, int],
        identity: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write what remains, publish the set under its name and return its manifest.

        Each of the `samples` has a stored example; `raw` counts the records of every set.
        """
        counts = self._write_samples(samples)
        for column in self._columns.values():
            column.finish()
        self._shards.finish()
        write_quarantine(self._making / "quarantine.jsonl", quarantine)
        _write_lines(self._making / "bad_images.jsonl", bad_images)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            **self._settings,
            "identity": dict(identity),
            "sources": conservation(
                raw, used=counts["source"], merged=counts["merged"], quarantine=quarantine
            ),
            "splits": {split: counts["split"][split] for split in SPLITS},
            "encoded_sources": list(self._sources),
            "mix": {source: n / counts["all"] for source, n in counts["source"].items()},
            "images": len(self._index),
            "files": {
                str(path.relative_to(self._making)): sha256(path)
                for path in sorted(self._making.rglob("*"))
                if path.is_file()
            },
        }
        text = json.dumps(manifest, indent=1) + "\n"
        (self._making / "manifest.json").write_text(text, encoding="utf-8")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self._making.rename(self.folder)
        return manifest

    def _write_samples(self, samples: Iterable[Sample]) -> dict[str, Any]:
        rows: dict[str, list[int]] = {split: [] for split in SPLITS}
        sources: Counter[str] = Counter()
        merged: Counter[str] = Counter()
        pending: list[dict[str, Any]] = []
        with pq.ParquetWriter(self._making / "samples/00000.parquet", SAMPLES) as parquet:
            for sample in samples:
                rows[sample.split].append(self._rows[sample.conversation.id])
                sources[sample.conversation.source] += 1
                merged[sample.conversation.source] += len(sample.conversation.merged)
                pending.append(_row(sample))
                if len(pending) == 1000:
                    parquet.write_table(pa.Table.from_pylist(pending, SAMPLES))
                    pending = []
            parquet.write_table(pa.Table.from_pylist(pending, SAMPLES))
        for split, indices in rows.items():
            np.save(self._making / f"encoded/{split}.npy", np.array(indices, np.int64))
        splits = {split: len(indices) for split, indices in rows.items()}
        return {
            "source": sources,
            "merged": merged,
            "split": splits,
            "all": sum(splits.values()),
        }

    def _mark_offsets(self) -> None:
        self._columns["offsets"].append(np.array([[self._columns[n].length for n in RAGGED]]))


def id_hash(name: str) -> int:
    """A sample's id as a number below 2**64: what its random draws depend on."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])


def conservation(
    raw: Mapping[str, int],
    *,
    used: Mapping[str, int],
    merged: Mapping[str, int],
    quarantine: Iterable[Rejected],
) -> dict[str, dict[str, Any]]:
    """Per set: raw = used + merged + dropped + held_out, and the drops by reason.

    `merged` counts the records whose rounds are in a sample beside those of the one that names it.
    """
    reasons: dict[str, Counter[str]] = {source: Counter() for source in raw}
    for rejected in quarantine:
        reasons[rejected.source][rejected.reason] += 1
    table = {}
    for source, records in raw.items():
        held_out = reasons[source].pop("held_out", 0)
        dropped = dict(sorted(reasons[source].items()))
        kept, joined = used.get(source, 0), merged.get(source, 0)
        found = kept + joined + sum(dropped.values()) + held_out
        assert records == found, f"{source}: {records - found} records were lost"
        table[source] = {
            "raw": records,
            "used": kept,
            "merged": joined,
            "dropped": dropped,
            "held_out": held_out,
        }
    return table


def write_quarantine(path: Path, quarantine: Iterable[Rejected]) -> None:
    """One JSON line for every raw record that did not come through."""
    _write_lines(path, map(asdict, quarantine))


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


class _Column:
    """An .npy file that grows along its first axis, so that nothing is held in memory."""

    def __init__(self, path: Path, *, dtype: str, shape: tuple[int, ...] = ()) -> None:
        self.file = open(path, "wb")  # noqa: SIM115 - closed by the Writer
        self._dtype, self._shape, self.length = np.dtype(dtype), shape, 0
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Add rows, of shape (n, *shape)."""
        self.file.write(np.ascontiguousarray(rows, self._dtype).data)
        self.length += len(rows)

    def finish(self) -> None:
        """Write the final length into the header."""
        # numpy pads headers so that any length fits in the same room.
        self.file.seek(0)
        self._write_header()
        self.file.close()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.length, *self._shape),
        }
        np.lib.format.write_array_header_1_0(self.file, header)


class _Shards:
    """images/*.parquet: row groups of about 8 MB in files of about 256 MB."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._parquet, self._files = folder, None, 0
        self._rows: list[dict[str, Any]] = []
        self._group_bytes = self._shard_bytes = 0

    def append(self, image: StoredImage, source_id: str) -> None:
        """Add a row."""
        row = {name: getattr(image, name) for name in IMAGES.names[:-1]}
        self._rows.append(row | {"source_ids": [source_id]})
        self._group_bytes += len(image.bytes)
        if self._group_bytes >= GROUP_BYTES:
            self._flush()

    def finish(self) -> None:
        """Write what is left; there is always one file, so that readers find the schema."""
        if self._rows or not self._files:
            self._flush()
        self.close()

    def close(self) -> None:
        """Close the file that is being written."""
        if self._parquet:
            self._parquet.close()
            self._parquet = None

    def _flush(self) -> None:
        if self._parquet is None:
            path = self._folder / f"{self._files:05}.parquet"
            self._parquet = pq.ParquetWriter(path, IMAGES, compression="none")
            self._files += 1
        self._parquet.write_table(pa.Table.from_pylist(self._rows, IMAGES))
        self._shard_bytes += self._group_bytes
        self._rows, self._group_bytes = [], 0
        if self._shard_bytes >= SHARD_BYTES:
            self.close()
            self._shard_bytes = 0


def _row(sample: Sample) -> dict[str, Any]:
    conversation = sample.conversation
    messages = [
        {
            "role": turn.role,
            "supervise": turn.supervise,
            "content": [asdict(part) for part in turn.content],
        }
        for turn in conversation.turns
    ]
    return {
        "id": conversation.id,
        "source": conversation.source,
        "images": list(sample.images),
        "messages": messages,
        "split": sample.split,
        "group_keys": list(sample.group_keys),
        "meta": json.dumps({"record": conversation.record, **conversation.meta}),
    }
