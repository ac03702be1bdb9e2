"""Trials over several seeds compared: what each way of training comes to, and how far it is from the best.

A file of its own because it is about seeds, where sweep_report.py is about single trials. Ways are compared
on the same held-out samples, after as many updates, seed by seed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestration.pages.page import grid, note, number, percent, table
from orchestration.pages.plots import COLOURS, Series, chart, figure
from orchestration.records.record import Record, Run
from orchestration.searching.effects import paired
from orchestration.space import SEED

ACCURACY, LOSS, BLIND = "eval/accuracy", "eval/loss", "eval/accuracy_blind"


def compare(record: Record) -> list[dict[str, Any]]:
    """Each way of training with at least two seeds, the most accurate first.

    `way` are its searched values but the seed, `seeds` how many trials have ended; `accuracy`, `loss` and
    `blind` are [mean, low, high] over seeds; `difference` is that of the accuracy from the first way's, seed
    by seed, None for itself; `curve` has [samples seen, mean, low, high] of the accuracy after every epoch.
    """
    ways: dict[str, dict[int, Run]] = {}
    for run in record.ranked:
        if SEED in run.values and run.state == "finished":
            ways.setdefault(_way(run.values), {})[run.values[SEED]] = run
    told = [(way, runs) for way, runs in ways.items() if len(runs) > 1]
    told.sort(key=lambda one: -_mean(one[1], ACCURACY))
    batch = record.experiment.train.batch
    return [
        {
            "way": way,
            "seeds": len(runs),
            "accuracy": paired([run.last(ACCURACY) for run in runs.values()]),
            "loss": paired([run.last(LOSS) for run in runs.values()]),
            "blind": paired([run.last(BLIND) for run in runs.values()]),
            "difference": _difference(runs, told[0][1]) if runs is not told[0][1] else None,
            "curve": _curve(list(runs.values()), batch),
        }
        for way, runs in told
    ]


def section(record: Record) -> str:
    """The comparison on a page; nothing where no way was trained with several seeds."""
    found = compare(record)
    if not found:
        return ""
    head = ("way", "seeds", "accuracy", "from the first", "held-out loss", "images zeroed")
    rows = [
        (
            {},
            (
                one["way"],
                str(one["seeds"]),
                _between(one["accuracy"]),
                _between(one["difference"]) if one["difference"] else "—",
                _between(one["loss"], written=number),
                _between(one["blind"]),
            ),
        )
        for one in found
    ]
    shown = found[:COLOURS]
    series = [
        Series([point[:2] for point in one["curve"]], one["way"], f"c{k}", mark)
        for k, one in enumerate(shown)
        for mark in ("", "circle")
    ]
    drawn = chart(series, title="held-out answers exactly right", x="samples seen", shares=True)
    names = [(f"c{k}", one["way"]) for k, one in enumerate(shown)]
    explained = (
        "Means over seeds with 95 % intervals by Student's t; differences are paired by seed. "
        "All have made as many updates on as many samples."
    )
    curves = grid([figure(drawn, names)])
    return f"<h2>Ways compared</h2>{note(explained)}{table(head, rows)}{curves}"


def _way(values: Mapping[str, Any]) -> str:
    """A trial's values but its seed."""
    return ", ".join(
        f"{path.rpartition('.')[2]}={value}" for path, value in values.items() if path != SEED
    )


def _mean(runs: Mapping[int, Run], metric: str) -> float:
    return float(np.mean([run.last(metric) for run in runs.values()]))


def _difference(runs: Mapping[int, Run], first: Mapping[int, Run]) -> list[float] | None:
    both = sorted(runs.keys() & first.keys())
    return paired([runs[seed].last(ACCURACY) - first[seed].last(ACCURACY) for seed in both])


def _curve(runs: Sequence[Run], batch: int) -> list[list[float]]:
    """After each epoch that all have ended."""
    points = zip(*(run.curve(ACCURACY) for run in runs), strict=False)
    return [[some[0][0] * batch, *(paired([value for _, value in some]) or ())] for some in points]


def _between(of: Sequence[float] | None, *, written: Any = percent) -> str:
    if of is None:
        return "—"
    mean, low, high = map(written, of)
    return f"{mean} ({low} to {high})"
