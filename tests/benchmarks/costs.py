"""What tasks cost, measured in real runs; and other real runs, foretold from these costs by simulation."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from dsvl.digits import chats
from orchestration.cluster import connect
from orchestration.compose import load
from orchestration.prepare import prepare
from orchestration.preparing import survey
from orchestration.preparing.pool import each
from orchestration.records import journal
from tests.benchmarks import raw, rehearsal
from tests.benchmarks.fleet import Fleet, Training, Trial, pool, search
from tests.benchmarks.nine_sets import NineSets
from tests.orchestration.conftest import digits

SMALL, LARGE = 0.03, 0.1
"""Scales of the preparations that are measured and foretold."""
JOBS = 400
SHARD = 256
"""Records of a shard of a preparation."""
PHASES = ("spools", "_check", "_gather", "_split", "_write")
"""Of a preparation, as `orchestration.preparing.survey` calls them."""
TRIALS, UPDATES = 6, 48
TOGETHER = f"{TRIALS} trials, two at once"
LOADING = Path(__file__).parent / "results/loading.json"
"""What a photograph costs."""
QUICKSTART = Path(__file__).parents[2] / "configs/experiment/quickstart.yaml"


@dataclass(frozen=True)
class Costs:
    """Seconds of one core, unless said otherwise."""

    read: float
    """Of a record, until it is in a shard."""
    check: float
    """Of a record with a tiny image: check, encode, store."""
    image: float
    """More for a photograph of 640 x 480, resized to 448."""
    merge: float
    """Of a record, of the driver alone: gathered, split, written."""
    dispatch: float
    """Of a shard, of the driver alone."""
    driver_bytes: float
    """Of a record, that the driver holds."""
    trial: float
    """By the clock, from the end of a trial of a sweep to the first update of the next."""
    update: float
    """By the clock, of an update of such a trial."""
    trial_cores: float
    """Of all cores together, of such a trial from its start to its end."""


def measure(folder: Path) -> Costs:
    """All costs, below a folder for files."""
    rows, phases, held = _prepared(folder / "small", SMALL, preparers=1)
    images = json.loads(LOADING.read_text(encoding="utf-8"))["images"]["ways"]["dsvl"]
    _, trial, update, trial_cores = _swept(folder / "one", concurrent=1)
    return Costs(
        read=phases["spools"] / rows,
        check=phases["_check"] / rows,
        image=images["processor_ms_an_image"][0] / 1000,
        merge=(phases["_gather"] + phases["_split"] + phases["_write"]) / rows,
        dispatch=_dispatch(),
        driver_bytes=held / rows,
        trial=trial,
        update=update,
        trial_cores=trial_cores,
    )


def agreement(folder: Path, costs: Costs) -> dict[str, tuple[float, float]]:
    """Seconds that other runs are foretold to take, and took."""
    found = {}
    for preparers in (1, 2):
        rows, phases, _ = _prepared(folder / f"large-{preparers}", LARGE, preparers=preparers)
        checked = pool(
            -(-rows // SHARD),
            Fleet(nodes=preparers, starts=phases["start"]),
            seconds=SHARD * costs.check,
            dispatch=costs.dispatch,
        )
        foretold = rows * costs.read / preparers + checked.seconds + rows * costs.merge
        took = sum(phases[name] for name in PHASES) + phases["start"]
        found[f"{rows:,} records prepared by {preparers}"] = (foretold, took)
    took, *_ = _swept(folder / "two", concurrent=2)
    training = Training(UPDATES, costs.update, every=UPDATES + 1, start=costs.trial)
    foretold = search([[Trial(training, 1)] * TRIALS], Fleet(nodes=2)).seconds
    # Nodes that they do not have here to themselves: its cores are what both share.
    foretold = max(foretold, TRIALS * costs.trial_cores / psutil.cpu_count())
    found[TOGETHER] = (foretold, took)
    return found


def _prepared(folder: Path, scale: float, *, preparers: int) -> tuple[int, dict[str, float], int]:
    """Records of a preparation, seconds of its phases, and bytes that the driver came to hold."""
    raw.write(folder / "raw", NineSets(scale), edge=48)
    experiment = rehearsal.experiment(folder)
    experiment = experiment.with_overrides({"cluster.preparers": preparers})
    phases: dict[str, float] = {}
    process, rows = psutil.Process(), 0
    before = held = 0

    def timed(name: str) -> Callable[..., Any]:
        work = getattr(survey, name)

        @wraps(work)
        def phase(*arguments: Any, **options: Any) -> Any:
            nonlocal before, held
            if name == "_gather":
                before = process.memory_info().rss
            began = time.perf_counter()
            result = work(*arguments, **options)
            phases[name] = time.perf_counter() - began
            if name == "_split":
                held = process.memory_info().rss - before
            return result

        return phase

    def each_timed(jobs: list, *arguments: Any, **options: Any) -> Iterator[Any]:
        began = time.perf_counter()
        for number, result in enumerate(each(jobs, *arguments, **options)):
            if not number:
                phases["start"] = time.perf_counter() - began
            yield result

    with ExitStack() as patches:
        for name in PHASES:
            patches.enter_context(patch.object(survey, name, timed(name)))
        patches.enter_context(patch.object(survey, "each", each_timed))
        result = prepare(experiment, progress=lambda line: None)
    rows = sum(source["raw"] for source in result["sources"].values())
    phases["_check"] -= phases["start"]
    return rows, phases, held


def _dispatch() -> float:
    """Of a job that does nothing, in a pool of one actor."""
    with connect(load(QUICKSTART)):
        results = each(range(JOBS), _Nothing, {}, most=1, labels={})
        next(results)
        began = time.perf_counter()
        done = sum(1 for _ in results)
        return (time.perf_counter() - began) / done


class _Nothing:
    def __call__(self, job: int) -> int:
        return job


def _swept(folder: Path, *, concurrent: int) -> tuple[float, float, float, float]:
    """Seconds of a sweep, of a trial beside its updates, of an update, and of all cores a trial."""
    chats.write(folder / "raw/digits", train=96, evaluation=8)
    file = digits(
        folder,
        "swept",
        cluster={"workers": 1, "cpus_per_worker": 0.75},
        evaluation={"chats": 0, "samples": 8},
        search={
            "space": {"train.seed": {"kind": "grid", "values": list(range(TRIALS))}},
            "concurrent": concurrent,
        },
    )
    command = [sys.executable, "-m", "orchestration.cli", "sweep", str(file)]
    before = psutil.cpu_times()
    subprocess.run(command, check=True, capture_output=True)
    after = psutil.cpu_times()
    at_work = after.user + after.system - before.user - before.system
    trials = load(file).run_folder / "trials"
    took = journal.seconds(journal.read(trials)[0])
    updates = [
        later["time"] - sooner["time"]
        for path in trials.glob("*/journal.jsonl")
        for sooner, later in pairwise(
            e for e in journal.read(path.parent)[0] if e["kind"] == "metrics" and e["step"]
        )
        if "eval/loss" not in later["metrics"]
    ]
    update = statistics.median(updates)
    return took, took * concurrent / TRIALS - UPDATES * update, update, at_work / TRIALS
