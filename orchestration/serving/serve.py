"""Models behind an address: Ray Serve runs the gate and every model, each in a process of its own."""

import hashlib
import ipaddress
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.applications import Starlette

from dsvl import pretrained
from dsvl.answers import Answers, Piece, Question
from dsvl.cache import ImageStore
from dsvl.config import require
from dsvl.data.encode import load_tokenizer
from dsvl.data.images import ImageProcessor
from orchestration.cluster import connect
from orchestration.config import Experiment
from orchestration.serving.batching import Batches, BusyError
from orchestration.serving.gate import Gate, Limits, LostError, Model
from orchestration.trained import Subject

log = logging.getLogger(__name__)

TOKEN = "DSVL_TOKEN"
"""The environment variable that may hold the token of clients."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""What this machine is called by itself."""
WAITING = 64
"""Questions that may wait for a model."""


@serve.deployment(max_ongoing_requests=2 * WAITING, max_queued_requests=WAITING)
class Talker:
    """A model that answers."""

    def __init__(self, subject: Subject) -> None:
        """Load it."""
        model = pretrained.load(subject.folder, precision=subject.manner["precision"])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        answers = Answers(
            model.to(device).eval(),
            load_tokenizer(subject.tokenizer),
            device=device,
            max_tokens=subject.manner["max_tokens"],
            store=ImageStore(limit_bytes=2**30),
        )
        self._batches = Batches(answers, waiting=WAITING)

    async def answer(self, question: Question) -> AsyncGenerator[Piece, None]:
        """As `Batches.ask`."""
        async with aclosing(self._batches.ask(question)) as pieces:
            async for piece in pieces:
                yield piece


@serve.deployment(max_ongoing_requests=256, ray_actor_options={"num_cpus": 0})
@serve.ingress()
class Entrance:
    """The gate, in a process where images that are sent can harm no model."""

    def __init__(
        self,
        subjects: dict[str, Subject],
        talkers: dict[str, DeploymentHandle],
        token: str,
        limits: Limits,
        hosts: Sequence[str],
    ) -> None:
        """By the names of the models; the token as its sha256."""
        models = {
            name: Model(
                ImageProcessor.from_checkpoint(subject.processor),
                subject.manner["max_tokens"],
                subject.manner["max_image_pixels"],
                partial(_answer, talkers[name]),
            )
            for name, subject in subjects.items()
        }
        self._gate = Gate(models, token=token, limits=limits, hosts=hosts)

    def __serve_build_asgi_app__(self) -> Starlette:
        """What Ray Serve asks for."""
        return self._gate.app()


async def _answer(talker: DeploymentHandle, question: Question) -> AsyncGenerator[Piece, None]:
    """As `Talker.answer`, of another process."""
    pieces = talker.options(stream=True).answer.remote(question)
    assert isinstance(pieces, DeploymentResponseGenerator)
    try:
        async for piece in pieces:
            yield piece
    except RayTaskError as error:
        raise error.cause from error
    except BackPressureError as error:
        raise BusyError("too many questions wait already; ask again later") from error
    except (RayActorError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
        raise LostError("the model was lost and is started anew; ask again in a minute") from error
    finally:
        pieces.cancel()


def run(
    models: Sequence[Subject], *, experiment: Experiment | None, host: str, port: int
) -> dict[str, Any]:
    """Serve models until Ctrl-C or SIGTERM, on the cluster of an experiment if one is given.

    Returns:
        The `address` where they were, and the folder of each of the `models`.

    Raises:
        ValueError: if the address is taken or not this machine's, or others could come without a token.
    """
    token = _token(host)
    _check_free(host, port)
    subjects = _named(models)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    with connect(experiment):
        try:
            signal.signal(signal.SIGTERM, _interrupt)
            _start(subjects, token=token, host=host, port=port)
            log.info("%s: serving %s; Ctrl-C ends", address, ", ".join(subjects))
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
            log.info("ending")
        finally:
            serve.shutdown()
    folders = {name: str(subject.folder) for name, subject in subjects.items()}
    return {"address": address, "models": folders}


def _start(subjects: dict[str, Subject], *, token: str, host: str, port: int) -> None:
    """Have Ray Serve run all of it, and wait until it does."""
    gpus = ray.cluster_resources().get("GPU", 0)
    logs = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(
        proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=logs
    )
    resources = {"num_cpus": 0, "num_gpus": min(1.0, gpus / len(subjects))}
    talkers = {
        name: Talker.options(name=f"model-{number}", ray_actor_options=resources).bind(subject)
        for number, (name, subject) in enumerate(subjects.items())
    }
    digest = hashlib.sha256(token.encode()).hexdigest()
    hosts = (*LOOPBACK, host) if _is_loopback(host) else ()
    entrance = Entrance.bind(subjects, talkers, digest, Limits(), hosts)
    serve.run(entrance, name="dsvl", route_prefix="/", logging_config=logs)


def _named(subjects: Sequence[Subject]) -> dict[str, Subject]:
    """Each by its name, followed by a number where an earlier one has that already."""
    named: dict[str, Subject] = {}
    for subject in subjects:
        name, number = subject.name, 2
        while name in named:
            name, number = f"{subject.name}-{number}", number + 1
        named[name] = subject
    return named


def _token(host: str) -> str:
    """What clients have to show: of the environment, else one of our own for this machine alone."""
    if token := os.environ.get(TOKEN, ""):
        require(
            len(token) >= 16 and token.isascii() and token.isprintable() and " " not in token,
            TOKEN,
            "***",
            "must have 16 or more letters and no blank; `openssl rand -hex 32` makes one",
        )
        return token
    require(
        _is_loopback(host),
        "--host",
        host,
        f"lets others ask, so they need a token: set {TOKEN}, as to what `openssl rand -hex 32` gives",
    )
    settings = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    path = settings / "dsvl/token"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        require(not path.stat().st_mode & 0o077, str(path), "others may read it", "chmod 600 it")
        log.info("clients show the token in %s", path)
        return path.read_text(encoding="ascii").strip()
    token = secrets.token_hex(32)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"{token}\n")
    print(f"clients show this token, told this once and kept in {path}: {token}", file=sys.stderr)
    return token


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _check_free(host: str, port: int) -> None:
    require(0 < port < 2**16, "--port", port, "must lie between 1 and 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            told = f"{host}:{port}: {error.strerror or error}; choose another --host or --port"
            raise ValueError(told) from error


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
