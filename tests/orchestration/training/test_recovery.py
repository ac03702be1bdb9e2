"""Trainings go on where workers fail and nodes come and go, but not where all would go wrong again."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.train import FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2.api.exceptions import ControllerError

from dsvl.checkpoint_folder import held
from orchestration.config import validated
from orchestration.records.journal import curve, read
from orchestration.records.results import note_place
from orchestration.training import faults
from orchestration.training.recovery import Patience, first_cause, told
from tests.orchestration.conftest import digits, run_folder, steps_done
from tests.orchestration.machines import Machines, wait_until

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


LOST = RuntimeError("[gloo] Connection closed by peer")
GONE = WorkerHealthCheckFailedError("A worker health check failed.", ray.exceptions.RayActorError())
REFUSED = ValueError("model: has other frozen parts\nwith a second line")
DIVERGED = FloatingPointError("update 12 diverged")
FULL = OSError(errno.ENOSPC, "no room for a checkpoint")


def goes_on(patience: Patience, *errors: Exception) -> bool:
    """Whether a training starts anew after errors of ranks 0, 1, ..."""
    failed = WorkerGroupError("", dict(enumerate(errors)))
    return patience.make_decision(failed) == FailureDecision.RETRY


def checkpoint(folder: Path, step: int) -> None:
    (folder / f"checkpoints/step-{step:06d}").mkdir(parents=True)


def newest_of(folder: Path) -> Callable[[], int]:
    return lambda: max(held(folder / "checkpoints"), default=-1)


def test_failures_count_from_the_newest_checkpoint_on(tmp_path):
    checkpoint(tmp_path, 5)
    patience = Patience(FailureConfig(max_failures=2), newest_of(tmp_path))
    for step in (10, 999_999, 1_000_000):
        assert goes_on(patience, LOST)
        assert goes_on(patience, LOST, GONE)
        checkpoint(tmp_path, step)
    assert goes_on(patience, LOST)
    (tmp_path / "checkpoints/step-000005").rmdir()  # as older ones are: no progress
    assert goes_on(patience, OSError(errno.EIO, "a disk that is slow to answer"))
    assert not goes_on(patience, LOST)


@pytest.mark.parametrize("error", [REFUSED, DIVERGED, FULL], ids=lambda error: type(error).__name__)
def test_what_would_go_wrong_again_is_not_tried_again(tmp_path, error):
    patience = Patience(FailureConfig(max_failures=2), newest_of(tmp_path))
    checkpoint(tmp_path, 5)
    assert not goes_on(patience, error)
    assert not goes_on(patience, LOST, GONE, error)


def test_a_cluster_that_is_slow_to_start_workers_is_waited_for(tmp_path):
    patience = Patience(FailureConfig(max_failures=0), newest_of(tmp_path))
    for _ in range(3):
        late = ControllerError(WorkerGroupStartupFailedError("no node yet"))
        assert patience.make_decision(late) == FailureDecision.RETRY


def test_the_cause_of_a_failure_is_what_cannot_mend_else_who_is_gone_else_the_first():
    def cause(*errors: Exception) -> Exception:
        return first_cause(WorkerGroupError("", dict(enumerate(errors))))

    other = RuntimeError("another")
    assert cause(LOST, GONE, REFUSED) is REFUSED
    assert cause(LOST, GONE, other) is GONE
    assert cause(other, LOST) is other
    assert first_cause(ControllerError(LOST)) is LOST
    unknown = WorkerGroupError("a hang", {})
    assert first_cause(unknown) is unknown


def test_a_failure_is_told_with_its_rank_its_node_and_its_exception(tmp_path):
    log = tmp_path / "logs/rank-1.log"
    note_place(log, "node-3, process 11")
    note_place(log, "node-7, process 22")
    failed = WorkerGroupError("", {0: LOST, 1: DIVERGED})
    assert told(failed, tmp_path) == (
        "rank 1 on node-7, process 22: FloatingPointError: update 12 diverged"
    )
    assert told(ControllerError(LOST), tmp_path) == f"RuntimeError: {LOST}"


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nodes_that_come_and_go_leave_the_samples_as_they_are(storage, trained_run, monkeypatch):
    path = digits(storage, "elastic")
    folder = run_folder(path)
    slow = [{"action": "slow", "rank": 0, "step": step} for step in range(1, 30)]
    monkeypatch.setenv(faults.VARIABLE, json.dumps(slow))  # Ray looks for nodes once a minute
    machines = Machines(cpus=1)

    def starts() -> list[tuple[int, int]]:
        entries = (entry for entry in read(folder)[0] if entry["kind"] == "start")
        return [(entry["workers"], entry["step"]) for entry in entries]

    def wait_for(holds: Callable[[], bool]) -> None:
        wait_until(lambda: holds() or driver.poll() is not None, seconds=300)
        assert driver.poll() is None, driver.stderr.read().decode()

    try:
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
