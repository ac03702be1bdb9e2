"""What a report says of evaluations: the figures of every set with their intervals, held-out ones by group.

A file of its own because it changes with what is measured, and report.py with what a run is.
"""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from orchestration.journal import read_json
from orchestration.page import note, table
from orchestration.record import Record


def evaluations(record: Record) -> str:
    """The newest evaluation of the training and of the best trial, if they have been evaluated."""
    runs = {run.folder: run for run in (record.training, record.best) if run}
    told = [(run.name, found) for folder, run in runs.items() if (found := newest(folder))]
    if not told:
        return ""
    explained = (
        "With 95 % intervals by the bootstrap over conversations; dsvl evaluate measured them."
    )
    return f"<h2>Evaluation</h2>{note(explained)}" + "".join(
        _set(name, found["checkpoint"]["step"], of, rest)
        for name, found in told
        for of, rest in found["sets"].items()
    )


def newest(folder: Path) -> dict[str, Any]:
    """What the last evaluation of a run has found; nothing where there was none."""
    paths = folder.glob("evaluations/*/evaluation.json")
    latest = max(paths, key=lambda path: path.stat().st_mtime, default=None)
    return read_json(latest) if latest else {}


def _set(run: str, step: int, name: str, told: Mapping[str, Any]) -> str:
    title = f"{name}: {run} after update {step}, {told['rounds']:,} rounds"
    figures = [({}, (figure, *_cells(of))) for figure, of in told["figures"].items()]
    parts = [f"<h3>{escape(title)}</h3>", table(("figure", "value", "from", "to"), figures)]
    for dimension, groups in told.get("by", {}).items():
        names = [key for key in next(iter(groups.values())) if key != "rounds"]
        rows = [
            ({}, (group, f"{of['rounds']:,}", *(_cells(of[key])[0] for key in names if key in of)))
            for group, of in groups.items()
        ]
        parts.append(table((dimension, "rounds", *names), rows))
    return "".join(parts)


def _cells(of: Mapping[str, float | None]) -> list[str]:
    bounds = (of[key] for key in ("value", "low", "high"))
    return ["—" if bound is None else f"{bound:.3f}" for bound in bounds]
