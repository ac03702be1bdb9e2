"""Journals on their way to MLflow: a process beside each command that writes some, and `catch_up` afterwards.

    python -m orchestration.records.shipping FOLDER

follows the journals of a run, or of a sweep and its trials, until its standard input ends: with the command
that started it, however that ended. Nothing that trains waits for it, and the command only so long as
`tracking.patience_s` says. What could not be brought stays in the journals; the next command on the same
experiment brings the rest into the same MLflow runs, and so does `catch_up`.
"""

import fcntl
import logging
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orchestration.config import Experiment, validated
from orchestration.records import journal
from orchestration.records.results import trials_folder

if TYPE_CHECKING:
    from orchestration.tracking import Run, Store  # which imports MLflow: seconds

log = logging.getLogger(__name__)

PERIOD_SECONDS = 2.0
LONGEST_SECONDS = 60.0
"""Between two tries while the store fails: the period, doubled each time, up to this."""
LOCK = ".shipping"
"""Locked in a followed folder by the one that ships it."""


@contextmanager
def shipped(experiment: Experiment, folder: Path) -> Iterator[None]:
    """Have the journals of a folder shipped while the block runs, and what is left when it ends.

    A shipper that dies is replaced. One that is not done in time after the end is ended.
    """
    command = [sys.executable, "-m", "orchestration.records.shipping", str(folder)]

    def start() -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C is for the command, whose end is then on the record too.
        pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(command, stdin=pipe, stdout=nothing, start_new_session=True)

    def keep() -> None:
        nonlocal shipper
        while not over.wait(PERIOD_SECONDS):
            if shipper.poll() is not None:
                shipper = start()

    over, shipper = threading.Event(), start()
    keeper = threading.Thread(target=keep, name="shipping", daemon=True)
    keeper.start()
    try:
        yield
    finally:
        over.set()
        keeper.join()
        if shipper.poll() is not None:  # since the keeper last looked
            shipper = start()
        assert shipper.stdin is not None
        shipper.stdin.close()
        try:
            done = shipper.wait(experiment.tracking.patience_s) == 0
        except subprocess.TimeoutExpired:
            shipper.kill()
            shipper.wait()
            done = False
        if not done:
            log.warning(
                "tracking store %s has not all of %s yet; the journals keep what it misses until "
                "the command is typed again, or `dsvl status --sync`",
                experiment.tracking_uri,
                folder,
            )


def catch_up(experiment: Experiment) -> dict:
    """Bring all that the journals of an experiment's training and sweep hold to MLflow, now.

    Returns the `store`, how many `runs` it has of them, and which folders are still `at_work`: a command
    there ships by itself.

    Raises:
        Exception: the store's own, whatever that is, where it fails.
    """
    run, trials = experiment.run_folder, trials_folder(experiment)
    runs, at_work = 0, []
    for folder in (run, trials):
        if not (folder / journal.NAME).exists():
            continue
        with ExitStack() as held:
            try:
                held.enter_context(journal.sole(folder))
                held.enter_context(locked(folder / LOCK, wait=False))
            except (RuntimeError, BlockingIOError):
                at_work.append(str(folder))
                continue
            follower = Follower(experiment, folder)
            follower.ship(over=True)
            runs += len(follower.runs)
    return {"store": experiment.tracking_uri, "runs": runs, "at_work": at_work}


class Follower:
    """Ships the journals of a run, or of a sweep and its trials."""

    def __init__(self, experiment: Experiment, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        self.sweep = folder == trials_folder(experiment)
        self.runs: dict[Path, Run] = {}
        self._store: Store | None = None

    def follow(self) -> bool:
        """Ship until standard input ends, and then what is left; returns whether all is shipped."""
        pause, failed = 0.0, False
        while True:
            closing = bool(select.select([sys.stdin], [], [], pause)[0])
            try:
                with locked(self.folder / LOCK, wait=closing):
                    self.ship(over=closing)
                failed, pause = False, PERIOD_SECONDS
            except (
                BlockingIOError
            ):  # the shipper of a command that was killed brings the last of it
                failed, pause = True, PERIOD_SECONDS
            except Exception as error:  # each kind of store has its own; none may end the shipping
                if not failed:
                    text = "tracking store %s: %s; the journals keep what it misses"
                    log.warning(text, self.experiment.tracking_uri, error)
                failed, pause = True, min(2 * max(pause, PERIOD_SECONDS), LONGEST_SECONDS)
                self.runs, self._store = {}, None  # what it has is asked anew
            if closing:
                return not failed

    def ship(self, *, over: bool) -> None:
        """Bring the store up to date; when all is `over`, runs without an end were killed."""
        from orchestration.tracking import Store, turn

        with turn(self.experiment):
            self._store = self._store or Store(self.experiment)
            self._ship(self._store, over=over)

    def _ship(self, store: "Store", *, over: bool) -> None:
        name = self.experiment.name
        root = self._run(store, self.folder, name=f"{name} sweep" if self.sweep else name)
        if root is None:
            return
        if self.sweep:
            found = {path.parent for path in self.folder.glob(f"*/{journal.NAME}")}
            for folder in sorted(found - {self.folder / journal.NOTES}):
                trial = self._run(store, folder, name=folder.name, parent=root.id)
                if trial:
                    store.ship(trial, over=over)
        before = root.offset
        store.ship(root, over=over)
        if self.sweep and self.experiment.search and root.offset > before:
            store.mark_best(root, self.experiment.search)

    def _run(self, store: "Store", folder: Path, **named: str) -> "Run | None":
        """The MLflow run of a folder, once its journal has begun."""
        if folder not in self.runs and journal.read(folder)[0]:
            self.runs[folder] = store.run(folder, **named)
        return self.runs.get(folder)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a file; without `wait`, a BlockingIOError where another process does."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def main() -> int:
    """Follow the folder that is named."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # whoever trains on these cores goes first
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    folder = Path(sys.argv[1])
    experiment = validated(journal.read_json(folder / "experiment.json")["experiment"])
    return 0 if Follower(experiment, folder).follow() else 1


if __name__ == "__main__":
    sys.exit(main())
