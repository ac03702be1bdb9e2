"""Whatever becomes of the tracking store, the shipper or the command: nothing waits, and nothing is lost."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from orchestration import cli
from orchestration.config import Experiment, validated
from orchestration.records import shipping
from orchestration.records.journal import Journal
from orchestration.records.results import begin, trials_folder
from orchestration.records.shipping import catch_up, shipped
from tests.orchestration.conftest import SETTINGS, digits, run_folder, run_id, steps_done
from tests.orchestration.lives import SWEEP, command_of, disturb
from tests.orchestration.lives import start as start_life
from tests.orchestration.machines import wait_until
from tests.orchestration.outages import OUTAGES, TOKEN, Door, Server, differences
from tests.orchestration.postgres import PASSWORD, Postgres, programs

STEPS = 300
STEPS_TRAINED = 24
"""Of a training on digits, two epochs long."""


def made(storage: Path, name: str, **tracking: object) -> Experiment:
    settings = {"name": name, "storage": {"path": str(storage)}, "tracking": tracking}
    experiment = validated(SETTINGS | settings)
    begin(experiment, experiment.run_folder)
    return experiment


def start(experiment: Experiment) -> Journal:
    journal = Journal(experiment.run_folder)
    about = {"identity": experiment.identity(), "params": experiment.identity_fields()}
    journal.start(**about, step=0)
    return journal


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("server"))
    yield started
    started.end()


def test_no_outage_of_a_server_costs_a_point_or_doubles_one(server, tmp_path, monkeypatch, capfd):
    """All kinds at once, but for the full disk, which all doors lead to: that one is the last."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    *kinds, full = OUTAGES
    for group in (kinds, [full]):
        names = {kind: kind.replace(" ", "-") for kind in group}
        doors = {kind: Door(server, seconds=0.3) for kind in group}
        runs = {
            kind: made(tmp_path, names[kind], uri=doors[kind].uri, patience_s=5) for kind in group
        }
        _undergo(doors, runs)
        for kind, experiment in runs.items():
            told = catch_up(experiment)
            assert told == {"store": doors[kind].uri, "runs": 1, "at_work": []}, kind
            client, run = MlflowClient(doors[kind].uri), run_id(experiment.run_folder)
            found = differences(client, run, experiment.run_folder)
            points = {"points": 2 * STEPS, "lost": 0, "doubled": 0, "others": 0, "unknown": 0}
            assert found == points, kind
            assert client.get_run(run).info.status == "FINISHED"
            named = client.search_runs(["1"], f"attributes.run_name = '{experiment.name}'")
            assert len(named) == 1, kind
        for door in doors.values():
            door.close()
    assert TOKEN not in capfd.readouterr().err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.ray
