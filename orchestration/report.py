"""One HTML page on a training, a sweep or both, from the files of the run folder alone.

No server, no Ray and no torch is needed, and the page asks no other host for anything. What a
dataset, a model or a configuration says is escaped: it may hold HTML.
"""

import json
import platform
import shlex
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
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

from orchestration import journal, plots
from orchestration.config import Experiment
from orchestration.plan import language_parameters, prepared_folder
from orchestration.plots import Cell, Mark, Series, attributes, chart, short, thin

SIZE = "model.size"
PACKAGES = ("ray", "deepspeed", "torch", "transformers", "mlflow", "numpy", "pyarrow", "pillow")
IMAGES = ("image/png", "image/jpeg", "image/webp")
NOTES = {"stopped": "■ stopped", "failed": "✕ failed", "unfinished": "… unfinished"}
MARKS: dict[str, Mark] = {"finished": "circle", "stopped": "square", "failed": "cross"}
"""How the state of a trial is marked in a heat map, and in a chart."""
SHARES = (
    ("eval/accuracy", "as trained", "c0"),
    ("eval/accuracy_blind", "images zeroed", "c1"),
    ("eval/accuracy_majority", "most frequent answer", "c2"),
)
TOLD = {
    "finished": "The training of {name} finished.",
    "stopped": "The training of {name} was stopped after {epochs}.",
    "failed": "The training of {name} failed after {epochs}: {reason}.",
    "unfinished": "The training of {name} is unfinished: {epochs} are done.",
}
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
        return self.values.get(SIZE) or self.fields[SIZE]

    @property
    def epochs(self) -> int:
        """Epochs done."""
        return len(self.curves.get("eval/loss", ()))

    @property
    def counts(self) -> bool:
        """Whether it came to an end that tells something."""
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
        raise FileNotFoundError(f"{folder} holds no training and no trial; train or sweep first")
    for path in (folder / "experiment.json", folder / "trials/experiment.json"):
        before = _json(path)
        if before and before["identity"] != experiment.identity():
            changes = "; ".join(experiment.differences(before["fields"]))
            raise ValueError(f"{path} tells of another experiment: {changes}; report on that one")
    page = _Page(experiment, None if training.state == "waiting" else training, trials)
    settings = yaml.safe_dump(experiment.as_dict(), sort_keys=False, allow_unicode=True)
    _replace(folder / "experiment.yaml", settings)
    _replace(folder / "report.html", page.html())
    best = page.best
    evaluated = sorted(key for key in best.curves if key.startswith("eval/")) if best else []
    return {
        "report": str(folder / "report.html"),
        "training": training.state,
        "trials": dict(Counter(trial.state for trial in trials)),
        "best": best.name if best else None,
        "metrics": {key: best.last(key) for key in evaluated if best},
    }


def read(folder: Path, *, name: str) -> Run:
    """What the files of a run's folder tell, whatever state it is in."""
    entries, _ = journal.read(folder)
    curves: dict[str, list[tuple[int, float]]] = {}
    for metric, step, value, _ in journal.points(entries):
        curves.setdefault(metric, []).append((step, value))
    result = _json(folder / "result.json")
    last = next((e for e in reversed(entries) if e["kind"] in ("start", "end")), {})
    return Run(
        name=name,
        folder=folder,
        values=_json(folder / "values.json"),
        fields=_json(folder / "experiment.json").get("fields", {}),
        state=result.get("state") or last.get("state") or ("unfinished" if entries else "waiting"),
        reason=last.get("reason", ""),
        curves=curves,
        seconds=sum(b["time"] - a["time"] for a, b in pairwise(entries) if b["kind"] != "start"),
        ended=entries[-1]["time"] if entries else inf,
    )


def read_images(folder: Path, keys: set[str]) -> dict[str, dict[str, Any]]:
    """Prepared images by key, each with bytes, mime, width and height; row group by row group."""
    found = {}
    for file in _image_files(folder):
        for group in range(file.num_row_groups):
            if keys & set(file.read_row_group(group, columns=["key"])["key"].to_pylist()):
                columns = ["key", "bytes", "mime", "width", "height"]
                rows = file.read_row_group(group, columns=columns).to_pylist()
                found |= {row["key"]: row for row in rows if row["key"] in keys}
    return found


