"""An experiment's place in MLflow, and how the journal of a run gets there: in order, each point once.

Of a metric a later step is shipped, never an earlier one: the store itself says how far it has come. A batch
that is sent twice, as nobody knew whether it had arrived, changes nothing, as MLflow keeps one of two equal
points. Where a resume repeats steps that were shipped before, the first values stay; not shipped before, the
later ones count, as in the journal.
"""

import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException
from mlflow.tracking.context.registry import resolve_tags

from orchestration.config import Experiment
from orchestration.records import journal, load
from orchestration.records.record import read_if_there
from orchestration.records.registry import BATCH, Registry
from orchestration.space import SearchConfig

# MLflow's own seven retries take minutes; the shipper itself tries again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "0")

STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "failed": "FAILED"}
REASONS = {"stopped": "stopped_by", "failed": "failure"}
"""The tags that say why a run ended so."""
DERIVED = "model.language."
"""Of a trial these follow from `model.size`; MLflow's comparison would show them before what was searched."""
RECORD = "mlflow.json"
"""Beside a journal: the id of its MLflow run, so that every resume goes on in the same run."""
KEY = "dsvl.run"
"""The tag by which a run is found whose id was not written down."""


@dataclass
class Run:
    """A run folder and the MLflow run that it is shipped to."""

    folder: Path
    id: str
    status: str
    """That the store has."""
    reasons: dict[str, str]
    """Tags with the reason that it has."""
    params: set[str]
    shipped: dict[str, int]
    """The last step of each metric that the store has."""
    trial: bool
    registry: Registry
    offset: int = 0
    """Bytes of the journal that have been shipped."""
    last: dict = field(default_factory=dict)
    """The journal's latest start or end."""
    nodes: dict[Path, int] = field(default_factory=dict)
    """Bytes of the journals of its machines that have been shipped."""


