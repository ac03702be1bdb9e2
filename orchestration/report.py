"""One HTML page on a training, a sweep or both, from the files of the run folder alone.

No server, no Ray and no torch is needed, and the page asks no other host for anything. What a
dataset, a model or a configuration says is escaped: it may hold HTML.
"""

import json
import platform
import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from importlib import metadata
from itertools import pairwise
from math import inf, isfinite, nan
from pathlib import Path
from string import Template
from typing import Any

import pyarrow.parquet as pq
import yaml

from orchestration import journal
from orchestration.config import Experiment
from orchestration.plan import language_parameters
from orchestration.plots import (
    COLOURS,
    STYLE,
    Cell,
    Series,
    attributes,
    bars,
    chart,
    heat,
    legend,
    short,
    thin,
)

SIZE = "model.size"
PACKAGES = ("ray", "deepspeed", "torch", "transformers", "mlflow", "numpy", "pyarrow", "pillow")
NOTES = {
    "stopped": "■ stopped",
    "failed": "✕ failed",
    "unfinished": "… unfinished",
    "waiting": "not begun",
}
"""How a state other than finished is marked."""
MARKS = {"stopped": "square", "failed": "cross"}
SHARES = (
    ("eval/accuracy", "as trained", "c0"),
    ("eval/accuracy_blind", "images zeroed", "c1"),
    ("eval/accuracy_majority", "most frequent answer", "c2"),
)

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$name</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<style>$style</style></head><body><main>
<h1>$name</h1>
$sections
</main></body></html>
""")


@dataclass(frozen=True)
class Run:
    """A training or a trial, as its folder tells of it."""

    name: str
    folder: Path
    values: dict[str, Any]
    """The searched fields of a trial."""
    fields: dict[str, Any]
    """What was trained."""
    state: str
    """finished, stopped, failed, unfinished (running or interrupted) or waiting."""
    reason: str
    curves: dict[str, list[tuple[int, float]]]
    seconds: float
    """Spent training, over all resumes."""
    ended: float
    """When its last line was written."""

    @property
    def size(self) -> str:
        """Which of the model's sizes was trained."""
        return str(self.values.get(SIZE, self.fields.get(SIZE, "")))

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.curves.get("eval/loss", ()))

    @property
    def counts(self) -> bool:
        """Whether it ran to an end that tells something."""
        return self.state in ("finished", "stopped")

    def last(self, metric: str) -> float:
        """The latest value of a metric; nan where there is none."""
        curve = self.curves.get(metric)
        return curve[-1][1] if curve else nan


def write(experiment: Experiment) -> dict[str, Any]:
    """Write `report.html` into the run folder, and the whole experiment beside it as YAML.

    Raises:
        FileNotFoundError: if there is neither a training nor a trial in the folder.
        ValueError: if the folder holds the run of another experiment; the fields are named.
    """
    folder = experiment.run_folder
    training = read(folder, name=experiment.name)
    trials = [
        read(path.parent, name=path.parent.name)
        for path in sorted((folder / "trials").glob("*/values.json"))
    ]
    if training.state == "waiting" and not trials:
        raise FileNotFoundError(
            f"{folder} holds no training and no trial yet; train or sweep first"
        )
    for path in (folder / "experiment.json", folder / "trials/experiment.json"):
        before = _json(path)
        if before and before["identity"] != experiment.identity():
            changes = "; ".join(experiment.differences(before["fields"]))
            raise ValueError(f"{path} tells of another experiment: {changes}; report on that one")
    page = _Page(experiment, training if training.state != "waiting" else None, trials)
    settings = yaml.safe_dump(experiment.as_dict(), sort_keys=False, allow_unicode=True)
    _replace(folder / "experiment.yaml", settings)
    _replace(folder / "report.html", page.html())
    best = page.best
    return {
        "report": str(folder / "report.html"),
        "training": training.state,
        "trials": dict(Counter(trial.state for trial in trials)),
        "best": best and best.name,
        "metrics": {k: best.last(k) for k in sorted(best.curves) if k.startswith("eval/")}
        if best
        else {},
    }