def axes(trials: Sequence[Run]) -> tuple[str, ...]:
    """At most two searched fields that are numbers, the most varied first."""
    distinct = {
        path: {trial.values.get(path) for trial in trials}
        for path in dict.fromkeys(path for trial in trials for path in trial.values)
    }
    numbers = [
        path
        for path, values in distinct.items()
        if len(values) > 1 and all(type(value) in (int, float) for value in values)
    ]
    return tuple(sorted(numbers, key=lambda path: -len(distinct[path]))[:2])


class _Page:
    """The sections of a page, each a method that gives HTML."""

    def __init__(self, experiment: Experiment, training: Run | None, trials: list[Run]) -> None:
        self.experiment, self.training, self.trials = experiment, training, trials
        search = experiment.search
        self.metric = search.metric if search else "eval/loss"
        self.sign = -1 if search and search.mode == "max" else 1
        comparable = [t for t in trials if t.counts and isfinite(t.last(self.metric))]
        self.ranked = sorted(comparable, key=self._rank)
        alone = training if training and training.counts else None
        self.best = self.ranked[0] if self.ranked else alone
        runs = [*self.ranked, *([alone] if alone else [])]
        self.speaker = next((r for r in runs if (r.folder / "chats.json").exists()), None)
        tried = {trial.size for trial in trials}
        self.sizes = [size for size in experiment.model.languages if size in tried]
        self.axes = axes(trials)
        self.prepared = prepared_folder(experiment)

    def html(self) -> str:
        sections = [self.headline(), self.asked(), self.data()]
        sections += [self.curves(self.training)] if self.training else []
        if self.trials:
            sections += ["<h2>Sweep</h2>", self.accuracy(), self.heats(), self.losses()]
            sections += [self.progress(), self.table()]
        sections += [self.chats(), self.again()]
        return PAGE.substitute(
            name=escape(self.experiment.name), style=plots.STYLE, sections="\n".join(sections)
        )

    def headline(self) -> str:
        lines = []
        if self.ranked:
            count, best = len(self.ranked), self.ranked[0]
            of = f"The best of {count} trials with a result" if count > 1 else "The only result"
            lines.append(f"{of} is {best.name}. {_found(best)}")
        if self.trials:
            states = Counter(trial.state for trial in self.trials)
            if self.experiment.search:
                states["not begun"] += max(0, self.experiment.search.trials - len(self.trials))
            states["stopped early"] = states["stopped"]
            names = ("finished", "stopped early", "failed", "unfinished", "not begun")
            counts = ", ".join(f"{states[name]} {name}" for name in names if states[name])
            total = sum(states[name] for name in names)
            lines.append(f"Of {total} trials {counts}.")
        if run := self.training:
            epochs = f"{run.epochs} of {self.experiment.train.epochs} epochs"
            told = TOLD[run.state].format(name=run.name, epochs=epochs, reason=run.reason)
            lines.append(f"{told} {_found(run)}")
        text = "".join(f'<p class="lead">{escape(line)}</p>' for line in lines)
        return text + (_cards(self.best) if self.best else "")

    def asked(self) -> str:
        it = self.experiment
        trained = "projection, input embedding" if it.model.train_embedding else "projection"
        rows = [("identity", it.identity())]
        for size in self.sizes or [it.model.size]:
            language = it.model.languages[size]
            shape = f"{language.num_hidden_layers} layers, {language.hidden_size} wide"
            count = _count(sum(language_parameters(language).values()))
            rows.append((f"size {size}", f"{language.checkpoint}: {shape}, {count} parameters"))
        rows += [
            (
                "image tower",
                f"{it.model.vision.checkpoint}: {it.model.vision.tokens} vectors an image",
            ),
            ("attention", it.model.attention),
            ("trained", f"{trained}; all else is frozen"),
            ("learning rate", f"{it.optim.lr:g}, {it.optim.schedule}"),
            ("length", f"{it.train.epochs} epochs in batches of {it.train.batch}"),
            ("precision, seed", f"{it.train.precision}, {it.train.seed}"),
        ]
        if it.search:
            for path, domain in it.search.space.items():
                low, *between = domain.probes()
                listed = (
                    (low, *between) if domain.kind in ("grid", "choice") else (low, between[-1])
                )
                rows.append((f"searched {path}", f"{domain.kind} {', '.join(map(str, listed))}"))
            kind = it.search.scheduler.kind
            rows.append(("search", f"{it.search.mode} {self.metric}, scheduler {kind}"))
        return f"<h2>What was asked</h2>{_facts(rows)}"

    def data(self) -> str:
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
            kept = f"{source['raw']:,} records, {source['used']:,} used"
            why = f": {told}" if told else ""
            rows.append((f"set {name}", f"{kept}, {reasons.total():,} quarantined{why}"))
        return f"<h3>Data</h3>{_facts(rows)}"

    def curves(self, run: Run) -> str:
        loss, rate = run.curves.get("train/loss", []), run.curves.get("train/lr", [])
        held_out = run.curves.get("eval/loss", [])
        losses = [
            Series(thin(loss, 400), "train, update by update", "c0 faint"),
            Series(thin(loss, 60), "train, smoothed"),
            Series(held_out, "held out", "c1", "circle"),
        ]
        accuracies = [
            Series(run.curves.get(metric, []), name, look, mark)
            for metric, name, look in SHARES
            for mark in ("", "circle")
        ]
        charts = (
            (
                chart(losses, title="loss, nats a token", x="update"),
                [("c0", "train, smoothed"), ("c1 mark", "held out")],
            ),
            (
                chart(
                    [Series(thin(rate, 400), "learning rate")],
                    title="learning rate",
                    x="update",
                    zero=True,
                ),
                [],
            ),
            (
                chart(accuracies, title="held-out answers exactly right", x="update", shares=True),
                [(look, name) for _, name, look in SHARES],
            ),
        )
        figures = (f"<figure>{figure}{plots.legend(names)}</figure>" for figure, names in charts)
        return f"<h2>Training</h2>{_grid(figures)}"

    def accuracy(self) -> str:
        figures = [
            plots.bars(
                size,
                [(name, best.last(metric), look) for metric, name, look in SHARES],
                caption=best.name,
            )
            for size in self.sizes
            if (best := self._best_of(size))
        ]
        title = "<h3>Held-out answers exactly right, by the best trial of each size</h3>"
        return title + (
            _grid(figures) if figures else '<p class="soft">No trial has ended yet.</p>'
        )

    def heats(self) -> str:
        if not self.axes:
            return '<p class="soft">The trials vary no number, so there is no heat map.</p>'
        column, row = (*self.axes, "")[:2]
        columns, rows = self._numbers(column), self._numbers(row) if row else [0]
        if max(len(columns), len(rows)) > 12:
            return '<p class="soft">Too many different values for a heat map; see the table.</p>'
        values = {trial.last(self.metric) for trial in self.trials}
        scale = sorted((v for v in values if isfinite(v)), reverse=self.sign > 0)
        figures = []
        for size in self.sizes:
            places: dict[tuple[float, float], list[Run]] = {
                (r, c): [] for r in rows for c in columns
            }
            for trial in sorted(self.trials, key=self._order):
                if trial.size == size:
                    places[trial.values.get(row, 0), trial.values[column]].append(trial)
            best = self._best_of(size)
            figures.append(
                plots.heat(
                    {where: self._cell(here, best) for where, here in places.items()},
                    caption=size,
                    names=(_leaf(row), _leaf(column)),
                    scale=scale,
                    data={"data-size": size},
                )
            )
        by = " and ".join(_leaf(path) for path in self.axes)
        return (
            f"<h3>{escape(f'{self.metric} by {by}')}</h3>"
            '<p class="soft">Darker is better, over all sizes; outlined is the best of its size; '
            f"empty cells have no value yet.</p>{_grid(figures)}"
        )

    def losses(self) -> str:
        column, row = (*self.axes, "", "")[:2]
        columns = self._numbers(column) if column else []
        columns = columns if len(columns) <= plots.COLOURS else []
        rows = self._numbers(row) if row else [0]
        panels: dict[str, list[Series]] = {size: [] for size in self.sizes}
        for trial in self.trials:
            look = f"c{columns.index(trial.values[column])}" if columns else "c0"
            dash = " dash" if row and trial.values[row] != rows[-1] else ""
            held_out, train = (trial.curves.get(f"{split}/loss", []) for split in ("eval", "train"))
            panels[trial.size] += [
                Series(thin(train, 40), trial.name, f"{look} thin{dash}"),
                Series(held_out, f"{trial.name}, held out", look, "circle"),
            ]
            if trial.state in NOTES and trial.state in MARKS:
                last = (held_out or train)[-1:]
                told = f"{trial.name}, {trial.state}"
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
        return (
            f"<h3>Loss of every trial</h3>{plots.legend(names)}"
            '<p class="soft">Lines: train, smoothed. Circles: held out, after each epoch. '
            f"■ stopped early, ✕ failed.</p>{_grid(figures)}"
        )

    def progress(self) -> str:
        best: list[tuple[float, float]] = []
        marks = []
        for i, trial in enumerate(sorted(self.ranked, key=lambda trial: trial.ended), start=1):
            value = trial.last(self.metric)
            marks.append(Series([(i, value)], trial.name, "c0", MARKS[trial.state]))
            before = best[-1][1] if best else value
            best += [(i, before), (i, before if self.sign * (before - value) <= 0 else value)]
        figure = chart(
            [*marks, Series(best, "best so far", "c1")],
            title=f"{self.metric} in the order of ending",
            x="trials with a result",
        )
        names = [("c1", "best so far"), ("c0 mark", "a trial")] if best else []
        return f"<h3>Best so far</h3>{plots.legend(names)}{_grid([figure])}"

    def table(self) -> str:
        head = ("trial", "state", "epochs", "held-out loss", "accuracy", "images zeroed", "time")
        numbers = [{"class": "number"} if i > 1 else {} for i in range(len(head))]
        lines = []
        for trial in sorted(self.trials, key=self._order):
            best = {"class": "best"} if trial is self.best else {}
            cells = (
                ("★ " if best else "") + trial.name,
                f"{trial.state}: {trial.reason}" if trial.reason else trial.state,
                f"{trial.epochs} of {trial.fields.get('train.epochs', '?')}",
                _number(trial.last("eval/loss")),
                _percent(trial.last("eval/accuracy")),
                _percent(trial.last("eval/accuracy_blind")),
                _duration(trial.seconds),
            )
            written = "".join(
                f"<td{attributes({'data-label': label, **number})}>{escape(text)}</td>"
                for label, number, text in zip(head, numbers, cells, strict=True)
            )
            row = attributes({"data-trial": trial.name, "data-state": trial.state, **best})
            lines.append(f"<tr{row}>{written}</tr>")
        top = "".join(
            f"<th{attributes({'scope': 'col', **number})}>{name}</th>"
            for name, number in zip(head, numbers, strict=True)
        )
        return (
            f"<h3>All trials, by {escape(self.metric)}</h3>"
            f'<table class="trials"><thead><tr>{top}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table>"
        )

    def chats(self) -> str:
        if self.speaker is None:
            return ""
        chats = _json(self.speaker.folder / "chats.json")
        keys = {key for chat in chats for key in chat["images"]}
        images = read_images(self.prepared, keys) if self.prepared else {}
        return (
            f"<h2>Held-out chats with {escape(self.speaker.name)}</h2>"
            '<p class="soft">An answer is right if it is exactly the true one.</p>'
            f'<div class="chats">{"".join(_chat(chat, images) for chat in chats)}</div>'
        )

    def again(self) -> str:
        it = self.experiment
        path, new = shlex.quote(str(it.run_folder / "experiment.yaml")), f"name={it.name}-again"
        verbs = (["train"] if self.training else []) + (["sweep"] if self.trials else [])
        lines = [
            *("# talk to the best model", f"dsvl chat {path}", ""),
            "# go on where it stopped; what is done is not done again",
            *(f"dsvl {verb} {path}" for verb in verbs),
            *("", "# all of it again, from nothing"),
            *(f"dsvl {verb} {path} {shlex.quote(new)}" for verb in verbs),
            *("", "# every run, curve and setting"),
            f"mlflow ui --backend-store-uri {shlex.quote(it.tracking_uri)}",
        ]
        spent = sum(run.seconds for run in [*self.trials, self.training] if run)
        rows = [
            ("written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
            ("training time", f"{_duration(spent)}, all runs together"),
            ("python", f"{platform.python_version()} on {platform.platform()}"),
            *((name, version) for name in PACKAGES if (version := _version(name))),
        ]
        return (
            f"<h2>Do it again</h2><pre>{escape(chr(10).join(lines))}</pre>"
            f"<h2>Environment of this report</h2>{_facts(rows)}"
        )

    def _rank(self, run: Run) -> float:
        value = self.sign * run.last(self.metric)
        return value if isfinite(value) else inf

    def _order(self, run: Run) -> tuple[bool, float, str]:
        """Runs with a result before others, the best first."""
        return run not in self.ranked, self._rank(run), run.name

    def _best_of(self, size: str) -> Run | None:
        return next((run for run in self.ranked if run.size == size), None)

    def _numbers(self, path: str) -> list[float]:
        """The numbers that were tried for a field, and those that a grid asks to try."""
        domain = self.experiment.search.space.get(path) if self.experiment.search else None
        asked = domain.values if domain and domain.kind == "grid" else ()
        return sorted({*(trial.values[path] for trial in self.trials), *asked})

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


def _found(run: Run) -> str:
    """What the last evaluation of a run says, as a sentence."""
    right, blind, majority = (_percent(run.last(metric)) for metric, _, _ in SHARES)
    if not run.epochs:
        return "It has not been evaluated yet."
    return (
        f"It answers {right} of the held-out questions exactly, against {majority} by always "
        f"giving the most frequent answer and {blind} by the same model with its images zeroed; "
        f"its held-out loss is {_number(run.last('eval/loss'))} nats a token."
    )


def _cards(run: Run) -> str:
    right, blind, majority = (_percent(run.last(metric)) for metric, _, _ in SHARES)
    figures = (
        (right, "held-out answers exactly right"),
        (blind, "with images zeroed"),
        (majority, "most frequent answer"),
        (_number(run.last("eval/loss")), "held-out loss, nats a token"),
        (_duration(run.seconds), "training it"),
    )
    inside = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for value, name in figures)
    return f'<div class="cards">{inside}</div>'


