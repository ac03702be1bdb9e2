"""What an experiment needs and costs, from its settings alone: no torch, no Ray, no weights."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from orchestration.config import Experiment, legal_workers
from orchestration.parameters import Part, linear_parameters, parameters

GIB = 1024**3
STATE_BYTES = 12
"""Of a trained parameter: its float32 master value and two moments."""
QUANTIZED_BYTES = {"int8": (1.0, 0.0), "nf4": (1 / 2, 1 / 64 + 4 / (64 * 256))}
"""Of a quantised weight, and of its share in scales: NF4's are one a block of 64, quantised themselves."""


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
    """Count what the run, and each size of its search, needs; a PlanError where it cannot fit."""
    search = experiment.search
    sizes = [_size_plan(experiment, "run")]
    if search is not None:
        domain = search.space.get("model.size")
        for size in domain.probes() if domain else (experiment.model.size,):
            sizes.append(_size_plan(experiment.trial({"model.size": size}), "trial"))
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


def memory(experiment: Experiment) -> dict[str, int]:
    """Bytes that a worker needs, by component.

    A worker holds its share of what the ZeRO stage divides: 1 the optimizer, 2 the gradients too,
    3 the weights too. A frozen decoder keeps about 5.5 hidden + 3 intermediate values a token and
    layer for the way back, without checkpointing; the head keeps its logits and their gradient.
    Adapters keep what enters them and their layer. A tower without them keeps nothing, with them
    at most 5 hidden + 4 intermediate values a patch and layer.
    """
    model, engine = experiment.model, experiment.engine
    language, lora = model.language, model.language_lora
    width = 4 if experiment.train.precision == "fp32" else 2
    counts = parameters(model).values()
    trainable = sum(part.trainable for part in counts)
    frozen = sum(part.total for part in counts) - trainable
    frozen_bytes, scales = frozen * width, 0
    if model.quantization != "none":
        quantized = linear_parameters(language)
        weight, scale = QUANTIZED_BYTES[model.quantization]
        frozen_bytes += int(quantized * (weight - width))
        scales = int(quantized * scale)
    tokens = engine.micro_batch * experiment.data.max_tokens
    kept = 5.5 * language.hidden_size + 3 * language.intermediate_size
    if lora.rank and lora.targets == "attention":
        kept += 2.5 * language.hidden_size + 4 * lora.rank
    elif lora.rank:
        kept += 3.5 * language.hidden_size + language.intermediate_size + 7 * lora.rank

    def share(size: int, from_stage: int) -> int:
        return -(-size // experiment.cluster.workers) if engine.zero_stage >= from_stage else size

    return {
        "frozen weights": share(frozen_bytes, 3) + scales,
        "trainable weights": share(trainable * width, 3),
        "gradients": share(trainable * width, 2),
        "optimizer": share(trainable * STATE_BYTES, 1),
        "activations": int(tokens * language.num_hidden_layers * kept * width)
        + _tower_activations(experiment) * width,
        "logits": tokens * language.vocab_size * 8,
    }


def _tower_activations(experiment: Experiment) -> int:
    """Values that a tower with adapters keeps for the way back, if a micro batch is full of images."""
    model, vision = experiment.model, experiment.model.vision
    if not model.vision_lora.rank:
        return 0
    data = experiment.data
    images = experiment.engine.micro_batch * min(
        data.max_images, data.max_tokens // model.image_tokens
    )
    kept = 5 * vision.hidden_size + 4 * vision.intermediate_size + 6 * model.vision_lora.rank
    return images * vision.patches * vision.num_hidden_layers * kept


def prepared_folder(experiment: Experiment) -> Path | None:
    """The newest prepared data that belong to these settings, if there are any."""
    settings = experiment.as_dict()["data"]
    for dataset in settings["sets"].values():
        del dataset["records"]
    # The tokenizer and the content of the annotations count too, but reading them takes seconds.
    seen = {
        "data": settings,
        "image_tokens": experiment.model.image_tokens,
        "seed": experiment.train.seed,
    }
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
        accumulation=experiment.train.batch // (workers * micro_batch),
        checkpoint_bytes=STATE_BYTES * sum(part.trainable for part in parts.values()),
    )
    limit = experiment.cluster.gpu_memory_gib
    if limit is not None and size.memory_bytes > limit * GIB:
        components = ", ".join(f"{name} {_bytes(size.memory[name])}" for name in size.memory)
        raise PlanError(
            f"model.size={size.size}: a worker of this {purpose} needs "
            f"{_bytes(size.memory_bytes)} but cluster.gpu_memory_gib={limit:g}: {components}; "
            f"{_remedy(experiment, purpose)}"
        )
    return size


