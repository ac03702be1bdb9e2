"""The record of a run: an append-only file of JSON lines in its folder, read by tracker, report and resume.

One process writes at a time. A line is one of
`{"kind": "start", "time", "identity", "params", "step", "steps", "workers"}`,
`{"kind": "metrics", "time", "step", "metrics"}`,
`{"kind": "chats", "time", "step", "chats"}`, what `dsvl.chat.transcript` gave after update `step`,
`{"kind": "checkpoint", "time", "step", "metrics"}` where one was saved that has been evaluated,
`{"kind": "undone", "time", "fault"}` where updates since the last checkpoint are made again without one,
and `{"kind": "end", "time", "state", "reason", "since"}` with state finished, stopped (by a scheduler) or
failed; `since` when who ended it was at work.
"""

import errno
import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Self

NAME = "journal.jsonl"
NOTES = "notes"
"""Within a run's folder: a journal of its own, of what was made of the run: `{"kind": "file", "path"}`,
`{"kind": "evaluation", "path", "step", "metrics"}`,
`{"kind": "export", "path", "step", "metric", "value", "mode"}`."""
LOCK = ".lock"
"""Locked in a folder where a command is at work."""
PATIENCE_SECONDS = 60
GLANCE_SECONDS = 0.3
"""A process that only looks whether a lock is held holds it for less than this."""


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Be the only one at work in a folder, until the block or the process ends.

    Raises:
        RuntimeError: if another process is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            _lock(file, patience=GLANCE_SECONDS)
        except BlockingIOError:
            text = f"{folder}: another process is at work here; wait for its end, or stop it"
            raise RuntimeError(text) from None
        yield


def busy(path: Path) -> bool:
    """Whether a process holds the lock of a file: of a journal that it writes, or of a folder it works in."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _lock(file: IO, *, patience: float) -> None:
    """Lock an open file, or raise BlockingIOError if another process still does after so many seconds."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class Journal:
    """Appends lines to a run's journal; each is on its way to the disk before the call returns."""

    def __init__(self, folder: Path, *, wait: bool = True) -> None:
        """Open the journal of a run, after removing a line that a killed writer left half done.

        Waits for a writer that has it open: the last process of a killed run may still be dying.
        Without `wait` raises BlockingIOError while there is one.

        Raises:
            RuntimeError: if another process still writes after a minute.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            patience = PATIENCE_SECONDS if wait else GLANCE_SECONDS
            self._file = _writing(folder / NAME, patience=patience)
        except BlockingIOError:
            if not wait:
                raise
            text = f"{folder}: another process is training here; wait for its end, or stop it"
            raise RuntimeError(text) from None
        self._file.truncate(lines(folder)[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self._file.close()

    def start(
        self,
        *,
        identity: str,
        params: Mapping[str, object],
        step: int,
        steps: int = 0,
        workers: int = 0,
    ) -> None:
        """The run begins, or goes on after `step` of its `steps` updates, with workers of its own."""
        about = {"identity": identity, "params": params, "step": step, "steps": steps}
        self._append({"kind": "start", **about, "workers": workers})

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was measured after update `step`."""
        self._append({"kind": "metrics", "step": step, "metrics": metrics})

    def chats(self, step: int, chats: list[dict]) -> None:
        """Held-out conversations as the model continued them after update `step`."""
        self._append({"kind": "chats", "step": step, "chats": chats})

    def checkpoint(self, step: int, metrics: Mapping[str, float]) -> None:
        """The state after update `step` is saved, of which this was measured."""
        self._append({"kind": "checkpoint", "step": step, "metrics": metrics})

    def undone(self, fault: str) -> None:
        """The run goes back to its newest checkpoint."""
        self._append({"kind": "undone", "fault": fault})

    def file(self, path: str) -> None:
        """A file was made of the run, at this place relative to its folder."""
        self._append({"kind": "file", "path": path})

    def evaluation(self, path: str, *, step: int, metrics: Mapping[str, float]) -> None:
        """The model after update `step` was measured, into this folder relative to the run's."""
        self._append({"kind": "evaluation", "path": path, "step": step, "metrics": metrics})

    def export(self, path: str, *, step: int, metric: str, value: float, mode: str) -> None:
        """The model after update `step` was exported to this place relative to the run's folder."""
        about = {"path": path, "step": step, "metric": metric, "value": value, "mode": mode}
        self._append({"kind": "export", **about})

    def end(self, state: str, reason: str = "", *, since: float = 0.0) -> None:
        """The run is over. A caller that did not write its start passes `since`, when it began its work."""
        self._append({"kind": "end", "state": state, "reason": reason, "since": since})
        os.fsync(self._file.fileno())
        self._file.close()

    def _append(self, entry: dict[str, object]) -> None:
        self._file.write(json.dumps({"time": time.time()} | entry).encode() + b"\n")
        self._file.flush()


