"""What submitted trainings survive: a node, the head, the driver or the submitter killed at random moments.

    python -m tests.benchmarks.submitting [--seeds 5] [--only KIND ...] [--write tests/benchmarks/results]

As `tests.benchmarks.surviving`, but every run is `dsvl submit train --wait` to a cluster behind a token, of
a head that carries no work and two nodes of a CPU. The first and the fifth of each kind are disturbed while
they prepare the data, the others while they train on those of the undisturbed run. Prepared data and losses
are held against its own as well.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import psutil

from orchestration.records import journal
from tests.benchmarks.surviving import UPDATES, Run, main
from tests.orchestration.conftest import digits
from tests.orchestration.machines import Machines


class Submitted(Run):
    """One training that is carried to the cluster, from its file on."""

    machines: ClassVar[Machines | None] = None
    nodes: ClassVar[list[subprocess.Popen]] = []

    def write(self, folder: Path, name: str) -> Path:
        """Its experiment, with a storage of its own."""
        (own := folder / name).mkdir()
        (own / "raw").symlink_to(folder / "raw")
        prepared = folder / "unbroken/runs/prepared"
        self.prepares = not prepared.exists() or name.endswith(("0", "4"))
        if not self.prepares:
            ours = shutil.ignore_patterns(".work")
            shutil.copytree(prepared, own / "runs/prepared", ignore=ours)
        return digits(own, name)

    @classmethod
    def cluster(cls) -> Machines:
        """The machines that all runs share, started where there are none."""
        if cls.machines is None:
            cls.machines = Machines(cpus=0, dashboard=True)
            cls.nodes = [cls.machines.add(cpus=1) for _ in range(2)]
            cls.machines.wait_for_dashboard()
        return cls.machines

    @classmethod
    def end_cluster(cls) -> None:
        """The head and all its nodes go."""
        if cls.machines:
            cls.machines.end()
            cls.machines = None

    def start(self) -> None:
        """Type `dsvl submit train --wait`."""
        machines = self.cluster()
        command = [sys.executable, "-m", "orchestration.cli", "submit", "train", str(self.file)]
        command += ["--wait", "--address", machines.dashboard]
        environment = os.environ | {"RAY_AUTH_TOKEN": machines.token}
        with self.file.with_suffix(".log").open("a") as log:
            self.driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that takes a while."""
        while not holds():
            self.running()
            time.sleep(0.1)

    def begun(self, draw: random.Random) -> subprocess.Popen:
        """The submitter, in the midst of the preparation, or when a number of updates have been made."""
        self.start()
        self.notes["while_preparing"] = self.prepares
        if self.prepares:
            self.until(lambda: any(self.folder.parent.glob("prepared/.work/*")))
            time.sleep(2 * draw.random())
        else:
            self.reach(draw.randint(1, UPDATES - 10))
        assert self.driver is not None
        return self.driver

    def outcome(self) -> dict[str, bytes]:
        """The files of its last checkpoint, every loss, and the digests of its prepared data."""
        (prepared,) = self.folder.parent.glob("prepared/*/manifest.json")
        files = json.loads(prepared.read_text())["files"]
        found = {"losses": journal.curve(self.folder, "train/loss"), "prepared": files}
        assert [step for step, _ in found["losses"]] == list(range(1, UPDATES + 1))
        return super().outcome() | {
            name: json.dumps(value).encode() for name, value in found.items()
        }


def a_worker_node(draw: random.Random, run: Submitted) -> None:
    """A node that works goes, with all its processes, and another comes."""
    run.begun(draw)
    at_work = [node for node in run.nodes if _works(node)]
    lost = draw.choice(at_work or run.nodes)
    run.cluster().kill(lost)
    run.nodes[run.nodes.index(lost)] = run.cluster().add(cpus=1)


def the_head(draw: random.Random, run: Submitted) -> None:
    """The head and all its nodes go; the same command on a new cluster with the same storage."""
    submitter = run.begun(draw)
    run.end_cluster()
    submitter.wait()
    run.start()


def the_driver(draw: random.Random, run: Submitted) -> None:
    """SIGKILL of what the head runs of the job; the submitter sends it again by itself."""
    run.begun(draw)
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            named = " ".join(process.cmdline())
            ours = process.environ().get("RAY_AUTH_TOKEN") == run.cluster().token
            if ours and "python" in named and " train experiment.yaml" in named:
                process.kill()


def the_submitter(draw: random.Random, run: Submitted) -> None:
    """SIGKILL of the process that was typed, and the same command again at once."""
    submitter = run.begun(draw)
    submitter.kill()
    submitter.wait()
    run.start()


def _works(node: subprocess.Popen) -> bool:
    """Whether a node carries a worker of a training or a preparation."""
    for process in psutil.Process(node.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] and process.cmdline()[0].startswith(WORKERS):
                return True
    return False


WORKERS = ("ray::RayTrainWorker", "ray::MapWorker")
KINDS = {
    "a-worker-node": a_worker_node,
    "the-head": the_head,
    "the-driver": the_driver,
    "the-submitter": the_submitter,
}

if __name__ == "__main__":
    try:
        main("submitting", KINDS, Submitted)
    finally:
        Submitted.end_cluster()
