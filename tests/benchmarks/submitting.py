"""What submitted trainings survive: a node, the head, the driver or the submitter killed at random moments.

    python -m tests.benchmarks.submitting [--seeds 5] [--only KIND ...] [--write tests/benchmarks/results]

As `tests.benchmarks.surviving`, but every run is `dsvl submit train --wait` to a cluster of its own behind a
token: a head that carries no work, and two nodes.
"""

import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from tests.benchmarks.surviving import UPDATES, Run, main
from tests.orchestration.machines import Machines


class Submitted(Run):
    """One training that is carried to a cluster, from its file on."""

    def __init__(self, file: Path) -> None:
        super().__init__(file)
        self.cluster()

    def cluster(self) -> None:
        """Start the machines that it runs on."""
        self.machines = Machines(cpus=0, dashboard=True)
        self.nodes = [self.machines.add(cpus=2) for _ in range(2)]
        self.machines.wait_for_dashboard()

    def start(self) -> None:
        """Type `dsvl submit train --wait`."""
        command = [sys.executable, "-m", "orchestration.cli", "submit", "train", str(self.file)]
        command += ["--wait", "--address", self.machines.dashboard]
        environment = os.environ | {"RAY_AUTH_TOKEN": self.machines.token}
        with self.file.with_suffix(".log").open("a") as log:
            self.driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def end(self) -> None:
        """Wait for it; it must end well."""
        try:
            super().end()
        finally:
            self.machines.end()

    def begun(self, draw: random.Random) -> subprocess.Popen:
        """The submitter, when a number of updates have been made."""
        self.start()
        self.reach(draw.randint(1, UPDATES - 10))
        assert self.driver is not None
        return self.driver


def a_worker_node(draw: random.Random, run: Submitted) -> None:
    """A node that has come to work goes, with all its processes."""
    run.begun(draw)
    run.machines.kill(draw.choice(run.nodes))


def the_head(draw: random.Random, run: Submitted) -> None:
    """The head and all its nodes go; the same command on a new cluster with the same storage."""
    submitter = run.begun(draw)
    run.machines.end()
    submitter.wait()
    run.cluster()
    run.start()


def the_driver(draw: random.Random, run: Submitted) -> None:
    """SIGKILL of what the head runs of the job; the submitter sends it again by itself."""
    run.begun(draw)
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            named = " ".join(process.cmdline())
            if "python" in named and " train experiment.yaml" in named and _of(run, process):
                process.kill()


def the_submitter(draw: random.Random, run: Submitted) -> None:
    """SIGKILL of the process that was typed, and the same command again at once."""
    submitter = run.begun(draw)
    submitter.kill()
    submitter.wait()
    run.start()


def _of(run: Submitted, process: psutil.Process) -> bool:
    return process.environ().get("RAY_AUTH_TOKEN") == run.machines.token


KINDS = {
    "a-worker-node": a_worker_node,
    "the-head": the_head,
    "the-driver": the_driver,
    "the-submitter": the_submitter,
}

if __name__ == "__main__":
    main("submitting", KINDS, Submitted)
