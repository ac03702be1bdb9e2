"""Whether a cluster can ever hold what is asked of it: said at once, where Ray would wait for ever."""

from collections.abc import Mapping
from typing import Any

import ray
from ray._private.utils import get_num_cpus

from orchestration.config import Experiment

GRAIN = 1e-4
"""The smallest share of a CPU that Ray knows."""


def resources(experiment: Experiment) -> dict[str, float]:
    """What a worker of a training takes of its node."""
    cluster = experiment.cluster
    needed = {"CPU": cluster.cpus_per_worker, "GPU": float(cluster.gpus_per_worker)}
    return {kind: amount for kind, amount in needed.items() if amount}


def require_room(experiment: Experiment, *, workers: int, beside: float = 0.0) -> None:
    """Refuse so many workers, and CPUs beside them, if the connected cluster can never hold them.

    What else runs there is of no account. Which nodes an autoscaler would add, Ray does not tell: where
    `cluster.autoscaled` says that there is one, nothing is refused.

    Raises:
        ValueError: with the arithmetic.
    """
    if experiment.cluster.autoscaled:
        return
    needed = resources(experiment)
    nodes = [node for node in ray.nodes() if node["Alive"] and _labelled(node, experiment)]
    room = sum(_room(node["Resources"], needed) for node in nodes)
    cpus = sum(node["Resources"].get("CPU", 0.0) for node in nodes)
    if room >= workers and cpus >= workers * needed["CPU"] + beside:
        return
    each = " and ".join(f"{amount:g} {kind}" for kind, amount in needed.items())
    found = ", ".join(
        f"{node['NodeManagerHostname']} has "
        + " and ".join(f"{node['Resources'].get(kind, 0):g} {kind}" for kind in needed)
        for node in nodes
    )
    own = f" and {beside:g} CPU for the trial itself" if beside else ""
    labels = (
        f" with labels {experiment.cluster.gpu_labels}" if experiment.cluster.gpu_labels else ""
    )
    raise ValueError(
        f"{workers} workers of {each}{own} can never be placed: the nodes{labels} of the cluster at "
        f"{experiment.cluster.address} hold {room} ({found or 'there is none'}); set fewer workers or less "
        "cluster.cpus_per_worker, or add nodes; if they come by themselves, set cluster.autoscaled=true"
    )


def require_room_here(experiment: Experiment, *, workers: int, beside: float = 0.0) -> None:
    """The same before Ray starts on this machine, which takes seconds; GPUs and labels are left to it.

    Raises:
        ValueError: with the arithmetic.
    """
    cluster = experiment.cluster
    if cluster.address != "local" or ray.is_initialized():
        return
    cpus, needed = get_num_cpus(), workers * cluster.cpus_per_worker + beside
    if needed > cpus + GRAIN:
        own = f" and {beside:g} CPU for the trial itself" if beside else ""
        raise ValueError(
            f"{workers} workers of {cluster.cpus_per_worker:g} CPU{own} can never be placed: they take "
            f"{needed:g} CPU, and this machine has {cpus}; set fewer workers, less cluster.cpus_per_worker, "
            "or a cluster.address of more machines"
        )


def _room(offered: Mapping[str, float], needed: dict[str, float]) -> int:
    """How many workers fit into what is offered."""
    return min(int((offered.get(kind, 0.0) + GRAIN) / amount) for kind, amount in needed.items())


def _labelled(node: dict[str, Any], experiment: Experiment) -> bool:
    """Whether a node has the labels that a training asks for; Ray's operators are left to Ray."""
    wanted = experiment.cluster.gpu_labels.items()
    plain = {key: value for key, value in wanted if not value.startswith(("!", "in("))}
    return plain.items() <= node["Labels"].items()
