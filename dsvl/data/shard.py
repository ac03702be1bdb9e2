"""A shard of records, checked and encoded by itself, on any machine.

`Checker` takes a spooled file, opens the images that it is told to and encodes the conversations; its result
appears under its name when it is complete, so that whoever comes after a killed process goes on from there.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dsvl.data.columns import Column
from dsvl.data.encode import Encoder
from dsvl.data.folders import complete, discard, sha256
from dsvl.data.images import ImageProcessor, StoredImage, load
from dsvl.data.sources import BadImage, Images
from dsvl.data.spool import path_of
from dsvl.data.store import IMAGES
from dsvl.data.types import Conversation, Encoded, ImageRef, Part, Rejected, Turn

GROUP_BYTES = 8 << 20
"""Image bytes a row group."""


@dataclass(frozen=True, slots=True)
class Task:
    """A shard to check."""

    source: str
    records: str
    """Its spooled file."""
    images: str
    """The folder or file that holds the images of its set."""
    fresh: tuple[int, ...]
    """The images to open, as indices into all paths of the shard: those that no earlier shard opens."""
    result: str
    """The folder to write to."""


class Checker:
    """Opens images and encodes conversations, a shard at a time. A bad record is a result, no error."""

    def __init__(
        self, encoder: Encoder, *, processor: ImageProcessor, max_pixels: int, keep: bool
    ) -> None:
        """With `keep`, the images themselves are kept and not only what was found out about them."""
        self._encoder, self._processor = encoder, processor
        self._max_pixels, self._keep = max_pixels, keep
        self._images = cache(Images)  # archives stay open

    def check(self, task: Task) -> bool:
        """Write the result of a shard and return true, unless it is there and whole, its images unchanged."""
        folder = Path(task.result)
        if folder.is_dir():
            if (result := Result(folder)).is_whole() and result.is_current(task.images):
                return False
            discard(folder)
        rows = pq.read_table(task.records).to_pylist()
        paths = [path_of(own) for row in rows for own in row["paths"] or ()]
        found: dict[str, Any] = {"images": {}, "faults": {}, "stamps": {}, "rejected": {}}
        with complete(folder) as making:
            kept = ImageShard(making, edge=self._processor.size) if self._keep else None
            for place in task.fresh:
                path = paths[place]
                if not path.startswith("data:"):  # which only another annotation file can change
                    found["stamps"][path] = stamp(task.images, path)
                try:
                    image = load(
                        self._images(task.images),
                        path,
                        processor=self._processor,
                        max_pixels=self._max_pixels,
                    )
                except BadImage as bad:
                    found["faults"][place] = [bad.reason, bad.detail]
                    continue
                found["images"][place] = image.key
                if kept:
                    kept.append(image, source_id=f"{task.source}/{image.path}")
            if kept:
                kept.close()
            encoded: list[Encoded] = []
            places: list[int] = []
            for place, row in enumerate(rows):
                if row["reason"]:
                    continue
                example = self._encoded(task.source, row)
                if isinstance(example, Rejected):
                    found["rejected"][place] = [example.reason, example.detail]
                else:
                    encoded.append(example)
                    places.append(place)
            np.savez(making / "encoded.npz", allow_pickle=False, **_laid_out(encoded, places))
            found["sha256"] = {path.name: sha256(path) for path in making.iterdir()}
            (making / "found.json").write_text(json.dumps(found), encoding="utf-8")
        return True

    def _encoded(self, source: str, row: dict[str, Any]) -> Encoded | Rejected:
        turns = tuple(
            Turn(message["role"], tuple(Part(**part) for part in message["content"]))
            for message in row["messages"]
        )
        images = tuple(ImageRef(path_of(path)) for path in row["paths"])
        conversation = Conversation(row["id"], source, row["record"], images, turns)
        return self._encoder.encode(conversation, [str(i) for i in range(len(images))])


def _laid_out(encoded: Sequence[Encoded], places: Sequence[int]) -> dict[str, np.ndarray]:
    def end_to_end(name: str, dtype: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        return np.concatenate([np.empty((0, *shape), dtype), *(getattr(e, name) for e in encoded)])

    shown = [[int(name) for name in example.images] for example in encoded]
    return {
        "places": np.array(places, np.int64),
        "alone": np.array([example.alone for example in encoded], bool),
        "ids": end_to_end("ids", "i4"),
        "labels": end_to_end("labels", "i4"),
        "kinds": end_to_end("kinds", "i1"),
        "rounds": end_to_end("rounds", "i4", (4,)),
        "refs": end_to_end("refs", "i4", (4,)),
        "images": np.array([*chain.from_iterable(shown)], np.int64),
        "counts": np.array(
            [
                [len(e.ids), len(e.rounds), len(e.refs), len(own)]
                for e, own in zip(encoded, shown, strict=True)
            ],
            np.int64,
        ).reshape(-1, 4),
    }


class Result:
    """What was found out about the records of a shard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_whole(self) -> bool:
        """Whether the files are what was written."""
        try:
            return all(sha256(self.folder / name) == was for name, was in self.sha256.items())
        except (OSError, ValueError, KeyError):  # of a file that is gone, or half of found.json
            return False

    def is_current(self, images: str) -> bool:
        """Whether the image files are still those that were opened."""
        return all(stamp(images, path) == was for path, was in self._found["stamps"].items())

    @property
    def images(self) -> dict[int, str]:
        """Index into the shard's paths -> sha256 key of the image that was opened."""
        return {int(place): key for place, key in self._found["images"].items()}

    @property
    def faults(self) -> dict[int, list[str]]:
        """Index into the shard's paths -> reason and detail, where the image cannot be used."""
        return {int(place): fault for place, fault in self._found["faults"].items()}

    @property
    def stamps(self) -> dict[str, list[int] | None]:
        """`stamp` of every path that was opened, but for `data:` URIs."""
        return self._found["stamps"]

    @property
    def rejected(self) -> dict[int, list[str]]:
        """Row -> reason and detail, where the conversation cannot be used."""
        return {int(row): fault for row, fault in self._found["rejected"].items()}

    @property
    def sha256(self) -> dict[str, str]:
        """Digests of the files."""
        return self._found["sha256"]

    def examples(self, ids: Mapping[int, str], source: str) -> Iterator[tuple[int, Encoded]]:
        """(row, what was encoded) of the rows that `ids` names.

        Its images are indices into the images of the conversation.
        """
        with np.load(self.folder / "encoded.npz") as columns:
            data = dict(columns)
        ends = np.cumsum(data["counts"], 0)
        starts = ends - data["counts"]
        bounds = zip(starts.tolist(), ends.tolist(), strict=True)
        for place, alone, (start, end) in zip(
            data["places"].tolist(), data["alone"].tolist(), bounds, strict=True
        ):
            if place not in ids:
                continue
            tokens, rounds, refs, images = map(slice, start, end)
            yield (
                place,
                Encoded(
                    id=ids[place],
                    ids=data["ids"][tokens],
                    labels=data["labels"][tokens],
                    kinds=data["kinds"][tokens],
                    images=tuple(map(str, data["images"][images].tolist())),
                    source=source,
                    alone=alone,
                    rounds=data["rounds"][rounds],
                    refs=data["refs"][refs],
                ),
            )

    @cached_property
    def _found(self) -> dict[str, Any]:
        return json.loads((self.folder / "found.json").read_text(encoding="utf-8"))