def _remedy(experiment: Experiment, purpose: Literal["run", "trial"]) -> str:
    """The fewest and smallest changes of ZeRO stage, workers and micro batch that fit."""
    batch, engine = experiment.train.batch, experiment.engine
    workers = "cluster.workers" if purpose == "run" else "search.workers"
    now = (engine.zero_stage, engine.micro_batch, experiment.cluster.workers)
    last = 2 if experiment.model.quantization == "int8" else 3
    micros = [size for size in range(engine.micro_batch, 0, -1) if batch % size == 0]
    choices = [
        (stage, micro, count)
        for stage, micro in product(range(engine.zero_stage, last + 1), micros)
        for count in legal_workers(batch, micro)
        if count >= experiment.cluster.workers
    ]

    def distance(choice: tuple[int, int, int]) -> tuple[int, int, int, int]:
        changed = sum(value != before for value, before in zip(choice, now, strict=True))
        return changed, choice[2], choice[0], -choice[1]

    for choice in sorted(choices, key=distance):
        names = ("engine.zero_stage", "engine.micro_batch", "cluster.workers")
        other = experiment.with_overrides({**dict(zip(names, choice, strict=True)), "search": None})
        if sum(memory(other).values()) <= (experiment.cluster.gpu_memory_gib or 0) * GIB:
            settings = zip((*names[:2], workers), choice, now, strict=True)
            return "set " + " ".join(f"{name}={new}" for name, new, old in settings if new != old)
    return (
        "no ZeRO stage, micro batch or number of workers fits; lower data.max_tokens, "
        "choose a smaller model.size or a GPU with more memory"
    )


def _samples(experiment: Experiment) -> tuple[int | None, str]:
    """Training samples: counted in prepared data, else from the known sizes of the sets."""
    if folder := prepared_folder(experiment):
        manifest = folder / "manifest.json"
        return json.loads(manifest.read_text(encoding="utf-8"))["splits"]["train"], str(manifest)
    data = experiment.data
    shares = {"train": 1.0, "auto": 1 - data.eval_fraction, "eval": 0.0}
    known = [dataset for dataset in data.sets.values() if dataset.split != "eval"]
    if any(dataset.records is None for dataset in known):
        return None, "unknown until prepare"
    return round(sum((d.records or 0) * shares[d.split] for d in known)), "data.sets.*.records"


def _table(sizes: tuple[SizePlan, ...]) -> list[tuple[str, ...]]:
    """A column a size."""

    def row(name: str, cell: Callable[[SizePlan], str]) -> tuple[str, ...]:
        return name, *(cell(size) for size in sizes)

    trained = {name for name, part in sizes[0].parameters.items() if part.trainable}
    return [
        row("", lambda size: f"{size.purpose} {size.size}"),
        row("workers", lambda size: _count(size.workers)),
        row("accumulation", lambda size: _count(size.accumulation)),
        row("parameters", lambda size: _count(sum(p.total for p in size.parameters.values()))),
        row("  trained", lambda size: _count(sum(p.trainable for p in size.parameters.values()))),
        *(
            row(
                f"  {part}{' (trained)' if part in trained else ''}",
                lambda size, part=part: _count(size.parameters[part].total),
            )
            for part in sizes[0].parameters
        ),
        row("memory a worker", lambda size: _bytes(size.memory_bytes)),
        *(
            row(f"  {component}", lambda size, component=component: _bytes(size.memory[component]))
            for component in sizes[0].memory
        ),
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
