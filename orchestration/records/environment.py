"""What a run was made with: software, its commit, and the machine that the command was typed on."""

import platform
import socket
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("ray", "deepspeed", "torch", "transformers", "peft", "bitsandbytes", "safetensors",
            "mlflow", "optuna", "numpy", "pyarrow", "pillow")  # fmt: skip
HOME = Path(__file__).parents[2]


@cache
def environment() -> dict[str, Any]:
    """Versions, `commit` (None where there is none), whether files differ from it, and machine.

    No variable of the environment and no argument is among them: they may hold secrets.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _git(*arguments: str) -> str | None:
    """What git says of this project; None where it lies in no repository, or there is no git."""
    command = ["git", "-C", str(HOME), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
