"""Raw annotation files, row by row: JSON, JSON lines, Parquet, CSV and TSV, a window at a time in memory."""

import base64
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dsvl.data.types import Row

WINDOW = 1 << 20
"""Characters that are read at once."""
NEAR = 16
"""Characters at the end of a window in which a number, name or escape may be cut off."""
MAX_ROW = 1 << 28
"""Characters of the largest row; a file whose quotes do not pair up must not fill the memory."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Of tables, by the ending of their file."""
PARQUET_ROWS = 64
"""Rows of a Parquet file that are held at once; images may lie in them."""
_DIGITS = 4300
"""Of the longest integer that Python reads; one record with a longer one must not cost the file."""
_BLANKS = re.compile(r"[ \t\r\n]*")
# What an extension type leaves in a Parquet footer, whose arrow schema is in base64: at each of the three
# places in which its name may start within a group of three bytes.
_EXTENSION_TYPE = [
    base64.b64encode(b"\0" * shift + b"ARROW:extension:name")[4:-4] for shift in range(3)
]
csv.field_size_limit(MAX_ROW)  # images in base64 are cells of some tables


def _integer(digits: str) -> int | str:
    return int(digits) if len(digits) <= _DIGITS else digits


_DECODER = json.JSONDecoder(parse_int=_integer)


