"""Preparation on a cluster whose drivers and nodes come and go: the same bytes whatever happens."""

import json
import random
import time
from pathlib import Path

import pytest
import yaml

from dsvl.digits import chats
from dsvl.digits.chats import __file__ as digits
from tests.orchestration.machines import Machines, finished, names, wait_until

pytestmark = pytest.mark.ray

CHECKPOINTS = Path(digits).parent / "checkpoints"
CONFIGS = Path(digits).parents[2] / "configs"
SHARDS = 12
"""Of 256 records."""


@pytest.fixture(scope="module")
def machines():
    started = Machines(cpus=0)
    started.add(cpus=4)
    yield started
    started.end()


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, machines):
    """The experiment's file: digits in two files of annotations."""
    folder = tmp_path_factory.mktemp("digits")
    chats.write(folder / "data/digits", train=(SHARDS - 2) * 256, evaluation=256)
    records = json.loads((folder / "data/digits/train.json").read_text())
    for name, some in (("first", records[:2000]), ("second", records[2000:])):
        (folder / f"data/digits/{name}.json").write_text(json.dumps(some))
    base = {"reader": "llava_json", "images": "digits/images"}
    settings = {
        "extends": str(CONFIGS / "model/digits.yaml"),
        "name": "digits",
        "train": {"epochs": 1},
        "data": {
            "sets": {
                "more": base | {"annotations": ["digits/eval.json"], "split": "eval"},
                "chats": base
                | {"annotations": ["digits/first.json", "digits/second.json"], "split": "train"},
            }
        },
        "storage": {"data": str(folder / "data")},
        "cluster": {"address": machines.address},
    }
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def options(storage: Path, preparers: int) -> tuple[str, str]:
    return f"storage.path={storage}", f"cluster.preparers={preparers}"


def manifest(result: dict) -> dict:
    return json.loads((Path(result["folder"]) / "manifest.json").read_text())


@pytest.fixture(scope="module")
def unbroken(machines, experiment, tmp_path_factory):
    """The manifest of a preparation by one actor."""
    result, _ = machines.prepare(experiment, *options(tmp_path_factory.mktemp("one"), 1))
    return manifest(result)


@pytest.mark.parametrize("preparers", [2, 4])
def test_however_many_prepare_the_bytes_are_the_same(
    machines, experiment, unbroken, tmp_path, preparers
):
    result, _ = machines.prepare(experiment, *options(tmp_path, preparers))
    assert manifest(result) == unbroken


def test_the_order_in_which_files_are_listed_is_of_no_account(
    machines, experiment, unbroken, tmp_path
):
    settings = yaml.safe_load(experiment.read_text())
    sets = settings["data"]["sets"]
    sets["chats"]["annotations"].reverse()
    settings["data"]["sets"] = dict(reversed(sets.items()))
    reordered = experiment.with_name("reordered.yaml")
    reordered.write_text(yaml.safe_dump(settings, sort_keys=False))
    result, _ = machines.prepare(reordered, *options(tmp_path, 2))
    assert manifest(result) == unbroken


def test_killed_five_times_it_repeats_no_finished_shard_and_writes_the_same_bytes(
    machines, experiment, unbroken, tmp_path
):
    draw, work = random.Random(0), tmp_path / "prepared/.work"
    done: dict[str, int] = {}

    def shards() -> dict[str, int]:
        return {name: (work / name).stat().st_ino for name in names(work, "shard-*")}

    for kill in range(5):
        driver = machines.driver(experiment, *options(tmp_path, 2))
        wait_until(lambda: len(shards()) > len(done) or driver.poll() is not None)  # noqa: B023
        time.sleep(draw.uniform(0, 0.3))
        machines.kill(driver)
        assert done.items() <= shards().items(), f"kill {kill}: a finished shard was made again"
        done = shards()
    assert 5 <= len(done) < SHARDS, "it was killed on the way"
    result, said = machines.prepare(experiment, *options(tmp_path, 2))
    assert manifest(result) == unbroken
    assert done.items() <= shards().items()
    assert any("by an earlier run" in line for line in said)


def test_nodes_that_come_are_used_and_those_that_go_cost_no_record(
    machines, experiment, unbroken, tmp_path
):
    work = tmp_path / "prepared/.work"
    own = Machines(cpus=0)
    try:
        first = own.add(cpus=1)
        where = (f"cluster.address={own.address}", *options(tmp_path, 2))
        driver = own.driver(experiment, *where)
        wait_until(lambda: len(names(work, "shard-*")) >= 2)
        own.add(cpus=1)
        own.kill(first)
        result, _ = finished(driver)
        assert manifest(result) == unbroken
    finally:
        own.end()
