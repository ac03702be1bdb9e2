"""What a report says of a sweep: sizes, heat maps, curves, progress and the table of its trials.

A file of its own because it changes with how trials are searched, and report.py with what a run is.
"""

from html import escape
from itertools import product
from math import isfinite

from orchestration.pages import plots
from orchestration.pages.page import duration, grid, note, number, percent, table
from orchestration.pages.plots import SHARES, Cell, Mark, Series, chart, short, thin
from orchestration.records.record import Record, Run
from orchestration.space import SCHEDULE

NOTES = {"stopped": "■ stopped", "failed": "✕ failed", "unfinished": "… unfinished"}
MARKS: dict[str, Mark] = {"finished": "circle", "stopped": "square", "failed": "cross"}
"""How the state of a trial is marked in a heat map, and in a chart."""


def accuracy(record: Record) -> str:
    """The best trial of each size against what needs no image."""
    figures = [
        plots.bars(
            size,
            [(name, best.last(metric), look) for metric, name, look in SHARES],
            caption=best.name,
        )
        for size in record.sizes
        if (best := record.best_of(size))
    ]
    title = "<h3>Held-out answers exactly right, by the best trial of each size</h3>"
    return f"<h2>Sweep</h2>{title}{grid(figures) if figures else note('No trial has ended yet.')}"


def heats(record: Record) -> str:
    """The searched metric over the two numbers that were varied most, a map a size."""
    if not record.axes:
        return note("The trials vary no number, so there is no heat map.")
    column, row = (*record.axes, "")[:2]
    columns, rows = record.numbers(column), record.numbers(row) if row else [0]
    if max(len(columns), len(rows)) > 12:
        return note("Too many different values for a heat map; see the table.")
    values = {trial.last(record.metric) for trial in record.trials}
    scale = sorted((v for v in values if isfinite(v)), reverse=record.sign > 0)
    figures = []
    schedules = list(dict.fromkeys(trial.values.get(SCHEDULE) for trial in record.trials))
    for size, schedule in product(record.sizes, schedules):
        places: dict[tuple[float, float], list[Run]] = {(r, c): [] for r in rows for c in columns}
        for trial in record.trials:
            if (trial.size, trial.values.get(SCHEDULE)) == (size, schedule):
                places[trial.values.get(row, 0), trial.values[column]].append(trial)
        cells = {where: _cell(record, here) for where, here in places.items()}
        caption = f"{size}, {schedule}" if len(schedules) > 1 else size
        figures.append(
            plots.heat(cells, caption=caption, names=(_leaf(row), _leaf(column)), scale=scale)
        )
    by = " and ".join(_leaf(path) for path in record.axes)
    explained = "Darker is better, over all sizes; outlined is the best of its size; "
    explained += "empty cells have no value yet."
    return f"<h3>{escape(f'{record.metric} by {by}')}</h3>{note(explained)}{grid(figures)}"


def losses(record: Record) -> str:
    """The curves of all trials, a chart a size, all over the same axes."""
    column, row = (*record.axes, "", "")[:2]
    columns = record.numbers(column) if column else []
    columns = columns if len(columns) <= plots.COLOURS else []
    rows = record.numbers(row) if row else [0]
    panels: dict[str, list[Series]] = {size: [] for size in record.sizes}
    for trial in reversed(record.trials):  # the best is drawn last, on top
        look = f"c{columns.index(trial.values[column])}" if columns else "c0"
        dash = " dash" if row and trial.values[row] != rows[-1] else ""
        held_out, train = trial.curve("eval/loss"), trial.curve("train/loss")
        panels[trial.size] += [
            Series(thin(train, 40), trial.name, f"{look} thin{dash}"),
            Series(held_out, f"{trial.name}, held out", look, "circle"),
        ]
        if trial.state in ("stopped", "failed"):
            told, last = f"{trial.name}, {trial.state}", (held_out or train)[-1:]
            panels[trial.size].append(Series(last, told, look, MARKS[trial.state]))
    frame = [p for series in panels.values() for one in series for p in one.points]
    names = [(f"c{i}", f"{_leaf(column)} {short(value)}") for i, value in enumerate(columns)]
    if row:
        fewer = ", ".join(short(value) for value in rows[:-1])
        names.append(("soft", f"{_leaf(row)} {short(rows[-1])}"))
        names.append(("soft dash", f"{_leaf(row)} {fewer}"))
    figures = [
        chart(series, title=f"{size}: loss, nats a token", x="update", frame=frame)
        for size, series in panels.items()
    ]
    explained = (
        "Lines: train, smoothed. Circles: held out, after each epoch. ■ stopped early, ✕ failed."
    )
    title = f"<h3>Loss of every trial</h3>{plots.legend(names)}"
    return f"{title}{note(explained)}{grid(figures)}"


def progress(record: Record) -> str:
    """How the best value fell as trials came to an end."""
    best: list[tuple[float, float]] = []
    marks = []
    for i, trial in enumerate(sorted(record.ranked, key=lambda trial: trial.ended), start=1):
        value = trial.last(record.metric)
        marks.append(Series([(i, value)], trial.name, "c0", MARKS[trial.state]))
        before = best[-1][1] if best else value
        best += [(i, before), (i, min(before, value, key=lambda v: record.sign * v))]
    title, x = f"{record.metric} in the order of ending", "trials with a result"
    drawn = chart([*marks, Series(best, "best so far", "c1")], title=title, x=x)
    names = [("c1", "best so far"), ("c0 mark", "a trial")] if best else []
    return f"<h3>Best so far</h3>{plots.legend(names)}{grid([drawn])}"


def trials(record: Record) -> str:
    """All trials, the best first."""
    head = ("trial", "state", "epochs", "held-out loss", "accuracy", "images zeroed", "time")
    rows = []
    for trial in record.trials:
        best = {"class": "best"} if trial is record.best else {}
        cells = (
            ("★ " if best else "") + trial.name,
            f"{trial.state}: {trial.reason}" if trial.reason else trial.state,
            f"{trial.epochs} of {trial.fields.get('train.epochs', '?')}",
            number(trial.last("eval/loss")),
            percent(trial.last("eval/accuracy")),
            percent(trial.last("eval/accuracy_blind")),
            duration(trial.seconds),
        )
        rows.append(({"data-trial": trial.name, "data-state": trial.state, **best}, cells))
    return f"<h3>All trials, by {escape(record.metric)}</h3>{table(head, rows)}"


def _cell(record: Record, here: list[Run]) -> Cell:
    """The cell of a heat map for the trials with its values, the best first."""
    if not here:
        return Cell(None)
    best, value = here[0], here[0].last(record.metric)
    notes = [NOTES.get(best.state, ""), f"best of {len(here)}" if len(here) > 1 else ""]
    return Cell(
        value if isfinite(value) else None,
        note=", ".join(filter(None, notes)),
        best=best is record.best_of(best.size),
    )


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


SECTIONS = (accuracy, heats, losses, progress, trials)
"""In the order of the page."""
