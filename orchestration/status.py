"""Where runs and sweeps stand, from their journals alone: without Ray, torch or MLflow it answers at once."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from statistics import fmean

from orchestration.config import Experiment
from orchestration.records.course import Course
from orchestration.records.journal import LOCK, NAME, busy, read, read_json

QUIET_SECONDS = 60.0
"""A run is silent when nothing has been written for as long, and for ten times its usual update."""
UNDER_WAY = ("running", "silent", "restarting", "starting")
ENDED = ("finished", "stopped", "failed")


@dataclass(frozen=True)
class Standing:
    """How far a run, a sweep or a trial is."""

    name: str
    folder: str
    state: str
    """starting, running, silent (no line for long), restarting, finished, stopped (by a scheduler), failed,
    killed (it has not ended, and no process is at work), damaged (its journal cannot be read), or not begun
    (what was asked for was refused)."""
    reason: str
    """Why it failed or was stopped."""
    step: int
    """Updates done; of a sweep, trials that have come to an end."""
    steps: int | None
    """Of all; None where that is not known."""
    left_s: float | None
    """Seconds to go, at the pace since the last start."""
    tokens_per_s: float | None
    loss: float | None
    """The last held-out one; of a sweep, the best."""
    restarts: int
    undone: int
    """Updates that were undone and their batches skipped."""
    workers: int
    gpu_hours: float
    """Hours of its workers, which have one GPU each at most."""
    money: float | None
    """None where `cluster.gpu_hour_price` is not stated."""
    told: float | None
    """When the last line was written, in seconds since 1970."""
    trials: tuple["Standing", ...] = ()


@dataclass
class Followed:
    """A folder with a journal, of which every line is read once."""

    folder: Path
    course: Course = field(default_factory=Course)
    offset: int = 0

    def look(self, *, at_work: bool, now: float) -> Standing:
        """How far it is; `at_work` says whether the command that trains it is."""
        course, damage = self.course, ""
        try:
            entries, self.offset = read(self.folder, self.offset)
        except ValueError as error:
            entries, damage = [], str(error)
        for entry in entries:
            course.add(entry)
        end = {"state": "damaged", "reason": damage} if damage else course.end
        state = end["state"] if end else self._state(at_work=at_work, now=now)
        to_go = None if course.steps is None else course.steps - course.step
        running = state in ("running", "silent")
        hours, price = course.worker_seconds / 3600, self._price()
        return Standing(
            name=self.folder.name,
            folder=str(self.folder),
            state=state,
            reason=end.get("reason", ""),
            step=course.step,
            steps=course.steps,
            left_s=course.pace * to_go if running and course.pace and to_go is not None else None,
            tokens_per_s=course.latest.get("throughput/tokens_per_s") if running else None,
            loss=course.latest.get("eval/loss"),
            restarts=course.restarts,
            undone=course.undone,
            workers=course.workers,
            gpu_hours=hours,
            money=None if price is None else hours * price,
            told=course.told,
        )

    def _state(self, *, at_work: bool, now: float) -> str:
        told = self.course.told
        if busy(self.folder / NAME):
            usual = 10 * (self.course.pace or 0.0)
            return "silent" if told and now - told > max(QUIET_SECONDS, usual) else "running"
        if not at_work:
            return "not begun" if told is None else "killed"
        return "starting" if told is None else "restarting"

    def _price(self) -> float | None:
        path = self.folder / "experiment.json"
        stored = read_json(path).get("experiment", {}) if path.is_file() else {}
        return stored.get("cluster", {}).get("gpu_hour_price")


class Watch:
    """Runs and sweeps below a folder, or of one experiment, looked at as often as wanted."""

    def __init__(self, source: Experiment | Path) -> None:
        """`source` is an experiment, a run's folder, or a folder of such.

        Raises:
            FileNotFoundError: if there is no such folder.
        """
        self._source = source.run_folder if isinstance(source, Experiment) else source
        self._followed: dict[Path, Followed] = {}
        if isinstance(source, Path) and not source.is_dir():
            raise FileNotFoundError(f"{source}: no such folder of runs")

    def look(self) -> list[Standing]:
        """All of them now, by name, each sweep with its trials."""
        now, found = time.time(), []
        for folder in self._folders():
            if (folder / NAME).is_file() or (folder / "experiment.json").is_file():
                driver = folder.parent if _is_trial(folder) else folder
                found.append(self._of(folder).look(at_work=busy(driver / LOCK), now=now))
            if (folder / "trials" / NAME).is_file():
                found.append(self._sweep(folder, now))
        return found

    def owners(self) -> list[Path]:
        """The run folders of experiments, also of those of which only a trial was asked for."""
        return [run.parent.parent if _is_trial(run) else run for run in self._folders()]

    def _folders(self) -> Iterator[Path]:
        folders = [self._source.absolute()]
        if not _has_run(folders[0]):
            folders = sorted(folders[0].glob("*"))
        yield from filter(_has_run, folders)

    def _sweep(self, folder: Path, now: float) -> Standing:
        root = folder / "trials"
        at_work = busy(root / LOCK)
        paths = sorted(root.glob("*/values.json"))
        trials = [self._of(path.parent).look(at_work=at_work, now=now) for path in paths]
        sweep = self._of(root).look(at_work=at_work, now=now)
        ended = [self._of(Path(one.folder)).course.seconds for one in trials if one.state in ENDED]
        at_once = sum(trial.state in UNDER_WAY for trial in trials)
        left = None
        if at_work and ended and at_once and sweep.steps:
            left = fmean(ended) * (sweep.steps - len(ended)) / at_once
        return replace(
            sweep,
            name=f"{folder.name} sweep",
            state="running" if at_work else sweep.state,
            step=len(ended),
            left_s=left,
            tokens_per_s=sum(trial.tokens_per_s or 0.0 for trial in trials) or None,
            loss=self._of(root).course.latest.get("best/eval/loss"),
            restarts=sum(trial.restarts for trial in trials),
            undone=sum(trial.undone for trial in trials),
            workers=sum(trial.workers for trial in trials if trial.state in UNDER_WAY),
            gpu_hours=sum(trial.gpu_hours for trial in trials),
            money=None if sweep.money is None else sum(trial.money or 0.0 for trial in trials),
            told=max((one.told for one in (sweep, *trials) if one.told), default=None),
            trials=tuple(sorted(trials, key=_order)),
        )

    def _of(self, folder: Path) -> Followed:
        return self._followed.setdefault(folder, Followed(folder))


def _order(trial: Standing) -> tuple[bool, float, str]:
    """Those under way first, then the best."""
    return trial.state not in UNDER_WAY, inf if trial.loss is None else trial.loss, trial.name


def _is_trial(folder: Path) -> bool:
    return (folder / "values.json").is_file()


def _has_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (NAME, "experiment.json", f"trials/{NAME}"))
