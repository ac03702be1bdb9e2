"""One HTML page on a training, a sweep or both, from the files of the run folder alone.

This file says what stands on the page, section by section; run_report.py, data_report.py and sweep_report.py
do the same for a training, for data and for sweeps.
No server, no Ray and no torch is needed, and the page asks no other host for anything. What a dataset, a
model or a configuration says is escaped: it may hold HTML.
"""

import logging
import os
import shlex
from collections import Counter
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import yaml

from orchestration.config import Experiment
from orchestration.pages import (
    across_report,
    data_report,
    evaluation_report,
    run_report,
    sweep_report,
    trials_report,
    verdict_report,
)
from orchestration.pages.page import cards, document, duration, facts, number, percent
from orchestration.pages.plots import SHARES
from orchestration.planning.parameters import language_parameters, parameters
from orchestration.records.journal import NOTES, Journal, write_whole
from orchestration.records.record import Record, Run, read_if_there, stored
from orchestration.searching import comparison

log = logging.getLogger(__name__)

TOLD = {
    "finished": "The training of {name} finished.",
    "stopped": "The training of {name} was stopped after {epochs}.",
    "failed": "The training of {name} failed after {epochs}: {reason}.",
    "unfinished": "The training of {name} is unfinished: {epochs} are done.",
}


def write(source: Experiment | Path, html: Path | None = None) -> dict[str, Any]:
    """Write the page, `report.html` in the run folder unless told where, and the experiment as YAML.

    `source` may be the folder of a run, a sweep or a trial.

    Raises:
        FileNotFoundError: if there is neither a training nor a trial in the folder.
        ValueError: if the folder holds the run of another experiment; the fields are named.
    """
    experiment = source if isinstance(source, Experiment) else stored(source)
    if experiment.storage.remote is None:
        return _write(experiment, html)
    from orchestration.storing.mirroring import fetch_data, mirrored  # which loads torch

    with mirrored(experiment, writer=False):
        fetch_data(experiment)
        return _write(experiment, html)


def keep(experiment: Experiment, folder: Path) -> None:
    """Write the page, and have MLflow keep it, and its figures as PNGs, with the run of a folder.

    Work that is done does not fail of it: why there is no page is told.
    """
    try:
        html = Path(_write(experiment, None)["report"])
    except (FileNotFoundError, ValueError) as error:  # another run has this name, no trial began
        log.warning("no page is written: %s", error)
        return
    files = [html]
    try:
        from orchestration.pages import pictures
    except ModuleNotFoundError as error:
        log.info("no figures for MLflow: %s is missing; pip install 'dsvl[pictures]'", error.name)
    else:
        files += pictures.write(html.read_text(encoding="utf-8"), folder / "figures")
    with Journal(folder / NOTES) as notes:
        for path in files:
            notes.file(os.path.relpath(path, folder))


def _write(experiment: Experiment, html: Path | None) -> dict[str, Any]:
    """Write both of what is here."""
    folder, record = experiment.run_folder, Record(experiment)
    html = html or folder / "report.html"
    settings = yaml.safe_dump(record.whole.as_dict(), sort_keys=False, allow_unicode=True)
    write_whole(folder / "experiment.yaml", settings)
    write_whole(html, page(record))
    best = record.best
    evaluated = sorted(key for key in best.curves if key.startswith("eval/")) if best else []
    return {
        "report": str(html),
        "training": record.training.state if record.training else "waiting",
        "trials": dict(Counter(trial.state for trial in record.trials)),
        "best": best.name if best else None,
        "metrics": {key: best.last(key) for key in evaluated if best},
        "verdicts": verdict_report.found(record),
    }


def page(record: Record) -> str:
    """The whole page; each section is a function below."""
    sections = [headline, asked, run_report.cost, data_report.data]
    sections += run_report.SECTIONS if record.training else []
    sections += [verdict_report.verdicts]
    sections += across_report.SECTIONS if record.evidence else []
    sections += [comparison.section] if record.trials else []
    sections += [*sweep_report.SECTIONS, *trials_report.SECTIONS] if record.trials else []
    sections += [evaluation_report.evaluations, run_report.chats, again, environment]
    return document(record.experiment.name, [section(record) for section in sections])


