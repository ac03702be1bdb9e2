"""From what a model said, round by round, to figures with intervals; and how two models differ in them.

A row is a round: `set`, `sample` and `round` name it; `kind` and `expected` say how its `answer` is measured;
`seen`, `blind` and `shuffled` are [loss, targets, right] after the true history, `answer_blind` and
`answer_shuffled` what was said where the images were zero, or those of others.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dsvl import captions, metrics
from dsvl.bootstrap import Statistic, interval, ratio, redrawn

Row = dict[str, Any]
Counts = dict[str, tuple[float, ...]]
"""Figure -> what a round adds to the sums that it is made of."""

WAYS = {"seen": "", "blind": "_blind", "shuffled": "_shuffled"}
"""How images are seen, and what a figure is called then."""
BY = ("loss", "accuracy", "exact", "soft")
"""Figures that are told group by group as well."""
DIMENSIONS = ("blend", "round", "images")
"""What held-out rounds are grouped by."""


def figures(rows: Sequence[Row], objects: metrics.Objects | None = None) -> dict[str, Any]:
    """Every figure that can be told of rows: `value`, `low` and `high` by its name."""
    table = Table(rows, objects)
    return table.told() | _consistency(rows)


def grouped(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Some figures by each group of rows."""
    found: dict[str, dict[str, Any]] = {}
    for dimension in DIMENSIONS:
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            groups.setdefault(row[dimension], []).append(row)
        found[dimension] = {
            str(name): {"rounds": len(some)} | Table(some, names=BY).told()
            for name, some in sorted(groups.items())
        }
    return found


def differences(
    ours: Sequence[Row], theirs: Sequence[Row], objects: metrics.Objects | None = None
) -> dict[str, Any]:
    """How much more each figure is for ours than for theirs, over the rounds that both have answered.

    Draws are paired; `above` is the share of them in which ours is more.
    """
    keys = {_name(row) for row in ours} & {_name(row) for row in theirs}
    tables = [
        Table(sorted((row for row in rows if _name(row) in keys), key=_name), objects)
        for rows in (ours, theirs)
    ]
    found: dict[str, Any] = {"rounds": len(keys)}
    if not keys:
        return found
    sums = [(table.counts.sum(0), redrawn(table.counts)) for table in tables]
    for name in tables[0].columns.keys() & tables[1].columns.keys():
        (value, drawn), (other, redone) = (
            (table.of(name, total), table.of(name, draws))
            for table, (total, draws) in zip(tables, sums, strict=True)
        )
        above = float(np.mean(drawn > redone))
        found[name] = interval(float(value - other), drawn - redone) | {"above": above}
    return found


class Table:
    """What each sample adds to the sums of all figures."""

    def __init__(
        self,
        rows: Sequence[Row],
        objects: metrics.Objects | None = None,
        *,
        names: Iterable[str] | None = None,
    ) -> None:
        """Of some figures, where `names` says which."""
        measured = [measure(row, objects) for row in rows]
        for row, cider in zip(_captions(rows), _cider(rows), strict=True):
            measured[row]["cider_d"] = (cider, 1)
        widths = {name: len(counts) for one in measured for name, counts in one.items()}
        ends = np.cumsum([0, *widths.values()]).tolist()
        slices = map(slice, ends, ends[1:])
        self.columns = {
            name: columns
            for name, columns in zip(widths, slices, strict=True)
            if names is None or name in set(names)
        }
        samples: dict[str, int] = {}
        self.counts = np.zeros((len({row["sample"] for row in rows}), ends[-1]))
        """(samples, columns)."""
        for row, counts in zip(rows, measured, strict=True):
            at = samples.setdefault(row["sample"], len(samples))
            for name, columns in self.columns.items():
                if name in counts:
                    self.counts[at, columns] += counts[name]

    def of(self, name: str, sums: np.ndarray) -> np.ndarray:
        """A figure by (..., columns) sums."""
        return STATISTICS.get(name, ratio)(sums[..., self.columns[name]])

    def told(self) -> dict[str, Any]:
        """All figures with their intervals."""
        total = self.counts.sum(0)
        drawn = redrawn(self.counts) if len(self.counts) else np.zeros((0, *total.shape))
        return {
            name: interval(float(self.of(name, total)), self.of(name, drawn))
            for name in self.columns
        }


def measure(row: Row, objects: metrics.Objects | None = None) -> Counts:
    """What a round adds to each figure that can be told of it."""
    found: Counts = {}
    for way, suffix in WAYS.items():
        if told := row.get(way):
            loss, targets, right = told
            found[f"loss{suffix}"] = (loss, targets)
            found[f"accuracy{suffix}"] = (right, 1)
        if (answer := row.get(f"answer{suffix}")) is not None:
            measured = MEASURES[row["kind"]](answer, row["expected"], objects)
            found |= {f"{name}{suffix}": counts for name, counts in measured.items()}
    found["answered"] = (row.get("answer") is not None, 1)
    answer = row.get("answer")
    if answer is None:
        return found
    exact = found.get("exact")
    if exact and row.get("earlier"):
        found["earlier_image"] = exact
    if exact and any(metrics.images_named(said) for said in row["expected"][:1]):
        found["which_image"] = exact
    named = metrics.images_named(answer)
    if named:
        dangling = any(not 0 < number <= row["images"] for number in named)
        found["dangling_reference"] = (dangling, 1)
    found["tokens"] = (row["tokens"], 1)
    found["cut_off"] = (not row["ended"], 1)
    found["repetition"] = (metrics.repetition(answer), 1)
    return found


