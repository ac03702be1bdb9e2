"""A run folder read back: a training, the trials of a sweep, and the prepared data beneath them.

A file of its own because it changes with what workers and sweeps write down, and not with what a page says.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from orchestration.config import Experiment, StorageConfig, validated
from orchestration.plan import prepared_folder
from orchestration.records import journal
from orchestration.records.course import Course
from orchestration.records.results import EVIDENCE, experiment_of, refuse_another
from orchestration.searching.front import front
from orchestration.space import SCHEDULE, SEED

SIZE = "model.size"
EXAMPLES = 3
"""Records of each reason for which one may be quarantined."""


@dataclass(frozen=True)
class Run:
    """A training or a trial, as its folder tells of it."""

    name: str
    folder: Path
    values: dict[str, Any]
    """The searched fields of a trial."""
    fields: dict[str, Any]
    """What was trained."""
    state: str
    """finished, stopped, failed, unfinished (running or interrupted) or waiting."""
    reason: str
    curves: dict[str, list[tuple[int, float]]]
    course: Course

    @property
    def seconds(self) -> float:
        """Spent training, over all resumes."""
        return self.course.seconds

    @property
    def ended(self) -> float:
        """When its last line was written."""
        return inf if self.course.told is None else self.course.told

    @property
    def size(self) -> str:
        """Which of the model's sizes was trained."""
        return self.values.get(SIZE) or self.fields[SIZE]

    @property
    def epochs(self) -> int:
        """Epochs done, those of a trunk included."""
        return int(max((epoch for _, epoch in self.curve("train/epoch")), default=0))

    @property
    def losses(self) -> dict[int, float]:
        """Held-out loss by epochs done."""
        held_out = dict(self.curve("eval/loss"))
        ends = {step: int(epoch) for step, epoch in self.curve("train/epoch")}
        return {ends[step]: loss for step, loss in held_out.items() if step in ends}

    @property
    def counts(self) -> bool:
        """Whether it came to an end that tells something."""
        return self.state in ("finished", "stopped")

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) by step."""
        return self.curves.get(metric, [])

    def last(self, metric: str) -> float:
        """The latest value of a metric; nan where there is none."""
        return next((value for _, value in self.curve(metric)[-1:]), nan)


def read(folder: Path, *, name: str) -> Run:
    """What the files of a run's folder tell, whatever state it is in."""
    entries, _ = journal.read(folder)
    curves: dict[str, list[tuple[int, float]]] = {}
    for metric, step, value, _ in journal.points(entries):
        curves.setdefault(metric, []).append((step, value))
    course = Course()
    for entry in entries:
        course.add(entry)
    result = read_if_there(folder / "result.json")
    return Run(
        name=name,
        folder=folder,
        values=read_if_there(folder / "values.json"),
        fields=read_if_there(folder / "experiment.json").get("fields", {}),
        state=result.get("state")
        or course.end.get("state")
        or ("unfinished" if entries else "waiting"),
        reason=course.end.get("reason", ""),
        curves=curves,
        course=course,
    )


def stored(folder: Path) -> Experiment:
    """The experiment whose run folder this is, with its search if a sweep lies there, wherever it lies now.

    Raises:
        ValueError: if the folder is of no run.
    """
    trials = folder / "trials"
    if not (trials / "experiment.json").is_file():
        return experiment_of(folder)
    experiment = validated(read_if_there(trials / "experiment.json")["experiment"])
    here = StorageConfig(path=str(folder.absolute().parent), data=experiment.storage.data)
    return experiment.model_copy(update={"name": folder.absolute().name, "storage": here})


