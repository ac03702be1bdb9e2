"""The nodes of a cluster that is made for one work: by KubeRay, the cluster launcher or Slurm."""

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from orchestration.settings import Section

if TYPE_CHECKING:
    from orchestration.config import Experiment  # which has these settings as a section


class DeployConfig(Section):
    """What the nodes are that a manifest asks for. It changes nothing of what is trained."""

    image: str = "dsvl:0.1.0"
    """The container of all nodes, as `jobs/Dockerfile` makes it, with a tag or a digest."""
    gpus_per_node: int = Field(default=8, gt=0)
    """GPUs of a node that trains."""
    gpu_nodes: int | None = Field(default=None, gt=0)
    """Most of them; as many as the workers need when empty. Fewer are refused."""
    gpu_node_memory_gib: int = Field(default=512, gt=0)
    gpu_machine: str = "p4de.24xlarge"
    """What the cloud calls such a node; its GPUs must have `cluster.gpu_memory_gib`."""
    gpu_resources: dict[str, str] = Field(default_factory=dict)
    """What Kubernetes gives such a node beside CPUs, memory and GPUs: `{vpc.amazonaws.com/efa: "4"}` for a
    network without which several machines wait for weights."""
    cpus_per_node: int = Field(default=16, gt=0)
    """CPUs of a node that prepares data; those nodes come as there is work, and go."""
    cpu_node_memory_gib: int = Field(default=64, gt=0)
    cpu_machine: str = "m6i.4xlarge"
    region: str = "us-west-2"
    """Of the cloud."""
    node_config: dict[str, Any] = Field(default_factory=dict)
    """What else AWS is told of every node: its ImageId, and perhaps IamInstanceProfile, SubnetIds."""
    machines: tuple[str, ...] = ()
    """Names of machines of one's own, reached by ssh; the first becomes the head."""
    user: str = "ray"
    """Who logs in to them."""
    claim: str = "dsvl"
    """The PersistentVolumeClaim that is mounted where `storage.path` and `storage.data` are."""
    secret: str | None = None
    """A Secret of Kubernetes whose entries all nodes find in their environment, such as HF_TOKEN."""
    partition: str | None = None
    """Of Slurm; its default one when empty."""
    hours: int | None = Field(default=None, gt=0)
    """Of a job of Slurm, where longer ones are not taken; half as much again as planned when empty.

    Work that takes longer waits in the queue again, and goes on.
    """
    setup: tuple[str, ...] = ()
    """Commands of a Slurm script before the work, such as those that load modules."""

    @field_validator("image")
    @classmethod
    def _image_is_pinned(cls, image: str) -> str:
        name = image.rpartition("/")[2]
        if ":" not in name or name.endswith(":latest"):
            raise ValueError(f"{image!r} must have a tag other than latest, or a digest")
        return image


def pools(experiment: "Experiment") -> dict[str, Any]:
    """What an experiment needs of each kind of node: the count, and CPUs, GPUs, memory and labels of each.

    Raises:
        ValueError: if its workers do not fit into `deploy.gpu_nodes`.
    """
    cluster, deploy = experiment.cluster, experiment.deploy
    workers = max(cluster.workers, experiment.search.workers if experiment.search else 0)
    if cluster.gpus_per_worker:
        per_node = deploy.gpus_per_node
    elif cluster.cpus_per_worker > deploy.cpus_per_node:
        raise ValueError(
            f"deploy.cpus_per_node={deploy.cpus_per_node}: must be at least cluster.cpus_per_worker="
            f"{cluster.cpus_per_worker:g}, or no node has room for a worker"
        )
    else:
        per_node = int(deploy.cpus_per_node / cluster.cpus_per_worker)
    nodes = math.ceil(workers / per_node)
    if deploy.gpu_nodes is not None and nodes > deploy.gpu_nodes:
        raise ValueError(
            f"deploy.gpu_nodes={deploy.gpu_nodes}: {workers} workers need {nodes} nodes of "
            f"{per_node} each; set it to {nodes}, or cluster.workers to {deploy.gpu_nodes * per_node}"
        )
    preparing = {
        "nodes": math.ceil(cluster.preparers / deploy.cpus_per_node),
        "cpus": deploy.cpus_per_node,
        "gpus": 0,
        "memory_gib": deploy.cpu_node_memory_gib,
        "labels": cluster.cpu_labels,
    }
    training = preparing | {"nodes": nodes, "labels": cluster.gpu_labels}
    if cluster.gpus_per_worker:
        training |= {
            # One more than the workers take, for what a trial itself and Ray's own actors need.
            "cpus": math.ceil(cluster.cpus_per_worker * per_node) + 1,
            "gpus": deploy.gpus_per_node,
            "memory_gib": deploy.gpu_node_memory_gib,
        }
    return {"cpu": preparing, "gpu": training}


def labelled(experiment: "Experiment") -> "Experiment":
    """The experiment for a cluster with an autoscaler: each pool has a label, and gets its own work alone.

    Raises:
        ValueError: if a label is a rule, which no node can carry.
    """
    cluster = experiment.cluster
    for field in ("cpu_labels", "gpu_labels"):
        for key, value in getattr(cluster, field).items():
            if value.startswith(("!", "in(")):
                raise ValueError(
                    f"cluster.{field}.{key}={value!r} must be a plain value: a manifest gives it to nodes"
                )
    return experiment.with_overrides(
        {
            "cluster.autoscaled": True,
            "cluster.cpu_labels": cluster.cpu_labels or {"pool": "cpu"},
            "cluster.gpu_labels": cluster.gpu_labels or {"pool": "gpu"},
        }
    )