def merge(folder: Path, others: Collection[bytes]) -> None:
    """Put lines in that were written elsewhere, in the order of their times; not while there is a writer."""
    if not set(others) - set(lines(folder)[0]):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(BlockingIOError), _writing(folder / NAME, patience=GLANCE_SECONDS):
        merged = dict.fromkeys([*lines(folder)[0], *others])
        by_time = sorted(merged, key=lambda line: json.loads(line)["time"])
        write_whole(folder / NAME, b"".join(line + b"\n" for line in by_time).decode())


def _writing(path: Path, *, patience: float) -> IO[bytes]:
    """A journal as its only writer opens it; raises BlockingIOError as `_lock` does."""
    while True:
        file = path.open("ab")
        try:
            _lock(file, patience=patience)
        except BlockingIOError:
            file.close()
            raise
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()  # `merge` has replaced it meanwhile


def read(folder: Path, offset: int = 0) -> tuple[list[dict], int]:
    """What whole lines from a byte offset on say, and the offset after them; a torn one is left for later.

    Raises:
        ValueError: if one is damaged, as the disk of a machine that lost its power may leave it.
    """
    found, after = lines(folder, offset)
    entries = []
    for line in found:
        try:
            entries.append(json.loads(line))
        except ValueError:
            place = (folder / NAME).read_bytes()[:offset].count(b"\n") + len(entries) + 1
            text = f"{folder / NAME}: line {place} is damaged; restore the file, or remove the line"
            raise ValueError(text) from None
    return entries, after


def lines(folder: Path, offset: int = 0) -> tuple[list[bytes], int]:
    """The same lines as they are written."""
    path = folder / NAME
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    return whole.splitlines(), offset + len(whole)


def points(entries: list[dict]) -> Iterator[tuple[str, int, float, float]]:
    """(metric, step, value, time), once a metric and step.

    Where a resumed run repeats a step, the later line counts.
    """
    latest = {
        (key, entry["step"]): (value, entry["time"])
        for entry in entries
        if entry["kind"] == "metrics"
        for key, value in entry["metrics"].items()
    }
    for (key, step), (value, moment) in sorted(latest.items(), key=lambda item: item[0]):
        yield key, step, value, moment


def seconds(entries: list[dict]) -> float:
    """For how long there was work, without the time between an interruption and the next start."""
    return sum(passed(before["time"], entry) for before, entry in pairwise(entries))


def passed(before: float, entry: dict) -> float:
    """For how long there was work between the line before, told then, and this one."""
    return 0.0 if entry["kind"] == "start" else entry["time"] - max(before, entry.get("since", 0))


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run, by step."""
    return [(step, value) for key, step, value, _ in points(read(folder)[0]) if key == metric]


def write_json(path: Path, document: object) -> None:
    """Write a JSON file, whole."""
    write_whole(path, json.dumps(document, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    path = path.resolve()  # of a link, what it leads to is written
    if not path.parent.is_dir():  # told of this file, not of the unfinished one
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: must be a file, if it is there; name another")
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def read_json(path: Path) -> Any:
    """Read a JSON file that `write_json` left.

    Raises:
        ValueError: if it is no JSON any more; the file is named.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or remove its folder") from None