def headline(record: Record) -> str:
    """What was found, in sentences and in large figures."""
    lines = []
    if record.ranked:
        count, best = len(record.ranked), record.ranked[0]
        of = f"The best of {count} trials with a result" if count > 1 else "The only result"
        lines.append(f"{of} is {best.name}. {_found(best)}")
    if record.trials:
        states = Counter(trial.state for trial in record.trials)
        if (search := record.experiment.search) and search.trials is not None:
            states["not begun"] = max(0, search.trials - len(record.trials))
        states["stopped early"] = states.pop("stopped", 0)
        names = ("finished", "stopped early", "failed", "unfinished", "not begun")
        counts = ", ".join(f"{states[name]} {name}" for name in names if states[name])
        lines.append(f"Of {sum(states[name] for name in names)} trials {counts}.")
    if run := record.training:
        epochs = f"{run.epochs} of {record.experiment.train.epochs} epochs"
        told = TOLD[run.state].format(name=run.name, epochs=epochs, reason=run.reason)
        lines.append(f"{told} {_found(run)}")
    text = "".join(f'<p class="lead">{escape(line)}</p>' for line in lines)
    if not record.best:
        return text
    right, blind, majority = _shares(record.best)
    return text + cards(
        (right, "held-out answers exactly right"),
        (blind, "with images zeroed"),
        (majority, "most frequent answer"),
        (number(record.best.last("eval/loss")), "held-out loss, nats a token"),
        (duration(record.best.seconds), "training it"),
    )


def asked(record: Record) -> str:
    """The experiment."""
    it = record.experiment
    model, train, search = it.model, it.train, it.search
    rows = [("identity", it.identity())]
    for size in record.sizes or [model.size]:
        language = model.languages[size]
        shape = f"{language.num_hidden_layers} layers, {language.hidden_size} wide"
        count = _count(sum(language_parameters(language).values()))
        rows.append((f"size {size}", f"{language.checkpoint}: {shape}, {count} parameters"))
    trained = ", ".join(name for name, part in parameters(model).items() if part.trainable)
    rows += [
        ("image tower", f"{model.vision.checkpoint}: {model.vision.tokens} vectors an image"),
        ("attention", model.attention),
        ("trained", f"{trained}; all else is frozen"),
        ("learning rate", f"{it.optim.lr:g}, {it.optim.schedule}"),
        ("length", f"{train.epochs} epochs in batches of {train.batch}"),
        ("precision, seed", f"{train.precision}, {train.seed}"),
    ]
    for path, domain in search.space.items() if search else ():
        values = domain.probes()
        listed = values if domain.kind in ("grid", "choice") else (values[0], values[-1])
        only = " and ".join(f"{other} is {value}" for other, value in domain.when.items())
        where = f", where {only}" if only else ""
        rows.append((f"searched {path}", f"{domain.kind} {', '.join(map(str, listed))}{where}"))
    if search:
        sought = ", ".join(
            f"{'min' if sign > 0 else 'max'} {name}" for name, sign in search.objectives.items()
        )
        rows.append(("search", f"{sought}, scheduler {search.scheduler.kind}"))
    return f"<h2>What was asked</h2>{facts(rows)}"


def again(record: Record) -> str:
    """The commands to go on with."""
    folder, it = record.experiment.run_folder, record.whole
    path, new = shlex.quote(str(folder / "experiment.yaml")), f"name={it.name}-again"
    verbs = (["train"] if record.training else []) + (["sweep"] if record.trials else [])
    subject = shlex.quote(str(folder)) if record.is_trial else path
    lines = ["# talk to the best model", f"dsvl chat {subject}", ""]
    if not record.is_trial:
        lines += [
            "# go on where it stopped; what is done is not done again",
            *(f"dsvl {verb} {path}" for verb in verbs),
            "",
        ]
    lines += [
        "# all of it again, from nothing",
        *(f"dsvl {verb} {path} {shlex.quote(new)}" for verb in verbs),
        *("", "# every run, curve and setting"),
        f"mlflow ui --backend-store-uri {shlex.quote(it.tracking_uri)}",
    ]
    return f"<h2>Do it again</h2><pre>{escape(chr(10).join(lines))}</pre>"


def environment(record: Record) -> str:
    """What the best run, or else the first, was made with."""
    run = record.best or record.training or record.trials[0]
    made = read_if_there(run.folder / "environment.json")
    spent = sum(run.seconds for run in [*record.trials, record.training] if run)
    rows = [
        ("page written", datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
        ("training time", f"{duration(spent)}, all runs together"),
    ]
    if made:
        changed = ", with changes that are not in it" if made["changed"] else ""
        rows += [
            ("commit", f"{made['commit']}{changed}" if made["commit"] else "none"),
            ("machine", made["host"]),
            ("python", f"{made['python']} on {made['platform']}"),
            *made["packages"].items(),
        ]
    return f"<h2>Environment of {escape(run.name)}</h2>{facts(rows)}"


def _found(run: Run) -> str:
    """What the last evaluation of a run says, as a sentence."""
    if not run.epochs:
        return "It has not been evaluated yet."
    right, blind, majority = _shares(run)
    return (
        f"It answers {right} of the held-out questions exactly, against {majority} by always "
        f"giving the most frequent answer and {blind} by the same model with its images zeroed; "
        f"its held-out loss is {number(run.last('eval/loss'))} nats a token."
    )


def _shares(run: Run) -> list[str]:
    """Exact answers as trained, with images zeroed, and by the most frequent answer."""
    return [percent(run.last(metric)) for metric, _, _ in SHARES]


def _count(number: float) -> str:
    """A large number in thousands, millions or billions."""
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)
