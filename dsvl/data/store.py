"""The prepared format, and reading it: by index, memory-mapped. `writer` writes it.

samples/*.parquet   conversations before any template, in the order of their raw records
images/*.parquet    every image that decoded, once: its bytes and where it was first seen
encoded/*.npy       token ids, labels, kinds, images and rounds of all conversations laid end to end,
                    with offsets; the indices of each split
encoded/pixels/     every image resized to what the tower takes, row by row as in images/
features/DIGEST/    what a frozen tower makes of them, if asked for; see `dsvl.features`
quarantine.jsonl    raw records that did not come through
bad_images.jsonl    image files that could not be used: size and time of change, to notice a repair
manifest.json       identity, conservation of every set, realised mix, ids of the template's phrases,
                    sha256 of every file
"""

import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dsvl.config import SCHEMA_VERSION
from dsvl.data.encode import Phrases
from dsvl.data.folders import sha256
from dsvl.data.images import ImageProcessor
from dsvl.data.types import Example, Part, Turn

SPLITS = ("train", "eval")
RAGGED = ("ids", "images", "names", "rounds", "refs")
"""What `offsets` counts: its row n is where sample n starts in each of them."""

SAMPLES = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "images": pa.list_(pa.string()),
        "messages": pa.list_(
            pa.struct(
                {
                    "role": pa.string(),
                    "supervise": pa.bool_(),
                    "content": pa.list_(
                        pa.struct({"type": pa.string(), "text": pa.string(), "image": pa.int32()})
                    ),
                }
            )
        ),
        "split": pa.string(),
        "group_keys": pa.list_(pa.string()),
        "meta": pa.string(),
    }
)
IMAGES = pa.schema(
    {
        "key": pa.string(),
        "bytes": pa.binary(),
        "path": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "mime": pa.string(),
        "source_ids": pa.list_(pa.string()),
    }
)


class Examples:
    """The encoded conversations of one split, each by itself, by index."""

    def __init__(self, folder: Path, split: str, keys: list[str]) -> None:
        def column(name: str) -> np.ndarray:
            # A view of the memory map: slicing an np.memmap itself is ten times as slow.
            return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))

        self.ids, self.labels, self.kinds = column("ids"), column("labels"), column("kinds")
        """Of all conversations of both splits, laid end to end."""
        self.images, self.rounds, self.refs = column("images"), column("rounds"), column("refs")
        """The same of their images, as indices into `keys`; their rounds; and their references."""
        self._names, self._offsets = column("names"), column("offsets")
        self._rows = column(split)
        self.keys = keys
        """sha256 of every image."""
        self.starts = {name: self._offsets[self._rows, i] for i, name in enumerate(RAGGED)}
        """(N,) int64: where a conversation starts in each of what is laid end to end."""
        self.counts = {
            name: self._offsets[self._rows + 1, i] - self.starts[name]
            for i, name in enumerate(RAGGED)
        }
        """(N,) int64: how many it has of them."""
        self.lengths: np.ndarray = self.counts["ids"]
        """(N,) int64 positions, images included."""
        self.targets: np.ndarray = column("targets")[self._rows]
        """(N,) int64 supervised targets: what `Batch.targets` sums."""
        self.hashes: np.ndarray = column("hashes")[self._rows]
        """(N,) uint64: `writer.id_hash` of their ids."""
        self.sources: np.ndarray = column("sources")[self._rows]
        """(N,) int32: index into the manifest's `encoded_sources`."""
        self.alone: np.ndarray = column("alone")[self._rows]
        """(N,) bool: whether no other conversation may stand beside it."""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        """Conversation `index`, 0 <= index < N, as views of the memory map: read-only."""
        row = self._rows[index]
        begin, end = self._offsets[row : row + 2].tolist()
        (start, image, _), (stop, image_stop, _) = begin[:3], end[:3]
        return Example(
            id=self.name(index),
            ids=self.ids[start:stop],
            labels=self.labels[start:stop],
            kinds=self.kinds[start:stop],
            images=tuple([self.keys[i] for i in self.images[image:image_stop].tolist()]),
        )

    def record(self, rounds: np.ndarray) -> np.ndarray:
        """The conversation that each of these `rounds` is of."""
        return self._by_round[rounds]

    def said(self, rounds: np.ndarray) -> Iterator[tuple[bytes, bytes]]:
        """The ids of the question and of the answer of these rounds, as bytes."""
        starts = self.starts["ids"][self.record(rounds)].tolist()
        for at, (start, answer, end, _) in zip(starts, self.rounds[rounds].tolist(), strict=True):
            yield (
                self.ids[at + start : at + answer].tobytes(),
                self.ids[at + answer : at + end].tobytes(),
            )

    @cached_property
    def shows(self) -> np.ndarray:
        """(R,) int64: how many images each of `rounds` shows."""
        shown = self.rounds[:, 3].astype(np.int64)
        earlier = np.roll(shown, 1)
        earlier[self._offsets[:-1, RAGGED.index("rounds")]] = 0
        return shown - earlier

    @cached_property
    def _by_round(self) -> np.ndarray:
        by_row = np.full(len(self._offsets) - 1, -1)
        by_row[self._rows] = np.arange(len(self))
        return np.repeat(by_row, np.diff(self._offsets[:, RAGGED.index("rounds")]))

    def name(self, index: int) -> str:
        """The id of conversation `index`."""
        row = self._rows[index]
        start, stop = self._offsets[row : row + 2, RAGGED.index("names")].tolist()
        return self._names[start:stop].tobytes().decode()


