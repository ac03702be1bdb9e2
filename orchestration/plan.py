"""What an experiment needs and costs, from its settings alone: no torch, no Ray, no weights."""

import json
import logging
from pathlib import Path
from statistics import mean
from typing import Literal

from orchestration.config import Experiment
from orchestration.planning.choices import choices, fits, remedy
from orchestration.planning.cost import (
    checkpoints_kept,
    disk,
    exhaustive_cost,
    flops_of_a_step,
    run_cost,
    seconds_of_a_step,
    sweep_cost,
)
from orchestration.planning.flops import fullest
from orchestration.planning.memory import STATE_BYTES, gradient_checkpointing, host_memory, memory
from orchestration.planning.parameters import parameters
from orchestration.planning.planned import Plan, SizePlan, shown

log = logging.getLogger(__name__)


class PlanError(ValueError):
    """The experiment cannot be carried out on the machines it asks for."""


def plan(experiment: Experiment) -> Plan:
    """Count what the run, and each shape of its trials, needs; a PlanError where it cannot fit."""
    search = experiment.search
    workers = experiment.cluster.workers
    # What few workers share among them may not fit where it fits among many.
    extremes = {workers, experiment.worker_counts(workers)[0]}
    sizes = [
        _size_plan(experiment.with_overrides({"cluster.workers": count}), "run")
        for count in sorted(extremes, reverse=True)
    ]
    if search is not None:
        shapes = [values for values, _ in search.shapes(("model.size", "model.attention"))]
        order, own = list(experiment.model.languages), experiment.model.size
        for values in sorted(shapes, key=lambda shape: order.index(shape.get("model.size", own))):
            trial = experiment.trial(values)
            if (size := _size_plan(trial, "trial")) not in sizes:
                sizes.append(size)
    samples, source = _samples(experiment)
    batch, epochs = experiment.train.batch, experiment.train.epochs
    shapes = search.shapes(("train.batch",)) if search else []
    most = max([batch, *(values.get("train.batch", 0) for values, _ in shapes)])
    if samples is not None and samples < most:
        raise PlanError(
            f"train.batch={most} must not exceed the {samples} training samples ({source}); "
            "set it lower"
        )
    steps_per_epoch = None if samples is None else samples // batch
    return Plan(
        name=experiment.name,
        identity=experiment.identity(),
        run_folder=str(experiment.run_folder),
        samples=samples,
        samples_from=source,
        epochs=epochs,
        steps_per_epoch=steps_per_epoch,
        steps=None if steps_per_epoch is None else steps_per_epoch * epochs,
        tokens_per_step=batch * experiment.data.max_tokens,
        lengths=fullest(experiment),
        run=run_cost(experiment, samples),
        sweep=sweep_cost(experiment, samples) if search else None,
        exhaustive=exhaustive_cost(experiment, samples),
        gpu_memory_gib=experiment.cluster.gpu_memory_gib,
        gpu_tflops=experiment.cluster.gpu_tflops,
        utilisation=experiment.cluster.utilisation,
        gpu_hour_price=experiment.cluster.gpu_hour_price,
        disk=disk(experiment, prepared_folder(experiment)),
        checkpoints_kept=checkpoints_kept(experiment),
        trials=search.trials if search else None,
        trials_at_once=experiment.trials_at_once if search else None,
        sizes=tuple(sizes),
    )


def prepared_folder(experiment: Experiment) -> Path | None:
    """The newest prepared data that belong to these settings, if there are any."""
    # The tokenizer and the content of the annotations count too, but reading them takes seconds.
    seen = experiment.preparation()
    manifests = Path(experiment.storage.path, "prepared").glob("[!.]*/manifest.json")
    for path in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
        if seen.items() <= _identity(path).items():
            return path.parent
    return None


def _identity(manifest: Path) -> dict[str, object]:
    """What decided the samples of prepared data."""
    try:
        return dict(json.loads(manifest.read_text(encoding="utf-8"))["identity"])
    except (ValueError, KeyError, TypeError):
        log.warning("%s is damaged; what it describes is not looked at", manifest)
        return {}


def _size_plan(experiment: Experiment, purpose: Literal["run", "trial"]) -> SizePlan:
    parts = parameters(experiment.model)
    workers, micro_batch = experiment.cluster.workers, experiment.engine.micro_batch
    size = SizePlan(
        size=experiment.model.size,
        attention=experiment.model.attention,
        purpose=purpose,
        workers=workers,
        parameters=parts,
        memory=memory(experiment),
        host_bytes=host_memory(experiment),
        gradient_checkpointing=gradient_checkpointing(experiment),
        accumulation=experiment.train.batch // (workers * micro_batch),
        checkpoint_bytes=STATE_BYTES * sum(part.trainable for part in parts.values()),
        flops=flops_of_a_step(experiment),
        seconds_per_step=seconds_of_a_step(experiment),
        choices=tuple(choices(experiment)),
    )
    if not fits(experiment):
        cluster = experiment.cluster
        components = ", ".join(f"{name} {shown(size.memory[name])}" for name in size.memory)
        need, limit = f"{shown(size.memory_bytes)} but cluster", cluster.gpu_memory_gib
        text = f"{need}.gpu_memory_gib={limit:g}: {components}" if limit is not None else ""
        if (host := cluster.host_memory_gib) is not None:
            text += f"; {shown(size.host_bytes)} of its machine, cluster.host_memory_gib={host:g}"
        raise PlanError(
            f"model.size={size.size}: a worker of this {purpose} needs {text}; "
            f"{remedy(experiment, purpose)}"
        )
    return size


def blends_file(folder: Path, experiment: Experiment) -> Path:
    """Where prepared data have the sizes of an experiment's blends."""
    return folder / f"blends-{experiment.blending()}.json"


def _samples(experiment: Experiment) -> tuple[int | None, str]:
    """Training samples: counted in prepared data, else from the known sizes of sets and blends."""
    folder = prepared_folder(experiment)
    if folder and (counted := blends_file(folder, experiment)).is_file():
        blends = json.loads(counted.read_text(encoding="utf-8"))
        return sum(sides["train"] for sides in blends.values()), str(counted)
    data, total = experiment.data, 0.0
    shares = {"train": 1.0, "auto": 1 - data.eval_fraction, "eval": 0.0}
    for blend in data.all_blends().values():
        sets = [data.sets[name] for name in blend.sets if data.sets[name].split != "eval"]
        known: float | None = blend.records
        if known is not None:
            known *= max((shares[dataset.split] for dataset in sets), default=0.0)
        elif not (blend.join or any(dataset.records is None for dataset in sets)):
            known = sum((d.records or 0) * shares[d.split] for d in sets) / mean(blend.concat)
        if known is None:
            return None, "unknown until prepare"
        total += min(blend.samples or known, known) * blend.epochs
    return round(total), "records of data.sets and data.blends"
