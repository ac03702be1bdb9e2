"""A cluster for `ray up`, in a cloud or of machines of one's own, to which work is then submitted."""

from collections.abc import Iterator
from typing import Any

import yaml

from orchestration.clusters.package import shared_folder
from orchestration.clusters.slurm import shell_problems
from orchestration.config import Experiment
from orchestration.deploy import labelled, pools
from orchestration.problems import Problem

TOKEN = "~/.ray/auth_token"
START = f"export RAY_AUTH_MODE=token; chmod 600 {TOKEN}; ulimit -n 65536; ray start"
HEAD = (
    "--head --num-cpus=0 --num-gpus=0 --port=6379 --dashboard-host=127.0.0.1 "
    '--autoscaling-config="$HOME/ray_bootstrap_config.yaml"'
)


def cloud(experiment: Experiment, verb: str, name: str) -> str:
    """Machines of AWS that come as there is work, and go.

    Raises:
        ValueError: if none of AWS's images is named: Ray would take one of 2023, whose driver is too old.
    """
    if "ImageId" not in experiment.deploy.node_config:
        raise ValueError(
            "deploy.node_config must name an image of machines, with Docker and an NVIDIA driver as new as "
            f"torch asks for; set deploy.node_config={{ImageId: ami-...}}, of {experiment.deploy.region}"
        )
    nodes, deploy = pools(labelled(experiment)), experiment.deploy
    machines = {"cpu": deploy.cpu_machine, "gpu": deploy.gpu_machine}
    types: dict[str, Any] = {
        "head": {
            "resources": {"CPU": 0, "GPU": 0},
            "node_config": {**deploy.node_config, "InstanceType": "m6i.xlarge"},
        }
    }
    for pool, node in nodes.items():
        resources = {"CPU": node["cpus"], "GPU": node["gpus"]}
        types[pool] = {
            "resources": {kind: amount for kind, amount in resources.items() if amount},
            "labels": node["labels"],
            "min_workers": 0,
            "max_workers": node["nodes"],
            "idle_timeout_s": 60 if pool == "cpu" else 600,
            "node_config": {**deploy.node_config, "InstanceType": machines[pool]},
        }
    most = sum(node["nodes"] for node in nodes.values())
    provider = {"type": "aws", "region": deploy.region, "cache_stopped_nodes": False}
    return _cluster(experiment, name, provider, "ubuntu", most) + yaml.safe_dump(
        {"head_node_type": "head", "available_node_types": types}, sort_keys=False
    )


def own(experiment: Experiment, verb: str, name: str) -> str:
    """Machines of one's own, by their names in `deploy.machines`.

    Raises:
        ValueError: if none are named.
    """
    head, *others = experiment.deploy.machines or ("",)
    if not head or not others:
        raise ValueError("deploy.machines must name a head and at least one machine more; set it")
    provider = {"type": "local", "head_ip": head, "worker_ips": others}
    return _cluster(experiment, name, provider, experiment.deploy.user, len(others))


def _cluster(
    experiment: Experiment, name: str, provider: dict[str, Any], user: str, most: int
) -> str:
    """What both have in common: the container, the token, and how Ray is started."""
    shared = shared_folder(experiment)
    settings = {
        "cluster_name": name.lower().replace(".", "-"),
        "max_workers": most,
        "provider": provider,
        "auth": {"ssh_user": user},
        "docker": {
            "image": experiment.deploy.image,
            "container_name": "dsvl",
            "run_options": ["--shm-size=16g", "--ulimit=memlock=-1", f"--volume={shared}:{shared}"],
        },
        "file_mounts": {TOKEN: TOKEN},
        "head_start_ray_commands": ["ray stop", f"{START} {HEAD}"],
        "worker_start_ray_commands": ["ray stop", f'{START} --address="$RAY_HEAD_IP:6379"'],
    }
    return yaml.safe_dump(settings, sort_keys=False)


def check(text: str) -> Iterator[Problem]:
    """What Ray's own validator finds in it, and shellcheck in its commands."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    settings = yaml.safe_load(text)
    try:
        validate_config(prepare_config(settings))
    except Exception as error:  # of several libraries, and of Ray itself
        yield Problem((), " ".join(str(error).split())[:300])
        return
    for field in ("head_start_ray_commands", "worker_start_ray_commands"):
        yield from shell_problems("\n".join(settings.get(field, [])) + "\n")
