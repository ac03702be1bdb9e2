"""Which worker holds the others up: all wait for the slowest in every update, and none says for whom.

Within an update they wait for each other and so take equally long. What tells them apart is what each does
by itself, between updates, and how fast its device is when it needs nobody.
"""

import logging
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median_low

import torch
import torch.distributed as dist

LATE, SLOW = 0.2, 1.5
"""What is worth a warning: a share of an update that others wait, a device's time over the usual one."""
REPEATS = 20
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pace:
    """Of one worker."""

    host: str
    alone_s: float
    """Between updates, seconds an update."""
    update_s: float
    """Within them, waiting included."""
    device_s: float
    """A fixed piece of work on its device."""


class Stragglers:
    """Counts a worker's time: `with stragglers.update(): engine.update(...)`."""

    def __init__(self, device: torch.device) -> None:
        """Count from now on."""
        self.device = device
        self._begin()

    def _begin(self) -> None:
        self._updates, self._alone, self._within = 0, 0.0, 0.0
        self._left = time.perf_counter()

    @contextmanager
    def update(self) -> Iterator[None]:
        """What all workers do together, and leave together."""
        entered = time.perf_counter()
        yield
        self._alone += entered - self._left
        self._left = time.perf_counter()
        self._within += self._left - entered
        self._updates += 1

    def metrics(self) -> dict[str, float]:
        """What was found since the last call, under its names in journals; rank 0 warns. A collective."""
        pace = Pace(
            socket.gethostname(),
            alone_s=self._alone / self._updates,
            update_s=self._within / self._updates,
            device_s=device_seconds(self.device),
        )
        paces = [pace] * dist.get_world_size()
        dist.all_gather_object(paces, pace)
        found, warnings = compared(paces)
        if dist.get_rank() == 0:
            for warning in warnings:
                log.warning(warning)
        self._begin()
        return found


def compared(paces: Sequence[Pace]) -> tuple[dict[str, float], list[str]]:
    """Metrics of all workers, by rank, and a warning for each that holds the others up."""
    alone_s = median_low(pace.alone_s for pace in paces)
    device_s = median_low(pace.device_s for pace in paces)
    update_s = min(pace.update_s for pace in paces)  # of who came last, and waited for none
    warnings = []
    for rank, pace in enumerate(paces):
        who = f"rank {rank} on {pace.host}"
        if (late_s := pace.alone_s - alone_s) > LATE * update_s:
            warnings.append(
                f"{who} is late: it takes {pace.alone_s:.3g} s between two updates, where {alone_s:.3g} is "
                f"usual, and the others wait {late_s / update_s:.0%} of an update; look at its disk and "
                "network, and what else runs there"
            )
        if pace.device_s > SLOW * device_s:
            warnings.append(
                f"{who} has a slow device: it takes {pace.device_s / device_s:.2g} times as long as is "
                "usual; look at its temperature and clocks, and what else runs there"
            )
    found = {
        "throughput/waited_s": max(pace.alone_s for pace in paces) - alone_s,
        "throughput/device_spread": max(pace.device_s for pace in paces) / device_s,
    }
    return found, warnings


def device_seconds(device: torch.device) -> float:
    """The least time that a device takes for a few products of matrices: it alone, needing nobody."""
    side = 1024 if device.type == "cuda" else 256
    factor = torch.ones(side, side, device=device)
    product, times = torch.empty_like(factor), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        for _ in range(4):
            torch.mm(factor, factor, out=product)
        float(product[0, 0])  # waits for the device
        times.append(time.perf_counter() - began)
    return min(times)
