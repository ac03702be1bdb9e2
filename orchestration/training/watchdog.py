"""Ends a worker that hangs, leaving its stacks behind, so that the training starts anew."""

import faulthandler
from datetime import UTC, datetime
from pathlib import Path


class Watchdog:
    """A clock that runs out unless it is wound up again.

    It ticks outside of Python, so it also ends a process that is stuck in a collective or a kernel. What is
    left is a file `rank-R.TIME.stacks`: what the worker was doing, and the stacks of all its threads.
    """

    def __init__(self, folder: Path, *, rank: int, seconds: float) -> None:
        """Start the clock."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank}.{datetime.now(UTC):%Y%m%dT%H%M%S}.stacks"
        self._file = self.path.open("a", encoding="utf-8")
        self._seconds = seconds
        self.wind("beginning")

    def wind(self, doing: str) -> None:
        """The worker is alive, and will be `doing` something for at most the watchdog's seconds."""
        self._file.truncate(0)
        self._file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {doing}\n")
        self._file.flush()
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._file)

    def stop(self) -> None:
        """The worker is done, and nothing is left."""
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        self.path.unlink()
