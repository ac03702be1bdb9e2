"""What the doctor finds wrong with a machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from orchestration import doctor
from orchestration.config import Experiment, validated
from orchestration.doctor import examine, render

ROOT = Path(__file__).parents[2]


@pytest.fixture
def experiment(tmp_path, settings, monkeypatch) -> Experiment:
    """A small experiment on a machine where nothing else is wrong."""
    monkeypatch.setattr(doctor, "FREE_DISK", 1)
    monkeypatch.setattr(doctor, "RAY_MEMORY", 1)
    monkeypatch.setattr(doctor, "WORKER_MEMORY", 1)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    settings["storage"] = {"path": str(tmp_path / "runs")}
    return validated(settings)


def check(experiment: Experiment, name: str) -> dict:
    (found,) = [check for check in examine(experiment)["checks"] if check["check"] == name]
    return found


def installed(monkeypatch, **versions: str) -> None:
    real = doctor.metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: versions.get(name) or real(name))


def test_a_machine_that_has_all_that_is_needed_is_ok(experiment):
    report = examine(experiment)
    assert report["ok"], render(report)
    assert render(report).endswith("All that is needed is here.")


def test_nothing_is_left_in_the_storage(experiment, tmp_path):
    examine(experiment)
    assert not list((tmp_path / "runs").iterdir())


def test_a_storage_that_cannot_be_written_to_is_named_with_a_remedy(experiment, tmp_path):
    (tmp_path / "file").write_text("")
    broken = experiment.with_overrides({"storage.path": str(tmp_path / "file/runs")})
    report = examine(broken)
    assert not report["ok"]
    assert "FAIL  storage" in render(report)
    assert str(tmp_path / "file/runs") in check(broken, "storage")["found"]
    assert "storage.path" in check(broken, "storage")["remedy"]


def test_a_store_is_tried_and_told_with_a_remedy_if_it_refuses(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.0)
    place = tmp_path / "store"
    kept = experiment.with_overrides({"storage.remote": place.as_uri()})
    assert examine(kept)["ok"]
    assert check(kept, "store's clock")["ok"]
    assert not list(place.iterdir())
    place.rmdir()
    place.write_text("no folder")
    assert not examine(kept)["ok"]
    assert check(kept, "store")["found"].startswith("cannot write .probe-")
    assert "see that the store can be reached" in check(kept, "store")["remedy"]


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("ray", "2.55.1"),
        ("mlflow", "3.14.0"),
        ("torch", "2.9.1+cpu"),
        ("transformers", "5.2.0"),
        ("pillow", "12.3.0"),
    ],
)
def test_a_version_with_known_vulnerabilities_fails(experiment, monkeypatch, name, version):
    installed(monkeypatch, **{name: version})
    report = examine(experiment)
    assert not report["ok"]
    assert check(experiment, name)["found"].startswith(version)
    assert f"FAIL  {name}" in render(report)
    assert "CVE-" in check(experiment, name)["found"]


def test_the_safe_versions_pass_whatever_their_build(experiment, monkeypatch):
    installed(monkeypatch, torch="2.13.0+cpu", transformers="5.2.1", ray="2.60.0rc1")
    assert examine(experiment)["ok"]


def test_a_package_that_is_not_installed_fails(experiment, monkeypatch):
    def absent(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    assert check(experiment, "deepspeed")["found"].startswith("not installed")
    assert not examine(experiment)["ok"]


def test_a_version_other_than_the_tested_one_is_noted_and_no_failure(
    experiment, monkeypatch, tmp_path
):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\nray==1.2.3\nnot-installed-here==1.0\n")
    monkeypatch.setattr(doctor, "CONSTRAINTS", pins)
    found = check(experiment, "tested versions")
    assert not found["ok"]
    assert "ray" in found["found"]
    assert "(tested 1.2.3)" in found["found"]
    assert "not-installed-here" not in found["found"]
    assert examine(experiment)["ok"]


def test_too_little_free_disk_fails_and_tells_how_much_is_needed(experiment, monkeypatch):
    monkeypatch.setattr(doctor, "FREE_DISK", 2**60)
    assert not examine(experiment)["ok"]
    assert f"needs {2**30}.0 GiB" in check(experiment, "free disk")["found"]


def test_more_workers_than_processors_fail_as_ray_would_wait_for_ever(experiment):
    greedy = experiment.with_overrides({"cluster.cpus_per_worker": 10_000})
    assert not check(greedy, "CPUs")["ok"]
    assert not examine(greedy)["ok"]


def test_a_cluster_elsewhere_is_not_judged_by_this_machine(experiment):
    elsewhere = experiment.with_overrides(
        {"cluster.address": "127.0.0.1:1", "cluster.cpus_per_worker": 10_000}
    )
    checks = {check["check"]: check for check in examine(elsewhere)["checks"]}
    assert "CPUs" not in checks
    assert "127.0.0.1:1" in checks["machine"]["found"]
    failed = [name for name, check in checks.items() if check["essential"] and not check["ok"]]
    assert failed == ["cluster"]
    assert "ConnectionRefusedError" in checks["cluster"]["found"]


def test_gpus_that_are_not_there_fail(experiment, monkeypatch):
    monkeypatch.setattr(doctor, "_gpus", lambda: ["H100"])
    wanting = {"cluster.workers": 2, "cluster.gpus_per_worker": 1}
    assert not check(experiment.with_overrides(wanting), "GPUs")["ok"]
    assert check(experiment.with_overrides(wanting | {"cluster.workers": 1}), "GPUs")["ok"]


def test_a_port_in_use_is_noted_with_its_user_and_no_failure(experiment, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {number: "a test"})
        report = examine(experiment)
        found = check(experiment, f"port {number}")
    assert not found["ok"]
    assert f"process {os.getpid()}" in found["found"]
    assert report["ok"]
    assert "note  port" in render(report)


@pytest.mark.parametrize(("address", "told"), [("127.0.0.1", False), ("0.0.0.0", True)])
def test_a_port_that_other_machines_reach_is_told_so(experiment, monkeypatch, address, told):
    outside = [a.address for those in psutil.net_if_addrs().values() for a in those
               if a.family == socket.AF_INET and not a.address.startswith("127.")]  # fmt: skip
    if not outside:
        pytest.skip("this machine has the loopback interface alone")
    with socket.create_server((address, 0)) as server:
        monkeypatch.setattr(doctor, "PORTS", {(number := server.getsockname()[1]): "a test"})
        found = check(experiment, f"port {number}")
    assert ("reachable from other machines" in found["found"]) == told
    assert ("bind it to 127.0.0.1" in found["remedy"]) == told


def test_a_token_that_others_may_read_is_noted_with_the_remedy(experiment, tmp_path):
    token = tmp_path / "token"
    token.write_text("secret")
    token.chmod(0o644)
    found = check(experiment, "Ray's token")
    assert not found["ok"]
    assert found["remedy"].startswith(f"chmod 600 {token}")
    assert "secret" not in render(examine(experiment))
    token.chmod(0o600)
    assert check(experiment, "Ray's token")["ok"]


def test_the_doctor_imports_neither_torch_nor_ray():
    code = (
        "import sys, orchestration.doctor; "
        "assert not {'torch', 'ray', 'mlflow'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=60)
