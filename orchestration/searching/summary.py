"""What a search has found: its trials, the best first, and what single settings change."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from orchestration.config import Experiment
from orchestration.planning.planned import reached
from orchestration.records.journal import curve, read, read_json
from orchestration.records.results import trials_folder
from orchestration.searching.effects import Effect, Tried, effects, spread
from orchestration.searching.front import front
from orchestration.space import SCHEDULE, SEED, searched


def describe(folder: Path) -> str:
    """One line on a finished trial."""
    result = read_json(folder / "result.json")
    metrics = result["metrics"]
    return f"{result['state']}, loss {metrics['eval/loss']:.3f}, accuracy {metrics['eval/accuracy']:.1%}"


def summarize(experiment: Experiment) -> dict:
    """The finished trials, the best first by `search.metric`, and the names of those that failed.

    `front` names those that none beats in all `objectives`. Trials of another schedule than the best one's
    come after all of its own: they are no ranking together.
    """
    search, root = searched(experiment), trials_folder(experiment)
    trials, failures = [], []
    for path in sorted(root.glob("*/values.json")):
        folder, values = path.parent, read_json(path)
        if not search.proposes(values):
            continue  # left by a search of another space under this name
        if (folder / "result.json").exists():
            result = read_json(folder / "result.json")
            about = {"trial": folder.name, "folder": str(folder), "state": result["state"]}
            trials.append(about | values | result["metrics"])
        elif (over := ended(folder))[0] == "failed":
            failures.append(f"{folder.name}: {over[1]}")
    sign = 1 if search.mode == "min" else -1
    # A trial that diverged has no number to compare: last.
    trials.sort(key=lambda t: (math.isnan(t[search.metric]), sign * t[search.metric]))
    first = list(dict.fromkeys(trial.get(SCHEDULE) for trial in trials))
    trials.sort(key=lambda trial: first.index(trial.get(SCHEDULE)))
    signs = search.objectives
    ends = [[s * trial.get(name, math.nan) for name, s in signs.items()] for trial in trials]
    names = [trials[at]["trial"] for at in front(ends)]
    return {
        "best": trials[0] if trials and math.isfinite(trials[0][search.metric]) else None,
        "front": {"objectives": list(signs), "trials": names},
        "trials": trials,
        "failed": failures,
    }


def compare(experiment: Experiment, trials: Sequence[Mapping[str, Any]]) -> dict:
    """What single settings change among the trials of a summary."""
    search = searched(experiment)
    tried = [
        Tried(
            {path: trial[path] for path in (*search.space, SEED) if path in trial},
            trial[search.metric],
            len(curve(Path(trial["folder"]), "train/loss")),
        )
        for trial in trials
    ]
    relative = search.mode == "min"
    own = experiment.searched()
    changed = effects(tried, own, relative=relative, under=search.under)
    return {"relative": relative, "effects": [*map(asdict, changed)]}


def ended(folder: Path) -> tuple[str | None, str]:
    """The state in which a trial has ended, if it has, and why."""
    entries = read(folder)[0]
    last = entries[-1] if entries else {}
    return last.get("state"), last.get("reason", "")


def render(summary: dict) -> str:
    """The trials as a table, the best first, those of the front, and what single settings change."""
    width = max(len(trial["trial"]) for trial in summary["trials"])
    lines = [f"{'trial':<{width}}  state     eval/loss  accuracy  blind"]
    lines += [
        f"{trial['trial']:<{width}}  {trial['state']:<8}  {trial['eval/loss']:9.4f}  "
        f"{trial['eval/accuracy']:8.1%}  {trial['eval/accuracy_blind']:5.1%}"
        for trial in summary["trials"]
    ]
    objectives, named = summary["front"]["objectives"], summary["front"]["trials"]
    if len(objectives) > 1:
        lines.append(f"beaten by none in {' and '.join(objectives)}:")
        lines += [
            f"  {', '.join(reached(name, trial[name]) for name in objectives)}: {trial['trial']}"
            for trial in summary["trials"]
            if trial["trial"] in named
        ]
    lines += [f"failed: {failure}" for failure in summary["failed"]]
    for effect in (Effect(**one) for one in summary["effects"]):
        change = spread(effect, relative=summary["relative"])
        counted = f"{effect.pairs} pairs, {effect.updates:.2f} of the updates"
        lines.append(f"{effect.what}: {change}, {counted}")
    return "\n".join(lines)
