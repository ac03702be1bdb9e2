"""Work that is carried to a cluster: `dsvl submit VERB EXPERIMENT --to ray`."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from orchestration.clusters import kuberay, launcher, slurm
from orchestration.clusters.package import portable, require_in_image
from orchestration.clusters.ray_jobs import Request, connected, follow, send, stop, told
from orchestration.config import Experiment, digest
from orchestration.problems import ConfigError, Problem
from orchestration.space import searched

UP = "ray up FILE starts it, and --to ray submits to it"
AWS = f"{UP} with cluster.autoscaled=true and the labels of its nodes, cluster.cpu_labels and gpu_labels"
DASHBOARD = "http://127.0.0.1:8265"


@dataclass(frozen=True)
class Manifest:
    """One way to carry work to machines that come with it."""

    make: Callable[[Experiment, str, str], str]
    """The text, for an experiment, a verb and a name."""
    check: Callable[[str], Iterable[Problem]]
    send: tuple[str, ...]
    """The program that takes the text as its input."""
    stop: tuple[str, ...]
    """The program that ends what has the name which is added."""
    then: str
    """What to do with the text, or once it is sent."""
    named: Callable[[str], str] = str
    """What a work is called there."""


MANIFESTS = {
    "kuberay": Manifest(
        kuberay.manifest,
        kuberay.check,
        ("kubectl", "apply", "--filename=-"),
        ("kubectl", "delete", "--ignore-not-found", "rayjob,configmap"),
        "kubectl get rayjob tells how it is, kubectl logs --follow job/NAME what it says; one that has "
        "failed goes on after --stop and the same command",
        kuberay.object_name,
    ),
    "slurm": Manifest(
        slurm.script,
        slurm.check,
        ("sbatch",),
        ("scancel", "--name"),
        "squeue tells how it is; what it says is in the run's logs",
    ),
    "aws": Manifest(launcher.cloud, launcher.check, (), (), AWS),
    "machines": Manifest(launcher.own, launcher.check, (), (), UP),
}


def submit(
    experiment: Experiment,
    *,
    work: str,
    to: str = "ray",
    address: str | None = None,
    dry_run: bool = False,
    wait: bool = False,
    stopping: bool = False,
    again: bool = False,
    check: bool = False,
) -> dict[str, Any]:
    """Send work to a cluster, or find it there: the same work is one job, however often it is sent.

    Returns the job and its state; for a dry run what would be sent, for a check that it is `ok`.

    Raises:
        ValueError: if the request is wrong, or the cluster is not one that may be used.
    """
    if work == "sweep":
        searched(experiment)  # raises where there is nothing to search
    name = name_of(work, experiment)
    request = Request(work, portable(experiment), name)
    given = {"--wait": wait, "--again": again, "--address": address}
    if to != "ray" and (flags := [flag for flag, value in given.items() if value]):
        raise ValueError(
            f"{', '.join(flags)}: only with --to ray; with --to {to}, {MANIFESTS[to].then}"
        )
    if to != "ray":
        made = _made(request, MANIFESTS[to], printed=dry_run or check, stopping=stopping)
        return {"ok": True, "checked": f"{name} for {to}"} if check else made
    address = (address or os.environ.get("RAY_API_SERVER_ADDRESS") or DASHBOARD).rstrip("/")
    shown = request.shown(address)  # raises where the package is too large
    if check:
        return {"ok": True, "checked": f"{name} for {to}"}
    if dry_run:
        return shown
    client = connected(address)
    if stopping:
        return told(client, stop(client, request)) | {"ok": True}
    job = send(client, request, again=again)
    return told(client, follow(client, request, job) if wait else job)


def _made(request: Request, manifest: Manifest, *, printed: bool, stopping: bool) -> dict[str, Any]:
    """Make a manifest, find what is wrong with it, and send it unless that is all that is asked for.

    Raises:
        ValueError: if it cannot be made, is not valid, or there is no program to send it with.
    """
    require_in_image(request.experiment)
    name = manifest.named(request.stem)
    text = manifest.make(request.experiment, request.verb, name)
    if problems := list(manifest.check(text)):
        raise ConfigError(problems)
    if printed:
        return {"manifest": text, "then": manifest.then}
    command = (*manifest.stop, name) if stopping else manifest.send
    if not manifest.send:
        raise ValueError(f"this is no job but a cluster, which --dry-run prints; {manifest.then}")
    if shutil.which(command[0]) is None:
        raise ValueError(
            f"{command[0]} is not on this machine; --dry-run prints what it would be given"
        )
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    state = "STOPPED" if stopping else "SENT"
    return {
        "job": name,
        "state": state,
        "message": done.stdout.strip(),
        "then": manifest.then,
    }


def name_of(work: str, experiment: Experiment) -> str:
    """What the jobs of a work are called, by what it does: where it runs is of no account."""
    what = {"identity": experiment.identity(), "name": experiment.name}
    if work == "sweep" and experiment.search:
        what["search"] = experiment.as_dict()["search"]
    return f"{work}-{experiment.name}-{digest(what)[:8]}"


def render(result: dict[str, Any]) -> str:
    """A job, or what would be sent, as text for people."""
    if "checked" in result:
        return f"nothing is wrong with {result['checked']}"
    if "manifest" in result:
        return result["manifest"].rstrip()
    if "request" in result:
        files = result["files"]
        counted = (
            f"{len(files)} files, {sum(files.values()) / 1024**2:.1f} MiB; all names with --json"
        )
        shown = {"address": result["address"], **result["request"], "files": counted}
        return yaml.safe_dump(shown, sort_keys=False).strip()
    lines = [f"{result['job']}: {result['state']}"]
    if result["message"]:
        lines.append(result["message"])
    if "then" in result:
        lines.append(result["then"])
    if result["state"] in ("PENDING", "RUNNING"):
        lines.append("the same command tells how it is, --wait follows it, --stop stops it")
    return "\n".join(lines)
