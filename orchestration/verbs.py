"""What `dsvl` can do: for each verb what it takes, does, and tells programs and people."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TextIO

from orchestration.config import Experiment
from orchestration.problems import harmless

Result = tuple[dict[str, Any], str]
"""What a verb found out, for programs and for people."""

# The verbs import what they need themselves: ray, torch and mlflow take seconds, and `plan` none.


def _quickstart(experiment: Experiment) -> Result:
    """Make the digits, train, sweep and report: the whole way, on this machine."""
    from orchestration.quickstart import render, run

    result = run(experiment)
    return result, render(result)


def _check(experiment: Experiment) -> Result:
    """Read the raw data and say what would come through."""
    from orchestration.preparing.check import check

    found = check(experiment)
    problems = []
    for problem in found["problems"]:
        records, more = problem["records"][:3], problem["count"] - 3
        shown = [*records, f"and {more:,} more, all of them with --json"] if more > 0 else records
        problems.append(problem | {"records": shown})
    return found, described(found | {"problems": problems})[1]


def _plan(experiment: Experiment) -> Result:
    """Say what the experiment needs and costs: memory, steps, time, money, disk."""
    from orchestration.plan import plan

    planned = plan(experiment)
    return planned.as_dict(), planned.render()


def _prepare(experiment: Experiment) -> Result:
    """Turn raw data into prepared data."""
    from orchestration.prepare import prepare

    return described(prepare(experiment))


def _stats(experiment: Experiment) -> Result:
    """Say what an epoch of the prepared data is made of; prepares them first."""
    from orchestration.prepare import prepare
    from orchestration.preparing.statistics import measure, render

    result = measure(experiment, Path(prepare(experiment)["folder"]))
    return result, render(result)


def _preview(
    experiment: Experiment, *, count: int, blend: str | None, epoch: int, html: Path | None
) -> Result:
    """Show training samples as the model sees them: images, and which tokens are trained."""
    from orchestration.preparing.preview import page, preview, render
    from orchestration.records.journal import write_whole

    result = preview(experiment, count=count, blend=blend, epoch=epoch)
    if html is None:
        return result, render(result, colour=_on_a_terminal() and not os.environ.get("NO_COLOR"))
    write_whole(html, page(experiment, result))
    return {"page": str(html), **result}, f"page: {html}"


def _train(experiment: Experiment) -> Result:
    """Train the model, or go on where the run stopped."""
    from orchestration.commands import train

    result = train(experiment)
    return result, "\n".join(_lines({k: result[k] for k in ("folder", "state", "metrics")}))


def _sweep(experiment: Experiment) -> Result:
    """Run the search, or go on where it stopped."""
    from orchestration.clusters.placement import room_for_trials

    with room_for_trials(experiment):  # before more is loaded, which takes seconds
        from orchestration.commands import sweep
        from orchestration.searching.summary import render

        result = sweep(experiment)
    return result, render(result)


def _report(sources: list[Experiment | Path], *, html: Path | None) -> Result:
    """Write the page of a run or a sweep, or of a comparison of several."""
    from orchestration import report
    from orchestration.pages import side_by_side

    if len(sources) == 1:
        result = report.write(sources[0], html)
        held = [verdict for verdict in result["verdicts"] if verdict["holds"]]
        return result, described(result | {"verdicts": held})[1]
    result = side_by_side.write(sources, html or Path("comparison.html"))
    return result, side_by_side.render(result)


def _evaluate(
    experiment: Experiment | Path, *, suites: list[Path], step: int | None, against: Path | None
) -> Result:
    """Measure the best model on held-out samples and question suites."""
    from orchestration.trained import choose

    chosen = choose(experiment, step=step)  # refuses before more is loaded, which takes seconds
    from orchestration.evaluating.evaluation import evaluate, render

    result = evaluate(chosen, suites=suites, against=against)
    return result, harmless(render(result))


def _status(source: Experiment | Path, *, watch: bool, sync: bool) -> Result:
    """Say where runs and sweeps stand: state, progress, faults, losses, cost."""
    from orchestration.records import standings
    from orchestration.status import Watch

    seen, synced = Watch(source), []
    if sync:
        from orchestration.records.record import stored
        from orchestration.records.shipping import catch_up

        owners = [source] if isinstance(source, Experiment) else map(stored, seen.owners())
        synced = [catch_up(experiment) for experiment in owners]
    found = standings.watch(seen) if watch else seen.look()
    told = standings.render(found, terminal=_on_a_terminal()) if found else "no runs yet"
    told += "".join(map(standings.shipped, synced))
    return {"runs": list(map(asdict, found))} | ({"synced": synced} if sync else {}), told


def _submit(experiment: Experiment, **options: Any) -> Result:
    """Carry work to a cluster; typed again, tell how it is there."""
    from orchestration.submit import render, submit

    result = submit(experiment, **options)
    return result, harmless(render(result))


def _doctor(experiment: Experiment) -> Result:
    """Examine this machine and the cluster."""
    from orchestration.doctor import examine, render

    result = examine(experiment)
    return result, render(result)


def _chat(experiment: Experiment | Path, *, out: TextIO) -> Result:
    """Talk to the best model that the experiment has."""
    from orchestration.trained import find

    subject = find(experiment)  # refuses before more is loaded, which takes seconds
    from orchestration.serving.terminal import talk

    result = talk(subject, out=out)
    return result, f"answered: {result['answered']}"


def _serve(sources: Sequence[Experiment | Path], *, host: str, port: int) -> Result:
    """Serve models to browsers and OpenAI's clients until Ctrl-C; of several, answers stand side by side."""
    from orchestration.trained import find

    subjects = [find(source) for source in sources]
    experiments = [source for source in sources if isinstance(source, Experiment)]
    try:
        from orchestration.serving.serve import run
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}; pip install 'dsvl[serve]'") from error

    experiment = experiments[0] if experiments else None
    return described(run(subjects, experiment=experiment, host=host, port=port))


