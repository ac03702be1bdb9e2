"""Actors and nodes come as there is work, and go when there is none."""

import pytest

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
from orchestration.pool import each

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
    own = Autoscaled(most=2)
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
