"""Where runs stand: told truly while they run, when they are killed, and when they have ended."""

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestration.cli import main
from orchestration.config import Experiment, validated
from orchestration.records.journal import LOCK, NAME, Journal, busy, curve, sole, write_json
from orchestration.records.results import begin
from orchestration.records.standings import render
from orchestration.status import Standing, Watch
from tests.orchestration.conftest import SETTINGS, histories, run_folder

ROOT = Path(__file__).parents[2]
WRITER = """
import sys, time
from pathlib import Path
from orchestration.records.journal import Journal, sole
folder = Path(sys.argv[1])
with sole(folder):
    journal = Journal(folder)
    journal.start(identity="i", params={}, step=0, steps=100, workers=2)
    for step in range(1, 26):
        time.sleep(0.01)
        journal.metrics(step, {"throughput/tokens_per_s": 1000.0})
    print("ready", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    """Of a price that is known, in a storage of its own."""
    storage, cluster = {"path": str(tmp_path / "runs")}, {"workers": 2, "gpu_hour_price": 3.0}
    return validated(SETTINGS | {"storage": storage, "cluster": cluster})


@pytest.fixture
def writing() -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Start a process that trains, as far as the files of a run's folder show; it is killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WRITER, str(folder)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen(command, text=True, cwd=ROOT, **pipes))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def one(source: Experiment | Path) -> Standing:
    (standing,) = Watch(source).look()
    return standing


def test_a_run_is_running_until_its_process_is_killed(experiment, writing):
    folder = experiment.run_folder
    begin(experiment, folder)
    process, watch = writing(folder), Watch(experiment)
    (standing,) = watch.look()
    assert (standing.state, standing.step, standing.steps, standing.workers) == (
        "running",
        25,
        100,
        2,
    )
    assert standing.tokens_per_s == 1000
    assert standing.gpu_hours == pytest.approx(2 * (standing.told - started(folder)) / 3600)
    assert standing.money == pytest.approx(3 * standing.gpu_hours)
    assert standing.left_s == pytest.approx(75 * (standing.told - started(folder)) / 25)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (standing,) = watch.look()
    assert (standing.state, standing.step, standing.left_s) == ("killed", 25, None)


def started(folder: Path) -> float:
    return json.loads((folder / NAME).read_text().splitlines()[0])["time"]


def test_a_run_whose_workers_are_gone_while_its_driver_lives_is_restarting(experiment):
    folder = experiment.run_folder
    begin(experiment, folder)
    assert one(experiment).state == "not begun"
    assert "not begun" in render([one(experiment)], terminal=True)
    with sole(folder):
        assert one(experiment).state == "starting"
        journal = Journal(folder)
        journal.start(identity="i", params={}, step=0, steps=4, workers=2)
        assert one(experiment).state == "running"
        del journal  # and its lock
        assert one(experiment).state == "restarting"


def test_a_worker_that_writes_nothing_for_long_is_silent(experiment, monkeypatch):
    folder = experiment.run_folder
    with sole(folder):
        journal = Journal(folder)
        journal.start(identity="i", params={}, step=0, steps=4, workers=2)
        later = time.time() + 3600
        monkeypatch.setattr(time, "time", lambda: later)
        assert one(experiment).state == "silent"
        journal.metrics(1, {})  # an update of an hour, and the next may take as long
        assert one(experiment).state == "running"


def test_a_damaged_journal_is_told_and_keeps_no_other_run_from_view(experiment):
    """A line of zeros, as a power cut may leave it."""
    other = experiment.with_overrides({"name": "other"})
    for own in (experiment, other):
        begin(own, own.run_folder)
        with Journal(own.run_folder) as journal:
            journal.start(identity="i", params={}, step=0, steps=9)
            journal.metrics(3, {"eval/loss": 0.5})
    with (experiment.run_folder / NAME).open("ab") as file:
        file.write(bytes(20) + b"\n")
    found = {standing.name: standing for standing in Watch(Path(experiment.storage.path)).look()}
    assert found["other"].step == 3
    assert found[experiment.name].state == "damaged"
    assert f"{NAME}: line 3 is damaged" in found[experiment.name].reason


def test_who_watches_a_folder_without_runs_sees_an_empty_table():
    assert render([], terminal=False) == "run"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_names_are_told_whole_however_narrow_the_terminal(experiment, monkeypatch, width):
    name = "a" + "-long" * 7
    long = experiment.with_overrides({"name": name})
    with Journal(long.run_folder) as journal:
        journal.start(identity="i", params={}, step=0, steps=2300)
        journal.metrics(2300, {"eval/loss": 0.07, "throughput/tokens_per_s": 9.0})
        journal.end("finished")
    whole = one(long)
    monkeypatch.setenv("COLUMNS", str(width))
    text = re.sub(r"\x1b\[[0-9;]*m", "", render([whole], terminal=True))
    column = text.splitlines()[0].index("state")
    assert "".join(line[:column].strip() for line in text.splitlines()[1:]) == name
    assert "finished" in text
    assert "tokens/s" not in text


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_run_that_has_ended_is_told_with_its_reason(experiment, state):
    journal = Journal(experiment.run_folder)
    journal.start(identity="i", params={}, step=0, steps=4, workers=2)
    journal.metrics(4, {"eval/loss": 0.5})
    journal.end(state, "worker \x1b[31mdied")
    standing = one(experiment)
    assert (standing.state, standing.loss, standing.left_s) == (state, 0.5, None)
    text = render([standing], terminal=False)
    assert "4 of 4" in text
    assert "\x1b" not in text
    assert ("died" in text) == (state == "failed")


def test_a_sweep_is_told_with_its_trials(experiment):
    root = experiment.run_folder / "trials"
    with sole(root):
        Journal(root).start(identity="i", params={}, step=0, steps=5)
        Journal(root).metrics(1, {"best/eval/loss": 0.25})
        open_ones = []
        for name, state in (("a", "finished"), ("b", "failed"), ("c", None), ("d", None)):
            write_json_of(root / name)
            journal = Journal(root / name)
            journal.start(identity=name, params={}, step=0, steps=4, workers=1)
            journal.metrics(2, {"eval/loss": 0.5, "throughput/tokens_per_s": 10.0})
            journal.end(state, "lost") if state else open_ones.append(journal)
        sweep = one(experiment)
        states = {trial.name: trial.state for trial in sweep.trials}
        assert states == {"a": "finished", "b": "failed", "c": "running", "d": "running"}
        assert [trial.name for trial in sweep.trials][:2] == ["c", "d"]
        assert (sweep.state, sweep.step, sweep.steps, sweep.workers) == ("running", 2, 5, 2)
        assert (sweep.tokens_per_s, sweep.loss) == (20, 0.25)
        assert sweep.gpu_hours == pytest.approx(sum(trial.gpu_hours for trial in sweep.trials))
        assert sweep.left_s is not None
        assert one(root / "c").state == "running"
    del open_ones
    assert one(experiment).state == "killed"
    assert one(root / "c").state == "killed"


def write_json_of(folder: Path) -> None:
    folder.mkdir()
    write_json(folder / "values.json", {"optim.lr": 0.1})


def test_all_runs_below_a_folder_are_told_and_nothing_else(
    experiment, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["status"]) == 2  # as there are no runs
    (tmp_path / "runs/prepared").mkdir(parents=True)
    assert main(["status"]) == 0
    assert capsys.readouterr().out == "no runs yet\n"
    for name in ("one", "two"):
        run = experiment.with_overrides({"name": name})
        begin(run, run.run_folder)
        Journal(run.run_folder).end("finished")
    assert main(["status", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["name"], run["state"]) for run in runs] == [
        ("one", "finished"),
        ("two", "finished"),
    ]


def test_a_run_is_followed_line_by_line(experiment):
    journal, watch = Journal(experiment.run_folder), Watch(experiment)
    journal.start(identity="i", params={}, step=0, steps=9, workers=1)
    for step in range(1, 4):
        journal.metrics(step, {})
        assert [standing.step for standing in watch.look()] == [step]


def test_looking_keeps_no_command_from_its_work(tmp_path):
    with sole(tmp_path):
        pass
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            busy(tmp_path / LOCK)

    looking = [threading.Thread(target=look) for _ in range(2)]
    for thread in looking:
        thread.start()
    for _ in range(100):
        with sole(tmp_path):
            assert busy(tmp_path / LOCK)
    done.set()


def test_a_lock_is_seen_without_being_taken(tmp_path):
    assert not busy(tmp_path / LOCK)
    with (tmp_path / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert busy(tmp_path / LOCK)
        assert busy(tmp_path / LOCK)
    assert not busy(tmp_path / LOCK)


def test_watching_needs_a_terminal_and_ends_with_an_interrupt(experiment, capsys):
    Journal(experiment.run_folder).start(identity="i", params={}, step=3, steps=9)
    assert main(["status", str(experiment.run_folder), "--watch"]) == 2
    assert "needs a terminal" in capsys.readouterr().err
    ours, theirs = pty.openpty()
    command = ["-m", "orchestration.cli", "status", str(experiment.run_folder), "--watch"]
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=theirs, text=True
    )
    shown = b""
    while b"3 of 9" not in shown:
        shown += os.read(ours, 4096)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "3 of 9" in out
    assert "\x1b" not in out


def test_looking_loads_nothing_heavy(experiment):
    Journal(experiment.run_folder).start(identity="i", params={}, step=3, steps=9)
    code = (
        f"from orchestration.cli import main; assert main(['status', {experiment.storage.path!r}]) == 0; "
        "import sys; assert not {'torch', 'ray', 'mlflow', 'pyarrow', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_what_mlflow_has_missed_is_brought_to_it(experiment, capsys):
    begin(experiment, experiment.run_folder)
    journal = Journal(experiment.run_folder)
    journal.start(identity="i", params={"optim.lr": 0.1}, step=0, steps=2, workers=1)
    for step in (1, 2):
        journal.metrics(step, {"train/loss": 1.0 / step})
    journal.end("finished")
    assert main(["status", experiment.storage.path, "--sync", "--json"]) == 0
    (synced,) = json.loads(capsys.readouterr().out)["synced"]
    assert synced == {"store": experiment.tracking_uri, "runs": 1, "at_work": []}
    client = MlflowClient(experiment.tracking_uri)
    (run,) = client.search_runs([client.get_experiment_by_name("dsvl").experiment_id])
    assert histories(client, run.info.run_id)["train/loss"] == [(1, 1.0), (2, 0.5)]


@pytest.mark.ray
def test_a_real_training_is_told_as_it_was(trained_run):
    folder = run_folder(trained_run)
    standing = one(folder)
    assert (standing.state, standing.step, standing.steps) == ("finished", 48, 48)
    assert (standing.restarts, standing.undone, standing.workers) == (0, 0, 2)
    assert standing.loss == curve(folder, "eval/loss")[-1][1]
    assert standing.gpu_hours > 0
