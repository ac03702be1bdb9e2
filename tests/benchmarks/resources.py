"""What the systems take that the literature compares, each built of this project's parts: by `plan` alone.

    python -m tests.benchmarks.resources [--write tests/benchmarks/results]

The columns are those of the survey's table: training data, learnable parameters, resources and time; beside
them what the systems' authors report of their own, which differ in data, towers and decoders.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from orchestration.compose import load
from orchestration.plan import plan

EXPERIMENTS = Path(__file__).parents[2] / "configs/experiment"

REPORTED = {
    "llava_7b_linear": ("LLaVA, linear", "158K instructions; 8 A100, 18 hours"),
    "llava_7b_mlp": ("LLaVA-1.5, MLP", "—"),
    "minigpt4_7b": ("MiniGPT-4", "5M image-text pairs; 4 A100, 10 hours"),
    "blip2_7b": ("BLIP-2", "129M images, 1.2B parameters; 16 A100 (40 GB), 9 days"),
    "otter_7b": ("Flamingo, Otter", "10.6B parameters; TPUv4, 15 days (Flamingo)"),
    "qwen_vl_7b": ("Qwen-VL", "—"),
    "sparkleschat_7b": ("SparklesChat", "—"),
    "visualchat_7b": ("DeepSpeed-VisualChat, Single 7B", "10M to 100M parameters"),
    "visualchat_13b_set2": ("DeepSpeed-VisualChat, Set2 13B", "222,681 samples"),
}
"""Experiment -> the system that it stands for, and what its authors report."""


HEAD = """# What the compared systems take

`python -m tests.benchmarks.resources --write tests/benchmarks/results`: each system of this project's parts,
on one machine with eight GPUs of 80 GB, told by `dsvl plan configs/experiment/NAME.yaml` for full samples at
40 % of an A100's peak: bounds from above, none measured. The last column is what their authors report of
other data, towers and decoders (the survey's table); it is no comparison with ours.

| system | experiment | attention, projection | samples, epochs | trained | GiB a GPU | hours | $ | reported |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True)
class System:
    """A row of the table."""

    name: str
    experiment: str
    attention: str
    projection: str
    samples: int
    epochs: int
    learnable: int
    gpus: int
    gpu_memory_gib: float
    hours: float
    money: float
    reported: str


def systems() -> list[System]:
    """All of them, in the order of the table."""
    rows = []
    for file, (name, reported) in REPORTED.items():
        experiment = load(EXPERIMENTS / f"{file}.yaml")
        planned = plan(experiment)
        size = planned.sizes[0]
        assert planned.samples is not None
        assert planned.run.hours is not None
        assert planned.run.money is not None
        rows.append(
            System(
                name=name,
                experiment=file,
                attention=experiment.model.attention,
                projection=experiment.model.projection,
                samples=planned.samples,
                epochs=experiment.train.epochs,
                learnable=sum(part.trainable for part in size.parameters.values()),
                gpus=experiment.cluster.workers,
                gpu_memory_gib=size.memory_bytes / 2**30,
                hours=planned.run.hours,
                money=planned.run.money,
                reported=reported,
            )
        )
    return rows


def render(rows: list[System]) -> str:
    """The table for people."""
    lines = [HEAD]
    for row in rows:
        cells = (
            row.name,
            f"`{row.experiment}`",
            f"{row.attention}, {row.projection}",
            f"{row.samples:,} x {row.epochs}",
            f"{row.learnable / 1e6:,.1f}M",
            f"{row.gpu_memory_gib:.1f}",
            f"{row.hours:,.1f}",
            f"{row.money:,.0f}",
            row.reported,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Plan, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    options, rows = parser.parse_args(), systems()
    print(render(rows))
    if options.write:
        (options.write / "resources.md").write_text(render(rows), encoding="utf-8")
        text = json.dumps([asdict(row) for row in rows], indent=1)
        (options.write / "resources.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
