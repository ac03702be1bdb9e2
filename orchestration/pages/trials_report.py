"""What a report says of the trials of a sweep together: what settings change, what it cost, when it ran.

A file of its own because it changes with how trials are compared, and sweep_report.py with what one is.
"""

from collections.abc import Sequence
from html import escape
from math import isfinite

from orchestration.pages.figures import Bar, parallel, timeline
from orchestration.pages.page import duration, grid, note, table
from orchestration.pages.plots import COLOURS, Mark, Series, chart, legend
from orchestration.planning.planned import reached
from orchestration.records import journal
from orchestration.records.record import Record, Run
from orchestration.searching.effects import Tried, effects, spread
from orchestration.space import SEED

ENDS: dict[str, Mark] = {"stopped": "square", "failed": "cross"}
"""How the end of a trial is marked in a timeline, unless it is finished."""


def changes(record: Record) -> str:
    """Single settings against one another, all else equal."""
    search, tried = record.experiment.search, _tried(record)
    if search is None:
        return ""
    relative = record.sign > 0
    own = record.experiment.searched()
    found = effects(tried, own, relative=relative, under=search.under)
    if not found:
        return ""
    head = ("setting", f"change of {record.metric}, 95 %", "pairs", "updates made")
    rows = [
        (
            {"data-effect": one.path},
            (
                one.what,
                spread(one, relative=relative),
                str(one.pairs),
                f"{one.updates:.2f} times",
            ),
        )
        for one in found
    ]
    return f"<h3>What a setting changes, all else equal</h3>{table(head, rows)}"


def front(record: Record) -> str:
    """Trials that none beats in all that is searched for; nothing where that is one metric."""
    search = record.experiment.search
    if search is None or not search.tradeoffs:
        return ""
    best, rows = record.front, []
    for trial in best:
        cells = (trial.name, *(reached(name, trial.last(name)) for name in search.objectives))
        rows.append(({"data-front": trial.name}, cells))
    figures = []
    for other in search.tradeoffs:
        shown = [
            Series(
                [(trial.last(other), trial.last(record.metric))],
                f"{trial.name}: {reached(record.metric, trial.last(record.metric))}, "
                f"{reached(other, trial.last(other))}",
                "c1" if trial in best else "c0",
                "circle",
            )
            for trial in sorted(record.ranked, key=best.__contains__)
            if isfinite(trial.last(other))
        ]
        title = f"{record.metric} against {other}"
        figures.append(chart(shown, title=title, x=other, log_x=other == "train/flops"))
    title = f"Beaten by none in {' and '.join(search.objectives)}"
    names = [("c1 mark", "beaten by none"), ("c0 mark", "the other trials")]
    head = ("trial", *search.objectives)
    return f"<h3>{escape(title)}</h3>{legend(names)}{grid(figures)}{table(head, rows)}"


def costs(record: Record) -> str:
    """What each trial came to against what it took, and how its values led there."""
    search = record.experiment.search
    workers = search.workers if search else 1
    sizes, series = record.sizes[:COLOURS], []
    for trial in record.ranked:
        look = f"c{sizes.index(trial.size)}" if trial.size in sizes else "c0"
        minutes, value = workers * trial.seconds / 60, trial.last(record.metric)
        label = f"{trial.name}: {value:.4g}, {duration(workers * trial.seconds)} of a worker"
        series.append(Series([(minutes, value)], label, look, "circle"))
    points = sorted(point for one in series for point in one.points if point[0] > 0)
    front: list[tuple[float, float]] = []
    for minutes, value in points:
        if not front or record.sign * value < record.sign * front[-1][1]:
            front += [(minutes, front[-1][1]), (minutes, value)] if front else [(minutes, value)]
    shown = [one for one in series if one.points[0][0] > 0]
    drawn = chart(
        [*shown, Series(front, "the best for as much", "c1 dash")],
        title=f"{record.metric} against cost",
        x="minutes of a worker",
        log_x=True,
    )
    names = [(f"c{i} mark", size) for i, size in enumerate(sizes)]
    names.append(("c1 dash", "the best for as much"))
    values = [(t.values, t.last(record.metric), t.name) for t in record.ranked]
    lines = parallel(
        values,
        metric=record.metric,
        sign=record.sign,
        title="searched values and what they came to",
    )
    explained = note("A line is a trial, the darker the better; the best stands out.")
    return f"<h3>Cost</h3>{legend(names)}{grid([drawn])}<h3>All settings at once</h3>{explained}{lines}"


def course(record: Record) -> str:
    """When each trial was at work."""
    sizes, bars = record.sizes[:COLOURS], []
    for trial in sorted(record.trials, key=_began):
        look = f"c{sizes.index(trial.size)}" if trial.size in sizes else "c0"
        told = f"{trial.name}: {trial.state}, {duration(trial.seconds)}"
        bars.append(Bar(_spans(trial), told, look, ENDS.get(trial.state, "")))
    names = [(f"c{i}", size) for i, size in enumerate(sizes)]
    explained = "A row is a trial, in the order of their starts; gaps are interruptions. "
    explained += "■ stopped early, ✕ failed."
    drawn = timeline(bars, title="trials at work")
    return f"<h3>Timeline</h3>{legend(names)}{note(explained)}{drawn}"


def _tried(record: Record) -> list[Tried]:
    paths = (*(record.experiment.search.space if record.experiment.search else ()), SEED)
    return [
        Tried(
            {path: trial.values[path] for path in paths if path in trial.values},
            trial.last(record.metric),
            len(trial.curve("train/loss")),
        )
        for trial in record.ranked
    ]


def _spans(trial: Run) -> list[tuple[float, float]]:
    """From each start of a trial to the last line before the next one."""
    spans: list[tuple[float, float]] = []
    for entry in journal.read(trial.folder)[0]:
        moment = entry["time"]
        if entry["kind"] == "start" or not spans:
            spans.append((moment, moment))
        spans[-1] = (spans[-1][0], moment)
    return spans


def _began(trial: Run) -> float:
    spans: Sequence[tuple[float, float]] = _spans(trial)
    return spans[0][0] if spans else float("inf")


SECTIONS = (front, changes, costs, course)
"""In the order of the page."""