def rows(
    path: Path, file: str, *, within: str = "", holding: Literal["a list", "an object"] = "a list"
) -> Iterator[Row]:
    """The rows of a `.jsonl`, `.parquet`, `.csv` or `.tsv` file, or of the list or object in a JSON file.

    A CSV or TSV file begins with the names of its columns; every value is a text, and a row of another number
    of values is given as their list. With `within`, the JSON file is an object, and what it holds under that
    key is meant.
    Raises FileNotFoundError; ValueError naming file and line where the file as a whole cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such annotation file")
    if path.suffix == ".parquet":
        found = _parquet(path)
    elif path.suffix in (".jsonl", ".ndjson"):
        found = _lines(path)
    elif path.suffix in DELIMITERS:
        found = _table(path)
    else:
        found = _members(path, within, holding)
    for position, (key, value) in enumerate(found):
        yield Row(file, position, key, value)


def holds_object(path: Path) -> bool:
    """Whether a JSON file holds an object rather than a list."""
    with JsonFile(path) as text:
        return text.peek() == "{"


def parquet_file(path: Path) -> pq.ParquetFile:
    """A Parquet file of plain types.

    Raises ValueError where it is damaged, or has extension types: registered ones run code of their own
    when a schema is read, and some unpickle what the file holds.
    """
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(8)[:4], "little")
        file.seek(max(size - 8 - length, 0))
        footer = file.read(length)
    if any(name in footer for name in _EXTENSION_TYPE):
        raise ValueError(f"{path}: has columns of an extension type; store plain types")
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: is not Parquet: {error}") from error


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    file = parquet_file(path)
    try:
        for batch in file.iter_batches(PARQUET_ROWS):
            yield from (("", row) for row in batch.to_pylist())
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path}: is damaged: {error}") from error


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig") as file:
        number = 0
        try:
            while line := file.readline(MAX_ROW):
                number += 1
                if line.strip():
                    yield "", _DECODER.decode(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}:{number or 1}: is not JSON: {error}") from error


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=DELIMITERS[path.suffix], strict=True)
        try:
            names = next(lines, [])
            if not names or len(set(names)) < len(names):
                rule = "must begin with the names of its columns, each another"
                raise ValueError(f"{path}:1: {rule}, but begins with {names}")
            for cells in lines:
                if cells:  # a blank line has none
                    fits = len(cells) == len(names)
                    yield "", dict(zip(names, cells, strict=True)) if fits else cells
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}:{lines.line_num or 1}: is not CSV: {error}") from error


def _members(path: Path, within: str, holding: str) -> Iterator[tuple[str, Any]]:
    with JsonFile(path) as text:
        if not within:
            yield from _records(text, holding)
        elif text.peek() != "{":
            raise text.refused(f"must hold an object with {within!r}")
        else:
            found = False
            for key in text.members():
                if key == within and not found:
                    found = True
                    yield from _records(text, holding)
                else:
                    text.skip()
            if not found:
                raise ValueError(f"{path}:1: must hold {within!r}, as this format has it")
        if text.peek():
            raise text.error("is not JSON: Extra data")


def _records(text: "JsonFile", holding: str) -> Iterator[tuple[str, Any]]:
    if text.peek() != {"a list": "[", "an object": "{"}[holding]:
        raise text.refused(f"must hold {holding} of records")
    for key in text.members():
        yield key, text.value()


class JsonFile:
    """A cursor in a JSON file, of which little more than the value under it is in memory.

    Values are decoded by the standard library; only the containers around them are walked here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, encoding="utf-8-sig", newline="")  # noqa: SIM115 - a context manager
        self._text, self._at, self._lines = "", 0, 1
        self._ended = False

    def __enter__(self) -> "JsonFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def peek(self) -> str:
        """The next character that is no blank; empty at the end of the file."""
        while True:
            blanks = _BLANKS.match(self._text, self._at)
            assert blanks
            self._at = blanks.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def members(self) -> Iterator[str]:
        """The keys of the object or list that begins here (empty ones for a list).

        The cursor is before the member's value, which is to be taken by `value`, `skip` or `members`.
        """
        is_object = self.peek() == "{"
        close = "}" if is_object else "]"
        self._at += 1
        if self.peek() == close:
            self._at += 1
            return
        while True:
            key = ""
            if is_object:
                if self.peek() != '"':
                    raise self.error("is not JSON: Expecting property name in double quotes")
                key = self.value()
                self._take(":", "Expecting ':' delimiter")
            yield key
            if self.peek() == close:
                self._at += 1
                return
            self._take(",", "Expecting ',' delimiter")

    def value(self) -> Any:
        """The value that begins here."""
        self.peek()
        while True:
            start, end = self._at, len(self._text) - NEAR
            try:
                value, stop = _DECODER.raw_decode(self._text, start)
            except json.JSONDecodeError as error:
                # A value that is cut off by the window fails near its end, or as an open string.
                cut = error.pos > end or error.msg.startswith("Unterminated")
                if cut and self._more():
                    continue
                at = self._at + error.pos - start
                raise self.error(f"is not JSON: {error.msg}", at) from error
            except (ValueError, RecursionError) as error:
                raise self.error(f"is not JSON: {error}") from error
            # A number that ends near the window's may go on behind it: 1 of 1.5e+30.
            if stop < end or not self._more():
                self._at += stop - start
                return value

    def skip(self) -> None:
        """Pass over the value that begins here, a member at a time."""
        if self.peek() in ("[", "{"):
            for _ in self.members():
                self.value()
        else:
            self.value()

    def refused(self, rule: str) -> ValueError:
        """That the file holds another kind of value than `rule` asks for."""
        first = self.peek()
        kind = type(self.value()) if first not in ("[", "{") else {"[": list, "{": dict}[first]
        return ValueError(f"{self.path}:1: {rule}, but holds a {kind.__name__}")

    def error(self, message: str, at: int | None = None) -> ValueError:
        """A fault at the cursor, or another place in the window, with file and line."""
        line = self._lines + self._text.count("\n", 0, self._at if at is None else at)
        return ValueError(f"{self.path}:{line}: {message}")

    def _take(self, char: str, message: str) -> None:
        if self.peek() != char:
            raise self.error(f"is not JSON: {message}")
        self._at += 1

    def _more(self) -> bool:
        """Let go of what is behind the cursor and read on; False at the end of the file."""
        if self._ended:
            return False
        self._lines += self._text.count("\n", 0, self._at)
        kept = self._text[self._at :]
        self._text, self._at = kept, 0
        if len(kept) > MAX_ROW:
            raise self.error(f"has a value of over {MAX_ROW} characters")
        try:
            read = self._file.read(
                max(WINDOW, len(kept))
            )  # doubling: each character is kept in O(1)
        except UnicodeDecodeError as error:
            raise self.error(f"is not JSON: {error}") from error
        self._text += read
        self._ended = not read
        return not self._ended
