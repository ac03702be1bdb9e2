"""The load of a machine under MLflow's own names, its GPUs as their driver tells."""

import os

from orchestration.records import load


def smi(folder, monkeypatch, text: str, status: int = 0) -> None:
    """A driver that says this."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_every_gpu_is_told_of_but_for_what_it_does_not_tell(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "0, 97, 40960, 81920, 612.5\n3, 0, 0, 81920, [N/A]")
    gpus = {name: value for name, value in load.now().items() if name.startswith("gpu_")}
    assert gpus == {
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_memory_usage_megabytes": 40960.0,
        "gpu_0_memory_usage_percentage": 50.0,
        "gpu_0_power_usage_watts": 612.5,
        "gpu_3_utilization_percentage": 0.0,
        "gpu_3_memory_usage_megabytes": 0.0,
        "gpu_3_memory_usage_percentage": 0.0,
    }


def test_a_driver_that_fails_leaves_the_rest_of_the_load(tmp_path, monkeypatch):
    smi(tmp_path, monkeypatch, "NVIDIA-SMI has failed", status=9)
    assert 0 < load.now()["system_memory_usage_percentage"] < 100
