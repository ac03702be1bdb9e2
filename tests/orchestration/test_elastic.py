"""A training whose nodes are lost goes on with those that are left, and takes in those that come back."""

import numpy as np
import pytest

from orchestration.config import validated
from orchestration.elastic import worker_counts
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
    assert worker_counts(experiment, 6) == [2, 3, 4, 6]
    fixed = experiment.with_overrides({"cluster.min_workers": None})
    assert worker_counts(fixed, 6) == [6]


@pytest.mark.timeout(600)
def test_a_lost_node_leaves_a_legal_number_of_workers_and_the_same_samples(storage, trained_run):
    path = digits(storage, "elastic")
    folder = run_folder(path)
    machines = Machines(cpus=0)
    try:
        machines.add(cpus=1)
        lost = machines.add(cpus=1)
        options = (f"cluster.address={machines.address}", "cluster.min_workers=1")
        driver = machines.run(
            TRAIN, path, *options, "cluster.workers=2", "cluster.cpus_per_worker=1"
        )
        wait_until(lambda: steps_done(folder) >= 12 or driver.poll() is not None, seconds=240)
        machines.kill(lost)
        _, said = driver.communicate(timeout=400)
        assert driver.returncode == 0, said.decode()
    finally:
        machines.end()
    starts = [entry["step"] for entry in read(folder)[0] if entry["kind"] == "start"]
    assert starts[0] == 0
    assert starts[-1] in range(10, 48, 5)
    expected = curve(run_folder(trained_run), "train/loss")
    np.testing.assert_allclose(curve(folder, "train/loss"), expected, rtol=1e-3)
