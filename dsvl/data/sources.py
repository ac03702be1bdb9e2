"""Where the images of a set lie: in folders, and in files that are entered as if they were folders.

    birds/1.jpg            a file of the folder
    birds.tar/1.jpg        a member of a tar or zip
    SD.json/SD_IMG_1       base64 under its key in an object, as MIMIC-IT has it
    part-0.parquet/17/image    what a Parquet file holds in row 17; or under a name, if it has such a column

An annotation is not trusted: nothing outside the set's images is opened, whatever it names.
"""

import base64
import json
import re
import tarfile
import zipfile
from bisect import bisect_right
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from stat import S_ISLNK
from typing import Any, Protocol

from dsvl.data.rows import parquet_file
from dsvl.data.types import Reason

MAX_BYTES = 1 << 28
"""Bytes of the largest image file that is read."""
BLOCK = 1 << 20
"""Bytes that are searched for quotes at once."""
MAX_GAP = 1 << 20
"""Blanks between two texts of a JSON file."""

_ESCAPES = re.compile(rb"\\.", re.DOTALL)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|file:", re.IGNORECASE)


class BadImage(Exception):  # noqa: N818 - a fact about the data, not of the program
    """An image that cannot be used; `reason` is one of the reasons of the quarantine."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason: Reason = reason
        self.detail = detail


class Images:
    """The images of a set, below one folder or file and nowhere else."""

    def __init__(self, root: str | Path) -> None:
        self._root = Path(root)
        self._archives: dict[Path, Archive | BadImage] = {}

    def read(self, ref: str) -> bytes:
        """The bytes of an image: `ref` is its path below the root, or a `data:` URI that holds it.

        Raises BadImage: `forbidden_path` for anything but a relative path that stays inside the root,
        links resolved, whether or not the file exists; `missing_image`; `image_too_large` for a file of
        over MAX_BYTES; `undecodable_image` where the file that holds it is damaged or may not be read.
        """
        if ref.startswith("data:"):
            return _base64(ref.partition(",")[2])
        path, member = self._place(ref)
        try:
            if member:
                return self._archive(path).read(member)
            _check_size(path.stat().st_size)
            return path.read_bytes()
        except BadImage:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error

    def _place(self, ref: str) -> tuple[Path, str]:
        """The file that holds an image, and what the image is called in there."""
        shown = ascii(ref[:200])
        if "\0" in ref or _URL.match(ref) or Path(ref).is_absolute() or ".." in Path(ref).parts:
            raise BadImage(
                "forbidden_path", f"{shown} is not a plain path relative to {self._root}"
            )
        parts = Path(ref).parts
        try:
            root, path = self._root.resolve(), (self._root / ref).resolve()
            if not path.is_relative_to(root):
                raise BadImage("forbidden_path", f"{shown} leads out of {self._root}")
            if parts and path.is_file():
                return path, ""
            for depth in range(len(parts)):  # an archive on the way?
                path = self._root.joinpath(*parts[:depth]).resolve()
                if path.is_relative_to(root) and path.suffix in ARCHIVES and path.is_file():
                    return path, "/".join(parts[depth:])
        except PermissionError as error:
            raise _unreadable(Path(ref), error) from error
        except (OSError, ValueError, RuntimeError) as error:  # too long, not encodable, a link loop
            raise BadImage("forbidden_path", f"{shown}: {str(error)[:200]!a}") from error
        raise BadImage("missing_image", f"{shown} is not a file in {self._root}")

    def _archive(self, path: Path) -> "Archive":
        if path not in self._archives:
            try:
                self._archives[path] = ARCHIVES[path.suffix](path)
            except BadImage as bad:
                self._archives[path] = bad
            except Exception as error:
                self._archives[path] = _unreadable(path, error)
        found = self._archives[path]
        if isinstance(found, BadImage):
            raise BadImage(
                found.reason, found.detail
            )  # raised as it is, it would keep every traceback
        return found


class Archive(Protocol):
    """A file that holds images under names."""

    def read(self, member: str) -> bytes:
        """The bytes of one; raises BadImage."""
        ...


class Tar:
    """The regular files of an uncompressed tar, found by one pass over its headers."""

    def __init__(self, path: Path) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.isreg() and not member.issparse():
                    self._places[member.name.removeprefix("./")] = (member.offset_data, member.size)
                tar.members = []  # type: ignore  # it would keep all, which fills the memory
        self._path = path

    def read(self, member: str) -> bytes:
        """The bytes of a member; raises BadImage."""
        if member not in self._places:
            raise _missing(member)
        return _slice(self._path, self._places[member])


class Zip:
    """The regular files of a zip."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._members = {
            info.filename: info
            for info in self._zip.infolist()
            if not info.is_dir() and not S_ISLNK(info.external_attr >> 16)
        }

    def read(self, member: str) -> bytes:
        """The bytes of a member; raises BadImage."""
        if member not in self._members:
            raise _missing(member)
        info = self._members[member]
        _check_size(info.file_size)
        return self._zip.read(info)


