"""Whether this machine can carry an experiment out.

Nothing is mended by itself, and nothing heavy is imported: what is looked at may be broken.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dsvl.config import ModelConfig
from orchestration.clusters.access import readable_by_others, token_file
from orchestration.clusters.package import REMEDY, missing, named
from orchestration.config import Experiment

GIB = 1024**3
PYTHON = ">=3.11"
FLOORS = {
    "ray": (
        ">=2.56",
        "CVE-2026-57516 and CVE-2026-41486, code run by reading webdatasets and Parquet",
    ),
    "mlflow": (">=3.15", "CVE-2026-96804, pickles; CVE-2026-2652, authentication passed by"),
    "torch": (">=2.10", "CVE-2026-24747, memory corrupted by torch.load"),
    "transformers": (">5.2", "CVE-2026-5241, a config.json that runs code"),
    "pillow": (">=13.0.0", "CVE-2026-112403 and CVE-2026-112398, overflows in the JPEG decoder"),
    "deepspeed": (">=0.19", "this project calls what older ones lack"),
}
"""Versions that do, and what is known of those below."""
HOME = Path(__file__).parent.parent
"""The folder that the paths of the shipped experiments start at."""
CONSTRAINTS = HOME / "constraints.txt"
"""The versions that this project is tested with."""
FREE_DISK = 5 * GIB
SHARED_MEMORY = GIB
"""Ray passes objects between processes through it, gloo and NCCL their messages."""
RAY_MEMORY, WORKER_MEMORY = 2 * GIB, GIB
"""Of Ray itself, and of a worker before it holds a model: its imports."""
PATIENCE = 10.0
"""Seconds for which requests of a store are made again."""
PORTS = {8265: "Ray's dashboard", 5000: "MLflow's pages"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    check: str
    ok: bool
    found: str
    remedy: str = ""
    """What to do if it is not ok."""
    essential: bool = True
    """Whether the experiment cannot (or should not) run while it is not ok."""


def examine(experiment: Experiment) -> dict[str, Any]:
    """Look at what an experiment needs of this machine.

    Returns `ok`, which is whether all that is essential is in order, and `checks`: what was looked
    at, whether it is ok and essential, what was found, and the remedy if it is not ok.
    """
    checks = [
        *packages(),
        checkpoints(experiment.model),
        *storage(Path(experiment.storage.path)),
        *store(experiment.storage.remote),
        *resources(experiment),
        *(port(number, purpose) for number, purpose in PORTS.items()),
        *token(),
    ]
    if experiment.cluster.address != "local":
        from orchestration.clusters.nodes import examine_nodes

        checks += examine_nodes(experiment)
    return {
        "ok": all(check.ok for check in checks if check.essential),
        "checks": [
            asdict(check) | {"remedy": "" if check.ok else check.remedy} for check in checks
        ],
    }


def render(report: dict[str, Any]) -> str:
    """What was found as text for people, the remedies below what they mend."""
    checks = report["checks"]
    width = max(len(check["check"]) for check in checks)
    lines = []
    for check in checks:
        verdict = "ok" if check["ok"] else "FAIL" if check["essential"] else "note"
        lines.append(f"{verdict:<4}  {check['check']:<{width}}  {check['found']}")
        if not check["ok"]:
            lines.append(f"{'':<4}  {'':<{width}}  -> {check['remedy']}")
    failed = sum(check["essential"] and not check["ok"] for check in checks)
    verdict = (
        f"{failed} of {len(checks)} checks failed." if failed else "All that is needed is here."
    )
    return "\n".join([*lines, "", verdict])


def packages() -> Iterator[Check]:
    """Python and packages: no older than is safe, and which differ from the tested ones."""
    python = platform.python_version()
    yield Check("python", _within(python, PYTHON), python, f"use Python {PYTHON}")
    for name, (floor, known) in FLOORS.items():
        found = _version(name)
        fit = found is not None and _within(found, floor)
        yield Check(
            name,
            fit,
            f"{found or 'not installed'} (needs {floor}{'' if fit else f': {known}'})",
            f"pip install --constraint constraints.txt '{name}{floor}'",
        )
    if CONSTRAINTS.exists():
        others = [
            f"{pin.name} {found} (tested {str(pin.specifier).removeprefix('==')})"
            for pin in _pins(CONSTRAINTS.read_text(encoding="utf-8"))
            if (found := _version(pin.name)) and not _within(found, str(pin.specifier))
        ]
        yield Check(
            "tested versions",
            not others,
            ", ".join(others) or "all as in constraints.txt",
            "pip install --constraint constraints.txt --editable .",
            essential=False,
        )


def checkpoints(model: ModelConfig) -> Check:
    """Whether every checkpoint is a folder here, or at least a name that the hub could know."""
    lost = missing(model)
    return Check(
        "checkpoints",
        not lost,
        f"{', '.join(lost)}: no such folder in {Path.cwd()}, where relative paths start"
        if lost
        else f"{len(named(model))} named",
        f"cd {HOME}, or {REMEDY}" if all((HOME / name).is_dir() for name in lost) else REMEDY,
    )


def storage(folder: Path) -> Iterator[Check]:
    """Whether files can be written and renamed in a folder, and how much room there is."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as place:
            (written := Path(place, "written")).write_bytes(b"x" * 4096)
            written.rename(Path(place, "renamed"))
    except OSError as error:
        text = f"{folder}: {type(error).__name__}: {error.strerror or error}"
        yield Check("storage", False, text, "set storage.path to a folder that you may write to")
        return
    yield Check("storage", True, f"{folder.absolute()} can be written to")
    free = shutil.disk_usage(folder).free
    yield Check(
        "free disk",
        free >= FREE_DISK,
        f"{_gib(free)} (needs {_gib(FREE_DISK)})",
        f"make room, or set storage.path to a disk with {_gib(FREE_DISK)} free",
    )


