"""What a `dataset_info.json` of LLaMA-Factory says of annotation files: what columns and tags are called."""

from collections.abc import Mapping
from typing import Any

from dsvl.data.readers import alpaca, sharegpt

INFO = "dataset_info.json"
FIELDS = {"alpaca": alpaca.FIELDS, "sharegpt": sharegpt.FIELDS}
"""Of each format that it may describe, which are readers too."""


def described(info: object, file: str, *, reader: str) -> dict[str, str]:
    """The `fields` that it gives to an annotation file.

    Raises ValueError where it does not list the file once, or as another format than the reader's.
    """
    entries = info.values() if isinstance(info, Mapping) else ()
    name = file.rsplit("/", 1)[-1]
    found: list[Mapping[str, Any]] = [
        entry
        for entry in entries
        if isinstance(entry, Mapping) and str(entry.get("file_name")).rsplit("/", 1)[-1] == name
    ]
    formatting = found[0].get("formatting", "alpaca") if len(found) == 1 else None
    if formatting != reader:
        raise ValueError(
            f"{INFO}: must list {name} once, with formatting: {reader}; for another formatting name another "
            f"reader, of {', '.join(FIELDS)}"
        )
    parts = (found[0].get(part) for part in ("columns", "tags"))
    return {
        key: value
        for part in parts
        if isinstance(part, Mapping)
        for key, value in part.items()
        if key in FIELDS[reader] and isinstance(value, str)
    }
