"""What the lines of a journal come to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestration.config import validated
from orchestration.records.course import Course
from orchestration.records.journal import Journal, seconds
from orchestration.records.reckoning import came_to


def start(time: float, step: int = 0, workers: int = 2) -> dict:
    return {"kind": "start", "time": time, "step": step, "steps": 10, "workers": workers}


def metrics(time: float, step: int, **values: float) -> dict:
    return {"kind": "metrics", "time": time, "step": step, "metrics": values}


def course(*entries: dict) -> Course:
    made = Course()
    for entry in entries:
        made.add(entry)
    return made


def test_an_update_that_is_undone_is_no_restart():
    undone = {"kind": "undone", "time": 2.0, "fault": "update 3: its loss is nan"}
    run = course(start(0), metrics(1, 3), undone, start(2.5, 1), metrics(3, 2), start(9, 2))
    assert (run.undone, run.restarts, run.step) == (1, 1, 2)


def test_hours_are_those_of_the_workers_that_each_start_had():
    run = course(start(0), metrics(10, 1), start(100, 1, workers=1), metrics(105, 2))
    assert (run.seconds, run.worker_seconds) == (15, 10 * 2 + 5)


def test_the_pace_is_that_since_the_last_start():
    assert course(start(0), metrics(50, 5)).pace == 10
    assert course(start(0), metrics(50, 5), start(60, 5)).pace is None
    assert course(start(0), metrics(50, 5), start(60, 5), metrics(62, 6)).pace == 2


def test_a_run_that_has_started_again_has_not_ended():
    end = {"kind": "end", "time": 2.0, "state": "failed", "reason": "lost"}
    assert course(start(0), end).end == end
    assert course(start(0), end, start(3)).end == {}
    assert course().end == {}


def test_a_command_that_only_failed_counts_since_it_was_at_work():
    """Killed at 10; typed again at 1000, it fails before any update."""
    end = {"kind": "end", "time": 1003.0, "state": "failed", "reason": "lost", "since": 1000.0}
    entries = [start(0), metrics(10, 1), end]
    assert course(*entries).seconds == seconds(entries) == 13


@given(st.lists(st.sampled_from(["start", "metrics", "undone", "end"]), max_size=12))
def test_work_is_counted_as_the_journal_counts_it(kinds):
    blank = {"step": 1, "workers": 2, "metrics": {}}
    entries = [start(0)]
    entries += [{"kind": kind, "time": i**2, **blank} for i, kind in enumerate(kinds, start=1)]
    assert course(*entries).seconds == pytest.approx(seconds(entries))


def test_gpu_hours_that_mlflow_is_told_are_those_of_the_workers_that_each_start_had(
    settings, tmp_path, monkeypatch
):
    settings |= {"storage": {"path": str(tmp_path)}}
    settings["cluster"] = {"workers": 4, "gpus_per_worker": 1, "gpu_hour_price": 2.0}
    experiment, now = validated(settings), [1000.0]
    monkeypatch.setattr("time.time", lambda: now[0])
    with Journal(experiment.run_folder) as journal:
        for workers in (1, 4):
            journal.start(identity="i", params={}, step=0, steps=9, workers=workers)
            now[0] += 3600
            journal.metrics(1, {})
    came = came_to(experiment, experiment.run_folder, memory_before=0.0)
    assert (came["actual/hours"], came["actual/gpu_hours"], came["actual/money"]) == (2, 5, 10)
