"""Writing a prepared set (`store` says what it is): streamed to disk, then published at once."""

import hashlib
import json
import logging
import shutil
import tempfile
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dsvl.config import SCHEMA_VERSION
from dsvl.data.columns import Column
from dsvl.data.encode import Phrases
from dsvl.data.folders import discard, link, sha256
from dsvl.data.images import ImageProcessor
from dsvl.data.store import IMAGES, RAGGED, SAMPLES, SPLITS
from dsvl.data.types import Encoded, Rejected

log = logging.getLogger(__name__)


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
        for name in ("samples", "images", "encoded/pixels"):
            (self._making / name).mkdir(parents=True)
        self._columns = {
            name: Column(self._making / "encoded" / f"{name}.npy", dtype=dtype, shape=shape)
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
            )
        }
        self._index: dict[str, int] = {}
        self._image_shards = 0
        self._rows: dict[str, int] = {}
        self._sources: dict[str, int] = {}
        self._digests: dict[str, str] = {}
        self._samples = pq.ParquetWriter(self._making / "samples/00000.parquet", SAMPLES)
        self._splits: dict[str, list[int]] = {split: [] for split in SPLITS}
        self._used: Counter[str] = Counter()
        self._mark_offsets()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for column in self._columns.values():
                column.file.close()
            self._samples.close()
        finally:
            shutil.rmtree(self._making, ignore_errors=True)

    def images(self, shard: Path, digests: Mapping[str, str], *, wanted: Container[str]) -> None:
        """Take over the `wanted` images of a shard (`shard.ImageShard`), whose files have these digests.

        The files are linked, not copied, if all of them are wanted and none is there already.
        """
        number = f"{self._image_shards:05}"
        parquet = pq.ParquetFile(shard / "images.parquet")
        keys = parquet.read(["key"])["key"].to_pylist()
        new = [row for row, key in enumerate(keys) if key in wanted and key not in self._index]
        if not new:
            return
        self._image_shards += 1
        self._index |= {keys[row]: len(self._index) + place for place, row in enumerate(new)}
        self._columns["image_keys"].append(np.array([keys[row].encode() for row in new]))
        for name, target in (
            ("images.parquet", f"images/{number}.parquet"),
            ("pixels.npy", f"encoded/pixels/{number}.npy"),
        ):
            if len(new) == len(keys):
                link(shard / name, self._making / target)
                self._digests[target] = digests[name]
        if len(new) < len(keys):
            pixels = np.load(shard / "pixels.npy", mmap_mode="r")
            np.save(self._making / f"encoded/pixels/{number}.npy", pixels[new])
            with pq.ParquetWriter(
                self._making / f"images/{number}.parquet", IMAGES, compression="none"
            ) as kept:
                first = 0
                for group in range(parquet.num_row_groups):
                    table = parquet.read_row_group(group)
                    rows = [row - first for row in new if 0 <= row - first < len(table)]
                    first += len(table)
                    if rows:
                        kept.write_table(table.take(rows))

    def example(self, example: Encoded) -> None:
        """Store an encoded sample, whose images are stored."""
        indices = [self._index[key] for key in example.images]
        assert example.id not in self._rows, f"{example.id} is stored already"
        self._rows[example.id] = len(self._rows)
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

    def samples(self, rows: pa.Table) -> None:
        """Store conversations, schema `SAMPLES`, each with a side of the split and a stored example."""
        self._samples.write_table(rows)
        for name, source, split in zip(
            *(rows[column].to_pylist() for column in ("id", "source", "split")), strict=True
        ):
            self._splits[split].append(self._rows[name])
            self._used[source] += 1

    def finish(
        self,
        *,
        quarantine: Sequence[Rejected],
        bad_images: Iterable[Mapping[str, Any]],
        raw: Mapping[str, int],
        merged: Mapping[str, int],
        identity: Mapping[str, Any],
        about: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Write what remains, publish the set under its name and return its manifest.

        `raw` counts the records of every set, `merged` those whose rounds are in a sample that another
        record names; `about` goes into the manifest as it is.
        """
        self._samples.close()
        for split, indices in self._splits.items():
            np.save(self._making / f"encoded/{split}.npy", np.array(indices, np.int64))
        for column in self._columns.values():
            column.finish()
        write_quarantine(self._making / "quarantine.jsonl", quarantine)
        _write_lines(self._making / "bad_images.jsonl", bad_images)
        paths = sorted(path for path in self._making.rglob("*") if path.is_file())
        names = {str(path.relative_to(self._making)): path for path in paths}
        total = self._used.total()
        manifest = {
            "schema_version": SCHEMA_VERSION,
            **self._settings,
            "identity": dict(identity),
            "sources": conservation(raw, used=self._used, merged=merged, quarantine=quarantine),
            "splits": {split: len(self._splits[split]) for split in SPLITS},
            "encoded_sources": list(self._sources),
            "mix": {source: count / total for source, count in self._used.items()},
            "images": len(self._index),
            **about,
            "files": {
                name: self._digests.get(name) or sha256(path) for name, path in names.items()
            },
        }
        text = json.dumps(manifest, indent=1) + "\n"
        (self._making / "manifest.json").write_text(text, encoding="utf-8")
        if self.folder.exists():
            discard(self.folder)
        self._making.rename(self.folder)
        return manifest

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
