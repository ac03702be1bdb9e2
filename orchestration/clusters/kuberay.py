"""A RayJob of KubeRay for one work: a cluster that comes with it, grows, shrinks and goes with it."""

from collections.abc import Iterator
from typing import Any

import yaml

from orchestration.clusters.package import described, shared_folder
from orchestration.config import Experiment
from orchestration.deploy import labelled, pools
from orchestration.problems import Problem
from orchestration.records.results import JOB

RAY = "2.60.0"
"""The version of Ray in the image, as `constraints.txt` pins it."""
ATTEMPTS = 3
"""Clusters more that KubeRay starts when a head or a driver is lost; each goes on where the last was."""
MOUNTED = "/etc/dsvl"
LONGEST = 47
"""Characters of a name."""
KEPT = 3600
"""Seconds for which a cluster whose job failed is kept to look at; a job that is over is listed for a day."""


def manifest(experiment: Experiment, verb: str, name: str) -> str:
    """The YAML that `kubectl apply` takes: the experiment, and the job that carries it out.

    Raises:
        ValueError: if a worker needs what no node would have, or a folder would be no volume.
    """
    experiment = labelled(experiment)
    nodes = pools(experiment)
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"experiment.yaml": described(experiment)},
    }
    groups = [
        {
            "groupName": pool,
            "replicas": 0,
            "minReplicas": 0,
            "maxReplicas": node["nodes"],
            # Preparation comes and goes by the shard; a training that starts anew wants its nodes back.
            "idleTimeoutSeconds": 60 if pool == "cpu" else 600,
            "labels": node["labels"],
            "rayStartParams": {},
            "template": _pod(experiment, name, "ray-worker", node),
        }
        for pool, node in nodes.items()
    ]
    head = {"cpus": 4, "gpus": 0, "memory_gib": 16}
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/name": "dsvl"}},
        "spec": {
            "entrypoint": f"python -m jobs.work {verb} {MOUNTED}/experiment.yaml",
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": {JOB: name}}),
            "backoffLimit": ATTEMPTS,
            "deletionStrategy": {
                "deletionRules": [
                    _deleted("SUCCEEDED", "DeleteCluster", 60),
                    _deleted("FAILED", "DeleteCluster", KEPT),
                    _deleted("SUCCEEDED", "DeleteSelf", 24 * KEPT),
                    _deleted("FAILED", "DeleteSelf", 24 * KEPT),
                ]
            },
            "rayClusterSpec": {
                "rayVersion": RAY,
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {"version": "v2", "idleTimeoutSeconds": 60},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
                    "template": _pod(experiment, name, "ray-head", head),
                },
                "workerGroupSpecs": groups,
            },
        },
    }
    return yaml.safe_dump_all([settings, job], sort_keys=False)


def object_name(stem: str) -> str:
    """What the objects of a work are called: at most 47 characters, as KubeRay has it, its digest whole."""
    head, _, digest = stem.lower().replace("_", "-").replace(".", "-").rpartition("-")
    return f"{head[: LONGEST - len(digest) - 1].rstrip('-')}-{digest}"


def _deleted(status: str, policy: str, seconds: int) -> dict[str, Any]:
    return {"condition": {"jobStatus": status, "ttlSeconds": seconds}, "policy": policy}


def _pod(experiment: Experiment, name: str, role: str, node: dict[str, Any]) -> dict[str, Any]:
    """A node: no root, no privileges, nothing but the volumes that the work needs."""
    deploy = experiment.deploy
    amounts = {"cpu": str(node["cpus"]), "memory": f"{node['memory_gib']}Gi"}
    if node["gpus"]:
        amounts |= {"nvidia.com/gpu": str(node["gpus"]), **deploy.gpu_resources}
    container: dict[str, Any] = {
        "name": role,
        "image": deploy.image,
        "resources": {"requests": dict(amounts), "limits": dict(amounts)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "storage", "mountPath": shared_folder(experiment)},
            {"name": "experiment", "mountPath": MOUNTED, "readOnly": True},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    if deploy.secret:
        container["envFrom"] = [{"secretRef": {"name": deploy.secret}}]
    return {
        "spec": {
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 1000,
                "fsGroup": 1000,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [
                {"name": "storage", "persistentVolumeClaim": {"claimName": deploy.claim}},
                {"name": "experiment", "configMap": {"name": name}},
                {
                    "name": "shared-memory",
                    "emptyDir": {"medium": "Memory", "sizeLimit": f"{node['memory_gib'] // 4}Gi"},
                },
            ],
        }
    }


def check(text: str) -> Iterator[Problem]:
    """What is wrong with a manifest, by the rules of KubeRay for the parts that are made here."""
    from orchestration.clusters.kuberay_rules import problems

    for document in yaml.safe_load_all(text):
        yield from problems(document)
