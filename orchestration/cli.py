"""The command line: `dsvl VERB EXPERIMENT [section.field=value ...] [--json]`.

Results go to stdout, all else to stderr. Exit status: 0 done, 1 the work failed, 2 the request is
wrong.
"""

import argparse
import logging
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

from pydantic_core import to_json

from orchestration.compose import load
from orchestration.config import Experiment
from orchestration.problems import did_you_mean

QUICKSTART = Path(__file__).parent.parent / "configs/experiment/quickstart.yaml"

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
    from orchestration.prepare import check

    return _described(check(experiment))


def _plan(experiment: Experiment) -> Result:
    """Say what the experiment needs: memory, steps, disk."""
    from orchestration.plan import plan

    planned = plan(experiment)
    return planned.as_dict(), planned.render()


def _prepare(experiment: Experiment) -> Result:
    """Turn raw data into prepared data."""
    from orchestration.prepare import prepare

    return _described(prepare(experiment))


def _stats(experiment: Experiment) -> Result:
    """Say what an epoch of the prepared data is made of; prepares them first."""
    from orchestration.prepare import prepare
    from orchestration.statistics import measure, render

    result = measure(experiment, Path(prepare(experiment)["folder"]))
    return result, render(result)


def _preview(
    experiment: Experiment, *, count: int, blend: str | None, epoch: int, html: Path | None
) -> Result:
    """Show training samples as the model sees them: images, and which tokens are trained."""
    from orchestration.journal import write_whole
    from orchestration.preview import in_colour, page, preview, render

    result = preview(experiment, count=count, blend=blend, epoch=epoch)
    if html is None:
        return result, render(result, colour=in_colour())
    write_whole(html, page(experiment, result))
    return {"page": str(html), **result}, f"page: {html}"


def _train(experiment: Experiment) -> Result:
    """Train the model, or go on where the run stopped."""
    from orchestration.commands import train

    result = train(experiment)
    return result, "\n".join(_lines({k: result[k] for k in ("folder", "state", "metrics")}))


def _sweep(experiment: Experiment) -> Result:
    """Run the search, or go on where it stopped."""
    from orchestration.commands import sweep
    from orchestration.search import render

    result = sweep(experiment)
    return result, render(result)


def _report(experiment: Experiment) -> Result:
    """Write the page of a run or a sweep."""
    from orchestration.report import write

    return _described(write(experiment))


def _doctor(experiment: Experiment) -> Result:
    """Examine this machine and the cluster."""
    from orchestration.doctor import examine, render

    result = examine(experiment)
    return result, render(result)


def _chat(experiment: Experiment, *, out: TextIO) -> Result:
    """Talk to the best model that the experiment has."""
    from orchestration.terminal import talk

    result = talk(experiment, out=out)
    return result, f"answered: {result['answered']}"


VERBS: dict[str, Callable[..., Result]] = {
    "quickstart": _quickstart,
    "check": _check,
    "plan": _plan,
    "prepare": _prepare,
    "stats": _stats,
    "preview": _preview,
    "train": _train,
    "sweep": _sweep,
    "report": _report,
    "chat": _chat,
    "doctor": _doctor,
}


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "preview": {
        "--count": {"type": int, "default": 4, "metavar": "N", "help": "how many; 4 if not given"},
        "--blend": {"metavar": "NAME", "help": "of this blend, instead of all in turn"},
        "--epoch": {"type": int, "default": 0, "metavar": "E", "help": "as drawn for this epoch"},
        "--html": {"type": Path, "metavar": "FILE", "help": "write a page with the pictures"},
    },
}
"""What a verb takes beside an experiment: its keyword arguments, as argparse wants them."""


