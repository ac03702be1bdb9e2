"""One HTML page on several runs: in what they differ, and what came of it.

Runs that differ in the seed alone form a group, whose spread says how far other differences can be trusted.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from math import inf, isfinite, nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from orchestration.config import Experiment, validated
from orchestration.pages.page import document, duration, grid, matrix, note, number, percent, table
from orchestration.pages.plots import COLOURS, SHARES, Series, chart, legend, short, thin
from orchestration.problems import harmless
from orchestration.records.journal import read_json, write_whole
from orchestration.records.record import SIZE, Record, Run, stored

SEED = "train.seed"
ELSEWHERE = ("name", "storage.", "tracking.", "search", "checkpoint.")
"""Settings that decide neither what is trained nor what it costs."""
DERIVED = "model.language."
"""Follows from `model.size`."""
CURVES = (("eval/loss", "held-out loss, nats a token"), ("train/loss", "train loss, smoothed"))
DRAWN = 2 * COLOURS
"""Groups in a chart at most: colours, each as a line and dashed."""


@dataclass(frozen=True)
class Entrant:
    """A run that is compared."""

    run: Run
    settings: dict[str, Any]
    """Every setting, as dotted field -> value."""
    price: float | None
    """Of an hour of one worker."""

    @property
    def hours(self) -> float:
        """Of its workers together."""
        return self.run.course.worker_seconds / 3600


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone, the best first."""

    label: str
    values: dict[str, Any]
    """The fields in which groups differ."""
    entrants: tuple[Entrant, ...]

    def of(self, metric: str) -> list[float]:
        """The last value that each run has of a metric."""
        values = (entrant.run.last(metric) for entrant in self.entrants)
        return [value for value in values if isfinite(value)]

    def mean(self, metric: str) -> float:
        """Over the seeds; nan where no run has it."""
        return fmean(values) if (values := self.of(metric)) else nan

    @cached_property
    def name(self) -> str:
        """The label, and how many runs it stands for."""
        count = len(self.entrants)
        return f"{self.label} ({count} seeds)" if count > 1 else self.label


def write(sources: Sequence[Experiment | Path], page: Path) -> dict[str, Any]:
    """Compare all runs of some experiments, or of folders of runs, sweeps and trials, on a page.

    Raises:
        FileNotFoundError: if a source has no run.
        ValueError: if there are fewer than two runs in all, or a folder is none of a run.
    """
    opened = [stored(source) if isinstance(source, Path) else source for source in sources]
    found = {one.run.folder.resolve(): one for source in opened for one in _entrants(source)}
    entrants = list(found.values())
    if len(entrants) < 2:
        first = entrants[0].run.folder if entrants else opened[0].run_folder
        held = "" if entrants else "holds no trial with a result; "
        raise ValueError(f"{first}: {held}a comparison needs another run beside it")
    differing = _differing(entrants)
    groups = _groups(entrants, [field for field in differing if field != SEED])
    sections = [
        headline(groups, len(entrants)),
        differences(groups, differing),
        outcomes(groups),
        curves(groups),
        runs(groups),
    ]
    write_whole(page, document("Comparison", sections))
    return {
        "report": str(page),
        "runs": len(entrants),
        "differ in": differing,
        "best": groups[0].label,
        "groups": [
            {
                "name": group.label,
                "fields": group.values,
                "seeds": len(group.entrants),
                "eval/loss": group.mean("eval/loss"),
            }
            for group in groups
        ],
    }


def render(result: dict[str, Any]) -> str:
    """The groups, the best first, and where the page is."""
    rows = [
        f"{number(group['eval/loss']):>10}  {group['seeds']:>5}  {harmless(group['name'])}"
        for group in result["groups"]
    ]
    return "\n".join([f"{'eval/loss':>10}  seeds  runs", *rows, f"page: {result['report']}"])


def headline(groups: Sequence[Group], runs: int) -> str:
    """Which is best, and whether the seeds let that be said."""
    lines = [f"{runs} runs, {len(groups)} of them different but for the seed."]
    if len(groups) > 1:
        best, second = (group.of("eval/loss") for group in groups[:2])
        if best and second:
            apart = "Every run of it is" if max(best) < min(second) else "Not every run of it is"
            lines.append(
                f"Best is {groups[0].label}, with a held-out loss of {_spread(best)}, before "
                f"{groups[1].label}, with {_spread(second)}. {apart} better than all of the second."
            )
            if min(len(best), len(second)) < 2:
                lines.append("Without several seeds of both it is not known what is luck.")
    return "".join(f'<p class="lead">{escape(line)}</p>' for line in lines)


def differences(groups: Sequence[Group], differing: Sequence[str]) -> str:
    """The fields that are not the same everywhere, side by side."""
    rows = [
        (field, [_shown(group.values[field]) for group in groups])
        for field in differing
        if field != SEED
    ]
    if SEED in differing:
        seeds = ([str(one.settings[SEED]) for one in group.entrants] for group in groups)
        rows.append((SEED, [", ".join(each) for each in seeds]))
    if not rows:
        return f"<h2>What differed</h2>{note('Nothing: the same was trained each time.')}"
    return f"<h2>What differed</h2>{matrix([_letter(i) for i in range(len(groups))], rows)}"


