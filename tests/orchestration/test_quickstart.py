"""The main job, with a smaller search: from nothing to a report, and again without doing it twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

OVERRIDES = (
    "search.space.model.size.values=[small]",
    "search.space.optim.lr.values=[1e-2, 3e-2]",
    "search.space.train.epochs.values=[1]",
    "train.epochs=1",
)


def quickstart(folder, *options, cwd=None):
    """`dsvl quickstart` with its storage in a folder."""
    storage = (f"storage.path={folder}/runs", f"storage.data={folder}/raw")
    return subprocess.run(
        [sys.executable, "-m", "orchestration.cli", "quickstart", *OVERRIDES, *storage, *options],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )


def test_where_its_checkpoints_are_not_the_quickstart_says_so_before_any_work(tmp_path):
    done = quickstart(tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "dsvl/digits/checkpoints/small, " in done.stderr
    assert f"no such folder in {tmp_path}, where relative paths start" in done.stderr
    assert f"-> cd {Path(__file__).parents[2]}, or set each checkpoint" in done.stderr
    assert not (tmp_path / "raw").exists()
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_quickstart_ends_with_a_model_that_looks_and_typed_again_repeats_nothing(tmp_path):
    first = quickstart(tmp_path, "--json")
    assert first.returncode == 0, first.stderr
    found = json.loads(first.stdout)
    assert found["trials"] == 2
    best = found["best"]
    assert best["eval/accuracy"] > best["eval/accuracy_majority"] + 0.3
    assert abs(best["eval/accuracy_blind"] - best["eval/accuracy_majority"]) < 0.08
    page = (tmp_path / "runs/quickstart/report.html").read_text()
    assert best["trial"] in page
    for noise in ("Traceback", "Token authentication", "worker processes have been started"):
        assert noise not in first.stderr
    lines = [line for line in first.stderr.splitlines() if line.startswith("INFO [")]
    assert len(lines) == 12, "a line when a phase begins, a line when it is done"

    journals = {path: path.read_bytes() for path in tmp_path.rglob("trials/size=*/journal.jsonl")}
    again = quickstart(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "2 trials and a training on 1500 chats" in again.stdout
    assert {path: path.read_bytes() for path in journals} == journals
