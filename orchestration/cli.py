"""The command line: `dsvl VERB EXPERIMENT [section.field=value ...] [--json]`.

Results go to stdout, all else to stderr. Exit status: 0 done, 1 the work failed, 2 the request is
wrong.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from pydantic_core import to_jsonable_python

from orchestration.compose import load
from orchestration.config import Experiment, StorageConfig
from orchestration.problems import did_you_mean, harmless, raised_by_us
from orchestration.records.again import RUN_ID, again
from orchestration.verbs import (
    FAULTS_FOUND,
    OF_A_FOLDER,
    OF_A_RUN,
    OPTIONS,
    SEVERAL,
    VERBS,
    WITHOUT_EXPERIMENT,
)

QUICKSTART = Path(__file__).parent.parent / "configs/experiment/quickstart.yaml"


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
        work = partial(VERBS[verb], **options)
        if verb not in WITHOUT_EXPERIMENT:
            sources = _sources(request)
            experiment = sources[0]
            work = partial(work, sources if verb in SEVERAL else experiment)
        if verb == "chat":  # which is read while it works
            work = partial(work, out=sys.stderr if as_json else sys.stdout)
        with redirect_stdout(sys.stderr):  # what libraries print is no result
            result, text = work()
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        return _fail(str(error), as_json=as_json, status=2)
    except KeyboardInterrupt:
        return _fail(f"{verb} was interrupted", as_json=as_json, status=1)
    except Exception as error:
        if isinstance(error, ValueError) and raised_by_us(error):
            return _fail(str(error), as_json=as_json, status=2)
        cause = f"{verb} failed: {type(error).__name__}: {_first_line(error)}"
        return _fail(cause + _log(verb, experiment, cause), as_json=as_json, status=1)
    if not _say(_json(result) if as_json else text):
        return 1
    return 0 if result.get("ok", True) else result.get("exit_status") or FAULTS_FOUND[verb]


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are reported like every other."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {' '.join(self.format_usage().split())}")


def _request(arguments: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """What is asked for, and the options that its verb alone takes."""
    verb = next((word for word in arguments if not word.startswith("-")), None)
    if verb is None and not {"-h", "--help"} & set(arguments):
        raise ValueError(f"name what to do: {', '.join(VERBS)}; dsvl --help says what each does")
    if verb is not None and verb not in VERBS:
        near = did_you_mean(verb, VERBS) or f"; the verbs are {', '.join(VERBS)}"
        raise ValueError(f"no verb {verb!r}{near}")
    verbs = "\n".join(f"  {name:<12}{action.__doc__}" for name, action in VERBS.items())
    about = f"Train and search multi-modal chat models.\n\nverbs:\n{verbs}"
    parser = _Parser(
        prog="dsvl",
        description=VERBS[verb].__doc__ if verb else about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("verb", metavar=verb or "VERB")
    options = OPTIONS.get(verb or "", {})
    added = [parser.add_argument(name, **how) for name, how in options.items()]
    if verb not in WITHOUT_EXPERIMENT:
        named = f"a YAML file{(OF_A_FOLDER | OF_A_RUN).get(verb or '', '')}"
        parser.add_argument("experiment", metavar="EXPERIMENT", nargs="?", help=named)
        parser.add_argument("overrides", metavar="section.field=value", nargs="*")
    parser.add_argument("--json", action="store_true", help="print the result as a JSON document")
    request = parser.parse_intermixed_args(arguments)
    return request, {option.dest: getattr(request, option.dest) for option in added}


def _sources(request: argparse.Namespace) -> list[Experiment | Path]:
    """What the verb works on: one experiment or folder, or several where it takes them."""
    verb, path, overrides = request.verb, request.experiment, request.overrides
    if verb in ("quickstart", "doctor") and (path is None or "=" in path):
        path, overrides = QUICKSTART, [*([path] if path else []), *overrides]
    if path is None and request.verb == "status":
        path = StorageConfig().path
    if path is None:
        asked = " WORK" if verb == "submit" else ""
        raise ValueError(f"name an experiment: dsvl {verb}{asked} EXPERIMENT")
    paths = [path]
    if verb in SEVERAL:
        paths += [word for word in overrides if "=" not in word or Path(word).is_dir()]
        overrides = [word for word in overrides if word not in paths]
    return [_source(verb, path, overrides) for path in paths]


def _source(verb: str, path: str | Path, overrides: Sequence[str]) -> Experiment | Path:
    if verb in OF_A_FOLDER and Path(path).is_dir():
        if overrides:
            told = f"{path} is a folder, whose settings are what they were; leave out {' '.join(overrides)}"
            raise ValueError(told)
        return Path(path)
    if verb in OF_A_FOLDER and not Path(path).exists() and Path(path).suffix != ".yaml":
        raise FileNotFoundError(
            f"{path}: no such file or folder; {verb} takes a YAML file{OF_A_FOLDER[verb]}"
        )
    if verb in OF_A_RUN and RUN_ID.fullmatch(str(path)):
        return again(str(path), overrides)
    return load(path, overrides)


def _fail(message: str, *, as_json: bool, status: int) -> int:
    if as_json:
        _say(_json({"error": message.splitlines()}))
    print(harmless(message), file=sys.stderr)
    return status


def _say(text: str) -> bool:
    """Print a result; false where it cannot be told, which then is."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except BrokenPipeError:  # who reads, as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"the result could not be written: {error}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


def _json(document: dict[str, Any]) -> str:
    """Strict JSON: what is no number becomes null; in ASCII, as names of files may be no Unicode."""
    plain = to_jsonable_python(document, inf_nan_mode="null", fallback=str)
    return json.dumps(plain, indent=2, allow_nan=False)


def _log(verb: str, experiment: Experiment | Path | None, cause: str) -> str:
    """Write cause and traceback of the current exception beside the run, or somewhere; tell where."""
    own = experiment.run_folder if isinstance(experiment, Experiment) else None
    if verb == "submit":  # to where the storage is, perhaps that of other machines
        own = None
    for folder in (own, None):
        with suppress(OSError):  # a full disk, or one that may not be written to
            folder = folder or Path(tempfile.gettempdir())
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{verb}.error.log"
            text = f"{cause}\n\n{traceback.format_exc()}"
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            return f"; see {path}"
    return ""


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")


if __name__ == "__main__":
    sys.exit(main())