@contextmanager
def turn(experiment: Experiment) -> Iterator[None]:
    """Be the only one of this storage's processes that uses its tracking store: SQLite has one writer."""
    if experiment.tracking.uri is not None:
        yield
        return
    folder = Path(experiment.storage.path)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".mlflow.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Store:
    """An experiment's place in MLflow."""

    def __init__(self, experiment: Experiment) -> None:
        """Open the store, and make the MLflow experiment if it is not there."""
        self.experiment = experiment
        mlflow.set_tracking_uri(
            experiment.tracking_uri
        )  # its registry asks for logged models there
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.client = MlflowClient(experiment.tracking_uri)
        name = experiment.tracking.experiment
        # Left to itself MLflow puts the artifacts of a database store under the working directory.
        here = (Path(experiment.storage.path) / "mlartifacts").absolute().as_uri()
        served = experiment.tracking_uri.startswith("http")
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                location = None if served else experiment.tracking.artifacts or here
                self.client.create_experiment(name, artifact_location=location)
            except MlflowException as error:
                if (
                    error.error_code != "RESOURCE_ALREADY_EXISTS"
                ):  # made by another process meanwhile
                    raise
            found = self.client.get_experiment_by_name(name)
            assert found is not None
        self.experiment_id = found.experiment_id

    def run(self, folder: Path, *, name: str, parent: str | None = None) -> Run:
        """The MLflow run of a folder whose journal has begun: the one it had before, or a new one."""
        began = journal.read(folder)[0][0]["time"]
        found = self._find(folder, key := f"{folder.name} {began}")
        if found is None:
            page = self.experiment.run_folder / "report.html"
            tags = {
                KEY: key,
                "mlflow.source.name": "dsvl",
                "mlflow.note.content": f"Files: `{folder}`. Report: `{page}`.",
            }
            if parent:
                tags["mlflow.parentRunId"] = parent
            if commit := read_if_there(folder / "environment.json").get("commit"):
                tags["mlflow.source.git.commit"] = commit
            found = self.client.create_run(
                self.experiment_id,
                start_time=int(1000 * began),
                tags=resolve_tags(tags),
                run_name=name,
            )
        if read_if_there(folder / RECORD).get("run_id") != found.info.run_id:
            where = {"run_id": found.info.run_id, "folder": str(folder.absolute())}
            journal.write_json(folder / RECORD, where)
        return Run(
            folder,
            found.info.run_id,
            status=found.info.status,
            reasons={k: v for k, v in found.data.tags.items() if k in REASONS.values()},
            params=set(found.data.params),
            shipped={point.key: point.step for point in found.data.to_proto().metrics},
            trial=parent is not None,
            registry=Registry(self.client, folder, found.info.run_id, project=self.experiment.name),
        )

    def _find(self, folder: Path, key: str) -> MlflowRun | None:
        """The run that is written down, or was made by a process that did not come to writing it down."""
        record = read_if_there(folder / RECORD)
        written = Path(record.get("folder", folder))
        copied = written.is_dir() and not written.samefile(folder)
        if record and not copied:
            try:
                return self.client.get_run(record["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise  # else it is another store than before
        found = self.client.search_runs(
            [self.experiment_id], f"tags.`{KEY}` = '{key}'", max_results=1
        )
        return found[0] if found else None

    def ship(self, run: Run, *, over: bool) -> None:
        """Bring the store up to date with a run's journal; if all is `over`, without an end it was killed."""
        entries, offset = journal.read(run.folder, run.offset)
        for entry in entries:
            if entry["kind"] in ("start", "end"):
                run.last = entry
            if entry["kind"] == "start":
                self._start(run, entry)
        self._metrics(run, entries)
        for entry in entries:
            if entry["kind"] == "checkpoint":
                run.registry.checkpoint(entry["step"], entry["metrics"])
        for path in sorted(run.folder.glob(f"{load.FOLDER}/*/{journal.NAME}")):
            lines, run.nodes[path] = journal.read(path.parent, run.nodes.get(path, 0))
            self._metrics(run, lines)
        run.registry.notes()
        self._state(run, over=over)
        run.offset = offset

    def _metrics(self, run: Run, entries: list[dict]) -> None:
        """Ship the points that are later than those that the store has, step by step."""
        metrics = [
            Metric(key, value, int(1000 * moment), step)
            for key, step, value, moment in journal.points(entries)
            if step > run.shipped.get(key, -1)
        ]
        metrics.sort(key=lambda metric: metric.step)
        for first in range(0, len(metrics), BATCH):
            batch = metrics[first : first + BATCH]
            self.client.log_batch(run.id, metrics=batch)
            run.shipped |= {metric.key: metric.step for metric in batch}

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

    def _state(self, run: Run, *, over: bool) -> None:
        """Set the run's state; the reason why it was stopped or failed is a tag as long as it holds."""
        going = run.last.get("kind") != "end"
        status = STATUS[run.last["state"]] if not going else "KILLED" if over else "RUNNING"
        reason = "" if going else run.last["reason"]
        reasons = {REASONS[run.last["state"]]: reason} if reason else {}
        if (status, reasons) == (run.status, run.reasons):
            return
        for tag in run.reasons.keys() - reasons.keys():
            self.client.delete_tag(run.id, tag)
        for tag, told in reasons.items():
            self.client.set_tag(run.id, tag, told)
        if going:
            self.client.update_run(run.id, status=status)
        else:
            self.client.set_terminated(run.id, status, end_time=int(1000 * run.last["time"]))
        run.status, run.reasons = status, reasons

    def _start(self, run: Run, entry: dict) -> None:
        """Say what is run; parameters that the store has can never be changed there."""
        run.registry.files()
        run.registry.data()
        params = [
            Param(name, str(value))
            for name, value in entry["params"].items()
            if name not in run.params and not (run.trial and name.startswith(DERIVED))
        ]
        tags = [RunTag("dsvl.identity", entry["identity"])]
        for first in range(0, max(len(params), 1), BATCH // 10):
            batch = params[first : first + BATCH // 10]
            self.client.log_batch(run.id, params=batch, tags=tags)
            run.params |= {param.key for param in batch}


def download(uri: str, run_id: str, folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Fetch files that a run of a store has under these names into a folder.

    Raises:
        ValueError: if the store has no such run.
    """
    client = MlflowClient(uri)
    try:
        there = {file.path for file in client.list_artifacts(run_id)}
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise ValueError(
            f"{run_id}: the tracking store {uri} has no such run; set tracking.uri to that which has"
        ) from None
    return {
        name: Path(client.download_artifacts(run_id, name, str(folder)))
        for name in names
        if name in there
    }
