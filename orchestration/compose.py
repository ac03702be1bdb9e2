"""From YAML files to an experiment: `extends`, merge, overrides, and every problem with its line.

`extends:` names one file or a list of them, relative to the file itself. They are merged from left
to right, then the file goes on top, then overrides `section.field=value`. Mappings merge; lists are
replaced. There is no other way to compose, so anchors and aliases are refused.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from orchestration.config import Experiment, validated
from orchestration.problems import MISSING, ConfigError, Keys, Problem
from orchestration.settings import merge, path_keys, place

OVERRIDE = "override"
"""How the origin of a value begins that the command line set."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """The experiment of a file with overrides on top.

    A ConfigError names every problem of the file, of those it extends and of the overrides.
    """
    composition = _Composition()
    tree = composition.file(os.path.normpath(path), asked_by="", chain=())
    if composition.incomplete and not tree.settings:
        raise ConfigError(composition.problems)
    tree.origins.setdefault((), f"{os.path.normpath(path)}:1")
    for override in overrides:
        tree = composition.override(tree, override)
    problems = composition.problems
    try:
        experiment = validated(tree.settings)
    except ConfigError as error:
        raise ConfigError(
            problems
            + [
                replace(problem, origin=_origin(problem.keys, tree.origins))
                for problem in error.problems
                # what an unreadable file would have set is not missing
                if not (composition.incomplete and problem.text == MISSING)
            ]
        ) from None
    if problems:
        raise ConfigError(problems)
    return experiment


@dataclass
class _Tree:
    """Settings, and where each of them came from."""

    settings: dict[str, Any] = field(default_factory=dict)
    origins: dict[Keys, str] = field(default_factory=dict)

    def under(self, over: "_Tree") -> "_Tree":
        """This tree with another on top."""
        kept = {
            keys: origin
            for keys, origin in self.origins.items()
            if not any(isinstance(key, int) for key in keys)  # positions in lists that may be gone
            or keys[:-1] not in over.origins
        }
        return _Tree(merge(self.settings, over.settings), {**kept, **over.origins})


@dataclass
class _Composition:
    """The problems met on the way."""

    problems: list[Problem] = field(default_factory=list)
    incomplete: bool = False
    """A file could not be read, so more may be missing than is."""

    def file(self, path: str, asked_by: str, chain: tuple[str, ...]) -> _Tree:
        """The settings of a file on top of those it extends."""
        real = os.path.realpath(path)
        if real in chain:
            cycle = [os.path.relpath(step) for step in (*chain[chain.index(real) :], real)]
            return self._unreadable(
                asked_by, f"extends in a circle: {' -> '.join(cycle)}; remove one of them"
            )
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            return self._unreadable(asked_by, f"no file {path!r}{_near_file(path)}")
        except IsADirectoryError:
            held = _near_file(os.path.join(path, "?"))
            return self._unreadable(asked_by, f"{path!r} is a folder, not a YAML file{held}")
        except (OSError, UnicodeDecodeError) as error:
            return self._unreadable(asked_by, f"cannot read {path!r}: {error}")
        tree = self._parse(path, text)
        extends = tree.settings.pop("extends", [])
        names = [extends] if isinstance(extends, str) else extends
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            origin = tree.origins["extends",]
            self.problems.append(
                Problem(("extends",), f"must be a path or a list of paths, not {extends!r}", origin)
            )
            names, self.incomplete = [], True
        below = _Tree()
        for position, name in enumerate(names):
            origin = _origin(("extends", position), tree.origins)
            parent = os.path.normpath(os.path.join(os.path.dirname(path), name))
            below = below.under(self.file(parent, asked_by=origin, chain=(*chain, real)))
        return below.under(tree)

    def override(self, tree: _Tree, text: str) -> _Tree:
        """The settings with `section.field=value` on top."""
        origin = f"{OVERRIDE} '{text}'"
        path, equals, value_text = text.partition("=")
        keys = path_keys(path.strip())
        if not equals or not all(keys):
            self.problems.append(Problem((), "must read section.field=value", origin))
            return tree
        try:
            parser = _Parser(origin)
            value = parser.parse(value_text)
            settings = place(tree.settings, keys, value)
        except ConfigError as error:
            self.problems += [replace(problem, origin=origin) for problem in error.problems]
            return tree
        self.problems += [
            replace(problem, keys=keys + problem.keys, origin=origin) for problem in parser.problems
        ]
        sections = {keys[:end] for end in range(1, len(keys))} - tree.origins.keys()
        within = {known: origin for known in sections | {keys + inner for inner in parser.origins}}
        within[keys] = origin
        return replace(tree.under(_Tree(origins=within)), settings=settings)

    def _parse(self, path: str, text: str) -> _Tree:
        parser = _Parser(path)
        try:
            settings = parser.parse(text)
        except ConfigError as error:
            self.problems += error.problems
            self.incomplete = True
            return _Tree()
        self.problems += parser.problems
        if settings is None:
            settings = {}
        if not isinstance(settings, dict):
            kind = "a list" if isinstance(settings, list) else repr(settings)
            return self._unreadable(f"{path}:1", f"must hold a mapping of sections, not {kind}")
        return _Tree(settings, parser.origins)

    def _unreadable(self, origin: str, text: str) -> _Tree:
        self.problems.append(Problem((), text, origin))
        self.incomplete = True
        return _Tree()


OLD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)")
"""What YAML 1.1 takes for octal or for hours and minutes, and hardly anybody means so."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases, with numbers such as 1e-4 (to YAML 1.1 that is text)."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(
                problem="aliases are not read; use extends", problem_mark=mark
            )
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


