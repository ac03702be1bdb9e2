"""Which ways of dividing and offloading fit, and the nearest settings that do where the chosen do not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from orchestration.config import Experiment, legal_workers
from orchestration.planning.memory import GIB, gradient_checkpointing, host_memory, memory

OFFLOADS = (("none", "none"), ("cpu", "none"), ("none", "cpu"), ("cpu", "cpu"))
"""Where optimizer and parameters lie, from the fastest."""
CHOICES = (
    *((stage, "none", "none") for stage in (0, 1, 2, 3)),
    *((stage, "cpu", "none") for stage in (1, 2, 3)),
    *((3, optimizer, device) for device in ("cpu", "nvme") for optimizer in ("none", "cpu")),
)
"""ZeRO stage, and where optimizer and parameters lie, from the fastest."""


@dataclass(frozen=True)
class Choice:
    """A ZeRO stage, what is offloaded, and what a worker then needs."""

    zero_stage: int
    offload_optimizer: str
    offload_parameters: str
    gradient_checkpointing: bool
    memory_bytes: int
    host_bytes: int
    """Offloaded to the machine's memory."""
    fits: bool | None
    """None where no limit is stated."""
    fewest_workers: int | None
    """The fewest workers on which it fits, batch and micro batch being as they are."""
    configured: bool


def choices(experiment: Experiment) -> Iterator[Choice]:
    """All that are possible with the precision and the quantisation."""
    engine, cluster = experiment.engine, experiment.cluster
    limited = cluster.gpu_memory_gib is not None
    for stage, optimizer, parameters in CHOICES:
        if not _legal(experiment, stage):
            continue
        chosen = (stage, optimizer, parameters)
        other = _variant(
            experiment,
            zero_stage=stage,
            offload_optimizer=optimizer,
            offload_parameters=parameters,
            nvme_path="nvme" if parameters == "nvme" else None,
        )
        counts = legal_workers(experiment.train.batch, engine.micro_batch) if limited else []
        yield Choice(
            *chosen,
            gradient_checkpointing=gradient_checkpointing(other),
            memory_bytes=sum(memory(other).values()),
            host_bytes=host_memory(other),
            fits=fits(other) if limited else None,
            fewest_workers=next((n for n in counts if fits(_variant(other, workers=n))), None),
            configured=chosen
            == (engine.zero_stage, engine.offload_optimizer, engine.offload_parameters),
        )


def fits(experiment: Experiment) -> bool:
    """Whether a worker stays within the memory that it may fill, where that is stated."""
    gpu, host = experiment.cluster.gpu_memory_gib, experiment.cluster.host_memory_gib
    return (gpu is None or sum(memory(experiment).values()) <= gpu * GIB) and (
        host is None or host_memory(experiment) <= host * GIB
    )


def remedy(experiment: Experiment, purpose: Literal["run", "trial"]) -> str:
    """The fewest and smallest changes that fit: of recomputation, ZeRO, offloads, micro batch and workers."""
    batch, engine = experiment.train.batch, experiment.engine
    recompute, chosen = engine.gradient_checkpointing, experiment.cluster.workers
    workers = "cluster.workers" if purpose == "run" else "search.workers"
    now = {
        "engine.gradient_checkpointing": recompute,
        "engine.zero_stage": engine.zero_stage,
        "engine.offload_optimizer": engine.offload_optimizer,
        "engine.offload_parameters": engine.offload_parameters,
        "engine.micro_batch": engine.micro_batch,
        workers: chosen,
    }
    offloads = {(engine.offload_optimizer, engine.offload_parameters), *OFFLOADS}
    candidates = [
        (again, stage, *offload, micro, count)
        for again in ((recompute,) if recompute is not False else (False, True))
        for stage in range(engine.zero_stage, 4)
        if _legal(experiment, stage)
        for offload in offloads
        if stage == 3 or (offload[1] == "none" and (stage > 0 or offload[0] == "none"))
        for micro in range(engine.micro_batch, 0, -1)
        if batch % micro == 0
        for count in legal_workers(batch, micro)
        if count >= chosen
    ]

    def distance(candidate: tuple[Any, ...]) -> tuple[int, ...]:
        changed = sum(new != old for new, old in zip(candidate, now.values(), strict=True))
        _, stage, optimizer, parameters, micro, count = candidate
        offloaded = (parameters != "none") + (optimizer != "none")
        return changed, count, offloaded, stage, -micro

    for candidate in sorted(candidates, key=distance):
        *fields, count = candidate
        names = [name.removeprefix("engine.") for name in list(now)[:-1]]
        if fits(_variant(experiment, workers=count, **dict(zip(names, fields, strict=True)))):
            return "set " + " ".join(
                f"{name}={str(new).lower()}"
                for (name, old), new in zip(now.items(), candidate, strict=True)
                if new != old
            )
    return (
        "no ZeRO stage, offloading, micro batch or number of workers fits; lower data.max_tokens, "
        "choose a smaller model.size or a GPU with more memory"
    )


def _legal(experiment: Experiment, stage: int) -> bool:
    """Whether the rules of an experiment allow a ZeRO stage."""
    whole = experiment.train.precision == "fp32" or stage > 0
    return whole and (experiment.model.quantization != "int8" or stage < 3)


def _variant(experiment: Experiment, *, workers: int | None = None, **engine: Any) -> Experiment:
    """The same with other settings, which are legal: validating each of hundreds would take a second."""
    cluster = experiment.cluster
    return experiment.model_copy(
        update={
            "engine": replace(experiment.engine, **engine),
            "cluster": cluster.model_copy(update={"workers": workers or cluster.workers}),
        }
    )