@pytest.mark.slow
def test_a_training_ends_well_while_its_store_refuses_the_token_and_then_is_down(
    server, storage, cluster, monkeypatch, capfd
):
    """... to the end; `dsvl status --sync` brings all of it: points, models, page and figures."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    door = Door(server, seconds=0)
    door.manner = "401"
    tracking = {"uri": door.uri, "patience_s": 2}
    path = digits(storage, "away", tracking=tracking, train={"batch": 8, "epochs": 2})
    folder = run_folder(path)

    def go_down() -> None:
        while steps_done(folder) < STEPS_TRAINED // 2:
            time.sleep(0.1)
        door.close()

    breaking = threading.Thread(target=go_down, daemon=True)
    breaking.start()
    assert cli.main(["train", str(path)]) == 0
    breaking.join()
    assert steps_done(folder) == STEPS_TRAINED
    assert not (folder / "mlflow.json").exists()
    assert cli.main(["status", str(folder), "--sync"]) == 1, "the store is still away"
    said = capfd.readouterr().err
    assert "the journals keep what it misses" in said
    assert "until the command is typed again, or `dsvl status --sync`" in said
    assert TOKEN not in said
    door.open()
    assert cli.main(["status", str(folder), "--sync"]) == 0
    client, run = MlflowClient(door.uri), run_id(folder)
    found = differences(client, run, folder)
    assert found.pop("points") > 2 * STEPS_TRAINED
    assert set(found.values()) == {0}
    assert client.get_run(run).info.status == "FINISHED"
    assert client.get_run(run).outputs.model_outputs
    assert "report.html" in {file.path for file in client.list_artifacts(run)}
    door.close()


def _undergo(doors: dict[str, Door], runs: dict[str, Experiment]) -> None:
    """Write the journals of runs, each with a shipper, while their doors break down and come back."""
    begun, ended = set(), set()
    contexts = {kind: shipped(runs[kind], runs[kind].run_folder) for kind in runs}
    journals = {kind: start(runs[kind]) for kind in runs}
    for step in range(1, STEPS + 1):
        for kind, outage in ((kind, OUTAGES[kind]) for kind in runs):
            if kind not in begun and step > outage.begins * STEPS:
                while outage.begins and not (runs[kind].run_folder / "mlflow.json").exists():
                    time.sleep(0.05)  # it begins in mid-run, and not before
                outage.do(doors[kind])
                begun.add(kind)
            if kind not in ended and step > outage.ends * STEPS:
                outage.undo(doors[kind])
                ended.add(kind)
        if step == 1:
            for context in contexts.values():
                context.__enter__()
        for journal in journals.values():
            journal.metrics(step, {"train/loss": 1 / step, "train/lr": step / STEPS})
        time.sleep(0.04)
    for kind, journal in journals.items():
        journal.end("finished")
        began = time.monotonic()
        contexts[kind].__exit__(None, None, None)
        assert (
            time.monotonic() - began < runs[kind].tracking.patience_s + 3 * shipping.PERIOD_SECONDS
        )
        OUTAGES[kind].undo(doors[kind])


def shippers(folder: Path) -> list[psutil.Process]:
    """Those of a folder."""
    command = ["-m", "orchestration.records.shipping", str(folder)]
    return [p for p in psutil.Process().children() if command_of(p)[1:] == command]


def test_a_shipper_that_is_killed_is_replaced_and_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(shipping, "PERIOD_SECONDS", 0.1)
    experiment = made(tmp_path, "killed")
    folder, journal = experiment.run_folder, start(experiment)
    with shipped(experiment, folder):
        while not (folder / "mlflow.json").exists():
            time.sleep(0.05)
        journal.metrics(1, {"train/loss": 1.0})
        (first,) = shippers(folder)
        first.kill()
        journal.metrics(2, {"train/loss": 0.5})
        while first.pid in {p.pid for p in shippers(folder)} or not shippers(folder):
            time.sleep(0.05)
        journal.metrics(3, {"train/loss": 0.25})
        journal.end("finished")
    assert shippers(folder) == []
    client = MlflowClient(experiment.tracking_uri)
    assert set(differences(client, run_id(folder), folder).values()) == {0, 3}
    assert client.get_run(run_id(folder)).info.status == "FINISHED"


COMMAND = """
import sys, time
from pathlib import Path
from orchestration.config import validated
from orchestration.records.journal import Journal, read_json
from orchestration.records.shipping import shipped
folder = Path(sys.argv[1])
experiment = validated(read_json(folder / "experiment.json")["experiment"])
journal = Journal(folder)
journal.start(identity=experiment.identity(), params={}, step=0)
with shipped(experiment, folder):
    for step in range(1, 10**9):
        journal.metrics(step, {"train/loss": 1 / step})
        time.sleep(0.01)
