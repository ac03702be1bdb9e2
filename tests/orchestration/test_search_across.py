"""A search across sizes for real: killed at a random moment, it goes on and ends with its evidence."""

import json
import random
import signal
import time
from pathlib import Path
from subprocess import PIPE

import pytest

from orchestration.compose import load
from orchestration.records.journal import read
from orchestration.records.results import trials_folder
from orchestration.space import EPOCHS, SEED
from tests.orchestration.conftest import digits

SEARCH = {
    "across": "model.size",
    "space": {
        "model.size": {"kind": "grid", "values": ["small", "medium"]},
        "optim.lr": {"kind": "loguniform", "low": 1e-3, "high": 1e-1},
        EPOCHS: {"kind": "grid", "values": [1, 2]},
        "optim.schedule": {"kind": "grid", "values": ["wsd"]},
        "optim.warmup_steps": {"kind": "grid", "values": [3]},
    },
    "target_epochs": 20,
    "verify": 1,
    "confirm": 1,
    "concurrent": 2,
}


def starts(folder: Path) -> list[int]:
    return [entry["step"] for entry in read(folder)[0] if entry["kind"] == "start"]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_search_across_sizes_that_is_killed_trains_nothing_twice_and_recommends(storage, dsvl):
    path = digits(
        storage,
        "climbed",
        model={"size": "medium"},
        train={"batch": 8, "epochs": 1, "precision": "fp32"},
        cluster={"workers": 1, "cpus_per_worker": 0.75},
        evaluation={"chats": 0, "samples": 8},
        search=SEARCH,
    )
    experiment = load(path)
    root, moment = trials_folder(experiment), random.randint(1, 8)
    driver = dsvl("sweep", path)
    while len(list(root.glob("*/result.json"))) < moment:
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    done = {
        file: (file.read_bytes(), file.stat().st_mtime_ns) for file in root.glob("*/result.json")
    }

    again = dsvl("sweep", path, "--json", stdout=PIPE, stderr=PIPE)
    out, err = again.communicate()
    assert again.returncode == 0, err
    summary = json.loads(out)
    assert summary["failed"] == []
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in done} == done

    trials = {trial["trial"]: trial for trial in summary["trials"]}
    found = [trial for trial in trials.values() if trial.get(SEED) is None]
    assert len([t for t in found if t["model.size"] == "small" and t[EPOCHS] == 1]) >= 8
    assert [t["model.size"] for t in trials.values() if SEED in t] == ["medium", "medium"]
    for name, trial in trials.items():
        # 12 updates an epoch, of which the last fifth anneals: 9 are shared with a training twice as long.
        begun = 9 if trial[EPOCHS] == 2 and trial.get(SEED) is None else 0
        first, *later = starts(root / name)
        assert first == begun
        assert len(later) <= 1

    told = json.loads((experiment.run_folder / "evidence.json").read_text())
    chosen = load(experiment.run_folder / "recommended.yaml")
    assert chosen.optim.lr == told["recommendation"]["lr"]
    assert len(told["confirmed"]["eval/loss"]["after"]) == 1
    assert told["cost"]["search"] <= 20

    # Killed between its last checkpoint and its result, a trial has no update left to tell of.
    (root / summary["best"]["trial"] / "result.json").unlink()
    finished = dsvl("sweep", path, "--json", stdout=PIPE, stderr=PIPE)
    assert json.loads(finished.communicate()[0])["best"] == summary["best"]
    assert sum(len(starts(root / name)) for name in trials) == sum(
        len(starts(folder)) for folder in root.iterdir() if (folder / "journal.jsonl").exists()
    )
