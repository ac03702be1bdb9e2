"""An experiment: the settings of the library, and those of the machines that carry it out.

Frozen once it is made. What is trained (`identity`) is kept apart from where it runs.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, parse_qsl, urlsplit

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import to_jsonable_python

from dsvl.config import (
    SCHEMA_VERSION,
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from orchestration.deploy import DeployConfig
from orchestration.legal import WHAT, across_problems, search_problems
from orchestration.problems import SECRET, ConfigError, Problem, explain
from orchestration.settings import Section, path_keys, place
from orchestration.space import SearchConfig

BLENDING = ("blends", "temperature", "max_rounds")
"""Settings of `data` that change no prepared data."""


STORES: dict[str, set[str]] = {
    "s3": {"region", "scheme", "endpoint_override"},
    "gs": {"scheme", "endpoint_override"},
    "file": set(),
}
"""Kinds of object stores, and what their URIs may say beside the place."""


class ClusterConfig(Section):
    """Which machines carry the work, and how much of them."""

    address: str = "local"
    """`local` starts Ray here, `auto` joins this machine's cluster, HOST:PORT joins that one."""
    workers: int = Field(default=1, gt=0)
    """Workers of a training."""
    min_workers: int | None = Field(default=None, gt=0)
    """The fewest that a training goes on with when nodes are lost; when empty, it waits for all of them.
    It takes as many, up to `workers`, as the nodes hold and the batch divides among, and more again when
    nodes come back."""
    cpus_per_worker: float = Field(default=1, gt=0)
    gpus_per_worker: Literal[0, 1] = 0
    preparers: int = Field(default=1, gt=0)
    """Most actors that prepare data at once."""
    cpu_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that prepare data, as `ray start --labels` gives them; any node when empty."""
    gpu_labels: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that train and run the tower."""
    autoscaled: bool = False
    """Whether nodes come while work waits for them: then it waits, however few there are when it begins."""
    gpu_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of a GPU that a worker may fill; a plan that needs more is refused."""
    host_memory_gib: float | None = Field(default=None, gt=0)
    """Memory of its machine that a worker may fill with what is offloaded; more is refused as well."""
    gpu_tflops: float | None = Field(default=None, gt=0)
    """Peak of a worker's device at `train.precision`, in 10^12 operations a second; plans tell time by it."""
    utilisation: float = Field(default=0.4, gt=0, le=1)
    """Share of that peak that training reaches, over all it computes, with what it waits for. ZeRO-Infinity
    sustained 40 % on 512 GPUs (arXiv:2104.07857); put what your own runs measure."""
    gpu_hour_price: float | None = Field(default=None, ge=0)
    """What an hour of a worker's GPU costs, in any currency; plans tell money by it."""
    failures: int = Field(default=2, ge=0)
    """Restarts of a training without a new checkpoint in between before it counts as failed. What would go
    wrong again, as a request that is refused, a model that diverged or a full disk, ends it at once."""
    hang_timeout_s: float = Field(default=1800, gt=0)
    """Seconds after which a worker counts as hanging: loading, hashing the frozen parts, a save, an update or
    a batch of an evaluation must take less. Its stacks are then in the run's `logs`, and the training starts
    anew."""

    @field_validator("address")
    @classmethod
    def _address_is_known(cls, address: str) -> str:
        if not re.fullmatch(r"local|auto|[\w.-]+:\d+", address):
            raise ValueError(f"{address!r} must be local, auto or HOST:PORT")
        return address


