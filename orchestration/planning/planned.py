"""What a plan says: for programs, and as a text for people."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestration.planning.choices import Choice
from orchestration.planning.cost import Cost
from orchestration.planning.flops import Lengths
from orchestration.planning.memory import GIB
from orchestration.planning.parameters import Part


@dataclass(frozen=True)
class SizePlan:
    """What one size of the model needs, in a run or in the trials of a sweep."""

    size: str
    attention: str
    purpose: Literal["run", "trial"]
    workers: int
    parameters: dict[str, Part]
    memory: dict[str, int]
    """Component -> bytes on a worker's device, at the moment when they are most."""
    host_bytes: int
    """What a worker offloads to its machine's memory."""
    gradient_checkpointing: bool
    """Whether layers are computed anew in the backward pass."""
    accumulation: int
    """Passes of a worker for one optimizer update."""
    checkpoint_bytes: int
    flops: dict[str, float]
    """Part -> floating-point operations of an update, at most."""
    seconds_per_step: float | None
    """At most; None where the devices' peak is not stated."""
    choices: tuple[Choice, ...]
    """What it would need with other ZeRO stages and offloads."""

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
    lengths: Lengths
    """The sample that operations, time and money are told for: a full one."""
    run: Cost
    sweep: Cost | None
    """All trials, none stopped early."""
    exhaustive: Cost | None
    """The grid that a search across sizes stands for."""
    gpu_memory_gib: float | None
    """That a worker's memory has to fit; None is no limit."""
    gpu_tflops: float | None
    utilisation: float
    gpu_hour_price: float | None
    disk: dict[str, int | None]
    """What -> bytes in the storage; None is unknown until `prepare`."""
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
        """The plan as aligned texts for people: the run, its memory, and the choices it has."""
        a_sample = self.lengths
        rows = [
            ("experiment", self.name),
            ("identity", self.identity),
            ("folder", self.run_folder),
            ("samples", f"{_count(self.samples)} ({self.samples_from})"),
            ("epochs", _count(self.epochs)),
            ("steps", f"{_count(self.steps)} ({_count(self.steps_per_epoch)} an epoch)"),
            ("tokens a step", f"at most {_count(self.tokens_per_step)}"),
            (
                "a full sample",
                f"{a_sample.text:,} text tokens, all answers, and {a_sample.images} images",
            ),
            (
                "memory of a GPU",
                "no limit set" if self.gpu_memory_gib is None else f"{self.gpu_memory_gib:g} GiB",
            ),
            ("checkpoints", f"{self.checkpoints_kept} kept"),
            ("disk", "; ".join(f"{name} {shown(size)}" for name, size in self.disk.items())),
        ]
        rows += self._cost("cost of the run", self.run)
        if self.sweep is not None:
            count = "as their results ask for" if self.trials is None else f"{self.trials:,}"
            rows.append(("trials", f"{count}, {self.trials_at_once} at once"))
            rows += self._cost("cost of the sweep", self.sweep)
        if self.exhaustive is not None:
            rows += self._cost("in place of a grid", self.exhaustive)
        tables = [_table(self.sizes), _choices(self.sizes[0].choices)]
        texts = [_aligned(rows, str.ljust), *(_aligned(table, str.rjust) for table in tables)]
        return "\n\n".join("\n".join(lines) for lines in texts)

    def _cost(self, name: str, cost: Cost) -> list[tuple[str, str]]:
        """What it comes to, and by which figures."""
        if cost.flops is None:
            return [(name, "unknown until prepare")]
        text = f"at most {operations(cost.flops)}"
        if cost.hours is None or cost.gpu_hours is None:
            return [(name, f"{text}; cluster.gpu_tflops would give the time")]
        text += f", {cost.hours:,.1f} hours, {cost.gpu_hours:,.1f} GPU-hours"
        how = f"{self.gpu_tflops:g} TFLOP/s x {self.utilisation:.0%}"
        if cost.money is not None:
            text += f", {cost.money:,.0f} in money"
            how += f", {self.gpu_hour_price:g} a GPU-hour"
        return [(name, f"{text} ({how})")]


def _table(sizes: tuple[SizePlan, ...]) -> list[tuple[str, ...]]:
    """A column a size."""

    def row(name: str, cell: Callable[[SizePlan], str]) -> tuple[str, ...]:
        return name, *(cell(size) for size in sizes)

    schemes = len({size.attention for size in sizes}) > 1
    parts = {name: part for size in sizes for name, part in size.parameters.items()}
    return [
        row("", lambda size: f"{size.purpose} {size.size}{f' {size.attention}' * schemes}"),
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
        row("memory a worker", lambda size: shown(size.memory_bytes)),
        *(
            row(f"  {component}", lambda size, component=component: shown(size.memory[component]))
            for component in sizes[0].memory
        ),
        row("of its machine", lambda size: shown(size.host_bytes)),
        row("layers recomputed", lambda size: _yes(size.gradient_checkpointing)),
        row("a checkpoint", lambda size: shown(size.checkpoint_bytes)),
        row("a step at most", lambda size: operations(sum(size.flops.values()))),
        *(
            row(f"  {part}", lambda size, part=part: operations(size.flops[part]))
            for part in sizes[0].flops
        ),
        row("seconds a step", lambda size: _number(size.seconds_per_step)),
    ]


def _choices(choices: Sequence[Choice]) -> list[tuple[str, ...]]:
    """A row a choice."""
    smallest = next((choice for choice in choices if choice.fits), None)
    rows = [
        (
            f"ZeRO {choice.zero_stage}",
            choice.offload_optimizer,
            choice.offload_parameters,
            _yes(choice.gradient_checkpointing),
            shown(choice.memory_bytes),
            shown(choice.host_bytes),
            "no limit set" if choice.fits is None else _yes(choice.fits),
            "" if choice.fewest_workers is None else _count(choice.fewest_workers),
            "configured" * choice.configured or "simplest that fits" * (choice is smallest),
        )
        for choice in choices
    ]
    heads = ("", "optimizer to", "weights to", "recomputed", "memory a worker", "of its machine",
             "fits", "fewest workers", "")  # fmt: skip
    return [heads, *rows]


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


def shown(size: int | None) -> str:
    """Bytes for people."""
    if size is None:
        return "unknown until prepare"
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 1024**2:.2f} MiB"


def operations(flops: float) -> str:
    """Floating-point operations for people."""
    for unit, size, least in (("ZFLOP", 1e21, 1), ("EFLOP", 1e18, 1), ("PFLOP", 1e15, 0.1)):
        if flops >= least * size:
            return f"{flops / size:,.2f} {unit}"
    return f"{flops / 1e12:,.4f} TFLOP"


def reached(objective: str, value: float) -> str:
    """What a trial has come to, for people."""
    match objective:
        case "train/flops":
            return operations(value)
        case "eval/accuracy":
            return f"{value:.1%} right"
        case _:
            return f"loss {value:.4f}"


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:,.1f}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
