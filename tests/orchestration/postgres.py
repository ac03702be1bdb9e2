"""A real PostgreSQL in a folder of its own, started and ended by a test; it wants a password."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.orchestration.outages import free_port

PASSWORD = "canary-77d0-password"


def programs() -> Path | None:
    """Where Debian's package puts its programs, or None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


class Postgres:
    """A server on this machine's own address; `uri` has no password, PGPASSWORD is for that."""

    def __init__(self) -> None:
        there = programs()
        assert there is not None
        self._programs, self._folder = there, Path(tempfile.mkdtemp(prefix="dsvl-pg-", dir="/tmp"))
        # It refuses to run as root.
        self._user = {"user": "nobody", "group": "nogroup"} if os.getuid() == 0 else {}
        if self._user:
            shutil.chown(self._folder, **self._user)
        secret, port = self._folder / "secret", free_port()
        secret.write_text(PASSWORD)
        secret.chmod(0o644)
        self._do("initdb", "--auth=scram-sha-256", "--username=dsvl", f"--pwfile={secret}")
        options = (
            f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        )
        self._do(
            "pg_ctl", "start", "--wait", f"--log={self._folder / 'log'}", f"--options={options}"
        )
        self.uri = f"postgresql://dsvl@127.0.0.1:{port}/postgres"

    def _do(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), "-D", str(self._folder / "data"), *arguments]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd="/", **self._user)

    def end(self) -> None:
        self._do("pg_ctl", "stop", "--mode=immediate")
        shutil.rmtree(self._folder, ignore_errors=True)
