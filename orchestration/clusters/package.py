"""What a job brings along to a cluster: the code, its experiment, and small checkpoints."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import yaml

from dsvl.config import ModelConfig
from orchestration.config import Experiment
from orchestration.problems import ConfigError, Problem

EXPERIMENT = "experiment.yaml"
"""The experiment within the package, whole: nothing that it extends is needed."""
HOME = Path(__file__).parents[2]
CODE = ("dsvl", "orchestration", "jobs")
HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""How a hub names checkpoints."""
REMEDY = "set each checkpoint of model to a whole path"
LIMIT = 100 * 1024**2
"""Bytes that Ray keeps of a package in the head's memory."""


def portable(experiment: Experiment) -> Experiment:
    """The experiment as a node carries it out: on the cluster that the node belongs to.

    Raises:
        ConfigError: where a folder has another meaning on another machine.
    """
    problems = [
        Problem(
            ("storage", field),
            f"{path!r} must be a whole path that all nodes see under this name; "
            f"set storage.{field} to a shared folder",
        )
        for field in ("path", "data")
        if not _whole(path := getattr(experiment.storage, field))
    ]
    problems += [
        Problem(
            ("model",),
            f"checkpoint {name!r} must lie below {Path.cwd()} to be sent along; set its whole path",
        )
        for name in named(experiment.model)
        if ".." in Path(name).parts
    ]
    if lost := [name for name in missing(experiment.model) if not Path(name).is_absolute()]:
        text = f"no folder {', '.join(lost)} in {Path.cwd()}, where relative paths start; {REMEDY}"
        problems.append(Problem(("model",), text))
    if problems:
        raise ConfigError(problems)
    return experiment.with_overrides({"cluster.address": "auto"})


def shared_folder(experiment: Experiment) -> str:
    """The folder that holds all that is stored, as nodes that come with the work mount it.

    Raises:
        ConfigError: if there is none but the root.
    """
    storage = experiment.storage
    shared = os.path.commonpath([storage.path, storage.data])
    if shared == "/":
        text = f"{storage.data!r} must lie in one volume with storage.path={storage.path!r}"
        raise ConfigError([Problem(("storage", "data"), f"{text}; put both below one folder")])
    return shared


def contents(experiment: Experiment) -> dict[str, Path]:
    """Name within the package -> the file that is sent, without the experiment itself.

    Raises:
        ConfigError: if that is too large, naming what is largest.
    """
    files = {
        str(path.relative_to(HOME)): path
        for part in CODE
        for path in _files(HOME / part)
        if "__pycache__" not in path.parts
    }
    sizes = {"the code": _size(files)}
    for name in named(experiment.model):
        folder = Path(name)
        if not folder.is_absolute() and folder.is_dir():
            added = {str(path): path for path in _files(folder)}
            sizes[name] = _size({n: path for n, path in added.items() if n not in files})
            files |= added
    if sum(sizes.values()) > LIMIT:
        largest = max(sizes, key=lambda name: sizes[name])
        raise ConfigError(
            [
                Problem(
                    ("model",),
                    f"the package would have {sum(sizes.values()) / 1024**2:,.0f} MiB, of which "
                    f"{sizes[largest] / 1024**2:,.0f} are {largest}; Ray takes at most "
                    f"{LIMIT / 1024**2:,.0f}: put it where all nodes see it, and set its whole path",
                )
            ]
        )
    return files


def require_in_image(experiment: Experiment) -> None:
    """Refuse checkpoints of this machine where nothing but the image and shared folders is at hand.

    Raises:
        ConfigError: naming them.
    """
    lost = [name for name in named(experiment.model) if Path(name).is_dir() and not _in_image(name)]
    if lost:
        text = f"{', '.join(lost)}: no node has this folder; put it where all see it, and set its whole path"
        raise ConfigError([Problem(("model",), text)])


def named(model: ModelConfig) -> list[str]:
    """The checkpoints that a model names."""
    return [*(each.checkpoint for each in model.languages.values()), model.vision.checkpoint]


def missing(model: ModelConfig) -> list[str]:
    """Those of them that are no folders, nor names that a hub could have: it has no tower of kind qwen."""
    extracted = model.vision.checkpoint if model.vision.kind == "qwen" else None
    return [
        name
        for name in named(model)
        if not Path(name).is_dir() and (name == extracted or not HUB.fullmatch(name))
    ]


def _in_image(name: str) -> bool:
    return Path(name).is_absolute() or Path(name).parts[0] in CODE


def pack(experiment: Experiment, folder: Path) -> None:
    """Fill an empty folder with what is sent."""
    for name, path in contents(experiment).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)
    (folder / EXPERIMENT).write_text(described(experiment), encoding="utf-8")


def described(experiment: Experiment) -> str:
    """The text of the experiment's file: all that is not as the code has it by itself."""
    settings = experiment.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _whole(path: str) -> bool:
    return Path(path).is_absolute() or "://" in path


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _size(files: dict[str, Path]) -> int:
    return sum(path.stat().st_size for path in files.values())