"""


def test_what_a_killed_command_has_written_is_shipped_and_the_run_told_killed(tmp_path):
    experiment = made(tmp_path, "orphaned")
    folder = experiment.run_folder
    command = subprocess.Popen([sys.executable, "-c", COMMAND, str(folder)])
    while not (folder / "mlflow.json").exists():
        assert command.poll() is None
        time.sleep(0.05)
    assert catch_up(experiment)["runs"] in (0, 1)
    (shipper,) = [
        p for p in psutil.Process(command.pid).children() if "shipping" in str(command_of(p))
    ]
    command.kill()
    command.wait()
    psutil.wait_procs([shipper])
    client = MlflowClient(experiment.tracking_uri)
    found = differences(client, run_id(folder), folder)
    assert found.pop("points") > 1
    assert set(found.values()) == {0}
    assert client.get_run(run_id(folder)).info.status == "KILLED"


QUICK, ALL = range(2), [pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 20)]


@pytest.mark.parametrize("seed", [*QUICK, *ALL])
def test_whoever_is_killed_the_journal_is_whole_and_mlflow_complete(tmp_path_factory, seed):
    storage = tmp_path_factory.getbasetemp() / "kills"
    experiment = made(storage, f"seed-{seed}")
    folder = experiment.run_folder
    disturb(experiment, seed)
    lines = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") and json.loads(line) for line in lines)
    # The shipper of a driver that was killed may still be at work.
    wait_until(lambda: catch_up(experiment)["runs"] == 1)
    client = MlflowClient(experiment.tracking_uri)
    found = differences(client, run_id(folder), folder)
    assert found == {"points": 600, "lost": 0, "doubled": 0, "others": 0, "unknown": 0}
    assert client.get_run(run_id(folder)).info.status == "FINISHED"
    named = client.search_runs(["1"], f"attributes.run_name = '{experiment.name}'")
    assert len(named) == 1


@pytest.fixture
def postgres():
    if programs() is None:
        pytest.skip("needs PostgreSQL (Debian's package postgresql), which is not installed")
    started = Postgres()
    yield started
    started.end()


def sweep_together(storage: Path, *, commands: int, trials: int, steps: int, **tracking) -> None:
    """So many commands with so many trials each log at once; every point must arrive, without a word."""
    search = {
        "space": {"optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-1}},
        "samples": trials,
    }
    experiments = []
    for number in range(commands):
        settings = {"name": f"sweep-{number}", "storage": {"path": str(storage)}}
        settings |= {"search": search, "tracking": {"patience_s": 300} | tracking}
        experiments.append(validated(SETTINGS | settings))
        begin(experiments[-1], trials_folder(experiments[-1]))
    running = [
        start_life(SWEEP, trials_folder(one), trials, steps, stderr=subprocess.PIPE, text=True)
        for one in experiments
    ]
    for process in running:
        _, told = process.communicate()
        assert process.returncode == 0
        assert told == "", "a lock error is told, and nothing else is either"
    client = MlflowClient(experiments[0].tracking_uri)
    for experiment in experiments:
        root = trials_folder(experiment)
        parent = client.get_run(run_id(root))
        children = client.search_runs(
            [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
        )
        assert len(children) == trials
        for folder in root.glob("lr=*"):
            found = differences(client, run_id(folder), folder)
            points = {"points": 2 * steps, "lost": 0, "doubled": 0, "others": 0, "unknown": 0}
            assert found == points
            assert client.get_run(run_id(folder)).info.status == "FINISHED"


def test_trials_of_commands_that_log_at_once_to_one_sqlite_file_all_arrive(tmp_path):
    sweep_together(tmp_path, commands=3, trials=4, steps=20)


@pytest.mark.slow
def test_two_hundred_trials_logged_at_once_to_sqlite_all_arrive(tmp_path):
    sweep_together(tmp_path, commands=8, trials=25, steps=50)


@pytest.mark.slow
def test_two_hundred_trials_logged_at_once_to_postgresql_all_arrive(
    tmp_path, postgres, monkeypatch
):
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    first = made(tmp_path / "first", "first", uri=postgres.uri)
    start(first).end("finished")
    assert catch_up(first)["runs"] == 1  # the tables are made by one
    assert (tmp_path / "first/mlartifacts").is_dir(), "files are in the storage, wherever one works"
    sweep_together(tmp_path, commands=8, trials=25, steps=50, uri=postgres.uri)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or PASSWORD.encode() not in path.read_bytes(), path
