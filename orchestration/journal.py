"""The record of a run: an append-only file of JSON lines in its folder, read by tracker, report and resume.

One process writes at a time. A line is one of
`{"kind": "start", "time", "identity", "params", "step", "workers"}`,
`{"kind": "metrics", "time", "step", "metrics"}`,
`{"kind": "undone", "time", "fault"}` where updates since the last checkpoint are made again without one,
and `{"kind": "end", "time", "state", "reason"}` with state finished, stopped (by a scheduler) or failed.
"""

import fcntl
import json
import os
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

NAME = "journal.jsonl"
PATIENCE_SECONDS = 60


@contextmanager
def sole(folder: Path) -> Iterator[None]:
    """Be the only one at work in a folder, until the block or the process ends.

    Raises:
        RuntimeError: if another process is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"{folder}: another process is at work here; wait for its end, or stop it"
            raise RuntimeError(text) from None
        yield


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
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (file := _locked(folder / NAME)) is None:
            if not wait:
                raise BlockingIOError(f"{folder / NAME}: has a writer")
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{folder}: another process is training here; wait for its end, or stop it"
                )
            time.sleep(0.1)
        self._file = file
        self._file.truncate(read(folder)[1])

    def start(
        self, *, identity: str, params: Mapping[str, object], step: int, workers: int = 0
    ) -> None:
        """The run begins, or goes on after `step` updates, with so many workers of its own."""
        about = {"identity": identity, "params": params, "step": step, "workers": workers}
        self._append({"kind": "start", **about})

    def metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """What was measured after update `step`."""
        self._append({"kind": "metrics", "step": step, "metrics": metrics})

    def undone(self, fault: str) -> None:
        """The run goes back to its newest checkpoint."""
        self._append({"kind": "undone", "fault": fault})

    def end(self, state: str, reason: str = "") -> None:
        """The run is over."""
        self._append({"kind": "end", "state": state, "reason": reason})
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
    if file := _locked(folder / NAME):
        with file:
            merged = dict.fromkeys([*lines(folder)[0], *others])
            by_time = sorted(merged, key=lambda line: json.loads(line)["time"])
            write_whole(folder / NAME, b"".join(line + b"\n" for line in by_time).decode())


def _locked(path: Path) -> BinaryIO | None:
    """A journal as its only writer opens it, or None while there is another."""
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            return file
        file.close()  # `merge` has replaced it meanwhile


def read(folder: Path, offset: int = 0) -> tuple[list[dict], int]:
    """What whole lines from a byte offset on say, and the offset after them; a torn one is left for later."""
    found, after = lines(folder, offset)
    return [json.loads(line) for line in found], after


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
    return sum(b["time"] - a["time"] for a, b in pairwise(entries) if b["kind"] != "start")


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of one metric of a run, by step."""
    return [(step, value) for key, step, value, _ in points(read(folder)[0]) if key == metric]


def write_json(path: Path, document: object) -> None:
    """Write a JSON file, whole."""
    write_whole(path, json.dumps(document, indent=1))


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
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
