"""Time and peak memory of ways to do the same work.

Ways take turns within one process. On a CPU their time is that of the process, on one thread, which suffers
least from other work on the machine; wall time stands beside it. On a GPU it passes between two events.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
Ready = Callable[[], Run]
"""Prepares a run off the clock, such as the earlier rounds of a chat."""


@dataclass
class Figures:
    """What was measured of a way: times in seconds, one a round."""

    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    """Most memory that a run adds to what there was before it."""


def in_turns(ways: Mapping[str, Ready], *, rounds: int, device: torch.device) -> dict[str, Figures]:
    """Time every way once a round. The first of more than two rounds only warms up."""
    figures = {name: Figures() for name in ways}
    gc.collect()
    for number in range(rounds):
        for name, ready in ways.items():
            run = ready()
            seconds, wall = once(run, device)
            if number or rounds <= 2:
                figures[name].seconds.append(seconds)
                figures[name].wall.append(wall)
    return figures


def ratios(rival: Figures, ours: Figures) -> list[float]:
    """How many times faster ours was in each round."""
    return [a / b for a, b in zip(rival.seconds, ours.seconds, strict=True)]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least and most."""
    return statistics.median(values), min(values), max(values)


def peak_mib(run: Run, device: torch.device) -> float:
    """MiB that a run adds at its peak to what there was before it.

    On a CPU of resident memory: to be called in a process of its own, whose allocator gives back at once what
    is freed (`MALLOC`), and on Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""The environment of a process in which resident memory is that of living tensors."""


def once(run: Run, device: torch.device) -> tuple[float, float]:
    """Seconds of the processor and of the clock on the wall."""
    if device.type == "cuda":
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        wall = time.perf_counter()
        began.record()
        run()
        ended.record()
        torch.cuda.synchronize(device)
        return began.elapsed_time(ended) / 1000, time.perf_counter() - wall
    wall, seconds = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - seconds, time.perf_counter() - wall


def _resident(name: str) -> float:
    """MiB of the line of that name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) / 1024
