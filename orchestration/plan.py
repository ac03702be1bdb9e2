"""What an experiment needs and costs, from its settings alone: no torch, no Ray, no weights."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from orchestration.config import Experiment
from orchestration.memory import GIB, STATE_BYTES, gradient_checkpointing, memory, remedy
from orchestration.parameters import Part, parameters


class PlanError(ValueError):
    """The experiment cannot be carried out on the machines it asks for."""


@dataclass(frozen=True)
class SizePlan:
    """What one size of the model needs, in a run or in the trials of a sweep."""

    size: str
    purpose: Literal["run", "trial"]
    workers: int
    parameters: dict[str, Part]
    memory: dict[str, int]
    """Component -> bytes per worker; the activations are an estimate from above."""
    gradient_checkpointing: bool
    """Whether layers are computed anew in the backward pass."""
    accumulation: int
    """Passes of a worker for one optimizer update."""
    checkpoint_bytes: int

    @property
    def memory_bytes(self) -> int:
        """All components together."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Plan:
    """What an experiment needs."""

    name: str
    identity: str
    run_folder: str
    samples: int | None
    """Training samples; None is unknown until `prepare`."""
    samples_from: str
    """Where the number of samples comes from."""
    epochs: int
    steps_per_epoch: int | None
    """Optimizer updates; samples that fill no whole batch are left out of their epoch."""
    steps: int | None
    tokens_per_step: int
    """At most, with the tokens of images."""
    checkpoints_kept: int
    trials: int | None
    trials_at_once: int | None
    sizes: tuple[SizePlan, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan, fit for JSON."""
        plan = asdict(self)
        for described, size in zip(plan["sizes"], self.sizes, strict=True):
            described["memory_bytes"] = size.memory_bytes
        return plan

    def render(self) -> str:
        """The plan as an aligned text for people."""
        rows = [
            ("experiment", self.name),
            ("identity", self.identity),
            ("folder", self.run_folder),
            ("samples", f"{_count(self.samples)} ({self.samples_from})"),
            ("epochs", _count(self.epochs)),
            ("steps", f"{_count(self.steps)} ({_count(self.steps_per_epoch)} an epoch)"),
            ("tokens a step", f"at most {_count(self.tokens_per_step)}"),
            ("checkpoints", f"{self.checkpoints_kept} kept"),
        ]
        if self.trials is not None:
            rows.append(("trials", f"{_count(self.trials)}, {self.trials_at_once} at once"))
        return "\n".join([*_aligned(rows, str.ljust), "", *_aligned(_table(self.sizes), str.rjust)])


def plan(experiment: Experiment) -> Plan:
    """Count what the run, and each shape of its trials, needs; a PlanError where it cannot fit."""
    search = experiment.search
    sizes = [_size_plan(experiment, "run")]
    if search is not None:
        deciding = [path for path in ("model.size", "model.attention") if path in search.space]
        for values in product(*(search.space[path].probes() for path in deciding)):
            trial = experiment.trial(dict(zip(deciding, values, strict=True)))
            if (size := _size_plan(trial, "trial")) not in sizes:
                sizes.append(size)
    samples, source = _samples(experiment)
    batch, epochs = experiment.train.batch, experiment.train.epochs
    if samples is not None and samples < batch:
        raise PlanError(
            f"train.batch={batch} must not exceed the {samples} training samples ({source}); "
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
        checkpoints_kept=experiment.checkpoint.keep,
        trials=search.trials if search else None,
        trials_at_once=min(search.concurrent, search.trials) if search else None,
        sizes=tuple(sizes),
    )


def prepared_folder(experiment: Experiment) -> Path | None:
    """The newest prepared data that belong to these settings, if there are any."""
    # The tokenizer and the content of the annotations count too, but reading them takes seconds.
    seen = experiment.preparation()
    manifests = Path(experiment.storage.path, "prepared").glob("*/manifest.json")
    for path in sorted(manifests, key=lambda path: path.stat().st_mtime, reverse=True):
        if seen.items() <= json.loads(path.read_text(encoding="utf-8"))["identity"].items():
            return path.parent
    return None


def _size_plan(experiment: Experiment, purpose: Literal["run", "trial"]) -> SizePlan:
    parts = parameters(experiment.model)
    workers, micro_batch = experiment.cluster.workers, experiment.engine.micro_batch
    size = SizePlan(
        size=experiment.model.size,
        purpose=purpose,
        workers=workers,
        parameters=parts,
        memory=memory(experiment),
        gradient_checkpointing=gradient_checkpointing(experiment),
        accumulation=experiment.train.batch // (workers * micro_batch),
        checkpoint_bytes=STATE_BYTES * sum(part.trainable for part in parts.values()),
    )
    limit = experiment.cluster.gpu_memory_gib
    if limit is not None and size.memory_bytes > limit * GIB:
        components = ", ".join(f"{name} {_bytes(size.memory[name])}" for name in size.memory)
        raise PlanError(
            f"model.size={size.size}: a worker of this {purpose} needs "
            f"{_bytes(size.memory_bytes)} but cluster.gpu_memory_gib={limit:g}: {components}; "
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


def _table(sizes: tuple[SizePlan, ...]) -> list[tuple[str, ...]]:
    """A column a size."""

    def row(name: str, cell: Callable[[SizePlan], str]) -> tuple[str, ...]:
        return name, *(cell(size) for size in sizes)

    parts = {name: part for size in sizes for name, part in size.parameters.items()}
    return [
        row("", lambda size: f"{size.purpose} {size.size}"),
        row("workers", lambda size: _count(size.workers)),
        row("accumulation", lambda size: _count(size.accumulation)),
        row("parameters", lambda size: _count(sum(p.total for p in size.parameters.values()))),
        row("  trained", lambda size: _count(sum(p.trainable for p in size.parameters.values()))),
        *(
            row(
                f"  {name}{' (trained)' if part.trainable else ''}",
                lambda size, name=name: _count(size.parameters.get(name, Part(0, 0)).total),
            )
            for name, part in parts.items()
        ),
        row("memory a worker", lambda size: _bytes(size.memory_bytes)),
        *(
            row(f"  {component}", lambda size, component=component: _bytes(size.memory[component]))
            for component in sizes[0].memory
        ),
        row("layers recomputed", lambda size: "yes" if size.gradient_checkpointing else "no"),
        row("a checkpoint", lambda size: _bytes(size.checkpoint_bytes)),
    ]


def _aligned(rows: Sequence[tuple[str, ...]], align: Callable[[str, int], str]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [name.ljust(widths[0])]
            + [align(value, width) for value, width in zip(values, widths[1:], strict=True)]
        ).rstrip()
        for name, *values in rows
    ]


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _bytes(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 1024**2:.2f} MiB"
