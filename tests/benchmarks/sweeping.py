"""What a search survives: a driver killed at random moments, trials that fail, requests that cannot be.

    python -m tests.benchmarks.sweeping FOLDER [--only PART ...] [--trials 16] [--kills 20] [--write RESULTS]

- `killed`: `dsvl sweep` of 16 short trials that Optuna's estimator proposes from the results of those before.
  Its driver is killed (SIGKILL) at 20 random moments and typed again at once; in the end every trial, every
  number and the best one are held against those of the same sweep left alone.
- `failing`: of eight of these trials one runs out of memory, one meets a NaN and one raises. The others are
  held to the same numbers, and Ray is asked for placement groups that are left.
- `refused`: trials that this machine, or a cluster that runs, can never hold.

FOLDER keeps what was done: interrupted, the benchmark goes on when it is typed again.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.state import list_placement_groups

from dsvl.digits import chats
from orchestration import commands
from orchestration.compose import load
from orchestration.records.journal import curve, read, read_json, write_json
from orchestration.records.results import trials_folder
from orchestration.search import trial_name
from orchestration.training import faults
from tests.benchmarks.mmca import machine
from tests.orchestration.conftest import digits

UPDATES, EVERY = 12, 5
"""Of a trial, and from one of its checkpoints to the next."""
PAUSE_SECONDS = 5.0
"""At most, from the update that a kill waits for to the kill: starts and ends of trials are hit as well."""
METRICS = ("eval/loss", "eval/accuracy", "train/loss")
TRAIN = {"batch": 8, "epochs": 1, "precision": "fp32"}
AT_ONCE_SECONDS = 10.0
"""Within which a request that cannot be is refused."""
FAULTS = {"exhaust": "RuntimeError", "corrupt": "FloatingPointError", "raise": "RuntimeError"}
"""What strikes a trial, and what it fails of."""


class Sweep:
    """One search, from its file on."""

    def __init__(self, folder: Path, name: str, **sections: Any) -> None:
        self.file = digits(
            folder, name, **{"train": TRAIN, "checkpoint": {"every": EVERY}} | sections
        )
        self.root = trials_folder(load(self.file))

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Type `dsvl sweep`."""
        command = [sys.executable, "-m", "orchestration.cli", "sweep", str(self.file), *options]
        with self.file.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)

    def end(self, trials: int) -> None:
        """Type it and wait until so many trials have a result, unless they do; it must end well."""
        if len(self.ledger()) == trials:
            return
        driver = self.start()
        driver.communicate()
        assert driver.returncode == 0, self.file.with_suffix(".log").read_text()[-2000:]

    @property
    def updates(self) -> int:
        """That all trials have made, repeated ones once."""
        return sum(
            len(curve(path.parent, "train/loss")) for path in self.root.glob("*/values.json")
        )

    def results(self) -> dict[str, dict[str, Any]]:
        """What each trial that has a result has come to."""
        return {
            path.parent.name: {name: read_json(path)["metrics"][name] for name in METRICS}
            for path in sorted(self.root.glob("*/result.json"))
        }

    def ledger(self) -> dict[str, int]:
        """When each result was written, in nanoseconds, and thus whether it was again."""
        return {
            path.parent.name: path.stat().st_mtime_ns for path in self.root.glob("*/result.json")
        }


def proposed(folder: Path, name: str, trials: int) -> Sweep:
    """A search whose proposals follow from the results of the trials before."""
    rates = {"kind": "loguniform", "low": 1e-3, "high": 1e-1}
    space = {"optim.lr": rates}
    return Sweep(
        folder, name, search={"space": space, "sampler": "tpe", "samples": trials, "seed": 1}
    )


def killed(folder: Path, trials: int, kills: int) -> dict[str, Any]:
    """Kill the driver, type it again, and hold what comes of it against an unbroken sweep."""
    whole, broken = proposed(folder, "unbroken", trials), proposed(folder, "killed", trials)
    whole.end(trials)
    draw, told = random.Random(0), folder / "kills.json"
    moments = sorted(draw.randrange(trials * UPDATES) for _ in range(kills))
    pauses = [draw.uniform(0, PAUSE_SECONDS) for _ in moments]
    done: list[dict[str, Any]] = read_json(told) if told.exists() else []
    for moment, pause in list(zip(moments, pauses, strict=True))[len(done) :]:
        driver, typed = broken.start(), time.monotonic()
        while broken.updates < moment and driver.poll() is None:
            time.sleep(0.05)
        time.sleep(pause)
        assert driver.poll() is None, broken.file.with_suffix(".log").read_text()[-2000:]
        driver.kill()
        driver.wait()
        alive = round(time.monotonic() - typed, 1)
        done.append({"updates": broken.updates, "alive_s": alive, "results": broken.ledger()})
        write_json(told, done)
        print(f"kill {len(done)}: {done[-1]}", file=sys.stderr, flush=True)
    broken.end(trials)
    last, expected, found = broken.ledger(), whole.results(), broken.results()
    journals = [read(path.parent)[0] for path in broken.root.glob("*/result.json")]
    made = [
        e for j in journals for e in j if e["kind"] == "metrics" and "train/loss" in e["metrics"]
    ]
    return {
        "trials": len(expected),
        "kills": len(done),
        "updates_at_kills": [kill["updates"] for kill in done],
        "seconds_from_start_to_kill": [kill["alive_s"] for kill in done],
        "results_at_kills": [len(kill["results"]) for kill in done],
        "results_lost_or_written_again": sum(
            last.get(name) != when for kill in done for name, when in kill["results"].items()
        ),
        "updates": trials * UPDATES,
        "updates_made": len(made),
        "same_proposals": list(expected) == list(found),
        "same_metrics": expected == found,
        "best": best(expected),
        "same_best": best(expected) == best(found),
    }


