"""A training whose nodes are lost goes on with those that are left, and takes in those that come back."""

import json
from collections.abc import Callable

import numpy as np
import pytest

from orchestration import faults
from orchestration.config import validated
from orchestration.journal import curve, read
from tests.orchestration.conftest import digits, run_folder, steps_done
from tests.orchestration.machines import Machines, wait_until

pytestmark = pytest.mark.ray

TRAIN = """
import sys
from orchestration import commands
from orchestration.compose import load
commands.train(load(sys.argv[1], sys.argv[2:]))
"""


def test_only_workers_that_divide_the_batch_count(settings):
    settings |= {"train": {"epochs": 1, "batch": 48}, "engine": {"micro_batch": 4}}
    settings["cluster"] = {"workers": 6, "min_workers": 2}
    experiment = validated(settings)
    assert experiment.worker_counts(6) == [2, 3, 4, 6]
    fixed = experiment.with_overrides({"cluster.min_workers": None})
    assert fixed.worker_counts(6) == [6]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_that_come_and_go_leave_the_samples_as_they_are(storage, trained_run, monkeypatch):
    path = digits(storage, "elastic")
    folder = run_folder(path)
    slow = [{"action": "slow", "rank": 0, "step": step} for step in range(1, 30)]
    monkeypatch.setenv(faults.VARIABLE, json.dumps(slow))  # Ray looks for nodes once a minute
    machines = Machines(cpus=0)

    def starts() -> list[tuple[int, int]]:
        entries = (entry for entry in read(folder)[0] if entry["kind"] == "start")
        return [(entry["workers"], entry["step"]) for entry in entries]

    def wait_for(holds: Callable[[], bool]) -> None:
        wait_until(lambda: holds() or driver.poll() is not None, seconds=300)
        assert driver.poll() is None

    try:
        machines.add(cpus=1)
        driver = machines.run(
            TRAIN, path, f"cluster.address={machines.address}", "cluster.min_workers=1",
            "cluster.workers=2", "cluster.cpus_per_worker=1",
        )  # fmt: skip
        wait_for(lambda: steps_done(folder) >= 1)
        added = machines.add(cpus=1)
        wait_for(lambda: len(starts()) > 1 and steps_done(folder) > starts()[-1][1])
        machines.kill(added)
        _, said = driver.communicate(timeout=400)
        assert driver.returncode == 0, said.decode()
    finally:
        machines.end()
    counts, steps = zip(*starts(), strict=True)
    assert counts == (1, 2, 1)
    assert steps[0] == 0 < steps[1] <= steps[2]
    expected = curve(run_folder(trained_run), "train/loss")
    np.testing.assert_allclose(curve(folder, "train/loss"), expected, rtol=1e-3)
