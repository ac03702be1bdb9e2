"""A journal reaches MLflow whole and once, whatever happens to either of them on the way."""

import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestration import tracking
from orchestration.config import Experiment, validated
from orchestration.records import shipping
from orchestration.records.journal import NOTES, Journal
from orchestration.records.results import begin
from orchestration.records.shipping import Follower, catch_up, shipped
from tests.orchestration.conftest import SETTINGS, histories, run_id


@pytest.fixture(scope="module")
def storage(tmp_path_factory) -> Path:
    """One storage folder: MLflow takes seconds to make the tables of a store."""
    return tmp_path_factory.mktemp("storage")


@pytest.fixture
def experiment(storage, request) -> Experiment:
    """An experiment with a run folder of its own."""
    name = request.node.name.partition("[")[0][-90:].strip("_")
    made = validated(SETTINGS | {"name": name, "storage": {"path": str(storage)}})
    begin(made, made.run_folder)
    return made


@pytest.fixture
def client(experiment) -> MlflowClient:
    return MlflowClient(experiment.tracking_uri)


def ship(experiment: Experiment, folder: Path | None = None, *, over: bool = False) -> None:
    """What a shipper does that begins now."""
    Follower(experiment, folder or experiment.run_folder).ship(over=over)


def write(journal: Journal, steps: Iterator[int] | range, offset: float = 0.0) -> None:
    for step in steps:
        metrics = {"train/loss": 100.0 - step + offset, "train/lr": 0.1 * step}
        journal.metrics(step, metrics | ({"eval/loss": 2.0 * step} if step % 4 == 0 else {}))


def expected(steps: range) -> dict[str, list[tuple[int, float]]]:
    return {
        "train/loss": [(step, 100.0 - step) for step in steps],
        "train/lr": [(step, 0.1 * step) for step in steps],
        "eval/loss": [(step, 2.0 * step) for step in steps if step % 4 == 0],
    }


def start(journal: Journal, experiment: Experiment, step: int = 0) -> None:
    journal.start(identity=experiment.identity(), params=experiment.identity_fields(), step=step)


def test_a_journal_reaches_mlflow_with_every_metric_and_step_once(experiment, client):
    journal = Journal(experiment.run_folder)
    start(journal, experiment)
    write(journal, range(1, 1500))  # more than MLflow takes at once
    journal.end("finished")
    ship(experiment)
    found = run_id(experiment.run_folder)
    assert histories(client, found) == expected(range(1, 1500))
    run = client.get_run(found)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == experiment.name
    assert run.data.params == {k: str(v) for k, v in experiment.identity_fields().items()}
    assert run.data.tags["dsvl.identity"] == experiment.identity()
    files = [file.path for file in client.list_artifacts(found)]
    assert files == ["environment.json", "experiment.json"]
    assert client.get_experiment(run.info.experiment_id).name == "dsvl"


def test_a_journal_is_shipped_while_it_grows(experiment, client):
    folder = experiment.run_folder
    journal = Journal(folder)
    start(journal, experiment)
    follower = Follower(experiment, folder)
    for first in (1, 4, 5, 11):
        write(journal, range(first, first + 10))
        follower.ship(over=False)
        follower.ship(over=False)  # nothing new
        assert histories(client, run_id(folder)) == expected(range(1, first + 10))
    assert client.get_run(run_id(folder)).info.status == "RUNNING"


def test_a_new_command_goes_on_in_the_same_mlflow_run(experiment, client):
    folder = experiment.run_folder
    journal = Journal(folder)
    start(journal, experiment)
    write(journal, range(1, 10))
    ship(experiment)
    before = run_id(folder)
    write(journal, range(10, 20))
    journal.end("finished")
    ship(experiment)
    ship(experiment)
    assert run_id(folder) == before
    assert histories(client, before) == expected(range(1, 20))
    names = client.search_runs(["1"], f"attributes.run_name = '{experiment.name}'")
    assert len(names) == 1


