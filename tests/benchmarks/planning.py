"""How near the plan's memory comes to what trainings take: DeepSpeed engines on gloo, a process a worker.

    python -m tests.benchmarks.planning [--only CASE ...] [--write tests/benchmarks/results]

A worker's peak is what is resident at most during two updates, less what was when a tiny model had been
trained in the same process: libraries. Samples are as long as `data.max_tokens` allows and hold a small
image; half of their text is answers, where the plan counts all. Ten minutes on two cores, on Linux.
"""

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dsvl.data.collate import collate
from dsvl.data.types import IGNORED, Batch, Example, Kind
from dsvl.engine import Engine, join
from dsvl.model import VisualChat
from orchestration.config import Experiment, validated
from orchestration.planning.memory import memory
from tests.benchmarks.measure import MALLOC, peak_mib
from tests.benchmarks.mmca import machine

TARGET = 0.10
"""How far the plan may be from the measured peak, as a share of it."""
TOUCHED = {"MALLOC_PERTURB_": "1"}
"""Has glibc fill what it gives, so that all that is allocated is resident, as it is on a GPU."""
UPDATES = 2
"""The first allocates the moments, the second is the first that prefetches under ZeRO 3."""

VISION = {
    "image_size": 56,
    "patch_size": 14,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
}
LANGUAGE = {
    "vocab_size": 16_000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
}
CASES: dict[str, dict[str, object]] = {
    "zero-0": {"engine.zero_stage": 0},
    "zero-1": {"engine.zero_stage": 1},
    "zero-2": {"engine.zero_stage": 2},
    "zero-3": {"engine.zero_stage": 3},
    "zero-2-two-workers": {"engine.zero_stage": 2, "cluster.workers": 2},
    "zero-3-two-workers": {"engine.zero_stage": 3, "cluster.workers": 2},
    "recomputed": {"engine.gradient_checkpointing": True},
    "recomputed-zero-3-two-workers": {
        "engine.gradient_checkpointing": True, "engine.zero_stage": 3, "cluster.workers": 2
    },
    "causal": {"model.attention": "causal"},
    "micro-batch-2": {"engine.micro_batch": 2, "data.max_tokens": 512},
    "accumulated": {"train.batch": 4},
    "shared-keys": {"model.languages.made.num_key_value_heads": 4},
    "adapters": {"model.language_lora.rank": 32},
}  # fmt: skip


def experiment(overrides: Mapping[str, object], folder: Path = Path("made")) -> Experiment:
    """A case, its checkpoints in a folder; a batch is a micro batch a worker where it is not set."""
    settings: dict[str, Any] = {
        "name": "planning",
        "model": {
            "size": "made",
            "languages": {"made": {"checkpoint": str(folder / "language"), **LANGUAGE}},
            "vision": {"checkpoint": str(folder / "vision"), **VISION},
        },
        "data": {
            "max_tokens": 1024,
            "sets": {"made": {"reader": "llava_json", "annotations": ["made"], "images": "made"}},
        },
        "train": {"epochs": 1, "batch": 4, "precision": "fp32"},
        "engine": {"gradient_checkpointing": False},
    }
    workers, micro = (overrides.get(n, 1) for n in ("cluster.workers", "engine.micro_batch"))
    return validated(settings).with_overrides(
        {"train.batch": int(workers) * int(micro)} | overrides
    )