class Prepared:
    """A prepared set, open for reading; see `open_store`."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        processor = manifest["processor"]
        self.processor = ImageProcessor(
            processor["size"],
            mean=tuple(processor["mean"]),
            std=tuple(processor["std"]),
            crop=processor["crop"],
        )
        self.image_tokens: int = manifest["image_tokens"]
        """Positions an image."""
        self.pad_id: int = manifest["pad_id"]
        self.sources: list[str] = manifest["encoded_sources"]
        """The sets."""
        self.phrases = Phrases(**manifest["phrases"])
        encoded = folder / "encoded"
        self._keys: list[str] = np.load(encoded / "image_keys.npy").astype(str).tolist()
        self._pixels = [
            np.asarray(np.load(path, mmap_mode="r"))
            for path in sorted((encoded / "pixels").iterdir())
        ]
        self._first = np.cumsum([0, *map(len, self._pixels)]).tolist()
        self.train = Examples(encoded, "train", self._keys)
        """The conversations that are trained on, each by itself; `blend` makes samples of them."""
        self.eval = Examples(encoded, "eval", self._keys)
        """Those that are held out."""
        self.vision_input: Callable[[str], np.ndarray] = self.pixels
        """What a batch takes of the image with a key: pixels, unless features are set (`dsvl.features`)."""
        self.vision_shape: tuple[int, ...] = (3, self.processor.size, self.processor.size)
        """Of what that gives."""

    @property
    def quarantined(self) -> int:
        """Raw records that did not come through."""
        sources = self.manifest["sources"].values()
        return sum(source["raw"] - source["used"] - source["merged"] for source in sources)

    def pixels(self, key: str) -> np.ndarray:
        """(3, P, P) float32 of the image with this sha256 key, as the tower takes it."""
        shard, row = self.place(key)
        return self.processor.normalise(self._pixels[shard][row])

    def place(self, key: str) -> tuple[int, int]:
        """The shard of the image with this key, and its row there."""
        index = self._index[key]
        shard = bisect_right(self._first, index) - 1
        return shard, index - self._first[shard]

    @property
    def shards(self) -> int:
        """How many the images are in."""
        return len(self._pixels)

    def pixel_shard(self, shard: int) -> np.ndarray:
        """(n, 3, P, P) uint8 of a shard's images, before they are normalised; a view."""
        return self._pixels[shard]

    def image(self, key: str) -> bytes:
        """The bytes of the image with this sha256 key, as they were found."""
        file, group, row = self._places[key]
        return file.read_row_group(group, columns=["bytes"])["bytes"][row].as_py()

    def samples(self, split: str) -> pa.Table:
        """The conversations of a split, schema `SAMPLES`, in the order of its examples."""
        return pq.read_table(self.folder / "samples", filters=[("split", "=", split)])

    def conversations(
        self, split: str, count: int | None = None
    ) -> Iterator[tuple[str, tuple[str, ...], tuple[Turn, ...]]]:
        """(id, sha256 keys of its images, turns) of the first `count` conversations of a split."""
        for sample in islice(self._rows(split), count):
            turns = tuple(
                Turn(message["role"], tuple(Part(**part) for part in message["content"]))
                for message in sample["messages"]
            )
            yield sample["id"], tuple(sample["images"]), turns

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        for path in sorted((self.folder / "samples").iterdir()):
            for batch in pq.ParquetFile(path).iter_batches(1000):
                yield from (row for row in batch.to_pylist() if row["split"] == split)

    @cached_property
    def _index(self) -> dict[str, int]:
        return {key: i for i, key in enumerate(self._keys)}

    @cached_property
    def _places(self) -> dict[str, tuple[pq.ParquetFile, int, int]]:
        places = {}
        for path in sorted((self.folder / "images").iterdir()):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                keys = file.read_row_group(group, columns=["key"])["key"].to_pylist()
                places |= {key: (file, group, row) for row, key in enumerate(keys)}
        return places


def open_store(folder: str | Path) -> Prepared:
    """Open a prepared set for reading: metadata alone is read, whatever its size.

    Raises FileNotFoundError where there is none, ValueError where another version wrote it.
    """
    manifest = json.loads((Path(folder) / "manifest.json").read_text(encoding="utf-8"))
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{folder}: schema_version={manifest['schema_version']}: this version reads "
            f"{SCHEMA_VERSION}; prepare the data again"
        )
    return Prepared(Path(folder), manifest)


def verify(folder: str | Path) -> list[str]:
    """What is wrong with a prepared set, a line a fault: none if all is as it was written.

    Files whose size and time of change are those of the last verification are not read again.
    """
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        return [f"{folder}: has no manifest.json"]
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = manifest["files"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{folder / 'manifest.json'}: is damaged: {type(error).__name__}: {error}"]
    record = folder / ".verified.json"
    known = {}
    with suppress(OSError, ValueError, TypeError):  # absent, or half of it: then all files are read
        known = dict(json.loads(record.read_text(encoding="utf-8")))
    faults, verified = [], {}
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{path}: is missing")
            continue
        found = path.stat()
        verified[name] = [digest, found.st_size, found.st_mtime_ns]
        if known.get(name) != verified[name] and sha256(path) != digest:
            faults.append(f"{path}: differs from what was written")
    if not faults and known != verified:
        making = record.with_name(f".verified-{os.getpid()}")
        making.write_text(json.dumps(verified), encoding="utf-8")
        making.rename(record)
    return faults
