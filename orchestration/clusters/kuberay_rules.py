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
    """Of any object."""

    name: Name
    labels: Labels = {}


class ConfigMap(Part):
    """Files."""

    api_version: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: dict[str, str]


class Named(Part):
    """A reference."""

    name: Name


class FromSecret(Part):
    """Variables of the environment."""

    secret_ref: Named


class Amounts(Part):
    """What a container takes."""

    requests: dict[str, Quantity]
    limits: dict[str, Quantity]

    @model_validator(mode="after")
    def _gpus_are_what_is_limited(self) -> "Amounts":
        gpus = {part.get("nvidia.com/gpu") for part in (self.requests, self.limits)}
        if len(gpus) > 1:
            raise ValueError("requests and limits must have the same nvidia.com/gpu")
        return self


class Capabilities(Part):
    """Of Linux."""

    drop: list[Literal["ALL"]]


class ContainerSecurity(Part):
    """What a container may do."""

    allow_privilege_escalation: Literal[False]
    capabilities: Capabilities


class Mount(Part):
    """Where a volume is."""

    name: Name
    mount_path: Annotated[str, Field(pattern="^/")]
    read_only: bool = False


class Container(Part):
    """One of a pod."""

    name: Name
    image: str
    resources: Amounts
    security_context: ContainerSecurity
    volume_mounts: list[Mount]
    env_from: list[FromSecret] = []


class Seccomp(Part):
    """Which calls of the kernel are allowed."""

    type: Literal["RuntimeDefault"]


class PodSecurity(Part):
    """Who a pod is."""

    run_as_non_root: Literal[True]
    run_as_user: Annotated[int, Field(gt=0)]
    fs_group: int
    seccomp_profile: Seccomp


class Claim(Part):
    """A volume that outlives the pod."""

    claim_name: Name


class Memory(Part):
    """A folder in memory."""

    medium: Literal["Memory"]
    size_limit: Quantity


class Volume(Part):
    """Of any of three kinds."""

    name: Name
    persistent_volume_claim: Claim | None = None
    config_map: Named | None = None
    empty_dir: Memory | None = None


class PodSpec(Part):
    """A node."""

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
    """A template of them."""

    spec: PodSpec


class Head(Part):
    """The node that carries no work."""

    ray_start_params: dict[str, str]
    template: Pod


class Group(Part):
    """Nodes that are alike."""

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
    """Who may use the cluster: who has the token."""

    mode: Literal["token"]


class Autoscaler(Part):
    """Who adds and removes nodes."""

    version: Literal["v2"]
    idle_timeout_seconds: Count


class Cluster(Part):
    """All nodes."""

    ray_version: Annotated[str, Field(pattern=r"^2\.\d+\.\d+$")]
    auth_options: Authentication
    enable_in_tree_autoscaling: Literal[True]
    autoscaler_options: Autoscaler
    head_group_spec: Head
    worker_group_specs: list[Group]


class Condition(Part):
    """When something is deleted."""

    job_status: Literal["SUCCEEDED", "FAILED"]
    ttl_seconds: Count


class Rule(Part):
    """What is deleted when; workers alone cannot be, as the autoscaler has them."""

    condition: Condition
    policy: Literal["DeleteCluster", "DeleteSelf", "DeleteNone"]


class Deletion(Part):
    """All such rules."""

    deletion_rules: Annotated[list[Rule], Field(min_length=1)]


class JobSpec(Part):
    """What is run where."""

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
    """The whole."""

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