FAULTS_FOUND = {"check": 2, "doctor": 1}
"""Exit status where a verb did its work and found faults: of the request, or of the machine."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command and return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s", force=True
    )
    as_json = "--json" in arguments
    verb, experiment = "dsvl", None
    try:
        request, options = _request(arguments)
        verb = request.verb
        experiment = _experiment(request)
        work = partial(VERBS[verb], **options)
        if verb == "chat":  # which is read while it works
            work = partial(work, out=sys.stderr if as_json else sys.stdout)
        with redirect_stdout(sys.stderr):  # what libraries print is no result
            result, text = work(experiment)
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        return _fail(str(error), as_json=as_json, status=2)
    except KeyboardInterrupt:
        return _fail(f"{verb} was interrupted", as_json=as_json, status=1)
    except Exception as error:
        if isinstance(error, ValueError) and _raised_by_us(error):
            return _fail(str(error), as_json=as_json, status=2)
        cause = f"{verb} failed: {type(error).__name__}: {_first_line(error)}"
        return _fail(f"{cause}; see {_log(verb, experiment)}", as_json=as_json, status=1)
    print(_json(result) if as_json else text)
    return 0 if result.get("ok", True) else FAULTS_FOUND[verb]


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are reported like every other."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(
            f"{message}; usage: dsvl VERB EXPERIMENT [section.field=value ...] [--json]"
        )


def _request(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What is asked for, and the options that its verb alone takes."""
    verb = next((word for word in arguments if not word.startswith("-")), "")
    parser = _parser()
    added = [parser.add_argument(name, **how) for name, how in OPTIONS.get(verb, {}).items()]
    request = parser.parse_intermixed_args(arguments)
    return request, {option.dest: getattr(request, option.dest) for option in added}


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<12}{action.__doc__}" for verb, action in VERBS.items())
    parser = _Parser(
        prog="dsvl",
        description=f"Train and search multi-modal chat models.\n\nverbs:\n{verbs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", metavar="VERB")
    parser.add_argument("experiment", metavar="EXPERIMENT", nargs="?", help="a YAML file")
    parser.add_argument("overrides", metavar="section.field=value", nargs="*")
    parser.add_argument("--json", action="store_true", help="print the result as a JSON document")
    return parser


def _experiment(request: argparse.Namespace) -> Experiment:
    path, overrides = request.experiment, request.overrides
    if request.verb not in VERBS:
        near = did_you_mean(request.verb, VERBS) or f"; the verbs are {', '.join(VERBS)}"
        raise ValueError(f"no verb {request.verb!r}{near}")
    if request.verb == "quickstart" and (path is None or "=" in path):
        path, overrides = QUICKSTART, [*([path] if path else []), *overrides]
    if path is None:
        raise ValueError(f"name an experiment: dsvl {request.verb} EXPERIMENT")
    return load(path, overrides)


def _fail(message: str, *, as_json: bool, status: int) -> int:
    if as_json:
        print(_json({"error": message.splitlines()}))
    print(message, file=sys.stderr)
    return status


def _json(document: dict[str, Any]) -> str:
    """Strict JSON: what is no number becomes null."""
    return to_json(document, indent=2, inf_nan_mode="null", fallback=str).decode()


def _raised_by_us(error: ValueError) -> bool:
    """Whether the project refused a request; a library's ValueError tells of failed work."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals["__package__"].partition(".")[0] in ("dsvl", "orchestration")


def _log(verb: str, experiment: Experiment | None) -> Path:
    """Write the traceback of the current exception beside the run and return the file."""
    folder = experiment.run_folder if experiment else Path(tempfile.gettempdir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # then at least where any program may write
        folder = Path(tempfile.gettempdir())
    path = folder / f"{verb}.error.log"
    path.write_text(traceback.format_exc(), encoding="utf-8")
    return path


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


def _described(result: dict[str, Any]) -> Result:
    return result, "\n".join(_lines(result))


def _lines(result: Mapping[str, Any], indent: str = "") -> list[str]:
    width = max((len(str(name)) for name in result), default=0) + 1
    lines: list[str] = []
    for name, value in result.items():
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            lines.append(f"{indent}{name}:")
            for item in value:
                lines += [*_lines(item, indent + "  "), ""]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            lines.append(f"{indent}{f'{name}:':<{width}} {shown}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