def store(uri: str | None) -> Iterator[Check]:
    """Whether the object store, if there is one, takes, lists and gives back a file; and its clock."""
    if uri is None:
        return
    from orchestration.storing.mirroring import SKEW_SECONDS
    from orchestration.storing.remote import Remote

    remote = Remote(uri, patience=PATIENCE)
    try:
        ahead = remote.clock
    except (ValueError, RuntimeError) as error:
        text, _, remedy = str(error).partition("; ")
        yield Check("store", False, text.removeprefix("storage.remote: "), remedy)
        return
    yield Check("store", True, f"{remote.name} can be written to, listed and read")
    yield Check(
        "store's clock",
        abs(ahead) <= SKEW_SECONDS,
        f"{ahead:+.0f} s from this machine's",
        "run an NTP client here: which of two files is the later one depends on both clocks",
    )


def resources(experiment: Experiment) -> Iterator[Check]:
    """Processors, memory and GPUs against the workers that the experiment asks for."""
    cluster, search = experiment.cluster, experiment.search
    workers = max(cluster.workers, search.workers if search else 0)
    if sys.platform == "linux":
        shared = shutil.disk_usage("/dev/shm").free
        yield Check(
            "shared memory",
            shared >= SHARED_MEMORY,
            f"{_gib(shared)} free in /dev/shm (wants {_gib(SHARED_MEMORY)})",
            "in a container: docker run --shm-size=4g; Ray uses slow files in /tmp otherwise",
            essential=False,
        )
    gpus = _gpus()
    if cluster.address != "local":
        yield Check("machine", True, f"{cluster.address} carries the work")
        yield Check("GPUs", True, f"{len(gpus)} here", essential=False)
        return
    cpus, needed = _cpus(), workers * cluster.cpus_per_worker
    yield Check(
        "CPUs",
        cpus >= needed,
        f"{cpus} ({workers} workers x {cluster.cpus_per_worker:g} = {needed:g} needed)",
        "set cluster.workers or cluster.cpus_per_worker lower; Ray would wait for ever",
    )
    memory, needed = _memory(), RAY_MEMORY + workers * WORKER_MEMORY
    yield Check(
        "memory",
        memory >= needed,
        f"{_gib(memory)} ({_gib(needed)} for Ray and {workers} workers, before any model)",
        "set cluster.workers lower, or use a machine with more memory",
    )
    needed = workers * cluster.gpus_per_worker
    yield Check(
        "GPUs",
        len(gpus) >= needed,
        f"{', '.join(gpus) or 'none'} ({needed:g} needed)",
        "set cluster.gpus_per_worker=0, or use a machine with GPUs and nvidia-smi",
    )


def port(number: int, purpose: str) -> Check:
    """Whether a port of the loopback interface is free, and by whom it is used."""
    with socket.socket() as probe:
        probe.settimeout(1)
        free = probe.connect_ex(("127.0.0.1", number)) != 0
    open_to = "" if free or not _reachable(number) else ", and reachable from other machines"
    return Check(
        f"port {number}",
        free,
        f"free for {purpose}" if free else f"used by {_listener(number)}{open_to}",
        f"{purpose} must take another port, unless that is it"
        + ("; bind it to 127.0.0.1 and forward the port to who may use it" if open_to else ""),
        essential=False,
    )


def token() -> Iterator[Check]:
    """Whether others may read the token that lets one use Ray, where there is one."""
    path = token_file()
    if path.exists():
        yield Check(
            "Ray's token",
            not readable_by_others(path),
            f"{path} has mode {path.stat().st_mode & 0o777:04o}",
            f"chmod 600 {path}; whoever reads it may run code on the cluster",
            essential=False,
        )


def _pins(text: str) -> Iterator[Requirement]:
    for line in text.splitlines():
        if wanted := line.partition("#")[0].strip():
            yield Requirement(wanted)


def _within(version: str, specifier: str) -> bool:
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _cpus() -> int:
    """Cores that this process may use, or the container where that has fewer: whole ones, as Ray counts."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    limit = Path("/sys/fs/cgroup/cpu.max")
    quota, period = limit.read_text().split() if limit.exists() else ("max", "1")
    return cores if quota == "max" else min(cores, int(quota) // int(period))


def _memory() -> int:
    """Bytes of the machine, or of the container where that has less."""
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    total = psutil.virtual_memory().total
    return total if allowed == "max" else min(total, int(allowed))


def _gpus() -> list[str]:
    """Names of the GPUs, by nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    if shutil.which(command[0]) is None:
        return []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except subprocess.SubprocessError:  # of a driver that hangs or is broken
        return []
    return done.stdout.split("\n")[:-1]


def _reachable(number: int) -> bool:
    """Whether something listens on a port of an interface that other machines may reach."""
    addresses = [address for those in psutil.net_if_addrs().values() for address in those]
    for address in addresses:
        if address.family == socket.AF_INET and not address.address.startswith("127."):
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((address.address, number)) == 0:
                    return True
    return False


def _listener(number: int) -> str:
    """The process that listens on a port, as far as this user may know."""
    try:
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.laddr[1:2] == (number,) and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    except psutil.Error:
        pass  # what other users' processes do is not told to everyone; the port is taken all the same
    return "another process"
