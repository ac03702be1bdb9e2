"""MLflow behind the journals: one thread brings what they hold to the tracking store, in order.

Nothing that trains waits for it. What could not be shipped stays in the journal; the next command on the
same experiment ships the rest into the same MLflow run.
"""

import logging
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking.context.registry import resolve_tags

from orchestration import journal
from orchestration.config import Experiment
from orchestration.space import SearchConfig

log = logging.getLogger(__name__)

# MLflow's own seven retries would hold a finished command up for minutes; the shipper itself tries again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

PERIOD_SECONDS = 2.0
BATCH = 1000
"""Most metrics that MLflow takes at once; a tenth of it for parameters."""
STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
DERIVED = "model.language."
"""Of a trial these follow from `model.size`; MLflow's comparison would show them before what was searched."""
RECORD = "mlflow.json"
"""Beside a journal: the id of its MLflow run, so that every resume goes on in the same run."""


@dataclass
class Run:
    """A run folder and the MLflow run that it is shipped to."""

    folder: Path
    id: str
    offset: int = 0
    """Bytes of the journal that have been shipped."""
    shipped: dict[str, int] = field(default_factory=dict)
    """The last step of each metric that the store has."""
    trial: bool = False


class Store:
    """An experiment's place in MLflow."""

    def __init__(self, experiment: Experiment) -> None:
        """Open the store, and make the MLflow experiment if it is not there."""
        self.experiment = experiment
        self.client = MlflowClient(experiment.tracking_uri)
        name = experiment.tracking.experiment
        found = self.client.get_experiment_by_name(name)
        # Left to itself MLflow puts the artifacts of a database store under the working directory.
        artifacts = (Path(experiment.storage.path) / "mlartifacts").absolute().as_uri()
        local = experiment.tracking.uri is None
        self.experiment_id = (
            found.experiment_id
            if found
            else self.client.create_experiment(name, artifact_location=artifacts if local else None)
        )

    def run(self, folder: Path, *, name: str, parent: str | None = None) -> Run:
        """The MLflow run of a folder: the one it had before, or a new one."""
        record = folder / RECORD
        if record.exists():
            run_id = journal.read_json(record)["run_id"]
            keys = self.client.get_run(run_id).data.metrics
            history = {key: self.client.get_metric_history(run_id, key) for key in keys}
            steps = {key: max(point.step for point in points) for key, points in history.items()}
            return Run(folder, run_id, shipped=steps, trial=parent is not None)
        page = self.experiment.run_folder / "report.html"
        tags = {"mlflow.note.content": f"Files: `{folder}`. Report: `{page}`."}
        if parent:
            tags["mlflow.parentRunId"] = parent
        # The journal knows when it began; user, program and commit are found as by MLflow itself.
        began = next((milliseconds(entry) for entry in journal.read(folder)[0]), None)
        made = self.client.create_run(
            self.experiment_id, start_time=began, tags=resolve_tags(tags), run_name=name
        )
        run_id = made.info.run_id
        journal.write_json(record, {"run_id": run_id})
        self.attach(folder, folder / "experiment.json")
        return Run(folder, run_id, trial=parent is not None)

    def attach(self, folder: Path, path: Path) -> None:
        """Keep a file with the MLflow run of a folder."""
        run_id = journal.read_json(folder / RECORD)["run_id"]
        self.client.log_artifact(run_id, str(path))

    def ship(self, run: Run) -> None:
        """Bring the store up to date with a run's journal: each metric at most once a step."""
        entries, offset = journal.read(run.folder, run.offset)
        metrics = [
            Metric(key, value, int(1000 * moment), step)
            for key, step, value, moment in journal.points(entries)
            if step > run.shipped.get(key, -1)
        ]
        for entry in entries:
            if entry["kind"] == "start":
                self._start(run, entry)
        for first in range(0, len(metrics), BATCH):
            batch = metrics[first : first + BATCH]
            self.client.log_batch(run.id, metrics=batch)
            run.shipped |= {metric.key: metric.step for metric in batch}
        if entries and entries[-1]["kind"] == "end":
            self._end(run, entries[-1])
        run.offset = offset

    def mark_best(self, sweep: Run, search: SearchConfig) -> None:
        """Tag a sweep with the name of its best trial so far."""
        found = self.client.search_runs(
            [self.experiment_id],
            f"tags.mlflow.parentRunId = '{sweep.id}' and attributes.status = 'FINISHED'",
            order_by=[f"metrics.`{search.metric}` {'ASC' if search.mode == 'min' else 'DESC'}"],
            max_results=1,
        )
        for best in found:
            self.client.set_tag(sweep.id, "best_trial", best.info.run_name)

    def _end(self, run: Run, entry: dict) -> None:
        """Set the run's final state; the reason why it was stopped or failed becomes a tag."""
        state, reason = entry["state"], entry["reason"]
        if reason:
            self.client.set_tag(run.id, "stopped_by" if state == "stopped" else "failure", reason)
        self.client.set_terminated(run.id, STATUS[state], end_time=milliseconds(entry))

    def _start(self, run: Run, entry: dict) -> None:
        self.client.update_run(run.id, status="RUNNING")
        known = self.client.get_run(run.id).data.params
        params = [
            Param(name, str(value))
            for name, value in entry["params"].items()
            if name not in known and not (run.trial and name.startswith(DERIVED))
        ]
        tags = [RunTag("dsvl.identity", entry["identity"])]
        for first in range(0, max(len(params), 1), BATCH // 10):
            self.client.log_batch(run.id, params=params[first : first + BATCH // 10], tags=tags)


def milliseconds(entry: dict) -> int:
    """When a line of a journal was written, as MLflow counts time."""
    return int(1000 * entry["time"])


def attach(experiment: Experiment, folder: Path, path: Path) -> None:
    """Keep a file with the MLflow run of a folder; without the store, the file is there all the same."""
    try:
        Store(experiment).attach(folder, path)
    except Exception as error:  # as in Shipper
        log.warning("tracking store %s: %s; %s is not in it", experiment.tracking_uri, error, path)


def measured(
    experiment: Experiment, folder: Path, metrics: Mapping[str, float], *, step: int, path: Path
) -> None:
    """Keep what was measured of a trained model, and its file, with the MLflow run of its folder, if any."""
    if not (folder / RECORD).exists():
        return
    try:
        store, now = Store(experiment), int(1000 * time.time())
        run_id = journal.read_json(folder / RECORD)["run_id"]
        points = [Metric(name, value, now, step) for name, value in metrics.items()]
        for first in range(0, len(points), BATCH):
            store.client.log_batch(run_id, metrics=points[first : first + BATCH])
        store.attach(folder, path)
    except Exception as error:  # as in Shipper
        log.warning("tracking store %s: %s; %s is not in it", experiment.tracking_uri, error, path)


class Shipper:
    """Ships journals in the background while a `with` block runs, and what is left when it ends."""

    def __init__(self, experiment: Experiment) -> None:
        self._experiment = experiment
        self._store: Store | None = None
        self._single: list[tuple[Path, str]] = []
        self._sweeps: list[Path] = []
        self._runs: dict[Path, Run] = {}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)

    def __enter__(self) -> Self:
        """Start shipping."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ship the rest."""
        self._closing.set()
        self._thread.join()

    def follow(self, folder: Path, *, name: str) -> None:
        """Ship the journal of one run."""
        self._single.append((folder, name))

    def follow_sweep(self, folder: Path, *, name: str) -> None:
        """Ship the journals of all trials beneath a folder, as children of one run."""
        self._sweeps.append(folder)
        self._single.append((folder, name))

    def _work(self) -> None:
        closing = said = False
        while not closing:
            closing = self._closing.wait(PERIOD_SECONDS)
            try:
                self._ship()
                said = False
            except Exception as error:  # each kind of store has its own; none may end the shipping
                if not said:
                    log.warning(
                        "tracking store %s: %s; the journals keep what it misses",
                        self._experiment.tracking_uri,
                        error,
                    )
                said = True

    def _ship(self) -> None:
        self._store = self._store or Store(self._experiment)
        for folder, name in self._single:
            if folder not in self._runs:
                self._runs[folder] = self._store.run(folder, name=name)
        for sweep in self._sweeps:
            for path in sorted(sweep.glob(f"*/{journal.NAME}")):
                trial = path.parent
                if trial not in self._runs:
                    self._runs[trial] = self._store.run(
                        trial, name=trial.name, parent=self._runs[sweep].id
                    )
        search = self._experiment.search
        for folder in sorted(self._runs, key=self._sweeps.count):  # trials before their sweep
            run, before = self._runs[folder], self._runs[folder].offset
            self._store.ship(run)
            if search and folder in self._sweeps and run.offset > before:
                self._store.mark_best(run, search)
