"""Small experiments: as settings, independent of the shipped ones, and on the shipped digits."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsvl.digits import chats
from orchestration.compose import load
from orchestration.journal import curve

CONFIGS = Path(__file__).parents[2] / "configs"

LANGUAGE = {
    "checkpoint": "language",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "size": "small",
        "languages": {"small": LANGUAGE, "large": LANGUAGE | {"num_hidden_layers": 4}},
        "vision": {
            "checkpoint": "vision",
            "image_size": 8,
            "patch_size": 4,
            "hidden_size": 8,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
        },
    },
    "data": {
        "sets": {
            "chats": {"reader": "llava_json", "annotations": ["chats.json"], "images": "images"}
        },
        "blends": {"chats": {"sets": ["chats"]}},
        "max_tokens": 64,
    },
    "train": {"epochs": 2, "batch": 12},
}
SEARCH = {
    "space": {
        "model.size": {"kind": "grid", "values": ["small", "large"]},
        "optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    },
    "samples": 3,
    "concurrent": 4,
}


@pytest.fixture
def settings() -> dict[str, Any]:
    """Settings of a small, legal experiment; a test may change them."""
    return deepcopy(SETTINGS)


@pytest.fixture
def search() -> dict[str, Any]:
    """A small, legal search over them."""
    return deepcopy(SEARCH)


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few chats about digits, and all that is made of them: see `digits`."""
    folder = tmp_path_factory.mktemp("digits")
    chats.write(folder / "raw/digits", train=96, evaluation=8)
    return folder


@pytest.fixture(scope="session")
def trained_run(storage: Path, cluster: None) -> Path:
    """The file of an experiment that was trained on two workers without a break."""
    from orchestration.commands import train

    path = digits(storage, "unbroken")
    train(load(path))
    return path


HOSTILE = "<script>alert('why?')</script> & \x1b[31m<mark>⟦no⟧</mark>"
"""A text that must stay one, in a terminal and on a page."""


@pytest.fixture(scope="session")
def mixed(storage: Path, cluster: None) -> Path:
    """The file of an experiment with two blends, prepared: digits one after another, and hostile texts."""
    from orchestration.prepare import prepare

    said = [{"from": "human", "value": HOSTILE}, {"from": "gpt", "value": f"Yes: {HOSTILE}"}]
    records = [{"id": f"{HOSTILE} {number}", "conversations": said} for number in range(3)]
    records += [{"id": "broken", "conversations": said[:1]}]
    (storage / "raw/hostile.json").write_text(json.dumps(records))
    hostile = {"reader": "llava_json", "annotations": ["hostile.json"], "images": "digits/images"}
    data = {
        "max_rounds": 4,
        "max_dropped": 0.5,
        "sets": {"hostile": hostile | {"split": "train"}},
        "blends": {"joined": {"sets": ["digits_train", "digits_eval"], "concat": [1, 3]}},
    }
    path = digits(storage, "mixed", data=data)
    prepare(load(path))
    return path


@pytest.fixture
def dsvl() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the real command in a session of its own; what still runs after the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: object, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "orchestration.cli", *map(str, arguments)]
        started.append(subprocess.Popen(command, text=True, start_new_session=True, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def digits(storage: Path, name: str, **sections: Any) -> Path:
    """Write an experiment on the chats in `storage`, of 48 updates on two workers; returns its file."""
    parts = ("model/digits.yaml", "data/digits.yaml", "cluster/laptop.yaml")
    settings = {
        "extends": [str(CONFIGS / part) for part in parts],
        "name": name,
        "optim": {"lr": 1e-2},
        "train": {"batch": 8, "epochs": 4, "precision": "fp32"},
        "engine": {"micro_batch": 4},
        "checkpoint": {"every": 5},
        "evaluation": {"chats": 1},
        "storage": {"path": str(storage / "runs"), "data": str(storage / "raw")},
    }
    path = storage / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings | sections))
    return path


def run_folder(path: Path) -> Path:
    """Where the run of an experiment's file keeps its files."""
    return load(path).run_folder


def steps_done(folder: Path) -> int:
    """How many updates the journal of a run tells of."""
    return max((step for step, _ in curve(folder, "train/loss")), default=0)


def histories(client: Any, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric of an MLflow run as (step, value) by step, all that were ever logged."""
    return {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))
        for key in client.get_run(run_id).data.metrics
    }
