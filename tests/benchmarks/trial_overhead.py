"""What a trial costs beyond its own work: this project's settings against Ray's and DeepSpeed's defaults.

    python -m tests.benchmarks.trial_overhead [--pairs 3]

Two ratios, each from runs that alternate: the wall time of a sweep of four tiny trials with and without
the settings of `orchestration.cluster` and `reuse_actors`, and the CPU time that a worker's imports
take with and without what `orchestration.trainer.work` and `dsvl.engine.join` leave out. Run it on a
machine that does nothing else.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dsvl.digits import chats

DEFAULTS = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "2", "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
SWEEP = """
import functools, sys
from orchestration import search
from orchestration.cli import main
if sys.argv[1] == "defaults":
    search.tune.TuneConfig = functools.partial(
        lambda make, **settings: make(**settings | {"reuse_actors": False}), search.tune.TuneConfig
    )
sys.exit(main(sys.argv[2:]))
"""
IMPORTS = """
import sys
if sys.argv[1] == "ours":
    sys.modules["mlflow"] = None
import deepspeed, transformers
from transformers import CLIPVisionModel, LlamaForCausalLM
if sys.argv[1] == "defaults":
    deepspeed.ops.__compatible_ops__
"""


def sweep_seconds(variant: str, raw: Path) -> float:
    """Wall seconds a trial, from four trials of a few seconds each, the start of Ray left out."""
    with tempfile.TemporaryDirectory() as storage:
        arguments = [
            "sweep",
            "configs/experiment/quickstart.yaml",
            f"storage.path={storage}",
            f"storage.data={raw}",
            "search.space.model.size.values=[small]",
            "search.space.optim.lr.values=[1e-3, 3e-3, 1e-2, 3e-2]",
            "search.space.train.epochs.values=[1]",
            "search.concurrent=1",
        ]
        command = [sys.executable, "-c", SWEEP, variant, *arguments]
        environment = os.environ | (DEFAULTS if variant == "defaults" else {})
        subprocess.run(command, env=environment, check=True, capture_output=True)
        folders = sorted(Path(storage).glob("quickstart/trials/*/result.json"))
        ends = sorted(path.stat().st_mtime for path in folders)
    # The first trial also pays for what the cluster starts once.
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def import_seconds(variant: str) -> float:
    """CPU seconds of a worker's imports."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", IMPORTS, variant], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Alternate the variants and print medians, spreads and ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    pairs = parser.parse_args().pairs
    began = time.monotonic()
    results: dict[str, dict[str, list[float]]] = {"sweep": {}, "imports": {}}
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder)
        chats.write(raw / "digits", train=128, evaluation=32)
        import_seconds("ours")  # warms the page cache
        for _ in range(pairs):
            for variant in ("defaults", "ours"):
                results["sweep"].setdefault(variant, []).append(sweep_seconds(variant, raw))
                results["imports"].setdefault(variant, []).append(import_seconds(variant))
    summary = {
        what: {
            variant: {"median": statistics.median(values), "all": [round(v, 2) for v in values]}
            for variant, values in variants.items()
        }
        | {"ratio": statistics.median(variants["defaults"]) / statistics.median(variants["ours"])}
        for what, variants in results.items()
    }
    print(json.dumps(summary | {"seconds": round(time.monotonic() - began)}, indent=1))


if __name__ == "__main__":
    main()
