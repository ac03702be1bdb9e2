"""What a report says of evaluations: the figures of every set with their intervals, held-out ones by group.

A file of its own because it changes with what is measured, and report.py with what a run is.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from orchestration.pages.page import chat, note, table
from orchestration.records.journal import read_json
from orchestration.records.record import Record, read_images

MISSED = 6
"""Conversations that are shown with what was answered wrongly."""


def evaluations(record: Record) -> str:
    """The newest evaluation of the training and of the best trial, if they have been evaluated."""
    runs = {run.folder: run for run in (record.training, record.best) if run}
    paths = {run.name: path for folder, run in runs.items() if (path := newest(folder))}
    if not paths:
        return ""
    told = [(name, read_json(path)) for name, path in paths.items()]
    explained = (
        "With 95 % intervals by the bootstrap over conversations; dsvl evaluate measured them."
    )
    return (
        f"<h2>Evaluation</h2>{note(explained)}"
        + "".join(
            _set(name, found["checkpoint"]["step"], of, rest)
            for name, found in told
            for of, rest in found["sets"].items()
        )
        + "".join(_missed(record, name, path) for name, path in paths.items())
    )


def newest(folder: Path) -> Path | None:
    """The file of the last evaluation of a run, if there was one."""
    paths = folder.glob("evaluations/*/evaluation.json")
    return max(paths, key=lambda path: path.stat().st_mtime, default=None)


def _missed(record: Record, run: str, path: Path) -> str:
    """Held-out conversations with an answer that is not the true one, with their images."""
    lines = (path.parent / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    samples: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, lines):
        if row["kind"] == "said" and row["answer"] is not None:
            samples.setdefault(row["sample"], []).append(row)
    wrong = [
        rows for rows in samples.values() if any([row["answer"]] != row["expected"] for row in rows)
    ][:MISSED]
    if not wrong:
        return ""
    told = [_as_chat(rows) for rows in wrong]
    keys = {key for one in told for key in one["images"]}
    images = read_images(record.prepared, keys) if record.prepared else {}
    shown = "".join(chat(one, images) for one in told)
    return f'<h3>{escape(run)}: held-out answers that differ</h3><div class="chats">{shown}</div>'


def _as_chat(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rounds of one conversation as `page.chat` takes them."""
    keys: list[str] = []
    rounds = []
    for row in rows:
        places = list(range(len(keys), len(keys) + len(row["shows"])))
        keys += row["shows"]
        said = {"question": row["question"], "answer": row["expected"][0], "model": row["answer"]}
        rounds.append({"images": places} | said)
    return {"id": rows[0]["blend"], "images": keys, "rounds": rounds}


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
