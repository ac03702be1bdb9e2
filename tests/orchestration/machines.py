"""Ray clusters on this machine whose nodes come and go, by hand or as there is work, and their drivers."""

import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import psutil
from ray._private import parameter
from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG

DRIVER = """
import json, sys
from orchestration.compose import load
from orchestration.prepare import prepare
result = prepare(load(sys.argv[1], sys.argv[2:]), progress=lambda line: print(line, file=sys.stderr))
print(json.dumps(result))
"""


class Machines:
    """A head without CPUs of its own, unless it is given some, and the nodes that join it."""

    def __init__(self, *, cpus: int, dashboard: bool = False) -> None:
        """`dashboard`: whether jobs can be submitted."""
        self._folder = tempfile.mkdtemp(
            prefix="dsvl-", dir="/tmp"
        )  # sockets allow short paths only
        self._environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": (token := secrets.token_hex(32)),
            "RAY_DISABLE_IMPORT_WARNING": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        self.token = token
        port, web = free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{web}"
        self._nodes: list[subprocess.Popen[bytes]] = []
        self._start(
            "--head", f"--port={port}", f"--temp-dir={self._folder}", f"--num-cpus={cpus}",
            f"--include-dashboard={dashboard}", f"--dashboard-port={web}", *self._scaling(),
        )  # fmt: skip

    def add(
        self, *, cpus: int, disk: tuple[Path, Path] | None = None, **options: str
    ) -> subprocess.Popen[bytes]:
        """A node more; options are those of `ray start`. `disk`: what it finds in the place of a folder."""
        given = (f"--{name.replace('_', '-')}={value}" for name, value in options.items())
        own = f"--temp-dir={self._folder}/{len(self._nodes)}"  # or nodes would unpack jobs into one folder
        node = (f"--address={self.address}", f"--num-cpus={cpus}", own, *given)
        return self._start(*node, within=apart(*disk) if disk else ())

    def wait_for_dashboard(self) -> None:
        """Wait until jobs can be submitted."""
        port = urlsplit(self.dashboard).port

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(answers)

    def known(self, kind: str) -> list[dict[str, Any]]:
        """What the cluster's state API lists: `actors`, `tasks` or `nodes`, those that have ended too."""
        request = urllib.request.Request(
            f"{self.dashboard}/api/v0/{kind}?detail=1&limit=10000",
            headers={"Authorization": f"Bearer {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]["result"]["result"]

    def running(self, title: str) -> int:
        """How many processes of the nodes have a title that begins so: a program, or what Ray calls them."""
        titles = []
        for node in self._nodes:
            for process in psutil.Process(node.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    titles.append(Path("".join(process.cmdline()[:1])).name)
        return sum(own.startswith(title) for own in titles)

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
        """A preparation on this cluster that has begun."""
        return self.run(DRIVER, experiment, f"cluster.address={self.address}", *overrides)

    def run(self, code: str, *arguments: object) -> subprocess.Popen[bytes]:
        """A driver that has begun."""
        return subprocess.Popen(
            [sys.executable, "-c", code, *map(str, arguments)],
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

    def _scaling(self) -> Sequence[str]:
        """What the head is told of nodes that are to come and go by themselves: nothing."""
        return ()

    def _start(self, *options: str, within: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        node = subprocess.Popen(
            [
                *within, str(Path(sys.executable).parent / "ray"), "start", "--block",
                f"--dashboard-agent-listen-port={free_port()}", *options,
            ],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        self._nodes.append(node)
        return node


class Nodes(FakeMultiNodeProvider):
    """Processes of this machine that are nodes, each with a folder of its own, as in `Machines.add`."""

    def _create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Any, labels: Any
    ) -> None:
        with self.lock:
            own = f"{self.provider_config['folder']}/{self._next_node_id}"
            settings = partial(RayParams, temp_dir=own)
            with patch.object(parameter, "RayParams", settings):
                super()._create_node_with_resources_and_labels(
                    node_config, tags, count, resources, labels
                )


class Autoscaled(Machines):
    """A head that has no CPU and starts nodes of one as there is work; idle ones end.

    Ray's second autoscaler, as in KubeRay, which knows labels.
    """

    def __init__(self, *, pools: Mapping[str, int], dashboard: bool = False) -> None:
        """`pools`: the label `pool` of nodes -> how many there may be of them."""
        self._pools = pools
        super().__init__(cpus=0, dashboard=dashboard)

    @property
    def nodes(self) -> int:
        """How many there are beside the head."""
        return self.running("raylet") - 1

    def _scaling(self) -> Sequence[str]:
        self._environment |= {
            "PYTHONPATH": str(Path(__file__).parents[2]),  # where the head finds what starts nodes
            "RAY_FAKE_CLUSTER": "1",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
            "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            # A driver asks for nodes every 10 s by default, and for 180 s: longer than a test has work.
            "RAY_DATA_MIN_GAP_BETWEEN_AUTOSCALING_REQUESTS": "1",
            "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "8",
        }
        settings = BASE_READONLY_CONFIG | {
            "max_workers": sum(self._pools.values()),
            "idle_timeout_minutes": 0.1,
            "provider": {
                "type": "external",
                "module": f"{__name__}.{Nodes.__name__}",
                "folder": self._folder,
                "gcs_address": self.address,
                "launch_multiple": True,
                "disable_node_updaters": True,
            },
            "available_node_types": {
                FAKE_HEAD_NODE_TYPE: {
                    "resources": {"CPU": 0}, "node_config": {}, "max_workers": 0,
                },
            } | {
                pool: {
                    "resources": {"CPU": 1}, "node_config": {}, "labels": {"pool": pool},
                    "min_workers": 0, "max_workers": most,
                }
                for pool, most in self._pools.items()
            },
        }  # fmt: skip
        path = Path(self._folder) / "scaling.json"
        path.write_text(json.dumps(settings))
        return (f"--autoscaling-config={path}",)


def apart(disk: Path, folder: Path) -> Sequence[str]:
    """What begins a command that finds a disk of its own in the place of a folder."""
    root = [] if os.getuid() == 0 else ["--map-root-user"]
    script = f'mount --bind {shlex.quote(str(disk))} {shlex.quote(str(folder))} && exec "$@"'
    return ["unshare", *root, "--mount", "sh", "-c", script, "sh"]


def free_port() -> int:
    """A port of the loopback interface that nobody uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def finished(driver: subprocess.Popen[bytes]) -> tuple[Any, list[str]]:
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


def options(storage: Path, preparers: int) -> tuple[str, str]:
    """Overrides: where a preparation writes, and how many actors take part."""
    return f"storage.path={storage}", f"cluster.preparers={preparers}"


def manifest(result: dict[str, Any]) -> dict[str, Any]:
    """That of the set that a preparation has made, which holds the digests of all its files."""
    return json.loads((Path(result["folder"]) / "manifest.json").read_text())