def test_another_store_gets_all_of_a_run_that_an_earlier_one_had(experiment, client, tmp_path):
    folder = experiment.run_folder
    journal = Journal(folder)
    start(journal, experiment)
    write(journal, range(1, 10))
    ship(experiment)
    there = f"sqlite:///{tmp_path}/mlflow.db"
    moved = experiment.with_overrides({"tracking.uri": there})
    write(journal, range(10, 20))
    journal.end("finished")
    for _ in range(2):
        ship(moved)
    assert histories(MlflowClient(there), run_id(folder)) == expected(range(1, 20))


def test_a_copied_run_gets_a_place_of_its_own(experiment, client, tmp_path):
    folder = experiment.run_folder
    with Journal(folder) as journal:
        start(journal, experiment)
        write(journal, range(1, 10))
        journal.end("finished")
    ship(experiment)
    copy = experiment.with_overrides({"name": "a-copy"})
    shutil.copytree(folder, copy.run_folder)
    with Journal(copy.run_folder) as journal:
        write(journal, range(10, 12))
        journal.end("failed", reason="lost")
    ship(copy)
    assert run_id(copy.run_folder) != run_id(folder)
    assert client.get_run(run_id(folder)).info.status == "FINISHED"
    assert histories(client, run_id(folder)) == expected(range(1, 10))
    assert histories(client, run_id(copy.run_folder)) == expected(range(1, 12))
    moved = experiment.with_overrides({"name": "moved"})
    folder.rename(moved.run_folder)
    before = run_id(moved.run_folder)
    ship(moved)
    assert run_id(moved.run_folder) == before


@pytest.mark.parametrize("shipped_before", [True, False])
def test_steps_that_a_resume_repeats_are_not_doubled(experiment, client, shipped_before, tmp_path):
    folder = tmp_path / "run"
    begin(experiment, folder)
    journal = Journal(folder)
    start(journal, experiment)
    write(journal, range(1, 9), offset=0.0 if shipped_before else 0.5)
    del journal  # killed
    if shipped_before:
        ship(experiment, folder)
    resumed = Journal(folder)
    start(resumed, experiment, step=5)
    write(resumed, range(1, 5) if not shipped_before else range(0))  # from the very beginning
    write(resumed, range(5, 13))
    resumed.end("finished")
    ship(experiment, folder)
    assert histories(client, run_id(folder)) == expected(range(1, 13))


def test_a_store_that_fails_between_two_batches_gets_the_rest_later(
    experiment, client, monkeypatch, caplog
):
    folder = experiment.run_folder
    journal = Journal(folder)
    start(journal, experiment)
    write(journal, range(1, 1500))
    journal.end("finished")
    log_batch, calls = MlflowClient.log_batch, []

    def failing(self, run, metrics=(), **rest):
        calls.append(len(metrics))
        if calls.count(tracking.BATCH) == 2:
            raise ConnectionError("gone for a moment")
        log_batch(self, run, metrics=metrics, **rest)

    monkeypatch.setattr(MlflowClient, "log_batch", failing)
    with pytest.raises(ConnectionError):
        ship(experiment)
    assert client.get_run(run_id(folder)).info.status == "RUNNING"
    monkeypatch.setattr(MlflowClient, "log_batch", log_batch)
    ship(experiment)
    assert histories(client, run_id(folder)) == expected(range(1, 1500))
    assert client.get_run(run_id(folder)).info.status == "FINISHED"


