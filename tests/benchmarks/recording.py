"""What becomes of the record of trainings when the tracking store fails, and what keeping it costs an update.

    python -m tests.benchmarks.recording [--quick] [--only KIND ...] [--write tests/benchmarks/results]

A real MLflow server, and a door to it that breaks down on command. For each outage `dsvl train` runs in a
process of its own; then the store is well again, what it lacks is brought, and every point is held against
the journal. `cost` trains with the default store while the shipper is stopped and let go on in turns that
are longer than its period, so that it also catches up in its own: what an update takes with it and without,
turn by turn, in one run; and how long the one call takes that the loop makes. What a folder to write to has
of other kinds stays. `--quick` only shows that all of it works.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from mlflow import MlflowClient

from dsvl.digits import chats
from orchestration.compose import load
from orchestration.records import journal
from orchestration.records.course import Course
from orchestration.records.journal import Journal
from orchestration.records.shipping import catch_up
from tests.benchmarks.mmca import machine
from tests.orchestration.conftest import digits, run_folder, run_id
from tests.orchestration.outages import OUTAGES, TOKEN, Door, Server, differences

BATCH = 8
SLOW = 5.0
"""Seconds that a slow answer takes."""
TARGETS = {"ratio": 1.01, "p99_ms_added": 5.0}
"""At most; of the mean of an update."""


@dataclass(frozen=True)
class Size:
    """How much of everything is done."""

    chats: int
    epochs: dict[str, int]
    """Of these kinds; 1 for the others."""
    turn: int
    """Updates with the shipper, then as many without."""
    down: float
    """Seconds that the store which is down in mid-run is so at least."""


FULL = Size(960, {"down in mid-run": 40, "cost": 40}, turn=120, down=60.0)
QUICK = Size(96, {"down in mid-run": 6, "cost": 20}, turn=24, down=2.0)


def training(folder: Path, kind: str, size: Size, **tracking: Any) -> tuple[Path, int]:
    """The file of an experiment on one worker, and how many updates it has."""
    epochs = size.epochs.get(kind, 1)
    path = digits(
        folder,
        kind.replace(" ", "-"),
        train={"batch": BATCH, "epochs": epochs, "precision": "fp32"},
        cluster={"workers": 1},
        tracking=tracking,
        checkpoint={"every": 10_000},
        evaluation={"chats": 0, "samples": 8},
    )
    return path, epochs * size.chats // BATCH


def updates(run: Path) -> Callable[[], int]:
    """Tells how many updates a run has done, looking at each line of its journal once."""
    course, offset = Course(), 0

    def look() -> int:
        nonlocal offset
        entries, offset = journal.read(run, offset)
        for entry in entries:
            course.add(entry)
        return course.step

    return look


def start(path: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "orchestration.cli", "train", str(path)]
    with path.with_suffix(".log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def outage(kind: str, door: Door, folder: Path, size: Size) -> dict[str, Any]:
    """Train through it, bring what is lacking, and compare."""
    wrong, (path, steps) = OUTAGES[kind], training(folder, kind, size, uri=door.uri)
    run, began, done, undone = run_folder(path), None, False, False
    driver, step = start(path), updates(run)
    while driver.poll() is None:
        at = step() / steps
        if not done and at >= wrong.begins:
            wrong.do(door)
            began, done = time.monotonic(), True
        lasted = time.monotonic() - began if began else 0.0
        if done and not undone and wrong.ends < 1 and lasted > size.down:
            wrong.undo(door)
            undone = True
        time.sleep(0.05)
    ended = time.time()
    wrong.undo(door)
    entries = journal.read(run)[0]
    # By the record alone: the run that there is, if there is one by now.
    known = (run / "mlflow.json").exists()
    client = MlflowClient(door.uri)
    before = differences(client, run_id(run), run) if known else None
    catch_up(load(path))
    return {
        "exit": driver.returncode,
        "seconds_to_the_end": round(ended - entries[-1]["time"], 1),
        "before_the_sync": before,
        "after_the_sync": differences(client, run_id(run), run),
        "state": client.get_run(run_id(run)).info.status,
    }


def cost(folder: Path, size: Size) -> dict[str, Any]:
    """What an update takes with a shipper at work, and without."""
    path, steps = training(folder, "cost", size)
    run, driver, shipper, going = run_folder(path), start(path), None, True
    step = updates(run)
    while driver.poll() is None and (done := step()) < steps:
        if shipper is None:
            found = [
                p
                for p in psutil.Process(driver.pid).children()
                if "orchestration.records.shipping" in p.cmdline()
            ]
            shipper = found[0] if (run / "mlflow.json").exists() else None
        elif (done // size.turn % 2 == 0) != going:
            going = not going
            shipper.resume() if going else shipper.suspend()
        time.sleep(0.005)
    assert shipper is not None
    shipper.resume()
    assert driver.wait() == 0, path.with_suffix(".log").read_text()[-2000:]
    lines = [e for e in journal.read(run)[0] if e["kind"] == "metrics" and e["step"]]
    took: dict[int, list[float]] = {}
    for before, after in pairwise(lines):
        if after["step"] == before["step"] + 1 and "eval/loss" not in before["metrics"]:
            took.setdefault(after["step"] // size.turn, []).append(after["time"] - before["time"])
    turns = [(took[n], took[n + 1]) for n in range(2, steps // size.turn - 1, 2)]  # with, without
    ratios = [statistics.fmean(a) / statistics.fmean(b) for a, b in turns]
    with_it, without = ([s for turn in turns for s in turn[side]] for side in (0, 1))
    calls = []
    writer = Journal(folder / "calls")
    for step in range(2000):
        began = time.perf_counter()
        writer.metrics(step, lines[-2]["metrics"])
        calls.append(time.perf_counter() - began)
        time.sleep(0.002)
    return {
        "updates": len(with_it) + len(without),
        "turns": len(turns),
        "ms_with": round(1000 * statistics.fmean(with_it), 2),
        "ms_without": round(1000 * statistics.fmean(without), 2),
        "ratio": round(statistics.fmean(with_it) / statistics.fmean(without), 4),
        "ratio_by_turns": {
            "median": round(statistics.median(ratios), 4),
            "quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
        },
        "p99_ms_added": round(1000 * (p99(with_it) - p99(without)), 2),
        "call_us": {
            "median": round(1e6 * statistics.median(calls), 1),
            "p99": round(1e6 * p99(calls), 1),
        },
    }


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[-1]


def main() -> None:
    """Measure and print the document; exit code 1 where a point is lost or doubled, or a training failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    kinds = [*OUTAGES, "cost"]
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds, metavar="KIND")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    file = options.write / "recording.json" if options.write else None
    found = json.loads(file.read_text())["kinds"] if file and file.exists() else {}
    os.environ["MLFLOW_TRACKING_TOKEN"] = TOKEN
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        chats.write(folder / "raw/digits", train=size.chats, evaluation=8)
        server = Server(folder)
        stack.callback(server.end)
        for kind in options.only:
            if kind == "cost":
                found[kind] = cost(folder, size)
            else:
                door = Door(server, seconds=SLOW)
                found[kind] = outage(kind, door, folder, size)
                door.close()
            print(f"{kind}: {found[kind]}", file=sys.stderr, flush=True)
            document = {
                "command": f"python -m tests.benchmarks.recording{' --quick' * options.quick}",
                "targets": TARGETS,
                "kinds": found,
                "machine": machine(torch.device("cpu")),
            }
            if file:
                file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))
    clean = {"lost": 0, "doubled": 0, "others": 0, "unknown": 0}
    outages = [one for kind, one in found.items() if kind != "cost"]
    sys.exit(
        any(one["exit"] or not clean.items() <= one["after_the_sync"].items() for one in outages)
    )


if __name__ == "__main__":
    main()
