"""The load of the machines of a training, written down beside it under MLflow's own names."""

import math
import shutil
import socket
import subprocess
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
QUERY = (
    "nvidia-smi",
    "--query-gpu=index,utilization.gpu,memory.used,memory.total,power.draw",
    "--format=csv,noheader,nounits",
)


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
        load = {f"system/{host}/{name}": value for name, value in now().items()}
        writer.metrics(int(time.time() - began), load)
        time.sleep(PERIOD_SECONDS)


def now() -> dict[str, float]:
    """The load since the last call, or of this moment."""
    memory, disk, net = psutil.virtual_memory(), psutil.disk_usage("/"), psutil.net_io_counters()
    found = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_percentage": memory.percent,
        "system_memory_usage_gigabytes": memory.used / GIB,
        "disk_usage_percentage": disk.percent,
        "network_receive_megabytes": net.bytes_recv / 1e6,
        "network_transmit_megabytes": net.bytes_sent / 1e6,
    }
    return found | _gpus()


def _gpus() -> dict[str, float]:
    """Of all GPUs of the machine, as the driver tells: to ask CUDA would take memory on each of them."""
    if shutil.which("nvidia-smi") is None:
        return {}
    done = subprocess.run(QUERY, capture_output=True, text=True, check=False)
    found = {}
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        number, *told = line.split(", ")
        at_work, used, total, power = map(_number, told)
        found |= {
            f"gpu_{number}_utilization_percentage": at_work,
            f"gpu_{number}_memory_usage_megabytes": used,
            f"gpu_{number}_memory_usage_percentage": 100 * used / total,
            f"gpu_{number}_power_usage_watts": power,
        }
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _number(told: str) -> float:
    """NaN where a GPU does not tell."""
    try:
        return float(told)
    except ValueError:
        return math.nan
