"""Raw annotation files -> conversations: one module a family, one table at the foot."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePath
from typing import Literal

from dsvl.config import FieldsConfig, SetConfig
from dsvl.data import rows
from dsvl.data.readers import (
    alpaca,
    aokvqa,
    coco,
    hf_messages,
    llama_factory,
    llava_json,
    llava_otter,
    mimicit,
    minigpt4,
    ocr_vqa,
    qa,
    sharegpt,
    sparkles,
)
from dsvl.data.readers.records import Chat, Record, conversations
from dsvl.data.types import Conversation, Rejected, Row


@dataclass(frozen=True, slots=True)
class Reader:
    """What the files of a family hold, and how one of their records is read."""

    parse: Callable[[Record], Chat]
    holding: Literal["a list", "an object", "either"] = "a list"
    """Of records, as JSON; files of other kinds are lists."""
    within: str = ""
    """The key under which the file has it; with `either`, only where it is an object."""
    own_id: str = "id"
    """The field of a record's id, in lists."""
    merges: bool = False
    """Whether related records become one conversation."""


def read(
    source: str, *, config: SetConfig, root: str | Path, max_images: int, seed: int
) -> Iterator[Conversation | Rejected]:
    """Every raw record of a set, once: as a conversation, merged into one, or as rejected.

    They come in their order, merged ones where their last record stands. Relative annotation paths start
    at `root`; `seed` decides what is chosen at random. A window of a file is in memory at a time, and no
    image is opened.
    Raises FileNotFoundError, or ValueError naming file and line, where a whole file is unreadable.
    """
    reader = READERS[config.reader]
    files = _files(config, Path(root))

    def every_record() -> Iterator[Conversation | Rejected]:
        return conversations(
            source,
            chain.from_iterable(_rows(reader, Path(root) / name, name) for name in files),
            reader.parse,
            configs=files,
            own=config.fields.id or reader.own_id,
            max_images=max_images,
            seed=seed,
        )

    return mimicit.merged(every_record) if reader.merges else every_record()


def _files(config: SetConfig, root: Path) -> dict[str, SetConfig]:
    """The files of records, and how each is to be read."""
    described = [name for name in config.annotations if _describes(config, name)]
    files = {name: config for name in config.annotations if name not in described}
    for name in described:
        info = {row.key: row.value for row in rows.rows(root / name, name, holding="an object")}
        for file in files:
            told = llama_factory.described(info, file, reader=config.reader)
            fields = told | config.fields.given()
            files[file] = replace(config, fields=FieldsConfig(**fields))
    return files


def _describes(config: SetConfig, name: str) -> bool:
    return config.reader in llama_factory.FIELDS and PurePath(name).name == llama_factory.INFO


def _rows(reader: Reader, path: Path, name: str) -> Iterator[Row]:
    holding = reader.holding
    if holding == "either":
        holding = "an object" if rows.holds_object(path) else "a list"
    within = reader.within if holding == "an object" or reader.holding != "either" else ""
    return rows.rows(path, name, within=within, holding=holding)


READERS = {
    "aokvqa": Reader(aokvqa.parse, own_id="question_id"),
    "coco_caption": Reader(coco.parse, within="images", own_id="cocoid"),
    "llava": Reader(llava_json.parse),
    "llava_dial": Reader(llava_json.parse),
    "llava_otter_blend": Reader(llava_otter.parse, "either", within="data", merges=True),
    "minigpt4": Reader(minigpt4.parse, within="annotations", own_id="image_id"),
    "ocr_vqa": Reader(ocr_vqa.parse, "an object"),
    **dict.fromkeys(
        (f"otter_mimicit_{name}" for name in ("cgd", "sd", "sn", "tvc", "vst")),
        Reader(mimicit.parse, "an object", within="data", merges=True),
    ),
    "sparkles_dialogue": Reader(sparkles.parse),
    "llava_json": Reader(llava_json.parse),
    "sharegpt": Reader(sharegpt.parse),
    "hf_messages": Reader(hf_messages.parse),
    "alpaca": Reader(alpaca.parse),
    "qa": Reader(qa.parse),
}
