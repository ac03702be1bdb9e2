"""What KubeRay 1.7 takes of the parts of a RayJob that are made here: by its CRD, and by its own checks."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from orchestration.problems import MISSING, Problem

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[KMGT]i?)?$")]
Count = Annotated[int, Field(ge=0)]
Labels = dict[
    str, Annotated[str, Field(pattern=r"^([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?$", max_length=63)]
]


class Part(BaseModel):
    """A mapping whose keys are all known."""

    model_config = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel)


class Metadata(Part):
    """The metadata of an object."""

    name: Name
    labels: Labels = {}


class ConfigMap(Part):
    """A ConfigMap."""

    api_version: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class Named(Part):
    """A reference to an object by its name."""

    name: Name


class FromSecret(Part):
    """A source of environment variables."""

    secret_ref: Named


class Amounts(Part):
    """The resources of a container."""

    requests: dict[str, Quantity]
    limits: dict[str, Quantity]

    @model_validator(mode="after")
    def _gpus_are_what_is_limited(self) -> "Amounts":
        gpus = {part.get("nvidia.com/gpu") for part in (self.requests, self.limits)}
        if len(gpus) > 1:
            raise ValueError("requests and limits must have the same nvidia.com/gpu")
        return self


class Capabilities(Part):
    """The Linux capabilities of a container."""

    drop: list[Literal["ALL"]]


class ContainerSecurity(Part):
    """The securityContext of a container."""

    allow_privilege_escalation: Literal[False]
    capabilities: Capabilities


class Mount(Part):
    """A volumeMount."""

    name: Name
    mount_path: Annotated[str, Field(pattern="^/")]
    read_only: bool = False


class Container(Part):
    """A container of a pod."""

    name: Name
    image: str
    resources: Amounts
    security_context: ContainerSecurity
    volume_mounts: list[Mount]
    env_from: list[FromSecret] = []


class Seccomp(Part):
    """A seccompProfile."""

    type: Literal["RuntimeDefault"]


class PodSecurity(Part):
    """The securityContext of a pod."""

    run_as_non_root: Literal[True]
    run_as_user: Annotated[int, Field(gt=0)]
    fs_group: int
    seccomp_profile: Seccomp


class Claim(Part):
    """A persistentVolumeClaim."""

    claim_name: Name


class Memory(Part):
    """An emptyDir in memory."""

    medium: Literal["Memory"]
    size_limit: Quantity


class Volume(Part):
    """A volume of a pod: a claim, a ConfigMap or memory."""

    name: Name
    persistent_volume_claim: Claim | None = None
    config_map: Named | None = None
    empty_dir: Memory | None = None


class PodSpec(Part):
    """The spec of a pod, which is a node of Ray."""

    restart_policy: Literal["Never"]
    """The second autoscaler wants it so."""
    security_context: PodSecurity
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]

    @model_validator(mode="after")
    def _mounts_are_volumes(self) -> "PodSpec":
        known = {volume.name for volume in self.volumes}
        lost = {m.name for c in self.containers for m in c.volume_mounts} - known
        if lost:
            raise ValueError(f"volumeMounts must name volumes; {', '.join(sorted(lost))} is none")
        return self


class Pod(Part):
    """A pod template."""

    spec: PodSpec


class Head(Part):
    """The headGroupSpec: a node that carries no work."""

    ray_start_params: dict[str, str]
    template: Pod


class Group(Part):
    """One of workerGroupSpecs: nodes that are alike."""

    group_name: Name
    replicas: Count
    min_replicas: Count
    max_replicas: Count
    idle_timeout_seconds: Count
    labels: Labels
    ray_start_params: dict[str, str]
    template: Pod

    @model_validator(mode="after")
    def _fewest_are_no_more_than_most(self) -> "Group":
        if not self.min_replicas <= self.replicas <= self.max_replicas:
            raise ValueError("minReplicas <= replicas <= maxReplicas must hold")
        return self


class Authentication(Part):
    """The authOptions: who has the token may use the cluster."""

    mode: Literal["token"]


class Autoscaler(Part):
    """The autoscalerOptions."""

    version: Literal["v2"]
    idle_timeout_seconds: Count


class Cluster(Part):
    """The rayClusterSpec."""

    ray_version: Annotated[str, Field(pattern=r"^2\.\d+\.\d+$")]
    auth_options: Authentication
    enable_in_tree_autoscaling: Literal[True]
    autoscaler_options: Autoscaler
    head_group_spec: Head
    worker_group_specs: list[Group]


class Condition(Part):
    """The condition of a deletion rule."""

    job_status: Literal["SUCCEEDED", "FAILED"]
    ttl_seconds: Count


class Rule(Part):
    """What is deleted when; workers alone cannot be, as the autoscaler has them."""

    condition: Condition
    policy: Literal["DeleteCluster", "DeleteSelf", "DeleteNone"]


class Deletion(Part):
    """The deletionStrategy."""

    deletion_rules: Annotated[list[Rule], Field(min_length=1)]


class JobSpec(Part):
    """The spec of a RayJob."""

    entrypoint: str
    runtime_env_yaml: str = Field(alias="runtimeEnvYAML")
    backoff_limit: Count
    deletion_strategy: Deletion
    ray_cluster_spec: Cluster

    @model_validator(mode="after")
    def _environment_is_known(self) -> "JobSpec":
        given = yaml.safe_load(self.runtime_env_yaml)
        if not isinstance(given, dict) or set(given) - {"env_vars"}:
            raise ValueError("runtimeEnvYAML must be a mapping of env_vars alone")
        return self


class RayJob(Part):
    """A RayJob."""

    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


KINDS: dict[str, type[Part]] = {"ConfigMap": ConfigMap, "RayJob": RayJob}


def problems(document: Any) -> Iterator[Problem]:
    """What is wrong with one document of a manifest."""
    kind = document.get("kind") if isinstance(document, dict) else None
    if kind not in KINDS:
        yield Problem(("kind",), f"{kind!r} must be one of {', '.join(KINDS)}")
        return
    try:
        KINDS[kind].model_validate(document)
    except ValidationError as error:
        for details in error.errors():
            text = {"extra_forbidden": "no such field", "missing": MISSING}.get(details["type"])
            rule = details["msg"].replace("Input should ", "must ").replace("Value error, ", "")
            yield Problem((kind, *details["loc"]), text or rule)
