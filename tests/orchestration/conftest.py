"""Small experiments: as settings, independent of the shipped ones, and on the shipped digits."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsvl.digits import chats
from orchestration.compose import load
from orchestration.config import Experiment, validated
from orchestration.records.journal import curve
from tests.orchestration.machines import Machines, wait_until

CONFIGS = Path(__file__).parents[2] / "configs"
SHARDS = 12
"""Of 256 records, in the experiment `sharded`."""

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


@pytest.fixture
def experiment(
    settings: dict[str, Any], llava_set: Path, tokenizer_folder: Path, tmp_path: Path
) -> Callable[..., Experiment]:
    """Make an experiment over files of `llava_set`: name -> its settings; they become `settings`."""
    vision = tmp_path / "vision"
    vision.mkdir()
    (vision / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "size": {"shortest_edge": 8},
                "crop_size": {"height": 8, "width": 8},
                "resample": 3,
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
        )
    )

    def make(sets, *, storage="runs", preparers=1, tokenizer=tokenizer_folder, **data):
        settings["model"]["languages"]["small"]["checkpoint"] = str(tokenizer)
        settings["model"]["vision"]["checkpoint"] = str(vision)
        base = {"reader": "llava_json", "images": "images", "split": "auto"}
        data = {"max_tokens": 600, "max_dropped": 1.0, "eval_fraction": 0.5} | data
        settings["data"] = data | {"sets": {name: base | own for name, own in sets.items()}}
        settings["storage"] = {"path": str(tmp_path / storage), "data": str(llava_set)}
        settings["cluster"] = {"preparers": preparers}
        return validated(settings)

    return make


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with few chats about digits, and all that is made of them: see `digits`."""
    folder = tmp_path_factory.mktemp("digits")
    os.environ |= SECRETS
    chats.write(folder / "raw/digits", train=96, evaluation=8)
    return folder


@pytest.fixture(scope="session")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of an experiment on digits in several shards, from two files of annotations."""
    folder = tmp_path_factory.mktemp("sharded")
    chats.write(folder / "data/digits", train=(SHARDS - 2) * 256, evaluation=256)
    records = json.loads((folder / "data/digits/train.json").read_text())
    for name, some in (("first", records[:2000]), ("second", records[2000:])):
        (folder / f"data/digits/{name}.json").write_text(json.dumps(some))
    base = {"reader": "llava_json", "images": "digits/images"}
    files = ["digits/first.json", "digits/second.json"]
    sets = {
        "more": base | {"annotations": ["digits/eval.json"], "split": "eval"},
        "chats": base | {"annotations": files, "split": "train"},
    }
    settings = {
        "extends": str(CONFIGS / "model/digits.yaml"),
        "name": "digits",
        "train": {"epochs": 1},
        "data": {"sets": sets},
        "storage": {"data": str(folder / "data")},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="session")
def machines() -> Iterator[Machines]:
    """A cluster of a node of four CPUs."""
    started = Machines(cpus=0)
    started.add(cpus=4)
    yield started
    started.end()


@pytest.fixture(scope="session")
def cluster_of_jobs() -> Iterator[Machines]:
    """A head that carries no work, with a dashboard that asks for a token, and a node of two CPUs."""
    started = Machines(cpus=0, dashboard=True)
    started.add(cpus=2)
    started.wait_for_dashboard()

    def joined() -> bool:
        with suppress(OSError):  # the dashboard answers before it knows of nodes
            return sum(node["state"] == "ALIVE" for node in started.known("nodes")) == 2
        return False

    wait_until(joined)
    yield started
    started.end()


@pytest.fixture(scope="session")
def trained_run(storage: Path, cluster: None) -> Path:
    """The file of an experiment that was trained on two workers without a break."""
    from orchestration.commands import train

    path = digits(storage, "unbroken")
    train(load(path))
    return path


SECRETS = {
    name: f"canary-{name.lower()}-8c1f6b"
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "PGPASSWORD")
}
"""In the environment of all that is done with `storage`; they must be nowhere else."""
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


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """Chromium, driven through selenium; it keeps what it logs and asks for."""
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (program and driver):
        pytest.skip("needs Debian's chromium and chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for option in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "window-size=1400,900",
        f"user-data-dir={tmp_path / 'profile'}",
    ):
        options.add_argument(f"--{option}")
    downloads = {"download.default_directory": str(tmp_path), "download.prompt_for_download": False}
    options.add_experimental_option("prefs", downloads)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


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
        "evaluation": {"chats": 1, "inspect_every": 8},
        "storage": {"path": str(storage / "runs"), "data": str(storage / "raw")},
    }
    path = storage / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings | sections))
    return path


def run_folder(path: Path) -> Path:
    """Where the run of an experiment's file keeps its files."""
    return load(path).run_folder


def run_id(folder: Path) -> str:
    """Of the MLflow run of a folder."""
    return json.loads((folder / "mlflow.json").read_text())["run_id"]


def steps_done(folder: Path) -> int:
    """How many updates the journal of a run tells of."""
    return max((step for step, _ in curve(folder, "train/loss")), default=0)


def histories(client: Any, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Every metric of a training in MLflow as (step, value) by step, all that were ever logged.

    What `dsvl evaluate` has found of its checkpoints is left out.
    """
    return {
        key: sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))
        for key in client.get_run(run_id).data.metrics
        if not key.startswith("evaluation/")
    }
