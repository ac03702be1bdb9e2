"""A Ray cluster of several nodes on this machine, and drivers that come and go."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

DRIVER = """
import json, sys
from orchestration.compose import load
from orchestration.prepare import prepare
result = prepare(load(sys.argv[1], sys.argv[2:]), progress=lambda line: print(line, file=sys.stderr))
print(json.dumps(result))
"""


class Machines:
    """A head without CPUs of its own, unless it is given some, and the nodes that join it."""

    def __init__(self, *, cpus: int) -> None:
        self._folder = tempfile.mkdtemp(
            prefix="dsvl-", dir="/tmp"
        )  # sockets allow short paths only
        self._environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_DISABLE_IMPORT_WARNING": "1",
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._start(
            "--head", f"--port={port}", f"--temp-dir={self._folder}", f"--num-cpus={cpus}",
            "--include-dashboard=false",
        )  # fmt: skip

    def add(self, *, cpus: int) -> subprocess.Popen[bytes]:
        """A node more."""
        return self._start(f"--address={self.address}", f"--num-cpus={cpus}")

    def kill(self, process: subprocess.Popen[bytes]) -> None:
        """End a node or a driver at once, with all that it has started: its cable is pulled."""
        try:
            family = [psutil.Process(process.pid)]
            family += family[0].children(recursive=True)
        except psutil.NoSuchProcess:
            return
        for member in family:
            try:
                member.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        process.wait()

    def driver(self, experiment: Path, *overrides: str) -> subprocess.Popen[bytes]:
        """A preparation that has begun."""
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(experiment), *overrides],
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def prepare(self, experiment: Path, *overrides: str) -> tuple[dict[str, Any], list[str]]:
        """What a whole preparation returns, and what it says on the way."""
        return finished(self.driver(experiment, *overrides))

    def end(self) -> None:
        """Stop everything, the head last."""
        for node in reversed(self._nodes):
            self.kill(node)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        node = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), "start", "--block", *options],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._nodes.append(node)
        return node


def finished(driver: subprocess.Popen[bytes]) -> tuple[dict[str, Any], list[str]]:
    """What a driver returns in the end, and the lines that it has said."""
    out, said = driver.communicate(timeout=300)
    assert driver.returncode == 0, said.decode()
    return json.loads(out.splitlines()[-1]), said.decode().splitlines()


def wait_until(holds: Callable[[], bool], *, seconds: float = 120.0) -> None:
    """Wait for something that takes a while."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it has not come to pass"
        time.sleep(0.02)


def names(folder: Path, pattern: str) -> Sequence[str]:
    """The files or folders so named."""
    return sorted(path.name for path in folder.glob(pattern))