Measure = Callable[[str, Sequence[str], metrics.Objects | None], Counts]


def _open(answer: str, expected: Sequence[str], objects: metrics.Objects | None) -> Counts:
    return {}


def _answer(answer: str, expected: Sequence[str], objects: metrics.Objects | None) -> Counts:
    """Whether it is one of those expected: to the letter, and normalised."""
    exact = metrics.one_line(answer) in map(metrics.one_line, expected)
    soft = metrics.normal(answer) in map(metrics.normal, expected)
    return {"exact": (exact, 1), "soft": (soft, 1)}


def _people(answer: str, expected: Sequence[str], objects: metrics.Objects | None) -> Counts:
    """Whether it is what most people say, and how many it agrees with."""
    said = list(map(metrics.normal, expected))
    most = max(said, key=said.count)
    return {
        "exact": (metrics.normal(answer) == most, 1),
        "soft": (metrics.vqa_accuracy(answer, expected), 1),
    }


def _caption(answer: str, expected: Sequence[str], objects: metrics.Objects | None) -> Counts:
    said, people = captions.words(answer), list(map(captions.words, expected))
    return {
        "bleu": tuple(captions.bleu_counts(said, people)),
        "rouge_l": (captions.rouge_l(said, people), 1),
    }


def _said(answer: str, expected: Sequence[str], objects: metrics.Objects | None) -> Counts:
    """Of held-out answers, which may be words or descriptions."""
    return _answer(answer, expected, objects) | _caption(answer, expected, objects)


def _yes_no(answer: str, expected: Sequence[str], objects: metrics.Objects | None) -> Counts:
    said, true = metrics.says_yes(answer), expected[0] == "yes"
    return {
        "exact": (said == true, 1),
        "precision": (said and true, said),
        "recall": (said and true, true),
        "f1": (said and true, said, true),
        "yes_ratio": (said, 1),
    }


def _choice(answer: str, expected: Sequence[str], objects: metrics.Objects | None) -> Counts:
    right, *letters = expected
    chosen = metrics.choice(answer, letters or "ABCDEF")
    return {"exact": (chosen == right, 1), "no_choice": (not chosen, 1)}


def _objects(answer: str, expected: Sequence[str], objects: metrics.Objects | None) -> Counts:
    assert objects is not None
    named, missing, found = metrics.chair(objects.named(answer), expected)
    return {
        "chair_i": (missing, named),
        "chair_s": (missing > 0, 1),
        "objects_found": (found, len(expected)),
    }


def _f1(sums: np.ndarray) -> np.ndarray:
    return ratio(np.stack([2 * sums[..., 0], sums[..., 1] + sums[..., 2]], axis=-1))


def _bleu(sums: np.ndarray) -> np.ndarray:
    flat = sums.reshape(-1, sums.shape[-1]).tolist()
    return np.array([captions.bleu(counts) for counts in flat]).reshape(sums.shape[:-1])


MEASURES: dict[str, Measure] = {
    "open": _open,
    "answer": _answer,
    "people": _people,
    "caption": _caption,
    "said": _said,
    "yes_no": _yes_no,
    "choice": _choice,
    "objects": _objects,
}
"""By the kind of a round."""

STATISTICS: dict[str, Statistic] = {
    f"{name}{suffix}": statistic
    for name, statistic in (("f1", _f1), ("bleu", _bleu))
    for suffix in WAYS.values()
}
"""Figures that are no mean."""


def _captions(rows: Sequence[Row]) -> list[int]:
    """The rows that are measured as captions."""
    return [
        place
        for place, row in enumerate(rows)
        if row["kind"] in ("caption", "said") and row.get("answer") is not None
    ]


def _cider(rows: Sequence[Row]) -> list[float]:
    said = [rows[place] for place in _captions(rows)]
    people = [list(map(captions.words, row["expected"])) for row in said]
    return captions.cider_d([captions.words(row["answer"]) for row in said], people)


def _consistency(rows: Sequence[Row]) -> dict[str, Any]:
    """How often rewordings of one question are answered alike; groups are drawn, not samples."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        if row.get("group") and row.get("answer") is not None:
            groups.setdefault(row["group"], []).append(row["answer"])
    alike = [(metrics.agreement(said), 1.0) for said in groups.values() if len(said) > 1]
    if not alike:
        return {}
    counts = np.array(alike)
    return {"consistency": interval(float(ratio(counts.sum(0))), ratio(redrawn(counts)))}


def _name(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["set"], row["sample"], row["round"]