def test_a_store_that_cannot_be_reached_is_told_once_and_gets_everything_later(
    experiment, client, monkeypatch, caplog
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and never listening: every connection is refused
        uri = f"http://127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        _lost_and_found(experiment, client, {"tracking": {"uri": uri}}, caplog, monkeypatch)


def test_a_store_that_is_damaged_is_told_once_and_gets_everything_later(
    experiment, client, tmp_path, caplog, monkeypatch
):
    (tmp_path / "mlflow.db").write_text("this is no database" * 100)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    _lost_and_found(experiment, client, {"tracking": {"uri": uri}}, caplog, monkeypatch)


def _lost_and_found(experiment, client, broken, caplog, monkeypatch):
    folder = experiment.run_folder
    journal = Journal(folder)
    start(journal, experiment)
    monkeypatch.setattr(shipping, "PERIOD_SECONDS", 0.01)
    reading, writing = os.pipe()
    with os.fdopen(reading) as stdin, os.fdopen(writing, "w") as command:
        monkeypatch.setattr(sys, "stdin", stdin)
        follower = Follower(experiment.with_overrides(broken), folder)
        ends = threading.Thread(target=lambda: told.append(follower.follow()))
        told: list[bool] = []
        ends.start()
        write(journal, range(1, 10))
        while ends.is_alive() and not caplog.messages:  # until it has failed
            time.sleep(0.01)
        command.close()
        ends.join()
    assert told == [False]
    journal.end("finished")
    (message,) = [r.message for r in caplog.records if r.name == "orchestration.records.shipping"]
    assert "tracking store" in message
    assert "the journals keep what it misses" in message
    assert not (folder / "mlflow.json").exists()
    assert catch_up(experiment) == {
        "store": experiment.tracking_uri,
        "runs": 1,
        "at_work": [],
    }
    assert histories(client, run_id(folder)) == expected(range(1, 10))
    assert client.get_run(run_id(folder)).info.status == "FINISHED"


def test_trials_are_children_of_their_sweep_with_the_searched_values_as_parameters(
    experiment, search, client
):
    experiment = experiment.with_overrides({"search": search})
    root = experiment.run_folder / "trials"
    begin(experiment, root)
    sweep = Journal(root)
    sweep.start(identity=experiment.identity(), params={"optim.lr": "what is searched"}, step=0)
    rates = {"lr=0.002": 0.002, "lr=0.004": 0.004}
    with shipped(experiment, root):
        for name, lr in rates.items():
            trial = experiment.trial({"optim.lr": lr, "model.size": "large"})
            begin(trial, root / name)
            journal = Journal(root / name)
            start(journal, trial)
            write(journal, range(1, 5))
            journal.end("finished")
        sweep.metrics(2, {"best/eval/loss": 1.0})
        Journal(root / NOTES).file("values.json")  # whose journal is no trial's
        sweep.end("finished")
    parent = client.get_run(run_id(root))
    assert parent.info.run_name == f"{experiment.name} sweep"
    assert "mlflow.parentRunId" not in parent.data.tags
    assert parent.data.metrics == {"best/eval/loss": 1.0}
    children = client.search_runs(
        [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    )
    assert {child.info.run_name: child.data.params["optim.lr"] for child in children} == {
        name: str(lr) for name, lr in rates.items()
    }
    for child in children:
        assert child.data.params["model.size"] == "large"
        assert histories(client, child.info.run_id) == expected(range(1, 5))
        assert child.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("state", "reason", "status", "tags"),
    [
        ("finished", "", "FINISHED", {}),
        ("stopped", "scheduler", "FINISHED", {"stopped_by": "scheduler"}),
        ("failed", "ValueError: no such file", "FAILED", {"failure": "ValueError: no such file"}),
    ],
)
def test_how_a_run_ended_is_told_with_the_reason(
    experiment, client, tmp_path, state, reason, status, tags
):
    folder = tmp_path / "run"
    begin(experiment, folder)
    journal = Journal(folder)
    start(journal, experiment)
    journal.end(state, reason=reason)
    ship(experiment, folder)
    run = client.get_run(run_id(folder))
    assert run.info.status == status
    assert {k: v for k, v in run.data.tags.items() if k in ("stopped_by", "failure")} == tags


def test_a_failed_run_that_is_resumed_runs_again_and_then_is_finished(experiment, client):
    folder = experiment.run_folder
    first = Journal(folder)
    start(first, experiment)
    write(first, range(1, 4))
    first.end("failed", reason="RuntimeError: lost")
    ship(experiment)
    failed = client.get_run(run_id(folder))
    assert failed.info.status == "FAILED"
    assert failed.data.tags["failure"] == "RuntimeError: lost"
    second = Journal(folder)
    start(second, experiment, step=3)
    ship(experiment)
    going = client.get_run(run_id(folder))
    assert going.info.status == "RUNNING"
    assert "failure" not in going.data.tags
    write(second, range(4, 6))
    second.end("finished")
    ship(experiment)
    assert client.get_run(run_id(folder)).info.status == "FINISHED"
    assert histories(client, run_id(folder)) == expected(range(1, 6))