class StorageConfig(Section):
    """Where files are."""

    path: str = "runs"
    """The folder of prepared data, runs and the default tracking store."""
    remote: str | None = None
    """An object store that keeps what is in `path`, and from which it is fetched where it is missing:
    s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER. Then the nodes of a training need not share
    `path`: each fetches the prepared data once, to its own disk. Those that prepare, or try trials, do.
    `?region=`, `scheme=` and `endpoint_override=HOST:PORT` lead to stores that are not Amazon's;
    credentials come from the environment alone."""
    data: str = "data"
    """The folder of raw datasets."""

    @field_validator("path", "data")
    @classmethod
    def _is_a_folder(cls, path: str) -> str:
        if "://" in path:
            raise ValueError(
                f"{path!r} must be a folder; name the store in storage.remote, and here where to work"
            )
        return path

    @field_validator("remote")
    @classmethod
    def _is_a_store(cls, remote: str | None) -> str | None:
        if remote is None:
            return None
        parts = urlsplit(remote)
        if "@" in parts.netloc:
            raise ValueError("must hold no credentials; give them in the environment alone")
        if parts.scheme not in STORES or not (parts.netloc or parts.scheme == "file"):
            raise ValueError(
                f"{remote!r} must be s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///FOLDER"
            )
        if others := parse_qs(parts.query, keep_blank_values=True).keys() - STORES[parts.scheme]:
            known = ", ".join(sorted(STORES[parts.scheme])) or "nothing"
            raise ValueError(
                f"?{', '.join(sorted(others))}: of {parts.scheme}:// may be said {known}"
            )
        return remote


class TrackingConfig(Section):
    """Where runs are recorded."""

    uri: str | None = None
    """An MLflow tracking server or store; `mlflow.db` in the storage when empty."""
    experiment: str = "dsvl"
    """The MLflow experiment that holds the runs."""
    artifacts: str | None = None
    """Where a new one of a database keeps files, `s3://BUCKET/PREFIX` (boto3) for one; `mlartifacts` in the
    storage when empty. A server decides by itself."""
    patience_s: float = Field(default=30, ge=0)
    """Seconds that a finished command waits at most for the store to have all of it."""

    @field_validator("uri", "artifacts")
    @classmethod
    def _uri_holds_no_secret(cls, uri: str | None) -> str | None:
        parts = urlsplit(uri or "")
        asked = parse_qsl(parts.query, keep_blank_values=True)
        if parts.password is not None or any(re.search(f"{SECRET}$", name) for name, _ in asked):
            raise ValueError(
                "must not hold a password; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
                "MLFLOW_TRACKING_TOKEN, or a database's own PGPASSWORD in the environment"
            )
        return uri