class _Parser:
    """Reads one YAML text, noting the line of every value and every key that is set twice."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.origins: dict[Keys, str] = {}
        self.problems: list[Problem] = []

    def parse(self, text: str) -> Any:
        """The values of the text; a ConfigError where it is not YAML."""
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._value(loader, node, ())
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            origin = self._at(mark.line) if mark else self.name
            raise ConfigError([Problem((), f"not YAML: {error.problem}", origin)]) from None
        except (yaml.YAMLError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError([Problem((), f"not YAML: {reason}", self.name)]) from None

    def _at(self, line: int) -> str:
        return f"{self.name}:{line + 1}"

    def _value(self, loader: _Loader, node: yaml.Node, keys: Keys) -> Any:
        self.origins.setdefault(keys, self._at(node.start_mark.line))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, keys)
        if isinstance(node, yaml.SequenceNode):
            return [
                self._value(loader, item, (*keys, position))
                for position, item in enumerate(node.value)
            ]
        try:
            value = loader.construct_object(node)
            if node.tag.endswith((":int", ":float")) and OLD_NUMBER.fullmatch(node.value):
                raise ValueError(f"YAML 1.1 takes it for {value}, so write that if it is meant")
            return value
        except (
            ValueError,
            LookupError,
            AttributeError,
        ) as error:  # of 2024-13-45, or `!!bool maybe`
            text = f"{node.value!r} cannot be read: {error}; put it in quotes if it is text"
            self.problems.append(Problem(keys, text, self._at(node.start_mark.line)))
            return node.value

    def _mapping(self, loader: _Loader, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line
            key = key_node.value
            if not isinstance(key, str) or key_node.tag != "tag:yaml.org,2002:str":
                shown = key if isinstance(key, str) else "a list or mapping"
                text = f"the key {shown} must be text; put it in quotes"
                self.problems.append(Problem(keys, text, self._at(line)))
            elif key in values:
                text = f"is set twice, first in line {lines[key] + 1}; keep one"
                self.problems.append(Problem((*keys, key), text, self._at(line)))
            else:
                lines[key] = line
                self.origins[(*keys, key)] = self._at(line)
                values[key] = self._value(loader, value_node, (*keys, key))
        return values


def _origin(keys: Keys, origins: dict[Keys, str]) -> str:
    """Where the value at `keys`, or last a part of it, was set; else the section around it."""
    within = [origins[known] for known in origins if known[: len(keys)] == keys]
    overrides = [origin for origin in within if origin.startswith(OVERRIDE)]
    if keys and overrides:
        return overrides[-1]
    return next(
        (origins[keys[:end]] for end in range(len(keys), -1, -1) if keys[:end] in origins), ""
    )


def _near_file(path: str) -> str:
    folder = Path(path).parent
    names = sorted(entry.stem for entry in folder.glob("*.yaml"))
    near = get_close_matches(Path(path).stem, names, 1)
    if near:
        return f"; did you mean '{folder / near[0]}.yaml'?"
    return f"; {folder} holds {', '.join(f'{name}.yaml' for name in names)}" if names else ""