def _chat(chat: dict[str, Any], images: dict[str, dict[str, Any]]) -> str:
    parts = [f'<p class="soft">{escape(chat["id"])}</p>']
    for part in chat["rounds"]:
        figures = [_figure(i, images.get(chat["images"][i])) for i in part["images"]]
        parts += [f'<div class="images">{"".join(figures)}</div>'] if figures else []
        right = part["model"].strip() == part["answer"].strip()
        look, verdict = ("right", "✓ right") if right else ("wrong", "✗ wrong")
        parts.append(
            f"<dl><dt>question</dt><dd>{escape(part['question'])}</dd>"
            f"<dt>true answer</dt><dd>{escape(part['answer'])}</dd><dt>model</dt>"
            f'<dd>{escape(part["model"])} <span class="{look}">{verdict}</span></dd></dl>'
        )
    return f'<article class="chat">{"".join(parts)}</article>'


def _figure(number: int, image: dict[str, Any] | None) -> str:
    name = f"image {number + 1}"
    if image is None or image["mime"] not in IMAGES:
        return f"<figure><figcaption>{name}: not in the prepared data</figcaption></figure>"
    small = {"class": "small"} if max(image["width"], image["height"]) < 96 else {}
    source = f"data:{image['mime']};base64,{b64encode(image['bytes']).decode()}"
    tag = attributes({"src": source, "alt": name, **small})
    return f"<figure><img{tag}><figcaption>{name}</figcaption></figure>"


def _grid(figures: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def _facts(rows: Sequence[tuple[str, str]]) -> str:
    lines = (f'<tr><th scope="row">{escape(a)}</th><td>{escape(b)}</td></tr>' for a, b in rows)
    return f'<table class="facts">{"".join(lines)}</table>'


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


def _number(value: float) -> str:
    return f"{value:.3f}" if isfinite(value) else "—"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %" if isfinite(value) else "—"


def _count(number: float) -> str:
    """A large number in thousands, millions or billions."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _image_files(folder: Path) -> list[pq.ParquetFile]:
    return [pq.ParquetFile(path) for path in sorted((folder / "images").glob("*.parquet"))]


def _json(path: Path) -> Any:
    """The document in a file, or an empty mapping where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
