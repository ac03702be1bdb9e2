"""Work that is carried to a cluster as its jobs: sent once, followed, left alone, stopped, gone on with."""

import json
import signal
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from ray.job_submission import JobSubmissionClient

from orchestration import cli
from orchestration.clusters.ray_jobs import killed
from orchestration.records.journal import curve
from tests.orchestration.conftest import digits, run_folder, steps_done
from tests.orchestration.machines import Machines, wait_until

pytestmark = pytest.mark.ray


@pytest.fixture
def submit(cluster_of_jobs, dsvl, monkeypatch) -> Callable[..., subprocess.Popen[str]]:
    """Type `dsvl submit` with the token of that cluster."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster_of_jobs.token)

    def start(*arguments: object) -> subprocess.Popen[str]:
        address = ("--address", cluster_of_jobs.dashboard)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return dsvl("submit", *arguments, *address, "--json", **pipes)

    return start


def told(process: subprocess.Popen[str], *, status: int = 0) -> dict:
    """The document that a command prints; it ends with this exit status."""
    out, said = process.communicate(timeout=240)
    assert process.returncode == status, said
    return json.loads(out) | {"said": said}


def jobs(cluster: Machines, monkeypatch, stem: str) -> list[str]:
    """The names of the cluster's jobs that begin so."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", cluster.dashboard)
    headers = {"Authorization": f"Bearer {cluster.token}"}
    known = JobSubmissionClient(cluster.dashboard, headers=headers).list_jobs()
    return sorted(job.submission_id for job in known if (job.submission_id or "").startswith(stem))


def test_typed_twice_it_is_one_job_whose_end_and_words_both_are_told(
    cluster_of_jobs, submit, storage, monkeypatch
):
    path = digits(storage, "submitted")
    both = [submit("prepare", path, "--wait") for _ in range(2)]
    first, second = map(told, both)
    assert first["job"] == second["job"]
    assert first["state"] == second["state"] == "SUCCEEDED"
    assert jobs(cluster_of_jobs, monkeypatch, "prepare-submitted-") == [first["job"]]
    assert told(submit("prepare", path))["job"] == first["job"], "it has succeeded"
    log = (run_folder(path) / "logs" / first["job"] / "driver.log").read_text()
    assert log.splitlines()[-1] in first["said"]


def test_the_exit_status_of_a_refused_request_is_that_of_the_command(submit, storage):
    path = digits(storage, "too-large-for-it")
    options = ("train.batch=32", "cluster.workers=8")
    result = told(submit("train", path, *options, "--wait"), status=2)
    assert result["state"] == "FAILED"
    assert result["message"].startswith("8 workers of 0.75 CPU can never be placed: ")


def test_who_has_no_token_is_refused(cluster_of_jobs, submit, storage, monkeypatch, tmp_path):
    path = digits(storage, "unauthenticated")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert "asks for a token" in told(submit("prepare", path), status=2)["said"]
    monkeypatch.setenv("RAY_AUTH_TOKEN", "guessed" * 8)
    assert "does not take our token" in told(submit("prepare", path), status=2)["said"]
    assert not run_folder(path).exists()


def test_interrupted_it_goes_on_is_followed_again_stopped_and_gone_on_with(
    cluster_of_jobs, submit, storage, monkeypatch
):
    path = digits(storage, "left-alone")
    folder = run_folder(path)
    watched = submit("train", path, "--wait")
    wait_until(lambda: steps_done(folder) >= 1 or watched.poll() is not None)
    watched.send_signal(signal.SIGINT)
    assert "goes on" in told(watched, status=1)["said"]
    (job,) = jobs(cluster_of_jobs, monkeypatch, "train-left-alone-")
    assert told(submit("train", path)) | {"said": ""} == {
        "job": job, "state": "RUNNING", "message": "Job is currently running.",
        "exit_status": None, "ok": True, "said": "",
    }  # fmt: skip
    done = steps_done(folder)
    wait_until(lambda: steps_done(folder) >= done + 3)
    assert told(submit("train", path, "--stop"))["state"] == "STOPPED"
    finished = told(submit("train", path, "--wait"))
    assert finished["job"] == job.removesuffix("1") + "2"
    steps = [step for step, _ in curve(folder, "train/loss")]
    assert sorted(set(steps)) == list(range(1, 49))
    assert (folder / "logs" / job / "rank-0.log").parent.is_dir()


def test_a_driver_that_was_killed_is_told_from_one_that_failed():
    assert all(map(killed, (None, -9, 137)))
    assert not any(map(killed, (0, 1, 2)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["storage.path=runs"], "storage.path: 'runs' must be a whole path"),
        (["--address", "head:8265"], "must read http://HOST:PORT"),
        (["--address", "http://127.0.0.1:1"], "no Ray dashboard answers"),
        (["model.vision.checkpoint=../tower"], "'../tower' must lie below"),
        (["model.vision.checkpoint=a/b/tower"], "no folder a/b/tower in"),
        (["model.vision.checkpoint=heavy"], "of which 101 are heavy; Ray takes at most 100"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_is_sent(
    storage, tmp_path, monkeypatch, capsys, options, told
):
    path = digits(storage, "wrong")
    checkpoints = Path("dsvl").absolute()
    monkeypatch.chdir(tmp_path)
    Path("dsvl").symlink_to(checkpoints)
    Path("heavy").mkdir()
    with Path("heavy/model.safetensors").open("wb") as file:
        file.truncate(101 * 1024**2)
    assert cli.main(["submit", "train", str(path), *options]) == 2
    assert told in capsys.readouterr().err


def test_data_are_prepared_on_nodes_for_that_models_trained_on_others_and_the_head_does_neither(
    dsvl, storage, monkeypatch
):
    own = Machines(cpus=0, dashboard=True)
    try:
        for pool in ("cpu", "gpu"):
            own.add(cpus=2, labels=f"pool={pool}")
        own.wait_for_dashboard()
        monkeypatch.setenv("RAY_AUTH_TOKEN", own.token)
        path = digits(storage, "two-pools", train={"batch": 8, "epochs": 1, "precision": "fp32"})
        labels = ("cluster.cpu_labels={pool: cpu}", "cluster.gpu_labels={pool: gpu}")
        fresh = f"storage.path={storage / 'two-pools'}"
        told(dsvl("submit", "train", path, *labels, fresh, "--wait", "--json",
                  "--address", own.dashboard, stdout=subprocess.PIPE, stderr=subprocess.PIPE))  # fmt: skip
        pools = {node["node_id"]: node["labels"].get("pool", "head") for node in own.known("nodes")}
        where = Counter(
            (kind, pools[actor["node_id"]])
            for actor in own.known("actors")
            for kind in ("MapWorker", "RayTrainWorker")
            if actor["class_name"].startswith(kind)
        )
        tasks = {
            (task["name"], pools[task["node_id"]])
            for task in own.known("tasks")
            if task["type"] == "NORMAL_TASK" and task["node_id"]
        }
    finally:
        own.end()
    assert sorted(pools.values()) == ["cpu", "gpu", "head"]
    assert where.keys() == {("MapWorker", "cpu"), ("RayTrainWorker", "gpu")}
    assert where["RayTrainWorker", "gpu"] == 2
    assert {pool for _, pool in tasks} <= {"cpu"}, tasks