def read(folder: Path, *, name: str) -> Run:
    """What the files of a run's folder tell, whatever state it is in."""
    entries, _ = journal.read(folder)
    curves: dict[str, list[tuple[int, float]]] = {}
    for metric, step, value, _ in journal.points(entries):
        curves.setdefault(metric, []).append((step, value))
    result = _json(folder / "result.json")
    last = next((e for e in reversed(entries) if e["kind"] in ("start", "end")), {})
    seconds = sum(
        entry["time"] - before["time"]
        for before, entry in pairwise(entries)
        if entry["kind"] != "start"
    )
    return Run(
        name=name,
        folder=folder,
        values=_json(folder / "values.json"),
        fields=_json(folder / "experiment.json").get("fields", {}),
        state=result.get("state") or last.get("state") or ("unfinished" if entries else "waiting"),
        reason=last.get("reason", ""),
        curves=curves,
        seconds=seconds,
        ended=entries[-1]["time"] if entries else inf,
    )


def prepared_folder(experiment: Experiment) -> Path | None:
    """Where the data of an experiment lie prepared, if they do."""
    ours = experiment.prepared_identity()
    for path in sorted(Path(experiment.storage.path, "prepared").glob("*/manifest.json")):
        identity = _json(path).get("identity")
        if ours == identity or (isinstance(identity, dict) and ours in identity.values()):
            return path.parent
    return None


def axes(runs: Sequence[Run]) -> tuple[str, ...]:
    """At most two searched fields that are numbers, the most varied first."""
    distinct = {
        path: {run.values.get(path) for run in runs}
        for path in dict.fromkeys(path for run in runs for path in run.values)
    }
    numeric = [
        path
        for path, values in distinct.items()
        if len(values) > 1 and all(type(value) in (int, float) for value in values)
    ]
    return tuple(sorted(numeric, key=lambda path: -len(distinct[path]))[:2])