class Record:
    """The training of an experiment, the trials of its sweep with the best first, or both."""

    def __init__(self, experiment: Experiment) -> None:
        """Read the experiment's run folder.

        Raises:
            FileNotFoundError: if there is neither a training nor a trial in it.
            ValueError: if it holds the run of another experiment; the fields are named.
        """
        folder, search = experiment.run_folder, experiment.search
        for path in (folder / "experiment.json", folder / "trials/experiment.json"):
            if before := read_if_there(path):
                refuse_another(experiment, before, where=path)
        self.experiment = experiment
        self.is_trial = (folder / "values.json").is_file()
        self.whole = _of_its_own(experiment) if self.is_trial else experiment
        """The experiment, fit for a file: a trial as a run of its own beside its sweep."""
        self.metric = search.metric if search else "eval/loss"
        self.sign = -1 if search and search.mode == "max" else 1
        training = read(folder, name=experiment.name)
        self.training = None if training.state == "waiting" else training
        paths = (
            path
            for path in (folder / "trials").glob("*/values.json")
            if not search or search.proposes(read_if_there(path))
        )
        trials = (read(path.parent, name=path.parent.name) for path in paths)
        ordered = sorted(trials, key=self._order)
        first = list(dict.fromkeys(trial.fields.get(SCHEDULE) for trial in ordered))
        self.trials = sorted(ordered, key=lambda trial: first.index(trial.fields.get(SCHEDULE)))
        """The best first, those of another schedule than its own after all of its own."""
        if not (self.training or self.trials):
            raise FileNotFoundError(
                f"{folder} holds no training and no trial; train or sweep first"
            )
        self.ranked = [trial for trial in self.trials if self._comparable(trial)]
        """The trials that have a result."""
        signs = search.objectives if search else {self.metric: self.sign}
        ends = [[s * trial.last(name) for name, s in signs.items()] for trial in self.ranked]
        self.front = [self.ranked[at] for at in front(ends)]
        """Those of them that none beats in all that is searched for."""
        ended = [*self.ranked, *([training] if training.counts else [])]
        self.best = ended[0] if ended else None
        self.speaker = next((run for run in ended if (run.folder / "chats.json").exists()), None)
        """The best run that has chatted."""
        tried = {trial.size for trial in self.trials}
        self.sizes = [size for size in experiment.model.languages if size in tried]
        self.evidence = read_if_there(folder / EVIDENCE)
        """What a search across sizes has found, if there was one: see `evidence`."""
        self.prepared = self._prepared()

    def _prepared(self) -> Path | None:
        """The data that its runs were held to if they are there, or else any that it would take."""
        for run in [*([self.training] if self.training else []), *self.trials]:
            named = read_if_there(run.folder / "data.json").get("folder")
            if named and Path(named, "manifest.json").is_file():
                return Path(named)
        return prepared_folder(self.experiment)

    def best_of(self, size: str) -> Run | None:
        """The best trial of a size."""
        return next((run for run in self.ranked if run.size == size), None)

    @property
    def axes(self) -> tuple[str, ...]:
        """At most two searched fields that are numbers and no seeds, the most varied first."""
        distinct = {
            path: {trial.values.get(path) for trial in self.trials}
            for path in dict.fromkeys(path for trial in self.trials for path in trial.values)
        }
        numbers = [
            path
            for path, values in distinct.items()
            if path != SEED
            and len(values) > 1
            and all(type(value) in (int, float) for value in values)
        ]
        return tuple(sorted(numbers, key=lambda path: -len(distinct[path]))[:2])

    def numbers(self, path: str) -> list[float]:
        """The numbers that were tried for a field, and those that a grid asks to try."""
        search = self.experiment.search
        domain = search.space.get(path) if search else None
        asked = domain.values if domain and domain.kind == "grid" else ()
        return sorted({*(trial.values[path] for trial in self.trials), *asked})

    def _comparable(self, run: Run) -> bool:
        return run.counts and isfinite(run.last(self.metric))

    def _order(self, run: Run) -> tuple[bool, float, str]:
        value = self.sign * run.last(self.metric)
        return not self._comparable(run), value if isfinite(value) else inf, run.name


def _of_its_own(trial: Experiment) -> Experiment:
    folder = trial.run_folder.absolute()
    storage = trial.storage.model_copy(update={"path": str(folder.parents[2])})
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{folder.parents[1].name}-{folder.name}")[:100]
    return trial.model_copy(update={"name": name, "storage": storage})


@dataclass(frozen=True)
class Data:
    """What a folder of prepared data holds."""

    splits: Counter[str]
    """Samples to train and held out."""
    images: int
    sources: dict[str, dict[str, Any]]
    """What the manifest says of each set."""
    lost: dict[str, Counter[str]]
    """Why records of each set were quarantined."""
    examples: dict[tuple[str, str], list[dict[str, Any]]]
    """The first lines of the quarantine of each set and reason."""


def read_data(folder: Path) -> Data:
    """Count prepared data without reading the images."""
    sources = read_if_there(folder / "manifest.json")["sources"]
    lost = {name: Counter[str]() for name in sources}
    examples: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        lost[record["source"]][record["reason"]] += 1
        some = examples.setdefault((record["source"], record["reason"]), [])
        if len(some) < EXAMPLES:
            some.append(record)
    splits = pq.read_table(folder / "samples", columns=["split"])["split"]
    images = sum(file.metadata.num_rows for file in _image_files(folder))
    return Data(Counter(splits.to_pylist()), images, sources, lost, examples)


def read_shown(folder: Path, most: int) -> dict[str, list[str]]:
    """Keys of at most so many images of each set, from all over its samples."""
    table = pq.read_table(folder / "samples", columns=["source", "images"])
    by_set: dict[str, list[str]] = {}
    for source, images in zip(
        table["source"].to_pylist(), table["images"].to_pylist(), strict=True
    ):
        by_set.setdefault(source, []).extend(images)
    unlike = {source: list(dict.fromkeys(keys)) for source, keys in by_set.items()}
    return {
        source: keys[:: max(1, len(keys) // most)][:most] for source, keys in unlike.items() if keys
    }


def read_images(folder: Path, keys: set[str]) -> dict[str, dict[str, Any]]:
    """Prepared images by key, each with bytes, path, mime, width and height; row group by row group."""
    columns = ["key", "bytes", "path", "mime", "width", "height"]
    found = {}
    for file in _image_files(folder):
        for group in range(file.num_row_groups):
            if keys & set(file.read_row_group(group, columns=["key"])["key"].to_pylist()):
                rows = file.read_row_group(group, columns=columns).to_pylist()
                found |= {row["key"]: row for row in rows if row["key"] in keys}
    return found


def read_if_there(path: Path) -> Any:
    """What a JSON file holds, or an empty mapping where there is none."""
    return journal.read_json(path) if path.exists() else {}


def _image_files(folder: Path) -> Iterator[pq.ParquetFile]:
    yield from (pq.ParquetFile(path) for path in sorted((folder / "images").glob("*.parquet")))
