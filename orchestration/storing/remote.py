"""An object store: files put, fetched, listed and removed by name, with patience for requests that fail.

S3 and what speaks its language, Google's storage, or a folder (`file://`), by PyArrow. A request that fails
is made again: first by the store's own client, then, after pauses that grow and are partly drawn, by us.
"""

import errno
import hashlib
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qs, urlsplit

from pyarrow import fs

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger(__name__)

PATIENCE_SECONDS = 60.0
"""For how long a request is made again that fails."""
LONGEST_PAUSE_SECONDS = 10.0
AT_ONCE = 8
"""Files on their way at the same time."""
CHUNK = 8 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk that has no room."""
REFUSALS = (
    "ACCESS_DENIED", "NO_SUCH_BUCKET", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH",
    "INVALID_CLIENT_TOKEN_ID", "UNRECOGNIZED_CLIENT", "MISSING_AUTHENTICATION_TOKEN", "EXPIRED_TOKEN",
    "HTTP status 301", "HTTP status 400", "HTTP status 401", "HTTP status 403", "PERMISSION_DENIED",
    "UNAUTHENTICATED",
)  # fmt: skip
"""What the clients write where another attempt would be answered alike."""


class Found(NamedTuple):
    """A file in the store."""

    size: int
    changed: float
    """When it was put there, in seconds since 1970, perhaps rounded down to whole ones."""


class Remote:
    """A place in a store, by the URI of `storage.remote`; keys are relative to it."""

    def __init__(self, uri: str, *, patience: float = PATIENCE_SECONDS) -> None:
        self.patience = patience
        self.name = uri.partition("?")[0]
        """For messages."""
        self._fs, self._root = _opened(uri)

    @cached_property
    def clock(self) -> float:
        """Seconds by which the store's clock is ahead; reading it writes, reads, lists and removes a file.

        Raises:
            ValueError: if the store refuses any of it.
            RuntimeError: if it cannot be reached.
        """
        key, text = f".probe-{uuid.uuid4().hex}", b"dsvl"
        self._patiently(f"write {key}", lambda: self._write(key, [text]))
        found = self._patiently(f"read {key}", lambda: self._read(key))
        listed = self.files("").get(key)
        if found != text or listed is None:
            raise ValueError(f"storage.remote: {self.name} gives back other than what it is given")
        ahead = listed.changed - time.time()
        self.remove(key)
        return ahead

    def files(self, folder: str) -> dict[str, Found]:
        """Key -> what is known of it, of all files below a folder; of the root, those in itself."""
        place = self._place(folder)
        selector = fs.FileSelector(place, recursive=bool(folder), allow_not_found=True)
        found = self._patiently(f"list {folder}", lambda: self._fs.get_file_info(selector))
        return {
            one.path[len(self._root) + 1 :]: Found(one.size, one.mtime_ns / 1e9)
            for one in found
            if one.is_file
        }

    def read(self, key: str) -> bytes:
        """The content of a small file. Raises FileNotFoundError where there is none."""
        return self._patiently(f"read {key}", lambda: self._read(key))

    def write(self, key: str, content: bytes) -> None:
        """Put a small file."""
        self._patiently(f"write {key}", lambda: self._write(key, [content]))

    def fetch(self, key: str, path: Path, *, sha256: str | None = None) -> None:
        """Bring a file here, under a temporary name until it is whole.

        Raises:
            FileNotFoundError: if the store has none.
            RuntimeError: if it is not what its sha256 says, however often it is fetched.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        making = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")

        def attempt() -> None:
            digest = hashlib.sha256()
            with self._fs.open_input_stream(self._place(key)) as there, making.open("wb") as here:
                while chunk := there.read(CHUNK):
                    digest.update(chunk)
                    here.write(chunk)
                here.flush()
                os.fsync(here.fileno())
            if sha256 and digest.hexdigest() != sha256:
                raise OSError(f"{key} is not what its sha256 says")

        try:
            self._patiently(f"fetch {key}", attempt)
            making.replace(path)
        finally:
            making.unlink(missing_ok=True)

    def put(self, path: Path, key: str) -> None:
        """Bring a file there. Raises FileNotFoundError where there is none here."""

        def attempt() -> None:
            with path.open("rb") as here:
                self._write(key, iter(lambda: here.read(CHUNK), b""))

        self._patiently(f"put {key}", attempt)

    def remove(self, key: str) -> None:
        """Remove a file, if it is there."""

        def attempt() -> None:
            try:
                self._fs.delete_file(self._place(key))
            except FileNotFoundError:
                return  # by an attempt of which no answer came

        self._patiently(f"remove {key}", attempt)

    def _read(self, key: str) -> bytes:
        with self._fs.open_input_stream(self._place(key)) as stream:
            return stream.read()

    def _write(self, key: str, chunks: Iterable[bytes]) -> None:
        """Write a file and look whether all of it has come there: closing a stream also ends half a file."""
        place, written = self._place(key), 0
        local = self._fs.type_name == "local"  # where files are seen while they are written
        target = self._place(f".part-{uuid.uuid4().hex}") if local else place
        if local:
            Path(place).parent.mkdir(parents=True, exist_ok=True)
        with self._fs.open_output_stream(target) as stream:
            for chunk in chunks:
                stream.write(chunk)
                written += len(chunk)
        if local:
            Path(target).replace(place)
        if (size := self._fs.get_file_info(place).size) != written:
            raise OSError(f"{key}: {size} of {written} bytes have come there")

    def _place(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _patiently(self, what: str, work: Callable[[], R]) -> R:
        """Do it, again and again where requests fail; an error that would come again is raised at once."""
        began, attempts = time.monotonic(), 0
        while True:
            try:
                return work()
            except FileNotFoundError:
                raise
            except (OSError, NotImplementedError) as error:
                if isinstance(error, OSError) and error.errno in FULL:
                    raise
                told = f"storage.remote: cannot {what} in {self.name}: {error}"
                if isinstance(error, PermissionError) or any(
                    code in str(error) for code in REFUSALS
                ):
                    raise ValueError(
                        f"{told}; name a bucket that there is, and give credentials that may read, write, "
                        "list and remove there in the environment (AWS_ACCESS_KEY_ID, "
                        "AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION; GOOGLE_APPLICATION_CREDENTIALS)"
                    ) from None
                attempts += 1
                if time.monotonic() - began > self.patience:
                    raise RuntimeError(
                        f"{told} (attempt {attempts}); nothing is lost here: see that the store can be "
                        "reached, and type the command again"
                    ) from error
                time.sleep(random.uniform(0.1, 1) * min(LONGEST_PAUSE_SECONDS, 0.25 * 2**attempts))


def each(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Do it to several at once, and return what comes of them, in order."""
    with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="remote") as pool:
        return list(pool.map(work, items))


def _opened(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, and the place in it."""
    parts = urlsplit(uri)
    if parts.scheme == "s3":
        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        # Opening late saves two of three requests for a small file.
        retry = fs.AwsStandardS3RetryStrategy(max_attempts=6)
        store = fs.S3FileSystem(**options, retry_strategy=retry, allow_delayed_open=True)
        return store, f"{parts.netloc}{parts.path}".rstrip("/")
    store, root = fs.FileSystem.from_uri(uri)
    return store, root.rstrip("/")