class _Page:
    """The sections of a page, each a method that gives HTML."""

    def __init__(self, experiment: Experiment, training: Run | None, trials: list[Run]) -> None:
        self.experiment, self.training, self.trials = experiment, training, trials
        search = experiment.search
        self.metric = search.metric if search else "eval/loss"
        self.sign = -1 if search and search.mode == "max" else 1
        self.ranked = sorted(
            (run for run in trials if run.counts and isfinite(run.last(self.metric))),
            key=self._rank,
        )
        runs = [*self.ranked, *([training] if training and training.counts else [])]
        self.best = self.ranked[0] if self.ranked else training
        self.answering = next(
            (r for r in sorted(runs, key=self._rank) if (r.folder / "chats.json").exists()), None
        )
        self.sizes = [
            size
            for size in experiment.model.languages
            if any(trial.size == size for trial in trials)
        ]
        self.axes = axes(trials)
        self.prepared = prepared_folder(experiment)

    def html(self) -> str:
        """The page."""
        sections = [self.headline(), self.asked()]
        sections += [self.curves()] if self.training else []
        sections += [self.sweep()] if self.trials else []
        sections += [self.chats(), self.again()]
        return PAGE.substitute(
            name=escape(self.experiment.name), style=STYLE, sections="\n".join(sections)
        )

    def _rank(self, run: Run) -> float:
        value = self.sign * run.last(self.metric)
        return value if isfinite(value) else inf

    # what was found, and what was asked

    def headline(self) -> str:
        """What was found, in a sentence or two."""
        lines = []
        if self.ranked:
            best = self.ranked[0]
            count = len(self.ranked)
            lines.append(
                f"The best of {count} trial{'s' * (count > 1)} is {best.name}. {_found(best)}"
            )
        if self.trials:
            lines.append(f"{_sentence(self.counted())}.")
        if run := self.training:
            epochs = f"{run.epochs} of {self.experiment.train.epochs} epochs"
            told = {
                "finished": f"The training of {run.name} finished.",
                "stopped": f"The training of {run.name} was stopped after {epochs}.",
                "failed": f"The training of {run.name} failed after {epochs}: {run.reason}",
                "unfinished": f"The training of {run.name} is unfinished: {epochs} are done.",
            }
            lines.append(f"{told[run.state]} {_found(run)}")
        text = "".join(f'<p class="lead">{escape(line)}</p>' for line in lines)
        return text + (self.cards(self.best) if self.best else "")

    def counted(self) -> str:
        """How many trials came how far."""
        states = Counter(trial.state for trial in self.trials)
        if self.experiment.search:
            states["waiting"] += max(0, self.experiment.search.trials - len(self.trials))
        names = ("finished", "stopped", "failed", "unfinished", "waiting")
        shown = {"stopped": "stopped early", "waiting": "not begun"}
        counts = (f"{states[n]} {shown.get(n, n)}" for n in names if states[n])
        return f"of {sum(states.values())} trials {', '.join(counts)}"

    def cards(self, run: Run) -> str:
        """The figures of a run, large."""
        figures = [
            (_percent(run.last("eval/accuracy")), "held-out answers exactly right"),
            (_percent(run.last("eval/accuracy_blind")), "with images zeroed"),
            (_percent(run.last("eval/accuracy_majority")), "most frequent answer"),
            (_number(run.last("eval/loss")), "held-out loss, nats a token"),
            (_duration(run.seconds), "training it"),
        ]
        inside = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in figures)
        return f'<div class="cards">{inside}</div>'

    def asked(self) -> str:
        """The settings, and the data."""
        it = self.experiment
        rows = [("identity", it.identity())]
        sizes = self.sizes or [it.model.size]
        for size in sizes:
            language = it.model.languages[size]
            count = sum(language_parameters(language).values())
            rows.append((f"size {size}", f"{language.checkpoint}: {language.num_hidden_layers} layers, "
                        f"{language.hidden_size} wide, {_count(count)} parameters"))  # fmt: skip
        vision = it.model.vision
        trained = "projection and input embedding" if it.model.train_embedding else "projection"
        rows += [
            ("image tower", f"{vision.checkpoint}: {vision.tokens} vectors an image"),
            ("model", f"{it.model.attention} attention, {it.model.projection} projection; "
                      f"the {trained} trained, all else frozen"),
            ("training", f"batch {it.train.batch}, {it.train.epochs} epochs, learning rate {it.optim.lr:g} "
                         f"({it.optim.schedule}), {it.train.precision}, seed {it.train.seed}"),
        ]  # fmt: skip
        if it.search:
            for path, domain in it.search.space.items():
                probes = domain.probes()
                values = probes if hasattr(domain, "values") else probes[:: len(probes) - 1]
                rows.append((f"searched {path}", f"{domain.kind} {', '.join(map(str, values))}"))
            rows.append(
                ("search", f"{it.search.mode} {self.metric}, scheduler {it.search.scheduler.kind}")
            )
        return f"<h2>What was asked</h2>{_facts(rows)}{self.data()}"

    def data(self) -> str:
        """What came through the preparation, and what did not."""
        folder = self.prepared
        if folder is None:
            return '<p class="soft">The storage holds no prepared data of this experiment.</p>'
        splits = Counter(pq.read_table(folder / "samples", columns=["split"])["split"].to_pylist())
        images = sum(file.metadata.num_rows for file in _image_files(folder))
        lost: dict[str, Counter[str]] = {}
        for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            lost.setdefault(record["source"], Counter())[record["reason"]] += 1
        rows = [("samples", f"{splits['train']:,} to train, {splits['eval']:,} held out")]
        rows.append(("images", f"{images:,}"))
        for name, source in _json(folder / "manifest.json")["sources"].items():
            reasons = lost.get(name, Counter())
            told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
            rows.append(
                (
                    f"set {name}",
                    f"{source['raw']:,} records, {source['used']:,} used, "
                    f"{reasons.total():,} quarantined{f': {told}' if told else ''}",
                )
            )
        return f"<h3>Data</h3>{_facts(rows)}"

    # what happened

    def curves(self) -> str:
        """The training: loss, learning rate, and held-out metrics."""
        run = self.training
        assert run
        loss = run.curves.get("train/loss", [])
        held_out = run.curves.get("eval/loss", [])
        rate = run.curves.get("train/lr", [])
        accuracies = [
            Series(run.curves.get(metric, []), name, look, mark)
            for metric, name, look in SHARES
            for mark in ("", "circle")
        ]
        charts = [
            chart(
                [
                    Series(thin(loss, 400), "train loss, each update", "c0 faint"),
                    Series(thin(loss, 60), "train loss, smoothed", "c0"),
                    Series(held_out, "held-out loss", "c1", mark="circle"),
                ],
                title="loss, nats a token",
                x="update",
            ),
            chart(
                [Series(thin(rate, 400), "learning rate")],
                title="learning rate",
                x="update",
                zero=True,
            ),
            chart(accuracies, title="held-out answers exactly right", x="update", shares=True),
        ]
        loss_names = [("c0", "train"), ("c1 mark", "held out")]
        share_names = [(look, name) for _, name, look in SHARES]
        return (
            f"<h2>Training</h2>{legend([*loss_names])}"
            f'<div class="grid">{"".join(charts)}</div>{legend(share_names)}'
        )

    def sweep(self) -> str:
        """The trials: table, curves, heat maps, progress."""
        return "\n".join(
            [
                f"<h2>Sweep</h2><p>{escape(_sentence(self.counted()))}. Ranked by {escape(self.metric)}.</p>",
                self.accuracy(),
                self.heats(),
                self.losses(),
                self.progress(),
                self.table(),
            ]
        )

    def accuracy(self) -> str:
        """The best of each size against answering without looking."""
        figures = [
            bars(
                f"{size}: {best.name}",
                [(name, best.last(metric), look) for metric, name, look in SHARES],
            )
            for size in self.sizes
            if (best := self._best_of(size))
        ]
        if not figures:
            return '<p class="soft">No trial has come to its end yet.</p>'
        return (
            "<h3>Held-out answers exactly right, best trial of each size</h3>"
            f'<div class="grid">{"".join(figures)}</div>'
        )

    def heats(self) -> str:
        """The searched metric over the two most varied fields, a heat map a size."""
        if not self.axes:
            return '<p class="soft">The trials vary no number, so there is no heat map.</p>'
        column, row = (*self.axes, "")[:2]
        columns, rows = (
            sorted({trial.values[path] for trial in self.trials} | self._asked(path))
            if path
            else [0]
            for path in (column, row)
        )
        if max(len(columns), len(rows)) > 12:
            return '<p class="soft">Too many different values for a heat map; see the table.</p>'
        shown = [trial.last(self.metric) for trial in self.trials]
        shown = [value for value in shown if isfinite(value)] or [0.0]
        scale = (max(shown), min(shown)) if self.sign > 0 else (min(shown), max(shown))
        figures = []
        for size in self.sizes:
            trials = [trial for trial in self.trials if trial.size == size]
            best = self._best_of(size)
            cells = {}
            for where in ((r, c) for r in rows for c in columns):
                here = [t for t in trials if (t.values.get(row, 0), t.values[column]) == where]
                cells[where] = self._cell(sorted(here, key=self._order), best)
            figures.append(
                heat(
                    cells,
                    caption=size,
                    names=(_leaf(row), _leaf(column)),
                    scale=scale,
                    data={"data-size": size},
                )
            )
        across = f" by {_leaf(column)}" + (f" and {_leaf(row)}" if row else "")
        return (
            f"<h3>{escape(self.metric)}{escape(across)}</h3>"
            '<p class="soft">Darker is better; outlined is the best of its size; dashed cells have '
            "no value.</p>"
            f'<div class="grid">{"".join(figures)}</div>'
        )

    def losses(self) -> str:
        """The loss of every trial, a chart a size, all on one scale."""
        column, row = (*self.axes, "", "")[:2]
        columns = sorted({trial.values[column] for trial in self.trials}) if column else []
        rows = sorted({trial.values[row] for trial in self.trials}) if row else []
        if len(columns) > COLOURS:
            columns = []
        charts = []
        for size in self.sizes:
            series = []
            for trial in (trial for trial in self.trials if trial.size == size):
                colour = f"c{columns.index(trial.values[column])}" if columns else "c0"
                dash = " dash" if row and trial.values[row] != rows[-1] else ""
                held_out = trial.curves.get("eval/loss", [])
                train = trial.curves.get("train/loss", [])
                series += [
                    Series(thin(train, 40), trial.name, f"{colour} thin{dash}"),
                    Series(held_out, f"{trial.name}, held out", colour, "circle"),
                ]
                if trial.state in MARKS:
                    series.append(
                        Series(
                            (held_out or train)[-1:],
                            f"{trial.name}, {trial.state}",
                            colour,
                            MARKS[trial.state],
                        )
                    )
            charts.append((size, series))
        points = [p for _, series in charts for one in series for p in one.points]
        names = [(f"c{i}", f"{_leaf(column)} {short(v)}") for i, v in enumerate(columns)]
        if row:
            names.append(("soft", f"{_leaf(row)} {short(rows[-1])}"))
            fewer = ", ".join(map(short, rows[:-1]))
            names += [("soft dash", f"{_leaf(row)} {fewer}")] if fewer else []
        figures = [
            chart(series, title=f"{size}: loss, nats a token", x="update", frame=points)
            for size, series in charts
        ]
        return (
            f"<h3>Loss of every trial</h3>{legend(names)}"
            '<p class="soft">Lines: train, smoothed. Circles: held out. ■ stopped early, ✕ failed.</p>'
            f'<div class="grid">{"".join(figures)}</div>'
        )

    def progress(self) -> str:
        """The best so far against the trials that have come to their end."""
        trials = sorted((t for t in self.ranked), key=lambda trial: trial.ended)
        values = [(i, t.last(self.metric)) for i, t in enumerate(trials, start=1)]
        steps: list[tuple[float, float]] = []
        for i, value in values:
            best = self.sign * min(self.sign * value, self.sign * steps[-1][1]) if steps else value
            steps += [(i, steps[-1][1]), (i, best)] if steps else [(i, best)]
        marks = [
            Series([point], trial.name, "c0", MARKS.get(trial.state, "circle"))
            for trial, point in zip(trials, values, strict=True)
        ]
        figure = chart(
            [*marks, Series(steps, "best so far", "c1")],
            title=f"{self.metric} in the order of finishing",
            x="trials with a result",
        )
        return f'<h3>Best so far</h3><div class="grid">{figure}</div>'

    def table(self) -> str:
        """Every trial, the best first."""
        head = ("trial", "state", "epochs", "held-out loss", "accuracy", "images zeroed", "time")
        lines = []
        for trial in sorted(self.trials, key=self._order):
            best = self.ranked and trial is self.ranked[0]
            state = f"{trial.state}: {trial.reason}" if trial.reason else trial.state
            cells = (
                ("★ " if best else "") + trial.name,
                state,
                f"{trial.epochs} of {trial.fields.get('train.epochs', '?')}",
                _number(trial.last("eval/loss")),
                _percent(trial.last("eval/accuracy")),
                _percent(trial.last("eval/accuracy_blind")),
                _duration(trial.seconds),
            )
            written = "".join(
                f"<td{attributes({'data-label': label, **({'class': 'number'} if i > 1 else {})})}>"
                f"{escape(text).replace(',', ',<wbr>')}</td>"
                for i, (label, text) in enumerate(zip(head, cells, strict=True))
            )
            row = {"data-trial": trial.name, "data-state": trial.state}
            row |= {"class": "best"} if best else {}
            lines.append(f"<tr{attributes(row)}>{written}</tr>")
        top = "".join(
            f'<th scope="col"{" class=number" * (i > 1)}>{name}</th>' for i, name in enumerate(head)
        )
        return (
            f'<h3>All trials</h3><table class="trials"><thead><tr>{top}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table>"
        )

    # what it says, and how to do it again

    def chats(self) -> str:
        """Held-out chats as the best model that answered some answers them."""
        if self.answering is None:
            return ""
        chats = _json(self.answering.folder / "chats.json")
        keys = {key for chat in chats for key in chat["images"]}
        images = read_images(self.prepared, keys) if self.prepared else {}
        shown = "".join(_chat(chat, images) for chat in chats)
        return (
            f"<h2>Held-out chats with {escape(self.answering.name)}</h2>"
            '<p class="soft">The first held-out samples, not the best ones. An answer is right if it is '
            f'exactly the true one.</p><div class="chats">{shown}</div>'
        )

    def again(self) -> str:
        """How to go on, how to do it again, and with what it was done."""
        it = self.experiment
        path = shlex.quote(str(it.run_folder / "experiment.yaml"))
        verbs = (["train"] if self.training else []) + (["sweep"] if self.trials else [])
        lines = ["# talk to the best model", f"dsvl chat {path}"]
        lines += ["# go on where it stopped; what is done is not done again"]
        lines += [f"dsvl {verb} {path}" for verb in verbs]
        lines += ["# all of it again, from nothing"]
        lines += [f"dsvl {verb} {path} name={shlex.quote(it.name + '-again')}" for verb in verbs]
        lines += ["# every run, curve and setting"]
        lines += [f"mlflow ui --backend-store-uri {shlex.quote(it.tracking_uri)}"]
        spent = sum(
            run.seconds for run in [*self.trials, *([self.training] if self.training else [])]
        )
        rows = [
            ("written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
            ("training time", f"{_duration(spent)}, all runs together"),
            ("Python", f"{platform.python_version()} on {platform.platform()}"),
            *((name, version) for name in PACKAGES if (version := _version(name))),
        ]
        return (
            f"<h2>Do it again</h2><pre>{escape(chr(10).join(lines))}</pre>"
            f"<h2>Environment of this report</h2>{_facts(rows)}"
        )

    def _best_of(self, size: str) -> Run | None:
        return next((run for run in self.ranked if run.size == size), None)

    def _order(self, run: Run) -> tuple[bool, float, str]:
        """Runs with a result before others, the best first."""
        return run not in self.ranked, self._rank(run), run.name

    def _asked(self, path: str) -> set[float]:
        """The numbers that a grid asks to try."""
        domain = self.experiment.search.space.get(path) if self.experiment.search else None
        return set(domain.values) if domain and domain.kind == "grid" else set()

    def _cell(self, here: list[Run], best: Run | None) -> Cell:
        if not here:
            return Cell(None)
        value = here[0].last(self.metric)
        notes = [NOTES.get(here[0].state, ""), f"best of {len(here)}" if len(here) > 1 else ""]
        return Cell(
            value if isfinite(value) else None,
            note=", ".join(note for note in notes if note),
            best=here[0] is best,
        )


def read_images(folder: Path, keys: Collection[str]) -> dict[str, dict[str, Any]]:
    """Prepared images by key, each with bytes, mime, width and height; row group by row group."""
    found = {}
    for file in _image_files(folder):
        for group in range(file.num_row_groups):
            if keys & set(file.read_row_group(group, columns=["key"])["key"].to_pylist()):
                columns = ["key", "bytes", "mime", "width", "height"]
                rows = file.read_row_group(group, columns=columns).to_pylist()
                found |= {row["key"]: row for row in rows if row["key"] in keys}
    return found


def _image_files(folder: Path) -> list[pq.ParquetFile]:
    return [pq.ParquetFile(path) for path in sorted((folder / "images").glob("*.parquet"))]


def _chat(chat: dict[str, Any], images: dict[str, dict[str, Any]]) -> str:
    parts = [f'<p class="soft">{escape(chat["id"])}</p>']
    for part in chat["rounds"]:
        figures = [_figure(i, images.get(chat["images"][i])) for i in part["images"]]
        if figures:
            parts.append(f'<div class="images">{"".join(figures)}</div>')
        right = part["model"].strip() == part["answer"].strip()
        verdict = ("right", "✓ right") if right else ("wrong", "✗ wrong")
        lines = (
            ("question", escape(part["question"])),
            ("answer", escape(part["answer"])),
            ("model", f'{escape(part["model"])} <span class="{verdict[0]}">{verdict[1]}</span>'),
        )
        inside = "".join(f"<dt>{name}</dt><dd>{text}</dd>" for name, text in lines)
        parts.append(f"<dl>{inside}</dl>")
    return f'<article class="chat">{"".join(parts)}</article>'


def _figure(number: int, image: dict[str, Any] | None) -> str:
    name = f"image {number + 1}"
    if image is None or image["mime"] not in ("image/png", "image/jpeg", "image/webp"):
        return f"<figure><figcaption>{name}: not in the prepared data</figcaption></figure>"
    small = {"class": "small"} if max(image["width"], image["height"]) < 96 else {}
    source = f"data:{image['mime']};base64,{b64encode(image['bytes']).decode()}"
    tag = attributes({"src": source, "alt": name, **small})
    return f"<figure><img{tag}><figcaption>{name}</figcaption></figure>"


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    lines = (f"<tr><th scope=row>{escape(a)}</th><td>{escape(b)}</td></tr>" for a, b in rows)
    return f'<table class="facts">{"".join(lines)}</table>'


def _found(run: Run) -> str:
    """What the last evaluation of a run says, as sentences."""
    right, blind, majority = (run.last(metric) for metric, _, _ in SHARES)
    if not isfinite(right):
        return "It has not been evaluated yet."
    against = [f"{_percent(majority)} by always giving the most frequent answer"] * isfinite(
        majority
    )
    against += [f"{_percent(blind)} by the same model with its images zeroed"] * isfinite(blind)
    return (
        f"It answers {_percent(right)} of the held-out questions exactly"
        f"{', against ' if against else ''}{' and '.join(against)}; "
        f"its held-out loss is {_number(run.last('eval/loss'))} nats a token."
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _number(value: float) -> str:
    return f"{value:.3f}" if isfinite(value) else "–"


def _percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %") if isfinite(value) else "–"


def _count(number: int) -> str:
    """A large number in thousands, millions or billions."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02} min"
        if hours
        else f"{minutes} min {rest:02} s"
        if minutes
        else f"{rest} s"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _json(path: Path) -> Any:
    """The document in a file, or an empty mapping where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
