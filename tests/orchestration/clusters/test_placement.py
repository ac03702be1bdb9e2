"""What a cluster can never hold is refused at once, with the arithmetic."""

import os

import pytest
import ray

from orchestration import cli
from orchestration.clusters.placement import require_room
from orchestration.compose import load
from tests.orchestration.conftest import digits

pytestmark = pytest.mark.ray


@pytest.mark.parametrize(("verb", "field"), [("train", "cluster"), ("sweep", "search")])
def test_workers_that_no_node_will_ever_hold_are_refused(cluster, storage, capsys, verb, field):
    cpus = int(ray.cluster_resources()["CPU"])
    search = {"space": {"optim.lr": {"kind": "grid", "values": [1e-2]}}}
    path = digits(storage, f"too-many-{verb}", search=search)
    batch = 4 * 8 * cpus
    arguments = [
        f"train.batch={batch}",
        f"{field}.workers={8 * cpus}",
        "cluster.cpus_per_worker=0.5",
    ]
    assert cli.main([verb, str(path), *arguments]) == 2
    beside = " and 0.1 CPU for the trial itself" if verb == "sweep" else ""
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{8 * cpus} workers of 0.5 CPU{beside} can never be placed: ")
    assert f"hold {2 * cpus} (" in said
    assert f" has {cpus} CPU); set fewer workers" in said
    assert not (storage / f"runs/too-many-{verb}/checkpoints").exists()


def test_what_this_machine_can_never_hold_is_refused_before_ray_starts(
    storage, capsys, monkeypatch
):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **settings: pytest.fail("Ray was started"))
    search = {"space": {"optim.lr": {"kind": "grid", "values": [1e-2]}}}
    path = digits(storage, "too-many-here", search=search)
    assert cli.main(["sweep", str(path), "train.batch=4096", "search.workers=1024"]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert "they take 768.1 CPU, and this machine has " in said
    assert not (storage / "runs/too-many-here").exists()


def test_what_is_placed_to_the_last_core_is_not_refused(cluster, storage):
    cpus = int(ray.cluster_resources()["CPU"])
    options = [f"train.batch={12 * cpus}", f"cluster.cpus_per_worker={1 / 3}"]
    experiment = load(digits(storage, "full"), options)
    require_room(experiment, workers=3 * cpus)
    with pytest.raises(ValueError, match="for the trial itself"):
        require_room(experiment, workers=3 * cpus, beside=0.1)


def test_only_nodes_with_the_labels_count_unless_others_come(cluster, storage):
    options = ["cluster.gpu_labels={pool: a100}"]
    with pytest.raises(
        ValueError, match=r"labels {'pool': 'a100'} of the .* hold 0 \(there is none\)"
    ):
        require_room(load(digits(storage, "labelled"), options), workers=1)
    require_room(
        load(digits(storage, "labelled"), [*options, "cluster.autoscaled=true"]), workers=1
    )


def test_gpus_that_no_node_has_are_refused(cluster, storage):
    assert "GPU" not in ray.cluster_resources() or os.environ.get("CUDA_VISIBLE_DEVICES")
    options = ["cluster.gpus_per_worker=1"]
    with pytest.raises(ValueError, match=r"2 workers of 0.75 CPU and 1 GPU .* and 0 GPU\)"):
        require_room(load(digits(storage, "gpus"), options), workers=2)
