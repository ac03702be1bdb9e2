"""A file of records from one format into another."""

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsvl.config import FieldsConfig, SetConfig
from dsvl.data.convert import FORMATS, Format, to_record, write
from dsvl.data.readers import READERS, read
from dsvl.data.readers.llama_factory import FIELDS, INFO
from dsvl.data.readers.records import valid
from dsvl.data.sources import BadImage, Images
from dsvl.data.types import Conversation, Rejected
from orchestration.problems import did_you_mean
from orchestration.records.journal import write_json

ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet")
SHOWN = 20
"""Lost records that are told to people."""


def convert(
    origin: Path,
    target: Path,
    *,
    reader: str,
    format: Format,
    fields: Sequence[str] = (),
    images: Path | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the records of `origin` to `target` in another format; ids, images and turns are carried over.

    `fields` are FIELD=NAME, as in `FieldsConfig`. With `images`, the folder or file in which they lie, every
    image is looked up. ShareGPT gets an entry in the `dataset_info.json` beside it.

    Returns:
        `ok` (whether no record was lost); the `file`; how many were `written`, how many others `merged` into
        them, and their `images`; of each that was `lost` the `record`, the `reason` and the `detail`.

    Raises:
        ValueError: if there is no such format, field or ending, the target exists, or the file as a whole
            cannot be read.
        FileNotFoundError: if there is no such file.
    """
    _option("--from", reader, READERS)
    _option("--to", format, FORMATS)
    if target.suffix not in ENDINGS:
        raise ValueError(
            f"{target}: must end with {', '.join(ENDINGS)}, which say how it is written"
        )
    if target.exists() and not force:
        raise ValueError(f"{target}: exists already; give another name, or --force")
    if target.exists() and target.samefile(origin):
        raise ValueError(
            f"{target}: is what is read; records that are lost would be gone; name another"
        )
    info = target.with_name(INFO)
    entries = _entries(info) if format == "sharegpt" else {}
    if target.stem in entries and not force:
        raise ValueError(f"{info}: has an entry {target.stem!r}; give another name, or --force")
    config = SetConfig(
        reader=reader,  # pyright: ignore  # it is one of them
        annotations=(origin.name, *_described_by(origin, reader)),
        images=os.path.relpath(images, origin.parent) if images else ".",
        fields=_fields(fields),
    )
    found = read(origin.stem, config=config, root=origin.parent, max_images=2**31, seed=0)
    lost: list[Rejected] = []
    count = Counter(written=0, merged=0, images=0)

    def records() -> Iterator[dict[str, Any]]:
        opened = images and Images(images)
        for one in found:
            faults = [one] if isinstance(one, Rejected) else list(_faults(one, opened))
            lost.extend(faults)
            if isinstance(one, Conversation) and not faults:
                count.update(written=1, merged=len(one.merged), images=len(one.images))
                yield to_record(one, format)

    unfinished = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        write(unfinished, records(), format)
        unfinished.replace(target)
    finally:
        unfinished.unlink(missing_ok=True)
    if format == "sharegpt":
        columns = {"messages": "conversations"} | ({"images": "images"} if count["images"] else {})
        entry = {"file_name": target.name, "formatting": "sharegpt", "columns": columns}
        write_json(info, entries | {target.stem: entry})
    return {
        "ok": not lost,
        "file": str(target),
        **count,
        "lost": [
            {name: getattr(bad, name) for name in ("record", "reason", "detail")} for bad in lost
        ],
    }


def render(result: Mapping[str, Any]) -> str:
    """The same for people: the first lost records, and all of them counted."""
    lost, merged = result["lost"], result["merged"]
    joined = f", {merged:,} others merged into them" if merged else ""
    lines = [f"{result['file']}: {result['written']:,} records{joined}"]
    lines += [f"lost {bad['record']}: {bad['reason']}: {bad['detail']}" for bad in lost[:SHOWN]]
    if lost:
        counts = Counter(bad["reason"] for bad in lost).most_common()
        told = ", ".join(f"{count:,} {reason}" for reason, count in counts)
        more = "; --json names each" if len(lost) > SHOWN else ""
        lines.append(f"{len(lost):,} lost: {told}{more}")
    return "\n".join(lines)


def _faults(one: Conversation, images: Images | None) -> Iterator[Rejected]:
    """Why a conversation's records cannot be written, by its first image that cannot be used."""
    for path in (image.path for image in one.images):
        try:
            if valid(path) is None:
                raise BadImage("missing_image", f"{ascii(path)[:100]} is no valid text")
            if images:
                images.read(path)
        except BadImage as bad:
            yield from (Rejected(one.source, of, bad.reason, bad.detail) for of in one.records)
            return


def _option(option: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
        raise ValueError(f"{option} {name}: no such format{near}")


def _fields(given: Sequence[str]) -> FieldsConfig:
    pairs = [pair.partition("=") for pair in given]
    known = FieldsConfig.__dataclass_fields__
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"{name!r}: must be FIELD=NAME; the fields are {', '.join(known)}")
        if name not in known:
            near = did_you_mean(name, known) or f"; the fields are {', '.join(known)}"
            raise ValueError(f"{name!r}: no such field{near}")
    return FieldsConfig(**{name: value for name, _, value in pairs})


def _described_by(origin: Path, reader: str) -> list[str]:
    """The `dataset_info.json` beside a file of LLaMA-Factory that lists it."""
    entries = _entries(origin.with_name(INFO)).values() if reader in FIELDS else ()
    listed = any(isinstance(e, dict) and e.get("file_name") == origin.name for e in entries)
    return [INFO] if listed else []


def _entries(info: Path) -> dict[str, Any]:
    """What a `dataset_info.json` holds, if there is one."""
    try:
        entries = json.loads(info.read_text(encoding="utf-8")) if info.exists() else {}
    except ValueError as error:
        raise ValueError(f"{info}: is not JSON: {error}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{info}: must hold an object of datasets")
    return entries