def _export(
    experiment: Experiment | Path,
    *,
    form: Literal["merged", "adapter"],
    target: Path | None,
    step: int | None,
) -> Result:
    """Write the best model as a folder to hand on: whole, or what was trained alone."""
    from orchestration.trained import choose

    chosen = choose(experiment, step=step)
    from orchestration.export import export, render

    result = export(chosen, form=form, target=target)
    return result, render(result)


def _convert(**options: Any) -> Result:
    """Write a file of records in another format."""
    from orchestration.preparing.convert import convert, render

    result = convert(**options)
    return result, harmless(render(result))


def _on_a_terminal() -> bool:
    """Whether the result goes to one."""
    stdout = sys.__stdout__  # sys.stdout is another while a verb works
    return stdout is not None and stdout.isatty()


def described(result: dict[str, Any]) -> Result:
    """A result that people read as it is, name by name."""
    return result, harmless("\n".join(_lines(result)))


def _lines(result: Mapping[str, Any], indent: str = "") -> list[str]:
    width = max((len(str(name)) for name in result), default=0) + 1
    lines: list[str] = []
    for name, value in result.items():
        if isinstance(value, Mapping | list | tuple) and not value:
            continue
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            lines.append(f"{indent}{name}:")
            for item in value:
                lines += [*_lines(item, indent + "  "), ""]
        elif isinstance(value, list) and any(" " in str(item) for item in value):
            lines += [f"{indent}{name}:", *(f"{indent}  {item}" for item in value)]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else shown
            lines.append(f"{indent}{f'{name}:':<{width}} {shown}")
    return lines