def failing(folder: Path, trials: int) -> dict[str, Any]:
    """Let three of eight trials fail on a cluster of this process, and see who else is hurt."""
    whole = proposed(folder, "unbroken", trials)
    whole.end(trials)
    expected = dict(list(whole.results().items())[:8])
    rates = [read_json(whole.root / name / "values.json")["optim.lr"] for name in expected]
    sweep = Sweep(
        folder,
        "failing",
        train=TRAIN | {"max_skipped": 0},
        cluster={"workers": 2, "cpus_per_worker": 0.75, "failures": 0},
        search={"space": {"optim.lr": {"kind": "grid", "values": rates}}},
    )
    victims = dict(zip(FAULTS, [trial_name({"optim.lr": lr}) for lr in rates[1::2]], strict=False))
    asked = [{"action": a, "rank": 0, "step": 7, "run": name} for a, name in victims.items()]
    os.environ[faults.VARIABLE] = json.dumps(asked)  # before Ray starts: trials inherit it
    ray.init(num_cpus=2, include_dashboard=True, log_to_driver=False)
    try:
        summary = commands.sweep(load(sweep.file))
        deadline = time.monotonic() + 60
        while (left := placement_groups()) and time.monotonic() < deadline:
            time.sleep(0.2)
        ever = len(list_placement_groups(address=here()))
    finally:
        ray.shutdown()
        del os.environ[faults.VARIABLE]
    others = {name: found for name, found in expected.items() if name not in victims.values()}
    reasons = dict(failure.split(": ", 1) for failure in summary["failed"])
    return {
        "trials": len(rates),
        "failed": {action: reasons.get(name) for action, name in victims.items()},
        "others": len(others),
        "others_same_metrics": others == sweep.results(),
        "placement_groups_made": ever,
        "placement_groups_left": len(left),
    }


def placement_groups() -> list[Any]:
    """Those that Ray's state API knows and that hold something, or wait to."""
    return list_placement_groups(address=here(), filters=[("state", "!=", "REMOVED")])


def here() -> str:
    """The cluster of this process: the machine may have others."""
    return ray.get_runtime_context().gcs_address


def refused(folder: Path) -> dict[str, Any]:
    """Ask for trials of 64 workers, of this machine and of a cluster that runs, and time the answers."""
    sweep = proposed(folder, "refused", 4)
    answers = {"this_machine": answered(sweep)}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        answers["a_cluster"] = answered(sweep, f"cluster.address={here()}")
    finally:
        ray.shutdown()
    return answers


def answered(sweep: Sweep, *options: str) -> dict[str, Any]:
    """What is said to a request that cannot be, and how soon."""
    options = ("search.workers=64", "train.batch=512", *options)
    began, before = time.monotonic(), os.times()
    driver = sweep.start(*options, "--json")
    said = json.loads(driver.communicate()[0])
    after = os.times()
    spent = after.children_user + after.children_system
    return {
        "request": options,
        "exit": driver.returncode,
        "said": said["error"],
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(spent - before.children_user - before.children_system, 1),
        "load": round(os.getloadavg()[0], 1),
    }


def best(results: dict[str, dict[str, Any]]) -> str:
    """The trial of the least held-out loss."""
    return min(results, key=lambda name: results[name]["eval/loss"])


def kept(found: dict[str, Any]) -> bool:
    """Whether a part shows what it has to."""
    if "kills" in found:
        told = ("same_proposals", "same_metrics", "same_best")
        again = found["updates_made"] - found["updates"]
        at_most = found["kills"] * 2 * (EVERY - 1)  # two trials at once
        return (
            all(found[name] for name in told)
            and not found["results_lost_or_written_again"]
            and again <= at_most
        )
    if "failed" in found:
        told = all(cause in (found["failed"][action] or "") for action, cause in FAULTS.items())
        return told and found["others_same_metrics"] and not found["placement_groups_left"]
    return all(a["exit"] == 2 and a["seconds"] < AT_ONCE_SECONDS for a in found.values())


def main() -> None:
    """Print the document; exit code 1 where something was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parts = ("killed", "failing", "refused")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, metavar="PART")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    folder = options.folder.absolute()
    if not (folder / "raw/digits").exists():
        chats.write(folder / "raw/digits", train=96, evaluation=8)
    file = options.write / "sweeping.json" if options.write else None
    document = json.loads(file.read_text()) if file and file.exists() else {}
    command = f"python -m tests.benchmarks.sweeping FOLDER --trials {options.trials} --kills {options.kills}"
    document |= {"command": command, "machine": machine(torch.device("cpu"))}
    for part in options.only:
        match part:
            case "killed":
                document[part] = killed(folder, options.trials, options.kills)
            case "failing":
                document[part] = failing(folder, options.trials)
            case "refused":
                document[part] = refused(folder)
        if file:
            file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))
    sys.exit(not all(kept(document[part]) for part in options.only))


if __name__ == "__main__":
    main()