class Experiment(Section):
    """Everything about a run or a sweep of runs; the same file gives the same experiment."""

    name: str
    """The folder of the run within the storage."""
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    cluster: ClusterConfig = ClusterConfig()
    deploy: DeployConfig = DeployConfig()
    engine: EngineConfig = Field(default=EngineConfig(), validate_default=True)
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    storage: StorageConfig = StorageConfig()
    tracking: TrackingConfig = TrackingConfig()
    search: SearchConfig | None = None

    @field_validator("name")
    @classmethod
    def _name_is_a_folder_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(
                f"{name!r} must be a plain folder name: letters, digits, '.', '_' and '-', "
                "at most 100 of them, the first a letter or digit"
            )
        if name in ("prepared", "mlflow.db", "mlartifacts"):
            raise ValueError(f"{name!r} is taken by the storage itself; choose another name")
        return name

    # These two look at several sections. As rules of a field they speak even when another section is
    # broken, so that all problems come together.
    @field_validator("engine")
    @classmethod
    def _sections_agree(cls, engine: EngineConfig, info: ValidationInfo) -> EngineConfig:
        train, cluster = info.data.get("train"), info.data.get("cluster")
        model, problems = info.data.get("model"), []
        if model and model.quantization == "int8" and engine.zero_stage == 3:
            rule = "3 does not divide the weights of model.quantization=int8"
            problems.append(
                Problem(("engine", "zero_stage"), f"{rule}; set that to nf4, or this to 2")
            )
        if model and model.vision_lora.rank and engine.stored_features:
            rule = "true needs a frozen tower, which model.vision_lora.rank trains"
            problems.append(
                Problem(("engine", "stored_features"), f"{rule}; set it to false, or that to 0")
            )
        for name, _ in _flat(engine.deepspeed):
            if re.search(f"{SECRET}$", name):
                rule = "must not hold a secret, as every run keeps its settings"
                text = f"{rule}; leave it out, and set it in the environment of the workers"
                problems.append(Problem(("engine", "deepspeed", *name.split(".")), text))
        if train and engine.zero_stage == 0 and train.precision != "fp32":
            rule = f"0 keeps no float32 master values for train.precision={train.precision}"
            problems.append(Problem(("engine", "zero_stage"), f"{rule}; set it to 1, 2 or 3"))
        if train and cluster and train.precision == "fp16" and not cluster.gpus_per_worker:
            text = "'fp16' needs GPUs; set cluster.gpus_per_worker=1, or this to bf16 or fp32"
            problems.append(Problem(("train", "precision"), text))
        field = (info.context or {}).get("workers", "cluster.workers")
        unit = cluster.workers * engine.micro_batch if train and cluster else 1
        if train and cluster and train.batch % unit:
            nearest = max(1, round(train.batch / unit)) * unit
            legal = legal_workers(train.batch, engine.micro_batch)
            counts = (
                f"{field} to one of {', '.join(map(str, legal))}"
                if legal
                else f"engine.micro_batch to a divisor of {train.batch}"
            )
            problems.append(
                Problem(
                    ("train", "batch"),
                    f"{train.batch} must be a multiple of {field} x engine.micro_batch = "
                    f"{cluster.workers} x {engine.micro_batch}; "
                    f"set train.batch={nearest}, or {counts}",
                )
            )
        if cluster and cluster.min_workers and cluster.min_workers > cluster.workers:
            text = f"{cluster.min_workers} must not exceed cluster.workers={cluster.workers}"
            problems.append(Problem(("cluster", "min_workers"), text))
        if problems:
            raise ConfigError(problems)
        return engine

    @field_validator("checkpoint")
    @classmethod
    def _branches_can_be(
        cls, checkpoint: CheckpointConfig, info: ValidationInfo
    ) -> CheckpointConfig:
        optim, train, problems = info.data.get("optim"), info.data.get("train"), []
        for field in ("trunk", "branch_epochs"):
            if optim and getattr(checkpoint, field) and not optim.branching:
                text = "trunk and branch begin alike only with optim.schedule=wsd and optim.warmup_steps"
                problems.append(
                    Problem(("checkpoint", field), f"{text}; set both, or this to nothing")
                )
        if train and (longer := [n for n in checkpoint.branch_epochs if n >= train.epochs]):
            text = f"{longer} must be less than train.epochs={train.epochs}"
            problems.append(Problem(("checkpoint", "branch_epochs"), text))
        if problems:
            raise ConfigError(problems)
        return checkpoint

    @field_validator("search")
    @classmethod
    def _every_trial_is_an_experiment(
        cls, search: SearchConfig | None, info: ValidationInfo
    ) -> SearchConfig | None:
        problems = search_problems(cls, search, info.data) if search else []
        if search and search.across and not problems:
            problems = across_problems(search, info.data)
        checkpoint = info.data.get("checkpoint")
        for field in ("trunk", "branch_epochs"):
            if search and checkpoint and getattr(checkpoint, field):
                text = "a search says itself which trial branches off which; leave it out"
                problems.append(Problem(("checkpoint", field), text))
        cluster = info.data.get("cluster")
        if search and search.budget.money and cluster and cluster.gpu_hour_price is None:
            text = f"{search.budget.money:g} needs cluster.gpu_hour_price; set that, or gpu_hours"
            problems.append(Problem(("search", "budget", "money"), text))
        if problems:
            raise ConfigError(problems)
        return search

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.storage.path) / self.name

    @property
    def tracking_uri(self) -> str:
        """The tracking store in use."""
        return self.tracking.uri or f"sqlite:///{Path(self.storage.path) / 'mlflow.db'}"

    @property
    def trials_at_once(self) -> int:
        """How many trials of the search run at the same time."""
        assert self.search is not None
        search, room = self.search, self.cluster.workers // self.search.workers
        at_once = search.concurrent or max(1, room)
        return min(at_once, search.trials or at_once)

    def searched(self) -> dict[str, Any]:
        """The searched fields, as the experiment itself has them."""
        assert self.search is not None
        found, settings = {}, self.as_dict()
        for path in self.search.space:
            value: Any = settings
            for key in path_keys(path):
                value = value[key]
            found[path] = value
        return found

    def worker_counts(self, workers: int) -> list[int]:
        """The numbers of workers that a training meant for `workers` may have, fewest first."""
        fewest = self.cluster.min_workers or workers
        legal = legal_workers(self.train.batch, self.engine.micro_batch, most=workers)
        return [count for count in legal if fewest <= count]

    def identity(self) -> str:
        """Names what is trained: equal wherever and however it runs."""
        return digest(self.identity_fields())

    def identity_fields(self) -> dict[str, object]:
        """The settings behind the identity, as dotted field -> value that JSON can hold."""
        what: dict[str, Any] = {name: to_jsonable_python(getattr(self, name)) for name in WHAT}
        what["model"]["language"] = what["model"].pop("languages")[self.model.size]
        for part in (*what["data"]["sets"].values(), *what["data"]["blends"].values()):
            del part["records"]  # a hint for plans, which changes no sample
        return dict(_flat(what))

    def seed_of(self, side: Literal["train", "eval"]) -> int:
        """What the samples of a side are drawn by: trainings with seeds of their own are held to the same."""
        return self.train.seed if side == "train" else self.data.seed

    def preparation(self) -> dict[str, Any]:
        """The settings that decide prepared data; blending comes after it, and takes none of them."""
        data = self.as_dict()["data"]
        for name in BLENDING:
            del data[name]
        for dataset in data["sets"].values():
            del dataset["records"]
            dataset["annotations"].sort()
        return {
            "schema_version": SCHEMA_VERSION,
            "data": data,
            "image_tokens": self.model.image_tokens,
            "template": self.model.template,
        }

    def blending(self) -> str:
        """Names the settings by which samples are made of prepared data."""
        data = self.as_dict()["data"]
        for blend in data["blends"].values():
            del blend["records"]
        return digest({name: data[name] for name in BLENDING})

    def differences(self, fields: Mapping[str, object]) -> list[str]:
        """Where stored `identity_fields` differ from this experiment's, with both values."""
        ours = self.identity_fields()
        return [
            f"{name} ({fields.get(name, 'absent')!r} before, {ours.get(name, 'absent')!r} now)"
            for name in sorted(ours.keys() | fields.keys())
            if name not in ours or name not in fields or ours[name] != fields[name]
        ]

    def as_dict(self) -> dict[str, Any]:
        """Every setting, fit for JSON and YAML; validated again it gives an equal experiment."""
        return self.model_dump(mode="json")

    def params(self) -> dict[str, object]:
        """Every setting that this run uses, as dotted field -> value, for a tracker."""
        settings = self.as_dict()
        where = {name: value for name, value in settings.items() if name not in WHAT}
        return {**self.identity_fields(), **dict(_flat(where))}

    def with_overrides(self, overrides: Mapping[str, object]) -> "Experiment":
        """The same with dotted fields set anew; a ConfigError names all that is wrong."""
        settings = self.as_dict()
        for path, value in overrides.items():
            settings = place(settings, path_keys(path), value)
        return validated(settings)

    def trial(self, values: Mapping[str, object]) -> "Experiment":
        """The experiment that a trial of the search runs."""
        assert self.search is not None
        return self.with_overrides(
            {
                **values,
                "cluster.workers": self.search.workers,
                "cluster.min_workers": None,
                "search": None,
            }
        )


def validated(settings: Mapping[str, Any]) -> Experiment:
    """The experiment with these settings; a ConfigError names all that is wrong with them."""
    try:
        return Experiment.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(explain(error, Experiment)) from None


def legal_workers(batch: int, micro_batch: int, *, most: int = 1024) -> list[int]:
    """The numbers of workers, up to `most`, among which a batch can be divided."""
    shares = batch // micro_batch if batch % micro_batch == 0 else 0
    return [workers for workers in range(1, min(shares, most) + 1) if shares % workers == 0]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, object]]:
    pairs: list[tuple[str, object]] = []
    for key, value in tree.items():
        inner = _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else None
        pairs += [(prefix + key, value)] if inner is None else inner
    return pairs


def digest(fields: object) -> str:
    """16 hexadecimal digits that name a value that JSON can hold."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
