"""An object store under the storage: what machines are lost with is less than an update, whatever fails."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import psutil
import pytest

from orchestration.compose import load
from orchestration.config import Experiment
from orchestration.records import journal
from orchestration.storing.mirroring import mirror_of
from orchestration.training import faults
from tests.orchestration.buckets import ANYONE, Store
from tests.orchestration.conftest import digits, run_folder
from tests.orchestration.machines import Machines, wait_until

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def bucket() -> Iterator[Store]:
    """A store of whose requests a tenth fails."""
    store = Store(failing=0.1)
    yield store
    store.end()


def lose(process: Popen[str]) -> None:
    """A machine is gone at once, with all that was started on it."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family[1:], timeout=30)
    process.wait()


def succeed(process: Popen[str]) -> tuple[Any, str]:
    """The document that a command prints, and what it says on the way."""
    out, said = process.communicate(timeout=280)
    assert process.returncode == 0, said
    return json.loads(out), said


def losses(run: Path) -> list[tuple[int, float]]:
    return journal.curve(run, "train/loss")


@pytest.mark.slow
def test_a_training_whose_machine_is_lost_ends_on_another_one_with_the_same_bits(
    trained_run, bucket, dsvl, tmp_path, monkeypatch
):
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)

    def at(name: str) -> tuple[Experiment, Callable[[str], Popen[str]]]:
        """The experiment on a machine that has the raw data alone, and its commands."""
        place = [f"storage.path={tmp_path / name}", f"storage.remote={bucket.uri('walk')}"]
        return load(trained_run, place), lambda verb: dsvl(
            verb, trained_run, *place, "--json", stdout=PIPE, stderr=PIPE
        )

    first, on_first = at("first")
    hangs = [{"action": "hang", "rank": 0, "step": 20}]  # so that it does not end before it is lost
    monkeypatch.setenv(faults.VARIABLE, json.dumps(hangs))
    training = on_first("train")
    monkeypatch.delenv(faults.VARIABLE)
    mirror = mirror_of(first)
    assert mirror is not None
    wait_until(
        lambda: training.poll() is not None or max(mirror.whole(first.run_folder), default=0) > 5
    )
    assert training.poll() is None, training.communicate()
    lose(training)
    saved = max(mirror.whole(first.run_folder))
    shutil.rmtree(first.storage.path)

    second, on_second = at("second")
    result, said = succeed(on_second("train"))
    assert result["state"] == "finished"
    assert "fetching" in said
    unbroken, run = run_folder(trained_run), second.run_folder
    starts = [entry["step"] for entry in journal.read(run)[0] if entry["kind"] == "start"]
    assert starts == [0, saved]
    assert losses(run) == losses(unbroken)
    for name in ("step-000045", "step-000048"):
        kept = [folder / "checkpoints" / name for folder in (run, unbroken)]
        ours, theirs = ({p.name: p.read_bytes() for p in one.iterdir()} for one in kept)
        assert ours == theirs

    shutil.rmtree(second.storage.path)
    _, on_third = at("third")
    report, _ = succeed(on_third("report"))
    assert report["training"] == "finished"
    assert report["metrics"]["eval/loss"] == result["metrics"]["eval/loss"]
    assert Path(report["report"]).is_file()
    assert mirror.whole(first.run_folder) == {45, 48}
    assert bucket.way.counts["503"] > 0 < bucket.way.counts["closed"]
    keys = mirror.remote.files("unbroken")
    assert {"unbroken/result.json", "unbroken/report.html", "unbroken/chats.json"} <= keys.keys()
    secret = bucket.environment["AWS_SECRET_ACCESS_KEY"].encode()
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if secret in path.read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_that_have_a_store_in_common_alone_train_from_their_own_disks(
    trained_run, bucket, dsvl, tmp_path, monkeypatch
):
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder, uri = tmp_path / "runs", f"storage.remote={bucket.uri('apart')}"
    disks = [tmp_path / f"disk-{number}" for number in range(3)]
    for made in (folder, *disks):
        made.mkdir()
    whole, run = run_folder(trained_run), load(trained_run, [f"storage.path={folder}"]).run_folder
    succeed(dsvl("prepare", trained_run, uri, "--json", stdout=PIPE, stderr=PIPE))
    slow = [{"action": "slow", "rank": 0, "step": step} for step in (11, 16, 21)]
    monkeypatch.setenv(
        faults.VARIABLE, json.dumps(slow)
    )  # so that it does not end before one is lost
    own = Machines(cpus=0, dashboard=True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", own.token)
    try:
        first, _ = (own.add(cpus=1, disk=(disk, folder)) for disk in disks[:2])
        own.wait_for_dashboard()
        options = [f"storage.path={folder}", uri, "--address", own.dashboard, "--wait", "--json"]
        training = dsvl("submit", "train", trained_run, *options, stdout=PIPE, stderr=PIPE)
        mirror = mirror_of(load(trained_run, [f"storage.path={folder}", uri]))
        assert mirror is not None
        wait_until(lambda: training.poll() is not None or max(mirror.whole(run), default=0) > 5)
        own.kill(first)
        own.add(cpus=1, disk=(disks[2], folder))
        succeed(training)
        succeed(dsvl("submit", "report", trained_run, *options, stdout=PIPE, stderr=PIPE))
    finally:
        own.end()
    first_start, second_start = (e["step"] for e in journal.read(run)[0] if e["kind"] == "start")
    assert first_start == 0 < second_start
    assert losses(run) == losses(whole)
    assert (run / "report.html").is_file()
    prepared = [sorted(path.name for path in disk.glob("prepared/*/encoded/*")) for disk in disks]
    assert prepared[0] == prepared[1] == prepared[2] != []
    for path in (whole / "checkpoints/step-000048").iterdir():
        assert mirror.remote.read(mirror.key(run / path.relative_to(whole))) == path.read_bytes()


@pytest.mark.slow
def test_a_sweep_is_known_on_another_machine_which_trains_no_trial_again(
    storage, bucket, dsvl, tmp_path, monkeypatch
):
    for name, value in bucket.environment.items():
        monkeypatch.setenv(name, value)
    space = {"optim.lr": {"kind": "grid", "values": [1e-2, 3e-3]}}
    short = {"batch": 8, "epochs": 1, "precision": "fp32"}
    path = digits(storage, "swept-elsewhere", search={"space": space}, train=short)
    found = []
    for machine in ("first", "second"):
        place = [f"storage.path={tmp_path / machine}", f"storage.remote={bucket.uri('sweep')}"]
        found.append(succeed(dsvl("sweep", path, *place, "--json", stdout=PIPE, stderr=PIPE))[0])
        starts = [
            entry
            for values in load(path, place).run_folder.glob("trials/*/values.json")
            for entry in journal.read(values.parent)[0]
            if entry["kind"] == "start"
        ]
        assert len(starts) == 2
    losses_of = [{t["trial"]: t["eval/loss"] for t in each["trials"]} for each in found]
    assert losses_of[0] == losses_of[1]
    assert len(losses_of[0]) == 2


@pytest.mark.parametrize("wrong", ["credentials", "bucket"])
def test_a_store_that_refuses_ends_a_command_before_any_work(
    storage, bucket, dsvl, tmp_path, wrong
):
    uri = bucket.uri("x") if wrong == "credentials" else bucket.uri("x", bucket="others")
    environment = os.environ | (ANYONE if wrong == "credentials" else bucket.environment)
    path = digits(storage, "refused")
    place = (f"storage.path={tmp_path / 'runs'}", f"storage.remote={uri}")
    process = dsvl("prepare", path, *place, stdout=PIPE, stderr=PIPE, env=environment)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.startswith("storage.remote: cannot write")
    assert "AWS_ACCESS_KEY_ID" in said
    assert not (tmp_path / "runs").exists()