def measure(planned: Experiment, folder: Path) -> list[float]:
    """MiB that each worker takes at its peak."""
    for each in (planned, small(planned)):
        write_checkpoints(each)
    (folder / "experiment.json").write_text(json.dumps(planned.as_dict()), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = planned.cluster.workers
    command = [sys.executable, "-m", "tests.benchmarks.planning", "--worker", str(folder)]
    place = {"WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            command,
            env=os.environ
            | MALLOC
            | TOUCHED
            | place
            | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(workers)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a worker failed; see above")
    return [float(lines.split()[-1]) for lines in said]


def small(planned: Experiment) -> Experiment:
    """The same with a tiny decoder: what its training leaves resident is libraries."""
    name = "model.languages.made"
    tiny = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "checkpoint": planned.model.language.checkpoint + "-small"}  # fmt: skip
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return planned.with_overrides({f"{name}.{field}": v for field, v in (tiny | heads).items()})


def write_checkpoints(planned: Experiment) -> None:
    """A decoder and a tower of the experiment's shapes, with random weights."""
    torch.manual_seed(0)
    language, vision = planned.model.language, planned.model.vision
    shape = {n: v for n, v in vars(language).items() if isinstance(v, int)}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(language.checkpoint)
    shape = {n: v for n, v in vars(vision).items() if isinstance(v, int)}
    CLIPVisionModel(CLIPVisionConfig(**shape, num_attention_heads=4)).save_pretrained(
        vision.checkpoint
    )


def work(folder: Path) -> float:
    """The peak of this process as a worker, in MiB."""
    settings = json.loads((folder / "experiment.json").read_text(encoding="utf-8"))
    planned = validated(settings)
    torch.set_num_threads(1)
    join(backend="gloo")
    train(small(planned))
    peak = peak_mib(lambda: train(planned), torch.device("cpu"))
    dist.destroy_process_group()
    return peak


def train(planned: Experiment) -> None:
    """Build the model and update it some times; the peak begins anew where training begins."""
    model = VisualChat(planned.model, precision="fp32", seed=0)
    for weight in model.parameters():
        weight.data = (
            weight.data.clone()
        )  # off its file, pages of which stay as long as any is used
    engine = Engine(model, engine=planned.engine, train=planned.train, optim_config=planned.optim)
    passes = planned.train.batch // (planned.cluster.workers * planned.engine.micro_batch)
    batches = [batch(planned, seed=number) for number in range(passes)]
    targets = sum(int((each.labels != IGNORED).sum()) for each in batches)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # building took more, and is over
    for _ in range(UPDATES):
        engine.update(batches, targets=targets * planned.cluster.workers, lr=1e-3)
    engine.deepspeed.destroy()


def batch(planned: Experiment, *, seed: int) -> Batch:
    """A micro batch of full samples: an image, then text of which half is answers."""
    random, shown = np.random.default_rng(seed), planned.model.image_tokens
    length = planned.data.max_tokens
    is_image = np.arange(length) < shown
    ids = np.where(is_image, 0, random.integers(planned.model.language.vocab_size, size=length))
    labels = np.where(np.arange(length) < (length + shown) // 2, IGNORED, ids)
    example = Example(
        "made",
        ids.astype(np.int32),
        labels.astype(np.int32),
        np.where(is_image, Kind.IMAGE, Kind.TEXT).astype(np.int8),
        ("image",),
    )
    side = planned.model.vision.image_size
    image = random.normal(size=(3, side, side)).astype(np.float32)
    return collate(
        [example] * planned.engine.micro_batch,
        pixels=lambda _: image,
        image_tokens=shown,
        pad_id=0,
    )


def compare(name: str) -> dict[str, Any]:
    """A case: what is planned and what the worker that took most took, in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        planned = experiment(CASES[name], Path(folder))
        measured = max(measure(planned, Path(folder)))
    parts = {part: size / 2**20 for part, size in memory(planned).items()}
    total = sum(parts.values())
    return {"name": name, "planned": parts, "planned_mib": total, "measured_mib": measured,
            "ratio": total / measured}  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """All cases as Markdown."""
    of, cases = document["machine"], document["cases"]
    parts = list(cases[0]["planned"])
    lines = [
        f"`{document['command']}`, {document['seconds']} s in all.",
        f"{of['device']}, a thread a worker, torch {of['torch']}, float32. MiB of the worker that took most.",
        "",
        f"| case | {' | '.join(parts)} | planned | measured | planned / measured |",
        f"|---|{'---|' * (len(parts) + 3)}",
    ]
    for case in cases:
        sizes = [*case["planned"].values(), case["planned_mib"], case["measured_mib"]]
        cells = [case["name"], *(f"{size:,.0f}" for size in sizes), f"{case['ratio']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    ratios = [case["ratio"] for case in cases]
    met = all(abs(ratio - 1) <= TARGET for ratio in ratios)
    verdict = "met" if met else "MISSED"
    lines += [
        "",
        f"From {min(ratios):.3f} to {max(ratios):.3f}; target within {TARGET:.0%}: {verdict}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(work(options.worker))
        return
    began, cases = time.monotonic(), []
    for name in options.only:
        cases.append(compare(name))
        print(
            f"{time.monotonic() - began:4.0f} s  {name} {cases[-1]['ratio']:.3f}", file=sys.stderr
        )
    document = {
        "machine": machine(torch.device("cpu")),
        "command": f"python -m tests.benchmarks.planning {' '.join(sys.argv[1:])}".strip(),
        "seconds": round(time.monotonic() - began),
        "cases": cases,
    }
    print(table(document))
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1) + "\n"
        (options.write / "planning.json").write_text(text, encoding="utf-8")
        (options.write / "planning.md").write_text(table(document), encoding="utf-8")


if __name__ == "__main__":
    main()
