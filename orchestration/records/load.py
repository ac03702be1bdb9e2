"""The load of the machines of a training, written down beside it under MLflow's own names."""

import socket
import threading
import time
from pathlib import Path

import psutil

from orchestration.planning.memory import GIB
from orchestration.records import journal
from orchestration.records.journal import Journal

FOLDER = "nodes"
"""Within a run's folder: a journal for each machine."""
PERIOD_SECONDS = 10.0


def watch(folder: Path) -> None:
    """Write the load of this machine down while the process lives, from a thread of its own.

    Its steps are seconds since the machine first took part in the run.
    """
    threading.Thread(target=_watch, args=(folder,), name="nodes", daemon=True).start()


def _watch(folder: Path) -> None:
    host = socket.gethostname()
    writer = Journal(folder / FOLDER / host)
    lines, _ = journal.read(folder / FOLDER / host)
    began = lines[0]["time"] if lines else time.time()
    psutil.cpu_percent()  # what it tells later is since the call before
    time.sleep(1)
    while True:
        load = {f"system/{host}/{name}": value for name, value in _load().items()}
        writer.metrics(int(time.time() - began), load)
        time.sleep(PERIOD_SECONDS)


def _load() -> dict[str, float]:
    """Since the last call, or now."""
    memory, disk, net = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_gigabytes": memory.used / GIB,
        "disk_usage_percentage": disk.percent,
        "network_receive_megabytes": net.bytes_recv / 1e6,
        "network_transmit_megabytes": net.bytes_sent / 1e6,
    }
    import torch  # which whoever ships the journals does without

    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found[f"gpu_{number}_memory_usage_percentage"] = 100 * (1 - free / total)
    return found
