"""The token that lets one use a Ray cluster: where it is, and that nobody else reads it."""

import os
import secrets
import stat
from contextlib import suppress
from pathlib import Path


def token_file() -> Path:
    """Where Ray looks for the token, if the environment does not have it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray/auth_token")


def token() -> str | None:
    """The token, from the environment or from its file; None where there is none."""
    if given := os.environ.get("RAY_AUTH_TOKEN"):
        return given
    path = token_file()
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def readable_by_others(path: Path) -> bool:
    """Whether other users of this machine may read or write a file."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def make_token() -> None:
    """Make a token that only its owner may read, where there is none: Ray's own is readable by all."""
    if token() is not None:
        return
    path = token_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another process was faster
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(secrets.token_hex(32))
