"""What the doctor finds on the nodes of a cluster, and between them."""

import json
import subprocess

import pytest
import torch

from orchestration.clusters.nodes import _Member
from tests.orchestration.conftest import digits


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_node_whose_gpus_torch_cannot_use_says_why():
    assert "CUDA" in _Member().compute() or "NVIDIA" in _Member().compute()


@pytest.mark.ray
def test_nodes_that_work_together_are_found_fit_and_nothing_is_left(
    cluster_of_jobs, dsvl, storage, monkeypatch
):
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster_of_jobs.token)
    path = digits(storage, "examined")
    address = f"cluster.address={cluster_of_jobs.address}"
    process = dsvl("doctor", path, address, "--json", stdout=subprocess.PIPE)
    checks = {check["check"]: check for check in json.loads(process.communicate()[0])["checks"]}
    assert checks["nodes"]["found"].startswith("2: ")
    for name in ("shared storage", "clocks", "all-reduce"):
        assert checks[name]["ok"], checks[name]
    assert checks["all-reduce"]["found"] == "2 nodes add up to 2, by gloo"
    assert "disks of nodes" in checks
    assert not list((storage / "runs").glob(".doctor-*"))
