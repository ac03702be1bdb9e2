"""What trainings survive: processes killed at random moments, and the bits that come out in the end.

    python -m tests.benchmarks.surviving [--seeds 10] [--only KIND ...] [--write tests/benchmarks/results]

Every run is `dsvl train` in a process of its own, on two workers, with 48 updates and a checkpoint after each
fifth. Parameters, moments, random states, data position and manifest of its last checkpoint are held against
those of an undisturbed run, byte by byte. A driver that is killed is started again with the same command;
what happens to workers the run has to deal with itself. About half a minute a run on two cores. What a folder
to write to has of other kinds stays.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import torch

from dsvl.digits import chats
from orchestration.records import journal
from orchestration.training import faults
from tests.benchmarks.mmca import machine
from tests.orchestration.conftest import digits, run_folder, steps_done

UPDATES, EVERY = 48, 5
Disturb = Callable[[random.Random, Any], None]


class Run:
    """One training, from its file on."""

    def __init__(self, folder: Path, name: str) -> None:
        """Below a folder that has the raw data."""
        self.file = self.write(folder, name)
        self.folder = run_folder(self.file)
        self.driver: subprocess.Popen | None = None
        self.environment: dict[str, str] = {}
        self.notes: dict[str, bool] = {}

    def write(self, folder: Path, name: str) -> Path:
        """Its experiment, as a file; all runs share the prepared data."""
        return digits(folder, name)

    def start(self) -> None:
        """Type `dsvl train`."""
        command = [sys.executable, "-m", "orchestration.cli", "train", str(self.file)]
        environment = os.environ | self.environment
        with self.file.with_suffix(".log").open("a") as log:
            self.driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def end(self) -> None:
        """Wait for it; it must end well."""
        assert self.driver is not None
        code = self.driver.wait(timeout=900)
        assert code == 0, f"{self.file}: exit {code}; {self.said()}"

    def reach(self, update: int) -> None:
        """Wait until it has made an update."""
        while steps_done(self.folder) < update:
            self.running()
            time.sleep(0.02)

    def running(self) -> None:
        """It must not have ended."""
        assert self.driver is not None
        assert self.driver.poll() is None, f"{self.file}: ended early; {self.said()}"

    def said(self) -> str:
        """The end of what the command has printed."""
        return self.file.with_suffix(".log").read_text()[-2000:]

    def workers(self) -> list[psutil.Process]:
        """Its training processes."""
        assert self.driver is not None
        return [
            process
            for process in psutil.Process(self.driver.pid).children(recursive=True)
            if "RayTrainWorker" in " ".join(process.cmdline())
        ]

    def outcome(self) -> dict[str, bytes]:
        """The files of its last checkpoint."""
        last = self.folder / f"checkpoints/step-{UPDATES:06d}"
        return {path.name: path.read_bytes() for path in last.iterdir()}


def a_rank(draw: random.Random, run: Run) -> None:
    """SIGKILL of either rank, by itself, after any update."""
    fault = {"action": "kill", "rank": draw.randrange(2), "step": draw.randint(1, UPDATES)}
    run.environment = {faults.VARIABLE: json.dumps([fault])}
    run.start()


def a_rank_in_a_save(draw: random.Random, run: Run) -> None:
    """SIGKILL of either rank while a checkpoint is being written."""
    number = draw.randrange(UPDATES // EVERY)
    run.start()
    run.reach(number * EVERY)
    while not list((run.folder / "checkpoints").glob(".step-*")):
        run.running()
    time.sleep(draw.random() * 0.02)
    draw.choice(run.workers()).kill()
    run.notes["save_left_half_done"] = bool(list((run.folder / "checkpoints").glob(".step-*")))


def all_workers(draw: random.Random, run: Run) -> None:
    """SIGKILL of both ranks at once."""
    moment = draw.randint(1, UPDATES - 2)
    run.start()
    run.reach(moment)
    for worker in run.workers():
        worker.kill()


def the_driver(draw: random.Random, run: Run) -> None:
    """SIGKILL of the process that was typed, and the same command again at once."""
    moment = draw.randint(1, UPDATES - 2)
    run.start()
    run.reach(moment)
    assert run.driver is not None
    run.driver.kill()
    run.driver.wait()
    run.start()


KINDS: dict[str, Disturb] = {
    "a-rank": a_rank,
    "a-rank-in-a-save": a_rank_in_a_save,
    "all-workers": all_workers,
    "the-driver": the_driver,
}


def told(run: Run) -> dict[str, Any]:
    """Most updates that were made twice, and seconds from the last sign of life to the first new update."""
    entries = [e for e in journal.read(run.folder)[0] if e["kind"] in ("start", "metrics")]
    lost, away, done = 0, 0.0, 0
    for before, entry, after in zip(entries, entries[1:], entries[2:], strict=False):
        done = max(done, before["step"])
        if entry["kind"] == "start":
            lost = max(lost, done - entry["step"])
            away = max(away, after["time"] - before["time"])
    return {"lost": lost, "seconds_away": round(away, 1)}


def survive(
    kinds: Mapping[str, Disturb], start: type[Run], seeds: int, folder: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Disturb `seeds` trainings in each way; yields what became of them, way by way."""
    chats.write(folder / "raw/digits", train=96, evaluation=8)
    whole = start(folder, "unbroken")
    whole.start()
    whole.end()
    expected = whole.outcome()
    for kind in kinds:
        runs = []
        for seed in range(seeds):
            began, run = time.monotonic(), start(folder, f"{kind}-{seed}")
            kinds[kind](random.Random(f"{kind}{seed}"), run)
            run.end()
            same = run.outcome() == expected
            runs.append({"seed": seed, "same": same, **told(run), **run.notes})
            text = f"{kind} {seed}: {runs[-1]}, {time.monotonic() - began:.0f} s"
            print(text, file=sys.stderr, flush=True)
        yield (
            kind,
            {
                "what": (kinds[kind].__doc__ or "").strip(),
                "runs": len(runs),
                "same_bits": sum(run["same"] for run in runs),
                "most_updates_lost": max(run["lost"] for run in runs),
                "seconds_away": {
                    "median": statistics.median(run["seconds_away"] for run in runs),
                    "most": max(run["seconds_away"] for run in runs),
                },
                "each": runs,
            },
        )


def main(
    name: str = "surviving", ways: Mapping[str, Disturb] = KINDS, start: type[Run] = Run
) -> None:
    """Survive and print the document; exit code 1 where bits differ, or too many updates were lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=ways, default=list(ways), metavar="KIND")
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    file = options.write / f"{name}.json" if options.write else None
    kinds = json.loads(file.read_text())["kinds"] if file and file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, found in survive(
            {kind: ways[kind] for kind in options.only}, start, options.seeds, Path(folder)
        ):
            kinds[kind] = found
            document = {
                "command": f"python -m tests.benchmarks.{name} --seeds {options.seeds}",
                "checkpoint_every": EVERY,
                "updates": UPDATES,
                "kinds": kinds,
                "machine": machine(torch.device("cpu")),
            }
            text = json.dumps(document, indent=1)
            if file:
                file.write_text(text + "\n", encoding="utf-8")
            print(text)
    sys.exit(
        any(k["same_bits"] < k["runs"] or k["most_updates_lost"] > EVERY for k in kinds.values())
    )


if __name__ == "__main__":
    main()
