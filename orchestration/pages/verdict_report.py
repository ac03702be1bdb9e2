"""What a report says is wrong with a run, and with the trials of a sweep, by their own curves."""

from dataclasses import asdict
from html import escape
from math import inf, isfinite
from typing import Any

from orchestration.pages.page import facts, note
from orchestration.records.record import Record, Run
from orchestration.searching.diagnosis import diagnose
from orchestration.searching.verdicts import Verdict

MOST = 20
"""Trials that are named for something that is wrong with them."""


def found(record: Record) -> list[dict[str, Any]]:
    """The verdicts on the training, or else on the best trial, for programs."""
    run = record.training or record.best
    return [asdict(one) for one in _of(record, run)] if run else []


def verdicts(record: Record) -> str:
    """What holds of the training, or of the best trial; and what holds of any other trial."""
    run, parts = record.training or record.best, []
    judged = _of(record, run) if run else []
    if run and judged:
        parts.append(f"<h3>Verdicts on {escape(run.name)}</h3>{facts(map(_row, judged))}")
    held = [
        (f"{trial.name}: {one.name}", _told(one))
        for trial in record.trials
        if trial is not run
        for one in _of(record, trial)
        if one.holds
    ]
    if record.trials:
        more = f" The first {MOST} of {len(held)}." if len(held) > MOST else ""
        text = f"What is wrong with other trials, by their own curves.{more}"
        shown = facts(held[:MOST]) if held else note("Nothing.")
        parts.append(f"<h3>Verdicts on the trials</h3>{note(text)}{shown}")
    return "".join(parts)


def _of(record: Record, run: Run) -> list[Verdict]:
    """Held to the least loss that its size has after as many epochs, whatever the rate."""
    runs = [*record.trials, *([record.training] if record.training else [])]
    losses = [
        one.losses.get(run.epochs, inf) for one in runs if one.fields and one.size == run.size
    ]
    return diagnose(run, min((loss for loss in losses if isfinite(loss)), default=inf))


def _row(one: Verdict) -> tuple[str, str]:
    return f"{one.name}: {'yes' if one.holds else 'no'}", _told(one)


def _told(one: Verdict) -> str:
    return f"{one.evidence}. What would settle it: {one.experiment}."