class Base64Json:
    """A JSON object of base64 texts, of which offsets alone are kept: such files have many gigabytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}
        strings = _strings(path)
        for (start, end), (value, value_end) in zip(strings, strings, strict=False):
            key = json.loads(_slice(path, (start - 1, end - start + 2)))
            self._places[key] = (value, value_end - value)

    def read(self, member: str) -> bytes:
        """The bytes of the image under a key; raises BadImage."""
        if member not in self._places:
            raise _missing(member)
        text = _slice(self._path, self._places[member])
        if b"\\" in text:
            text = json.loads(b'"' + text + b'"').encode("ascii", "replace")
        return _base64(text.rpartition(b",")[2])  # some have data:image/jpeg;base64, before it


class Parquet:
    """Images in the rows of a Parquet file, in whatever column; by name, where names have a column."""

    NAMES = ("key", "id", "image_id", "name", "__index_level_0__")
    IMAGES = ("bytes", "base64", "image")

    def __init__(self, path: Path) -> None:
        self._file = parquet_file(path)
        columns = self._file.schema_arrow.names
        name, self._image = (
            next((column for column in known if column in columns), "")
            for known in (self.NAMES, self.IMAGES)
        )
        names = self._file.read([name])[name].to_pylist() if name and self._image else []
        self._rows = {str(name): row for row, name in enumerate(names)}
        groups = range(self._file.num_row_groups)
        sizes = (self._file.metadata.row_group(group).num_rows for group in groups)
        self._starts = [0, *accumulate(sizes)]
        self._held: tuple[tuple[int, str], Any] = ((-1, ""), None)

    def read(self, member: str) -> bytes:
        """The bytes of an image by name, or in ROW/COLUMN and further keys; raises BadImage."""
        if member in self._rows:
            row, keys = self._rows[member], [self._image]
        else:
            first, *keys = member.split("/")
            if not (first.isdecimal() and keys and int(first) < self._starts[-1]):
                raise _missing(member)
            row = int(first)
        if keys[0] not in self._file.schema_arrow.names:
            raise _missing(member)
        value = self._value(row, keys[0])
        try:
            for key in keys[1:]:
                value = value[int(key) if isinstance(value, list) else key]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise _missing(member) from error
        if isinstance(value, dict):
            value = value.get("bytes")
        if not isinstance(value, bytes | str):
            raise _missing(member)
        data = value if isinstance(value, bytes) else _base64(value.rpartition(",")[2])
        _check_size(len(data))
        return data

    def _value(self, row: int, column: str) -> Any:
        group = bisect_right(self._starts, row) - 1
        if self._held[0] != (group, column):
            held = self._file.read_row_group(group, columns=[column])[column]
            self._held = ((group, column), held)
        return self._held[1][row - self._starts[group]].as_py()


def _strings(path: Path) -> Iterator[tuple[int, int]]:
    """Where the content of every string starts and ends in an object of strings: key, value, key, ...

    Raises ValueError where the file is anything else.
    """
    gap, opened, at, number = (
        b"",
        -1,
        0,
        0,
    )  # what is between strings; the start of the one that is open

    def fault(where: int) -> ValueError:
        return ValueError(f"{path}: byte {where}: is cut off, or no object of texts")

    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            while block.endswith(b"\\") and (more := file.read(1)):  # keep escapes whole
                block += more
            if b"\\" in block:
                block = _ESCAPES.sub(b"__", block)  # of the same length, without quotes
            start = 0
            while (quote := block.find(b'"', start)) >= 0:
                if opened < 0:
                    gap += block[start:quote]
                    before = (b":" if number % 2 else b",") if number else b"{"
                    if gap.removeprefix(BOM_UTF8).strip() != before:
                        raise fault(at + quote)
                    opened, gap = at + quote + 1, b""
                else:
                    yield opened, at + quote
                    opened, number = -1, number + 1
                start = quote + 1
            if opened < 0:
                gap += block[start:]
                if len(gap) > MAX_GAP:
                    raise fault(at + start)
            at += len(block)
    end = b"}" if number else b"{}"
    if opened >= 0 or number % 2 or b"".join(gap.split()) != end:
        raise fault(at)


def _slice(path: Path, place: tuple[int, int]) -> bytes:
    """What is there in a file: offset and length."""
    offset, length = place
    _check_size(length)
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(length)
    if len(data) < length:
        raise BadImage("undecodable_image", f"{path.name} is cut off")
    return data


def _base64(text: str | bytes) -> bytes:
    try:
        return base64.b64decode(text)
    except ValueError as error:
        raise BadImage("undecodable_image", f"it is not base64: {error}") from error


def _check_size(size: int) -> None:
    if size > MAX_BYTES:
        raise BadImage("image_too_large", f"{size} bytes, more than {MAX_BYTES}")


def _unreadable(path: Path, error: Exception) -> BadImage:
    # Hostile bytes raise anything in a library: lzma.LZMAError, IndexError, NotImplementedError ...
    shown = ascii(f"{type(error).__name__}: {error}"[:200])[1:-1]
    return BadImage("undecodable_image", f"{path.name} cannot be read: {shown}")


def _missing(member: str) -> BadImage:
    return BadImage("missing_image", f"{member[:200]!a} is not in the file")


ARCHIVES = {".tar": Tar, ".zip": Zip, ".json": Base64Json, ".parquet": Parquet}
