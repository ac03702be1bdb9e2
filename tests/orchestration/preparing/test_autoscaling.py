"""Actors and nodes come as there is work, and go when there is none."""

import json
from collections import Counter
from subprocess import PIPE
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from orchestration.compose import load
from orchestration.records import journal
from tests.orchestration.conftest import digits
from tests.orchestration.machines import (
    Autoscaled,
    finished,
    manifest,
    names,
    options,
    wait_until,
)

pytestmark = pytest.mark.ray

JOBS = 20
WAITING = """
import json, sys, time
from pathlib import Path
import ray
from orchestration.preparing.pool import each

class Waiting:
    def __init__(self, folder, last):
        self.folder, self.last = folder, last

    def __call__(self, job):
        (self.folder / f"begun-{job}").touch(exist_ok=False)
        while not (self.folder / ("end" if job == self.last else "go")).exists():
            time.sleep(0.05)
        (self.folder / f"done-{job}").touch()
        return job

address, folder, jobs = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
ray.init(address=address, log_to_driver=False)
settings = {"folder": folder, "last": jobs - 1}
print(json.dumps(sorted(each(range(jobs), Waiting, settings, most=4, labels={}))))
"""


def test_actors_are_more_while_jobs_wait_and_one_while_the_last_job_runs(machines, tmp_path):
    def actors() -> int:
        return machines.running("ray::MapWorker")

    driver = machines.run(WAITING, machines.address, tmp_path, JOBS)
    wait_until(lambda: actors() > 1)
    (tmp_path / "go").touch()
    wait_until(lambda: len(names(tmp_path, "done-*")) == JOBS - 1)
    wait_until(lambda: actors() == 1)
    (tmp_path / "end").touch()
    done, _ = finished(driver)
    assert done == list(range(JOBS))


@pytest.mark.slow
def test_nodes_come_from_none_as_records_wait_and_all_go_again(machines, sharded, tmp_path):
    fixed, _ = machines.prepare(sharded, *options(tmp_path / "fixed", 2))
    own = Autoscaled(pools={"cpu": 2})
    try:
        wait_until(lambda: own.running("raylet") == 1)
        assert own.nodes == 0
        driver = own.driver(sharded, *options(tmp_path / "scaled", 2))
        wait_until(lambda: own.nodes > 0)
        assert not names(tmp_path / "scaled/prepared/.work", "shard-*")
        scaled, _ = finished(driver)
        assert manifest(scaled) == manifest(fixed)
        wait_until(lambda: own.nodes == 0)
    finally:
        own.end()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_submitted_work_has_nodes_of_its_kind_come_from_none_and_go_again(
    dsvl, storage, tmp_path, monkeypatch
):
    search = {"space": {"optim.lr": {"kind": "grid", "values": [1e-2, 3e-3]}}, "workers": 2}
    path = digits(storage, "scaled", search=search)
    settings = [
        f"storage.path={tmp_path}", "cluster.autoscaled=true", "cluster.cpu_labels={pool: cpu}",
        "cluster.gpu_labels={pool: gpu}",
    ]  # fmt: skip
    own = Autoscaled(pools={"cpu": 2, "gpu": 2}, dashboard=True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", own.token)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        own.wait_for_dashboard()
        wait_until(lambda: own.nodes == 0)  # the head itself
        with pytest.raises(HTTPError) as refused:
            urlopen(f"{own.dashboard}/api/jobs/")
        assert refused.value.code == 401
        works = {"train": [], "prepare": ["data.max_tokens=200"], "sweep": ["train.epochs=1"]}
        for work, others in works.items():
            options = [*settings, *others, "--wait", "--json", "--address", own.dashboard]
            job = dsvl("submit", work, path, *options, stdout=PIPE, stderr=PIPE)
            out, said = job.communicate(timeout=280)
            assert job.returncode == 0, said
            assert json.loads(out)["state"] == "SUCCEEDED"
            wait_until(lambda: own.nodes == 0)
        nodes, actors, tasks = map(own.known, ("nodes", "actors", "tasks"))
    finally:
        own.end()
    pools = {node["node_id"]: node["labels"].get("pool", "head") for node in nodes}
    alive = [pools[node["node_id"]] for node in nodes if node["state"] == "ALIVE"]
    assert alive == ["head"]
    assert set(pools.values()) == {"cpu", "gpu", "head"}
    where = Counter(
        (kind, pools[actor["node_id"]])
        for actor in actors
        for kind in ("MapWorker", "RayTrainWorker")
        if actor["class_name"].startswith(kind)
    )
    assert where.keys() == {("MapWorker", "cpu"), ("RayTrainWorker", "gpu")}
    assert where["RayTrainWorker", "gpu"] == 2 + 2 * 2
    ran = {
        pools[task["node_id"]]
        for task in tasks
        if task["type"] == "NORMAL_TASK" and task["node_id"]
    }
    assert ran <= {"cpu"}
    gone = [node["end_time_ms"] / 1000 for node in nodes if pools[node["node_id"]] == "cpu"]
    updates = journal.read(load(path, settings).run_folder)[0]
    assert min(gone) < max(entry["time"] for entry in updates), "its data are of no use to a node"
