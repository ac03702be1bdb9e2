"""A real MLflow server, and doors to it that misbehave on command; all on this machine's own address."""

import http.client
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from orchestration.records import journal
from tests.orchestration.conftest import histories

TOKEN = "canary-5f1e0c2a-token"
"""What the doors ask for."""


class Server:
    """An MLflow server on SQLite, in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
        command += ["--artifacts-destination", str(folder / "artifacts")]
        # Its own way to SQLite knows no tokens; those are the doors' affair.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_TRACKING")}
        with (folder / "server.log").open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True
            )
        while not self._answers():
            assert self.process.poll() is None, (folder / "server.log").read_text()[-2000:]
            time.sleep(0.2)

    def _answers(self) -> bool:
        with suppress(OSError):
            return ask(self.port, "GET", "/health").status == 200
        return False

    def fill_disk(self, full: bool) -> None:
        """Let none of its files grow beyond a page from now on, as on a disk without room, or end that."""
        limit = 4096 if full else resource.RLIM_INFINITY
        root = psutil.Process(self.process.pid)
        for process in (root, *root.children(recursive=True)):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    def end(self) -> None:
        root = psutil.Process(self.process.pid)
        for process in (*root.children(recursive=True), root):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


class Door:
    """A way to the server that wants the token, and breaks down as it is told to."""

    def __init__(self, server: Server, *, seconds: float) -> None:
        """A slow answer takes so many `seconds`."""
        self.server, self.seconds, self.port = server, seconds, free_port()
        self.manner = "well"
        self._listening: ThreadingHTTPServer | None = None
        self.open()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        """Answer again."""
        self.manner = "well"
        if self._listening is None:
            door = self

            class Handler(BaseHTTPRequestHandler):
                def __getattr__(self, name: str) -> Callable[[], None]:
                    if not name.startswith("do_"):
                        raise AttributeError(name)
                    return lambda: door.answer(self)

                def log_message(self, *said: object) -> None:
                    pass

            self._listening = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
            threading.Thread(target=self._listening.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Refuse connections."""
        if self._listening:
            self._listening.shutdown()
            self._listening.server_close()
            self._listening = None

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        right = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        if self.manner == "500":
            return reply(request, 500, b"broken")
        if self.manner == "401" or not right:
            return reply(request, 401, b"who are you?")
        headers = {
            name: value
            for name, value in request.headers.items()
            if name.lower() in ("content-type", "accept")
        }
        answer = ask(self.server.port, request.command, request.path, body, headers)
        text = answer.read()
        if self.manner == "slow":  # what it was asked for is done by then
            time.sleep(self.seconds)
        with suppress(OSError):  # who asked has gone
            reply(request, answer.status, text, answer.headers.get("Content-Type"))
        return None


def reply(to: BaseHTTPRequestHandler, status: int, body: bytes, kind: str | None = None) -> None:
    to.send_response(status)
    to.send_header("Content-Type", kind or "text/plain")
    to.send_header("Content-Length", str(len(body)))
    to.end_headers()
    to.wfile.write(body)


def ask(
    port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request(method, path, body=body, headers=headers or {})
    return connection.getresponse()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Outage:
    """How a store fails while a run goes on: at which share of it what is done to its door or server."""

    begins: float
    ends: float
    """Above 1: not before the run has ended."""
    do: Callable[[Door], None]

    def undo(self, door: Door) -> None:
        door.server.fill_disk(False)
        door.open()


def manner(name: str) -> Callable[[Door], None]:
    return lambda door: setattr(door, "manner", name)


OUTAGES = {
    "down at the start": Outage(0, 0.5, Door.close),
    "down in mid-run": Outage(0.3, 0.7, Door.close),
    "down to the end": Outage(0.3, 2, Door.close),
    "answering 500": Outage(0.3, 2, manner("500")),
    "answering slowly": Outage(0, 2, manner("slow")),
    "refusing the token": Outage(0.3, 2, manner("401")),
    "disk full": Outage(0.3, 2, lambda door: door.server.fill_disk(True)),
}


def differences(client, run_id: str, folder: Path) -> dict[str, int]:
    """Points of a run's journals that the store lacks, has twice, or has with another value."""
    entries = journal.read(folder)[0]
    for path in folder.glob(f"nodes/*/{journal.NAME}"):
        entries += journal.read(path.parent)[0]
    wanted = {(key, step): value for key, step, value, _ in journal.points(entries)}
    found = [
        ((key, step), value)
        for key, points in histories(client, run_id).items()
        for step, value in points
    ]
    held = dict(found)
    return {
        "points": len(wanted),
        "lost": len(wanted.keys() - held.keys()),
        "doubled": len(found) - len(held),
        "others": sum(held[point] != wanted[point] for point in held.keys() & wanted.keys()),
        "unknown": len(held.keys() - wanted.keys()),
    }