VERBS: dict[str, Callable[..., Result]] = {
    "quickstart": _quickstart,
    "check": _check,
    "plan": _plan,
    "prepare": _prepare,
    "stats": _stats,
    "preview": _preview,
    "convert": _convert,
    "train": _train,
    "sweep": _sweep,
    "status": _status,
    "report": _report,
    "evaluate": _evaluate,
    "chat": _chat,
    "serve": _serve,
    "export": _export,
    "submit": _submit,
    "doctor": _doctor,
}


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "submit": {
        "work": {
            "metavar": "WORK",
            "choices": ("check", "prepare", "train", "sweep", "report", "evaluate"),
            "help": "check, prepare, train, sweep, report or evaluate",
        },
        "--to": {
            "choices": ("ray", "kuberay", "slurm", "aws", "machines"),
            "default": "ray",
            "help": "a Ray cluster that runs (the default), KubeRay, Slurm, or what `ray up` starts",
        },
        "--address": {
            "metavar": "URL",
            "help": "its dashboard; http://127.0.0.1:8265 if neither given nor RAY_API_SERVER_ADDRESS",
        },
        "--dry-run": {"action": "store_true", "help": "say what would be sent, and send nothing"},
        "--check": {"action": "store_true", "help": "say what is wrong with it, and send nothing"},
        "--wait": {
            "action": "store_true",
            "help": "show what the job says until it ends; the exit status is its own",
        },
        "--stop": {"dest": "stopping", "action": "store_true", "help": "stop the job"},
        "--again": {"action": "store_true", "help": "once more, although it has succeeded"},
    },
    "serve": {
        "--host": {
            "default": "127.0.0.1",
            "help": "where to listen; this machine alone if not given",
        },
        "--port": {"type": int, "default": 8000, "metavar": "N", "help": "8000 if not given"},
    },
    "preview": {
        "--count": {"type": int, "default": 4, "metavar": "N", "help": "how many; 4 if not given"},
        "--blend": {"metavar": "NAME", "help": "of this blend, instead of all in turn"},
        "--epoch": {"type": int, "default": 0, "metavar": "E", "help": "as drawn for this epoch"},
        "--html": {"type": Path, "metavar": "FILE", "help": "write a page with the pictures"},
    },
    "report": {
        "--html": {
            "type": Path,
            "metavar": "FILE",
            "help": "write it there; report.html in the run's folder if not given, or comparison.html here",
        },
    },
    "evaluate": {
        "--suite": {
            "dest": "suites",
            "type": Path,
            "action": "append",
            "default": [],
            "metavar": "FILE",
            "help": "also ask these questions: YAML that describes a suite, JSON lines, the original's JSON",
        },
        "--checkpoint": {
            "dest": "step",
            "type": int,
            "metavar": "STEP",
            "help": "as of this update; the newest if not given",
        },
        "--against": {
            "type": Path,
            "metavar": "FOLDER",
            "help": "compare with this run, which has been evaluated",
        },
    },
    "status": {
        "--watch": {"action": "store_true", "help": "show it anew until Ctrl-C"},
        "--sync": {"action": "store_true", "help": "bring to MLflow what it has missed"},
    },
    "export": {
        "--to": {
            "dest": "target",
            "type": Path,
            "metavar": "FOLDER",
            "help": "which does not exist yet; below the run if not given",
        },
        "--form": {
            "choices": ("merged", "adapter"),
            "default": "merged",
            "help": "the whole model (the default), or what was trained beside the names of the rest",
        },
        "--checkpoint": {
            "dest": "step",
            "type": int,
            "metavar": "STEP",
            "help": "as of this update; the newest if not given",
        },
    },
    "convert": {
        "origin": {"type": Path, "metavar": "IN", "help": "JSON, JSON lines, Parquet, CSV, TSV"},
        "target": {"type": Path, "metavar": "OUT", "help": "JSON, JSON lines, Parquet"},
        "fields": {"nargs": "*", "metavar": "FIELD=NAME", "help": "where records of IN have it"},
        "--from": {
            "dest": "reader",
            "required": True,
            "metavar": "FORMAT",
            "help": "a reader: llava_json, sharegpt, hf_messages, alpaca, qa, or a dataset's own",
        },
        "--to": {
            "dest": "format",
            "required": True,
            "metavar": "FORMAT",
            "help": "llava_json, sharegpt or hf_messages",
        },
        "--images": {"type": Path, "metavar": "FOLDER", "help": "look up every image in it"},
        "--force": {"action": "store_true", "help": "overwrite what is there"},
    },
}
"""What a verb takes beside an experiment: its keyword arguments, as argparse wants them."""

WITHOUT_EXPERIMENT = ("convert",)

OF_A_FOLDER = {
    "evaluate": ", or the folder of a run",
    "chat": ", or the folder of a run or of an exported model",
    "serve": ", or the folder of a run or of an exported model; any number of both",
    "export": ", or the folder of a run",
    "report": ", or the folder of a run, sweep or trial; several of them are compared",
    "status": ", the folder of a run, or one of many; the storage's own if not given",
}
"""What verbs take in place of an experiment."""

SEVERAL = ("serve", "report")
"""Verbs that take any number of experiments and folders."""

OF_A_RUN = {"train": ", or the id of an MLflow run, which is trained again"}
"""And what is looked up in the tracking store."""

FAULTS_FOUND = {"check": 2, "convert": 1, "doctor": 1, "submit": 1}
"""Exit status where a verb did its work and found faults: of the request, of records, of the machine."""
