"""Work on a Ray cluster as its jobs: sent once, followed, stopped, and sent again when it was killed."""

import asyncio
import json
import logging
import os
import re
import shlex
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from orchestration.clusters.access import readable_by_others, token, token_file
from orchestration.clusters.package import EXPERIMENT, contents, described, pack
from orchestration.config import Experiment
from orchestration.problems import harmless
from orchestration.records.results import JOB

log = logging.getLogger(__name__)

CHATTY = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
"""Loggers that tell of every request."""
RECORDS = re.compile(r"(INFO|WARNING|ERROR) |\[?\d{4}-\d\d-\d\d |Running entrypoint for job ")
"""How lines begin that a command, its libraries and Ray say on the way."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
SIGNAL = 128
"""Exit statuses from here on tell of a signal, as those of a shell do."""


@dataclass(frozen=True)
class Request:
    """A command for a cluster."""

    verb: str
    experiment: Experiment
    stem: str
    """Names the work: what its jobs are called, but for the number of the attempt."""

    @property
    def entrypoint(self) -> str:
        """What the head runs; workers are where Ray places them."""
        return shlex.join(["python", "-m", "jobs.work", self.verb, EXPERIMENT])

    def body(self, attempt: int) -> dict[str, Any]:
        """What is sent, beside the package."""
        job = f"{self.stem}-{attempt}"
        return {
            "submission_id": job,
            "entrypoint": self.entrypoint,
            "runtime_env": {"env_vars": {JOB: job}},
            "metadata": {"verb": self.verb, "name": self.experiment.name},
        }

    def shown(self, address: str) -> dict[str, Any]:
        """All that would be sent, for a dry run: the first attempt, and every file with its size."""
        files = {name: path.stat().st_size for name, path in contents(self.experiment).items()}
        request = self.body(1)
        request["runtime_env"]["working_dir"] = f"a copy of these files, and {EXPERIMENT}"
        return {
            "address": address,
            "request": request,
            "files": files,
            EXPERIMENT: described(self.experiment),
        }


def connected(address: str) -> JobSubmissionClient:
    """A client of the cluster whose dashboard has this address.

    Raises:
        ValueError: if nothing answers there, whoever asks may use it, or it does not take our token.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"--address {address!r} must read http://HOST:PORT, the cluster's dashboard"
        )
    try:
        with urllib.request.urlopen(f"{address}/api/authentication_mode", timeout=30) as answer:
            mode = json.load(answer)["authentication_mode"]
    except OSError as error:
        raise ValueError(
            f"no Ray dashboard answers at {address} ({error}); start the cluster, or forward its port "
            "8265 to this machine"
        ) from None
    for chatty in CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # or Ray would follow RAY_ADDRESS instead
    if mode != "token":
        open_to_all = f"{address} asks for no token: whoever reaches it may run code on the cluster"
        if parts.hostname not in LOOPBACK:
            raise ValueError(f"{open_to_all}; start Ray there with RAY_AUTH_MODE=token")
        log.warning("%s; start Ray with RAY_AUTH_MODE=token", open_to_all)
        return JobSubmissionClient(address)
    secret = token()
    if secret is None:
        raise ValueError(
            f"{address} asks for a token, and there is none: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, "
            f"or put it into {token_file()} with mode 0600"
        )
    kept = token_file().is_file() and not os.environ.get("RAY_AUTH_TOKEN")
    if kept and readable_by_others(token_file()):
        log.warning("others may read %s; chmod 600 %s", token_file(), token_file())
    try:
        return JobSubmissionClient(address, headers={"Authorization": f"Bearer {secret}"})
    except AuthenticationError:
        raise ValueError(
            f"{address} does not take our token; ask who started it for theirs"
        ) from None


def send(client: JobSubmissionClient, request: Request, *, again: bool) -> JobDetails:
    """The newest job of this work, sent if there is none that runs or, unless `again`, has succeeded."""
    before = _attempts(client, request.stem)
    newest = max(before, default=0)
    if newest:
        state = before[newest].status
        if not state.is_terminal() or (state == JobStatus.SUCCEEDED and not again):
            return before[newest]
    body = request.body(newest + 1)
    with tempfile.TemporaryDirectory() as folder:
        pack(request.experiment, Path(folder))
        body["runtime_env"]["working_dir"] = folder
        try:
            client.submit_job(**body)
        except RuntimeError:
            # Somebody else may have sent it in between: then it is theirs that runs.
            if newest + 1 not in _attempts(client, request.stem):
                raise
    return client.get_job_info(body["submission_id"])


def follow(client: JobSubmissionClient, request: Request, job: JobDetails) -> JobDetails:
    """Show what a job says until it ends; what was killed is sent again, up to `cluster.failures` times.

    Ctrl-C leaves it running.
    """
    for left in range(request.experiment.cluster.failures, -1, -1):
        try:
            asyncio.run(_show(client, _id(job)))
            job = _ended(client, _id(job))
        except KeyboardInterrupt:
            log.warning("%s goes on; the same command follows it again, --stop stops it", _id(job))
            raise
        if job.status != JobStatus.FAILED or not killed(job.driver_exit_code) or not left:
            return job
        log.warning("%s was killed (%s); sent again", _id(job), job.message)
        job = send(client, request, again=False)
    return job


def killed(status: int | None) -> bool:
    """Whether a driver was ended from outside: by a signal, or with its node, so that nothing is told."""
    return status is None or status < 0 or status >= SIGNAL


def stop(client: JobSubmissionClient, request: Request) -> JobDetails:
    """Stop the newest job of this work, wait for its end, and say how it ended.

    Raises:
        ValueError: if it has none.
    """
    attempts = _attempts(client, request.stem)
    if not attempts:
        raise ValueError(f"{request.verb} of {request.experiment.name} was never submitted there")
    job = attempts[max(attempts)]
    client.stop_job(_id(job))
    return _ended(client, _id(job))


def told(client: JobSubmissionClient, job: JobDetails) -> dict[str, Any]:
    """What there is to say of a job; of one that failed by itself the cause, with which its command ended."""
    message = job.message or ""
    if job.status == JobStatus.FAILED and not killed(job.driver_exit_code):
        message = _last_words(client.get_job_logs(_id(job))) or message
    return {
        "job": _id(job),
        "state": str(job.status.value),
        "message": message,
        "exit_status": job.driver_exit_code,
        "ok": job.status != JobStatus.FAILED,
    }


def _last_words(log: str) -> str:
    """What a command says after all records of its log: why it failed."""
    lines = log.splitlines()
    records = [number for number, line in enumerate(lines, start=1) if RECORDS.match(line)]
    return harmless("\n".join(lines[max(records, default=0) :]).strip())


def _id(job: JobDetails) -> str:
    assert (
        job.submission_id is not None
    )  # as jobs have that were not started by a driver of their own
    return job.submission_id


def _attempts(client: JobSubmissionClient, stem: str) -> Mapping[int, JobDetails]:
    """The jobs of one work by the number of the attempt."""
    named = {job.submission_id or "": job for job in client.list_jobs()}
    return {
        int(name.removeprefix(f"{stem}-")): job
        for name, job in named.items()
        if name.startswith(f"{stem}-")
    }


async def _show(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        sys.stderr.write(harmless(lines))
        sys.stderr.flush()


def _ended(client: JobSubmissionClient, job: str) -> JobDetails:
    while not (details := client.get_job_info(job)).status.is_terminal():
        time.sleep(0.2)
    return details
