"""Preparation on a cluster whose drivers and nodes come and go: the same bytes whatever happens."""

import random
import time

import pytest
import yaml

from tests.orchestration.conftest import SHARDS
from tests.orchestration.machines import Machines, finished, manifest, names, options, wait_until

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def unbroken(machines, sharded, tmp_path_factory):
    """The manifest of a preparation by one actor."""
    result, _ = machines.prepare(sharded, *options(tmp_path_factory.mktemp("one"), 1))
    return manifest(result)


@pytest.mark.slow
@pytest.mark.parametrize("preparers", [2, 4])
def test_however_many_prepare_the_bytes_are_the_same(
    machines, sharded, unbroken, tmp_path, preparers
):
    result, _ = machines.prepare(sharded, *options(tmp_path, preparers))
    assert manifest(result) == unbroken


def test_the_order_in_which_files_are_listed_is_of_no_account(
    machines, sharded, unbroken, tmp_path
):
    settings = yaml.safe_load(sharded.read_text())
    sets = settings["data"]["sets"]
    sets["chats"]["annotations"].reverse()
    settings["data"]["sets"] = dict(reversed(sets.items()))
    reordered = sharded.with_name("reordered.yaml")
    reordered.write_text(yaml.safe_dump(settings, sort_keys=False))
    result, _ = machines.prepare(reordered, *options(tmp_path, 2))
    assert manifest(result) == unbroken


@pytest.mark.parametrize("kills", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_again_and_again_it_repeats_no_finished_shard_and_writes_the_same_bytes(
    machines, sharded, unbroken, tmp_path, kills
):
    draw, work = random.Random(0), tmp_path / "prepared/.work"
    done: dict[str, int] = {}

    def shards() -> dict[str, int]:
        return {name: (work / name).stat().st_ino for name in names(work, "shard-*")}

    for kill in range(kills):
        driver = machines.driver(sharded, *options(tmp_path, 2))
        wait_until(lambda: len(shards()) > len(done) or driver.poll() is not None)  # noqa: B023
        time.sleep(draw.uniform(0, 0.3))
        machines.kill(driver)
        assert done.items() <= shards().items(), f"kill {kill}: a finished shard was made again"
        done = shards()
    assert kills <= len(done) < SHARDS, "it was killed on the way"
    result, said = machines.prepare(sharded, *options(tmp_path, 2))
    assert manifest(result) == unbroken
    assert done.items() <= shards().items()
    assert any("by an earlier run" in line for line in said)


def test_nodes_that_come_are_used_and_those_that_go_cost_no_record(
    machines, sharded, unbroken, tmp_path
):
    work = tmp_path / "prepared/.work"
    own = Machines(cpus=0)
    try:
        first = own.add(cpus=1)
        driver = own.driver(sharded, *options(tmp_path, 2))
        wait_until(lambda: len(names(work, "shard-*")) >= 2)
        own.add(cpus=1)
        own.kill(first)
        result, _ = finished(driver)
        assert manifest(result) == unbroken
    finally:
        own.end()
