"""What orchestration costs: steps a second of `dsvl train` against a bare DeepSpeed loop on the same work.

    python -m tests.benchmarks.orchestrating [--pairs 7] [--workers 1] [--write tests/benchmarks/results]

Both train the same model on the same prepared samples with a thread a worker. `dsvl train` has Ray Train,
journal, MLflow, guard and watchdog around the loop; the bare one is processes and `dsvl.train.steps`. Runs
alternate. Updates are timed from one to the next within an epoch; the first third, in which Ray's processes
still start, is left out. Run it on a machine that does nothing else and has a core more than workers: Ray's
own processes need some of it.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp

from dsvl.data.blend import Blender
from dsvl.data.store import open_store
from dsvl.digits import chats
from dsvl.engine import Engine, join
from dsvl.model import VisualChat
from dsvl.train import steps
from orchestration.compose import load
from orchestration.plan import prepared_folder
from orchestration.records import journal
from tests.benchmarks.mmca import machine
from tests.orchestration.conftest import digits

TARGET = 0.97
SAMPLES, BATCH = 8192, 64
SETTINGS = {
    "train": {"batch": BATCH, "epochs": 1, "precision": "fp32"},
    "engine": {"micro_batch": 16},
    "evaluation": {"chats": 0, "samples": 8},
    "checkpoint": {"every": 10_000},
}


def orchestrated(file: Path) -> list[float]:
    """Seconds of each update of `dsvl train`."""
    command = [sys.executable, "-m", "orchestration.cli", "train", str(file)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    entries = journal.read(load(file).run_folder)[0]
    times = [
        entry["time"]
        for entry in entries
        if entry["kind"] == "metrics" and "train/loss" in entry["metrics"]
    ]
    return np.diff(times[:-1]).tolist()  # the last comes after an evaluation


def bare(file: Path, workers: int) -> list[float]:
    """The same of the bare loop."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = file.with_suffix(".bare.json")
    mp.start_processes(_bare_rank, (workers, file, port, out), nprocs=workers, start_method="spawn")
    return np.diff(json.loads(out.read_text())[:-1]).tolist()


def _bare_rank(rank: int, workers: int, file: Path, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    join(backend="gloo")
    experiment = load(file)
    folder, train = prepared_folder(experiment), experiment.train
    assert folder is not None
    prepared = open_store(folder)
    model = VisualChat(experiment.model, precision=train.precision, seed=train.seed)
    engine = Engine(model, engine=experiment.engine, train=train, optim_config=experiment.optim)
    blender = Blender(prepared, "train", data=experiment.data, seed=train.seed)
    times = []
    for _ in steps(engine, prepared, blender, train=train, config=experiment.engine):
        times.append(time.time())
    if rank == 0:
        out.write_text(json.dumps(times))
    torch.distributed.destroy_process_group()


def compare(pairs: int, workers: int, folder: Path) -> dict[str, Any]:
    """Both ways in turns, after one run that prepares the data."""
    chats.write(folder / "raw/digits", train=SAMPLES, evaluation=64)
    settings = SETTINGS | {"cluster": {"workers": workers}}
    orchestrated(digits(folder, "first", **settings))
    found: dict[str, list[float]] = {"dsvl train": [], "bare": []}
    p99: dict[str, list[float]] = {"dsvl train": [], "bare": []}
    for pair in range(pairs):
        file = digits(folder, f"pair-{pair}", **settings)
        for name, seconds in (("dsvl train", orchestrated(file)), ("bare", bare(file, workers))):
            steady = seconds[len(seconds) // 3 :]
            found[name].append(statistics.median(steady))
            p99[name].append(float(np.percentile(steady, 99)))
        text = {name: round(1000 * times[-1], 1) for name, times in found.items()}
        print(f"pair {pair}: {text} ms an update", file=sys.stderr, flush=True)
    shares = [alone / ours for ours, alone in zip(found["dsvl train"], found["bare"], strict=True)]
    return {
        "updates": SAMPLES // BATCH,
        "workers": workers,
        "pairs": pairs,
        "ms_an_update": {
            name: [round(1000 * f(times), 2) for f in (statistics.median, min, max)]
            for name, times in found.items()
        },
        "p99_ms": {name: round(1000 * statistics.median(t), 2) for name, t in p99.items()},
        "steps_a_second_of_bare": [round(f(shares), 4) for f in (statistics.median, min, max)],
        "target": TARGET,
        "met": statistics.median(shares) >= TARGET,
    }


def main() -> None:
    """Compare and print the document; exit code 1 below the target."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = compare(options.pairs, options.workers, Path(folder))
    document |= {
        "command": f"python -m tests.benchmarks.orchestrating --pairs {options.pairs}",
        "machine": machine(torch.device("cpu")),
    }
    text = json.dumps(document, indent=1)
    print(text)
    if options.write:
        (options.write / "orchestrating.json").write_text(text + "\n", encoding="utf-8")
    sys.exit(not document["met"])


if __name__ == "__main__":
    main()
