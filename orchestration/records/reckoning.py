"""What a plan foretells of a training, and what came of it: metrics `plan/...` and `actual/...`."""

import resource
from dataclasses import asdict
from pathlib import Path

import torch

from orchestration.config import Experiment
from orchestration.planning.cost import run_cost
from orchestration.planning.memory import GIB, memory
from orchestration.records import journal
from orchestration.records.course import Course

COSTS = ("hours", "gpu_hours", "money")


def foretold(experiment: Experiment, samples: int) -> dict[str, float]:
    """By the plan, at most: memory of a worker; time and money where the cluster states speed and price."""
    found = asdict(run_cost(experiment, samples))
    costs = {name: found[name] for name in COSTS if found[name] is not None}
    return _named("plan", {"memory_gib": sum(memory(experiment).values()) / GIB, **costs})


def came_to(experiment: Experiment, folder: Path, *, memory_before: float) -> dict[str, float]:
    """Measured: the peak of this worker, and the time of all starts, with evaluations and saves."""
    course = Course()
    for entry in journal.read(folder)[0]:
        course.add(entry)
    costs = {"hours": course.seconds / 3600, "memory_gib": peak_memory_gib() - memory_before}
    if experiment.cluster.gpus_per_worker:
        costs["gpu_hours"] = course.worker_seconds / 3600
        if (price := experiment.cluster.gpu_hour_price) is not None:
            costs["money"] = costs["gpu_hours"] * price
    return _named("actual", costs)


def peak_memory_gib() -> float:
    """Most that this process has held so far: of its GPU, or of its machine's memory where it has none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _named(whose: str, costs: dict[str, float]) -> dict[str, float]:
    return {f"{whose}/{name}": value for name, value in costs.items()}
