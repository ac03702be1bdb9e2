"""Whether a cluster can ever hold what is asked of it: said at once, where Ray would wait for ever."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray._private.utils import get_num_cpus

from orchestration.cluster import connect
from orchestration.config import Experiment
from orchestration.space import searched

GRAIN = 1e-4
"""The smallest share of a CPU that Ray knows."""
TRIAL_CPUS = 0.1
"""What a trial takes beside its workers: it only waits for them."""


def resources(experiment: Experiment) -> dict[str, float]:
    """What a worker of a training takes of its node."""
    cluster = experiment.cluster
    needed = {"CPU": cluster.cpus_per_worker, "GPU": float(cluster.gpus_per_worker)}
    return {kind: amount for kind, amount in needed.items() if amount}


def require_room_for_trials(experiment: Experiment) -> None:
    """Refuse a search of which the connected cluster can never hold a single trial, with a ValueError."""
    require_room(experiment, workers=searched(experiment).workers, beside=TRIAL_CPUS)


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


@contextmanager
def room_for_trials(experiment: Experiment) -> Iterator[None]:
    """Connect to the cluster, if it is running already; refuse a search of which not one trial fits there.

    Where Ray is to be started on this machine, by its cores; GPUs and labels are left to what starts it.

    Raises:
        ValueError: with the arithmetic.
    """
    cluster, workers = experiment.cluster, searched(experiment).workers
    if cluster.address != "local" or ray.is_initialized():
        with connect(experiment):
            require_room_for_trials(experiment)
            yield
        return
    cpus, needed = get_num_cpus(), workers * cluster.cpus_per_worker + TRIAL_CPUS
    if needed > cpus + GRAIN:
        raise ValueError(
            f"{workers} workers of {cluster.cpus_per_worker:g} CPU and {TRIAL_CPUS:g} CPU for the trial "
            f"itself can never be placed: they take {needed:g} CPU, and this machine has {cpus}; set fewer "
            "workers, less cluster.cpus_per_worker, or a cluster.address of more machines"
        )
    yield


def _room(offered: Mapping[str, float], needed: dict[str, float]) -> int:
    """How many workers fit into what is offered."""
    return min(int((offered.get(kind, 0.0) + GRAIN) / amount) for kind, amount in needed.items())


def _labelled(node: dict[str, Any], experiment: Experiment) -> bool:
    """Whether a node has the labels that a training asks for; Ray's operators are left to Ray."""
    wanted = experiment.cluster.gpu_labels.items()
    plain = {key: value for key, value in wanted if not value.startswith(("!", "in("))}
    return plain.items() <= node["Labels"].items()