def outcomes(groups: Sequence[Group]) -> str:
    """The metrics of each group over its seeds, and what a run of it cost."""
    head = ("", "runs", "seeds", "held-out loss", *(name for _, name, _ in SHARES[:2]),
            "tokens/s", "time a run", "GPU-h a run", "money a run")  # fmt: skip
    rows = []
    for place, group in enumerate(groups):
        members = group.entrants
        money = [one.hours * one.price for one in members if one.price is not None]
        cells = (
            _letter(place),
            group.label,
            str(len(members)),
            _spread(group.of("eval/loss")),
            *(_spread(group.of(metric), percent) for metric, _, _ in SHARES[:2]),
            short(fmean(_throughput(one.run) for one in members)),
            duration(fmean(one.run.seconds for one in members)),
            short(fmean(one.hours for one in members)),
            f"{fmean(money):,.2f}" if money else "—",
        )
        rows.append(({"class": "best"} if not place else {}, cells))
    told = "± is the standard deviation over runs that differ in the seed alone."
    return f"<h2>What came of it</h2>{note(told)}{table(head, rows)}"


def curves(groups: Sequence[Group]) -> str:
    """Losses and accuracy of all groups over each other: means, and from least to most over the seeds."""
    drawn = groups[:DRAWN]
    looks = [f"c{i % COLOURS}" + " dash" * (i >= COLOURS) for i in range(len(drawn))]
    figures = []
    for metric, title in (*CURVES, (SHARES[0][0], "held-out answers exactly right")):
        series = []
        for look, group in reversed(list(zip(looks, drawn, strict=True))):
            series += _lines(group, metric, look)
        figures.append(chart(series, title=title, x="update", shares=metric == SHARES[0][0]))
    names = [(look, f"{_letter(i)} {group.name}") for i, (look, group) in enumerate(
        zip(looks, drawn, strict=True))]  # fmt: skip
    told = "Lines are means over seeds, the shade reaches from the least to the most of them."
    if len(groups) > DRAWN:
        told += f" The best {DRAWN} of {len(groups)} are drawn."
    return f"<h2>Curves</h2>{legend(names)}{note(told)}{grid(figures)}"


def runs(groups: Sequence[Group]) -> str:
    """Every run with its folder."""
    head = ("run", "state", "seed", "held-out loss", "accuracy", "restarts", "undone", "time")
    rows = []
    for place, group in enumerate(groups):
        for one in group.entrants:
            run = one.run
            cells = (
                f"{_letter(place)} {run.folder}",
                f"{run.state}: {run.reason}" if run.reason else run.state,
                str(one.settings[SEED]),
                number(run.last("eval/loss")),
                percent(run.last("eval/accuracy")),
                str(run.course.restarts),
                str(run.course.undone),
                duration(run.seconds),
            )
            rows.append(({"data-run": str(run.folder)}, cells))
    return f"<h2>All runs</h2>{table(head, rows)}"


def _entrants(source: Experiment) -> Iterator[Entrant]:
    """The training of an experiment, and its trials with a result."""
    record = Record(source)
    for run in [*([record.training] if record.training else []), *record.ranked]:
        experiment = validated(read_json(run.folder / "experiment.json")["experiment"])
        settings = {
            name: value
            for name, value in experiment.params().items()
            if not name.startswith(ELSEWHERE)
        }
        yield Entrant(run, settings, experiment.cluster.gpu_hour_price)


def _differing(entrants: Sequence[Entrant]) -> list[str]:
    """The fields that not all have, or have alike; without those that follow from others."""
    names = dict.fromkeys(name for one in entrants for name in one.settings)
    found = [
        name
        for name in names
        if any(one.settings.get(name) != entrants[0].settings.get(name) for one in entrants)
    ]
    return [name for name in found if SIZE not in found or not name.startswith(DERIVED)]


def _groups(entrants: Sequence[Entrant], fields: Sequence[str]) -> list[Group]:
    """Runs that are alike in these fields, the group of the least mean loss first."""
    alike: dict[str, list[Entrant]] = {}
    for one in entrants:
        alike.setdefault(repr([one.settings.get(field) for field in fields]), []).append(one)
    made = []
    for members in alike.values():
        members.sort(key=lambda one: _last(one.run.last("eval/loss")))
        values = {field: members[0].settings.get(field) for field in fields}
        label = ", ".join(f"{name.rpartition('.')[2]}={_shown(v)}" for name, v in values.items())
        if not label or len(values) > 3:
            label = members[0].run.name
        made.append(Group(label, values, tuple(members)))
    return sorted(made, key=lambda group: _last(group.mean("eval/loss")))


def _lines(group: Group, metric: str, look: str) -> list[Series]:
    """A group's mean over the updates that all of its runs have, and the band of its seeds."""
    curves = [dict(one.run.curve(metric)) for one in group.entrants if one.run.curve(metric)]
    if not curves:
        return []
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = [[curve[step] for curve in curves] for step in steps]
    mean = list(zip(steps, map(fmean, values), strict=True))
    if not metric.startswith("eval/"):
        return [Series(thin(mean, 60), group.name, look)]
    upper = list(zip(steps, map(max, values), strict=True))
    lower = list(zip(steps, map(min, values), strict=True))
    band = [Series([*upper, *reversed(lower)], group.name, look, "band")] if len(curves) > 1 else []
    return [*band, Series(mean, group.name, look), Series(mean, group.name, look, "circle")]


def _throughput(run: Run) -> float:
    values = [value for _, value in run.curve("throughput/tokens_per_s")]
    return fmean(values) if values else nan


def _spread(values: Sequence[float], written: Any = number) -> str:
    """Mean, and deviation if there are several."""
    if not values:
        return "—"
    if len(values) == 1:
        return written(values[0])
    return f"{written(fmean(values))} ± {written(stdev(values))}"


def _last(value: float) -> float:
    """Sorts what is no number last."""
    return value if isfinite(value) else inf


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _letter(place: int) -> str:
    """A, B, ... Z, AA, AB, ..."""
    return ("" if place < 26 else _letter(place // 26 - 1)) + chr(65 + place % 26)
