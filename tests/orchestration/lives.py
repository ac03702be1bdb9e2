"""Commands in processes of their own that do in little what trainings and sweeps do to a record."""

import random
import subprocess
import sys
import time

import psutil

from orchestration.config import Experiment

WORKER = """
import sys, time
from pathlib import Path
from orchestration.records.journal import Journal, read
folder, steps = Path(sys.argv[1]), int(sys.argv[2])
journal = Journal(folder)
entries = read(folder)[0]
if entries and entries[-1]["kind"] == "end":
    sys.exit()
done = max((e["step"] for e in entries if e["kind"] == "metrics"), default=0) // 10 * 10
journal.start(identity="i", params={"optim.lr": 0.1}, step=done)
for step in range(done + 1, steps + 1):
    journal.metrics(step, {"train/loss": 1 / step, "train/lr": step / 7})
    time.sleep(0.01)
journal.end("finished")
"""
"""A worker: goes on from its last tenth update, as from a checkpoint."""

TRAINING = f"""
import subprocess, sys
from pathlib import Path
from orchestration.config import validated
from orchestration.records.journal import read_json
from orchestration.records.shipping import shipped
folder = Path(sys.argv[1])
experiment = validated(read_json(folder / "experiment.json")["experiment"])
with shipped(experiment, folder):
    while subprocess.run([sys.executable, "-c", {WORKER!r}, *sys.argv[1:]]).returncode:
        pass
"""
"""A command that trains: starts its worker again when that was killed."""

SWEEP = """
import sys, time
from pathlib import Path
from orchestration.config import validated
from orchestration.records.journal import Journal, read_json
from orchestration.records.results import begin
from orchestration.records.shipping import shipped
root, trials, steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
experiment = validated(read_json(root / "experiment.json")["experiment"])
Journal(root).start(identity="i", params={}, step=0)
with shipped(experiment, root):
    journals = []
    for number in range(trials):
        trial = experiment.trial({"optim.lr": (number + 1) / 1e4, "model.size": "small"})
        folder = root / f"lr={number}"
        begin(trial, folder)
        journals.append(Journal(folder))
        about = {"identity": trial.identity(), "params": trial.identity_fields()}
        journals[-1].start(**about, step=0)
    for step in range(1, steps + 1):
        for journal in journals:
            journal.metrics(step, {"train/loss": 1 / step, "eval/loss": 2 / step})
        time.sleep(0.02)
    for journal in journals:
        journal.end("finished")
    Journal(root).end("finished")
"""
"""A command that sweeps: all its trials at once."""


def start(command: str, *arguments: object, **options: object) -> subprocess.Popen:
    """One of the above."""
    return subprocess.Popen([sys.executable, "-c", command, *map(str, arguments)], **options)


def command_of(process: psutil.Process) -> list[str]:
    """What it was started with; nothing once it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # zombies among them
        return []


def disturb(
    experiment: Experiment, seed: int, *, steps: int = 300, kills: int = 3
) -> dict[str, int]:
    """Train with worker, driver and shipper killed in random order at random moments; whom, how often."""
    draw, folder = random.Random(seed), experiment.run_folder
    killed = dict.fromkeys(("worker", "driver", "shipper"), 0)
    driver = start(TRAINING, folder, steps)
    for _ in range(kills):
        time.sleep(draw.uniform(0.5, 3))
        if driver.poll() is not None:
            break
        whom, processes = draw.choice(list(killed)), {"driver": [psutil.Process(driver.pid)]}
        children = processes["driver"][0].children()
        processes["shipper"] = [
            p for p in children if "orchestration.records.shipping" in command_of(p)
        ]
        processes["worker"] = [p for p in children if p not in processes["shipper"]]
        for process in processes[whom]:
            process.kill()
            killed[whom] += 1
        if whom == "driver":
            driver.wait()
            driver = start(TRAINING, folder, steps)
    assert driver.wait() == 0
    return killed