class ImageShard:
    """images.parquet, schema `IMAGES`, and pixels.npy, what the tower takes: row by row the same images."""

    def __init__(self, folder: Path, *, edge: int) -> None:
        self._parquet = pq.ParquetWriter(folder / "images.parquet", IMAGES, compression="none")
        self._pixels = Column(folder / "pixels.npy", dtype="u1", shape=(3, edge, edge))
        self._keys: set[str] = set()
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def append(self, image: StoredImage, *, source_id: str) -> None:
        """Add an image, unless one with these bytes is there."""
        if image.key in self._keys:
            return
        self._keys.add(image.key)
        self._pixels.append(image.fitted[None])
        row = {name: getattr(image, name) for name in IMAGES.names[:-1]}
        self._rows.append(row | {"source_ids": [source_id]})
        self._bytes += len(image.bytes)
        if self._bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left."""
        self._flush()
        self._parquet.close()
        self._pixels.finish()

    def _flush(self) -> None:
        self._parquet.write_table(pa.Table.from_pylist(self._rows, IMAGES))
        self._rows, self._bytes = [], 0


def stamp(folder: str, path: str) -> list[int] | None:
    """Size and time of the last change (ns) of a file below a folder, or the archive it is in.

    None where there is none that may be read.
    """
    try:
        own = Path(folder, path).resolve()
        if not own.is_relative_to(Path(folder).resolve()):  # which is nobody's image
            return None
        for place in (own, *own.parents):
            with suppress(NotADirectoryError):  # something on the way is a file: an archive
                found = place.stat()
                readable = os.access(place, os.R_OK, effective_ids=True)
                return [found.st_size, found.st_mtime_ns] if readable else None
    except (
        OSError,
        ValueError,
        RuntimeError,
    ):  # absent, a path that no file can have, a loop of links
        return None
    return None
