"""When a storage and its store are brought together: before work, beside it and after it."""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from math import inf
from pathlib import Path

from dsvl import checkpoint_folder
from dsvl.config import CheckpointConfig
from dsvl.data.folders import claim
from orchestration.config import Experiment
from orchestration.records.journal import read_json
from orchestration.records.results import content_of
from orchestration.storing.mirror import Mirror

log = logging.getLogger(__name__)

PERIOD_SECONDS, JOURNAL_SECONDS = 2.0, 30.0
"""How often there is a look for new checkpoints, and how often a journal goes up without one."""
SKEW_SECONDS = 60.0
"""By which clocks may differ before it is told: which file is the later one depends on them."""


def mirror_of(experiment: Experiment) -> Mirror | None:
    """The mirror of an experiment's storage, if it has a store."""
    storage, tracked_here = experiment.storage, experiment.tracking.uri is None
    return _mirror(storage.path, storage.remote, tracked_here) if storage.remote else None


@cache
def _mirror(path: str, remote: str, tracked_here: bool) -> Mirror:
    return Mirror(Path(path), remote, tracked_here=tracked_here)


@contextmanager
def mirrored(experiment: Experiment, *others: Path, writer: bool = True) -> Iterator[None]:
    """Fetch what the store has of a run, and of `others`; bring there what the block has made of it.

    A `writer` is the only one at work there.

    Raises:
        ValueError: before anything else, if the store refuses to be used.
        RuntimeError: if it cannot be reached; at the end, nothing is lost here.
    """
    if (mirror := mirror_of(experiment)) is None:
        yield
        return
    require_access(mirror)
    for folder in (experiment.run_folder, *others):
        mirror.fetch(folder, writer=writer)
    try:
        yield
    except BaseException:
        try:
            mirror.push(experiment.run_folder)
        except Exception as error:  # what has failed before is the message
            log.warning("%s", error)
        raise
    mirror.fetch(experiment.run_folder)  # what workers on other machines have made
    mirror.push(experiment.run_folder)


def require_access(mirror: Mirror) -> None:
    """Raise ValueError where a store can't be written to, read and listed, once a process."""
    if abs(ahead := mirror.remote.clock) > SKEW_SECONDS:
        log.warning("%s: its clock is %.0f s ahead of this machine's", mirror.remote.name, ahead)


def fetch_data(experiment: Experiment) -> None:
    """Fetch the prepared data that a run and its trials were held to, where they are not here."""
    if experiment.storage.remote is None:
        return
    runs = experiment.run_folder
    for path in [runs / "data.json", *runs.glob("trials/*/data.json")]:
        if path.is_file():
            about = read_json(path)
            folder = Path(experiment.storage.path) / "prepared" / Path(about["folder"]).name
            require_prepared(experiment, folder, about["digest"])


def require_prepared(experiment: Experiment, folder: Path, content: str) -> None:
    """Fetch prepared data that this machine lacks, once for all its processes.

    Raises:
        ValueError: if the store has none of this `content`, a digest of the manifest's files.
    """
    if (mirror := mirror_of(experiment)) is None:
        return
    with claim(folder):  # others may fetch them meanwhile
        if content_of(folder) != content:
            mirror.fetch_prepared(folder)
        if experiment.engine.stored_features:
            mirror.fetch_features(folder)
    if content_of(folder) != content:
        raise ValueError(
            f"{mirror.remote.name}/{mirror.key(folder)}: not the prepared data that the run began with; "
            "prepare them again"
        )


def catch_up(experiment: Experiment, run: Path, work: Callable[[Mirror], None]) -> None:
    """Have something fetched for a training; one that has begun here goes on where the store is away."""
    if mirror := mirror_of(experiment):
        try:
            work(mirror)
        except RuntimeError as error:
            if not checkpoint_folder.held(run / "checkpoints"):
                raise
            log.warning("%s; going on with what is here", error)


def newest_known(experiment: Experiment, run: Path) -> int:
    """The updates of a run's newest checkpoint, in its folder or the store's; -1 where there is none."""
    steps = set(checkpoint_folder.held(run / "checkpoints"))
    if mirror := mirror_of(experiment):
        try:
            steps |= mirror.whole(run)
        except RuntimeError as error:
            log.warning("%s; what is here counts", error)
    return max(steps, default=-1)


class Uploads:
    """Brings a run to its store in the background of who trains it, and who never waits for that."""

    def __init__(
        self, mirror: Mirror, run: Path, config: CheckpointConfig, stay: Collection[int]
    ) -> None:
        """`config` and `stay` say which checkpoints the store keeps, as in `checkpoint_folder.remove_old`."""
        self._mirror, self._run, self._config, self._stay = mirror, run, config, stay
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="uploads", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait until all is there.

        Raises:
            RuntimeError: if the store cannot be reached.
            ValueError: if it refuses.
        """
        self._closing.set()
        self._thread.join()
        self._push()

    def _push(self) -> None:
        self._mirror.push(self._run, retention=self._config, stay=self._stay)

    def _work(self) -> None:
        before, pushed, said = -1, -inf, False
        while not self._closing.wait(PERIOD_SECONDS):
            newest = max(checkpoint_folder.held(self._run / "checkpoints"), default=-1)
            if newest == before and time.monotonic() - pushed < JOURNAL_SECONDS:
                continue
            try:
                self._push()
                before, said = newest, False
            except Exception as error:  # each kind of store has its own; none may end the training
                if not said:
                    log.warning("%s; tried again later", error)
                said = True
            pushed = time.monotonic()
