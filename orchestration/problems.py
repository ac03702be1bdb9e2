"""What is wrong with a configuration: where it stands, the rule and the remedy, a line each."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from difflib import get_close_matches
from opcode import opmap
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Keys = tuple[str | int, ...]
"""The way to a value: names of sections and fields, and positions in lists."""

MISSING = "is missing; set it"
SECRET = r"(?i:api_?key|token|password|secret)"
"""How names of fields end whose values are secrets."""
ANY = "*"
"""Stands for every key of a mapping whose keys the user chooses."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    keys: Keys
    text: str
    origin: str = ""
    """`FILE:LINE` or the override that the value came from."""

    def __str__(self) -> str:
        line = ": ".join(part for part in (self.origin, dotted(self.keys), self.text) if part)
        line = re.sub(rf"({SECRET}=)[^'\s&]+", r"\1***", line)  # a secret is never repeated
        return re.sub(r"(://[^/\s:@]*):[^/\s@]*@", r"\1:***@", line)


class ConfigError(ValueError):
    """Everything that is wrong with a configuration; its text has one line a problem."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def dotted(keys: Iterable[str | int]) -> str:
    """`section.field`, as people write it."""
    return ".".join(map(str, keys))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something known is near, else nothing."""
    near = get_close_matches(name, list(known), 1)
    return f"; did you mean '{near[0]}'?" if near else ""


def raised_by_us(error: ValueError) -> bool:
    """Whether the project refused a request: raised this itself.

    A library's ValueError tells of failed work, and one of Python's own, as `zip` raises, of our mistake.
    """
    last = error.__traceback__
    assert last is not None, "it was raised"
    while last.tb_next:
        last = last.tb_next
    code, package = last.tb_frame.f_code.co_code, last.tb_frame.f_globals.get("__package__")
    ours = (package or "").partition(".")[0] in (
        "dsvl",
        "orchestration",
    )  # a string's code has none
    return ours and code[last.tb_lasti] == opmap["RAISE_VARARGS"]


def harmless(text: str) -> str:
    """The text without what a terminal would obey or cannot show: data may hold escape sequences."""
    return "".join(
        letter
        if letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs")
        else ascii(letter)[1:-1]
        for letter in text
    )


def fields_at(root: type, keys: Sequence[str | int]) -> dict[str, Any]:
    """Fields and their types of the section at `keys`, none where it is no section of `root`."""
    fields = _fields(root)
    for key in keys:
        annotation = fields.get(str(key), fields.get(ANY))
        if annotation is None:
            return {}
        fields = _fields(annotation)
    return fields


def unknown_field(root: type, keys: Sequence[str | int]) -> str | None:
    """What to tell about a path that leads to no field of `root`; None where it does."""
    for end, key in enumerate(keys):
        fields = fields_at(root, keys[:end])
        if key not in fields and ANY not in fields:
            return _no_such_field(root, tuple(keys[:end]), str(key), fields)
    return None


def explain(error: ValidationError, root: type[BaseModel]) -> list[Problem]:
    """The problems behind a validation error of `root`, in the words of this project."""
    return [problem for details in error.errors() for problem in _explain(details, root)]


def _explain(details: ErrorDetails, root: type[BaseModel]) -> Iterator[Problem]:
    *section, name = details["loc"]
    section = _without_tags(tuple(section), root)
    keys = _without_tags((*section, name), root)
    text, value = details["msg"], details["input"]
    match details["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            text = _no_such_field(root, section, str(name), fields_at(root, section))
            yield Problem((*section, name), text)
        case "missing":
            yield Problem(keys, MISSING)
        case "dataclass_type" | "model_type" | "model_attributes_type" | "dict_type":
            yield Problem(keys, f"must be a mapping of fields, not {_shown(value)}")
        case "value_error":
            cause = details.get("ctx", {})["error"]
            if isinstance(cause, ConfigError):
                yield from cause.problems
            else:
                yield _broken_rule(keys, str(cause), root)
        case "union_tag_not_found":
            kinds = details.get("ctx", {})["discriminator"].strip("'")
            yield Problem((*keys, kinds), MISSING)
        case "literal_error" | "union_tag_invalid":
            context = details.get("ctx", {})
            expected = context.get("expected", context.get("expected_tags", ""))
            chosen = context.get("tag", value)
            near = did_you_mean(str(chosen), re.findall(r"'([^']*)'", expected))
            yield Problem(keys, f"{_shown(chosen)} must be one of {expected}{near}")
        case _:
            rule = re.sub(r"^(Input|\w+) should ", "must ", text).replace(" after validation", "")
            rule = rule.replace("a valid tuple", "a list, as [a, b]")
            yield Problem(keys, f"{_shown(value)} {rule}")


def _broken_rule(keys: Keys, text: str, root: type) -> Problem:
    """A rule of a section names its field as `field=value: must ...`: point at the field."""
    name, _, rest = text.partition("=")
    field = (*keys, *name.split("."))
    if rest and unknown_field(root, field) is None:
        return Problem(field, rest.replace(": must", " must", 1))
    return Problem(keys, text)


def _no_such_field(root: type, section: Keys, name: str, fields: Mapping[str, Any]) -> str:
    near = get_close_matches(name, list(fields), 1)
    if near:
        return f"no such field; did you mean '{dotted((*section, near[0]))}'?"
    elsewhere = [path for path in _paths(root) if path.rpartition(".")[2] == name]
    if elsewhere:
        return f"no such field; did you mean {' or '.join(map(repr, elsewhere))}?"
    return f"no such field; the fields here are {', '.join(fields) or 'none'}"


def _without_tags(location: Keys, root: type) -> Keys:
    """Pydantic names the chosen member of a union in the location; people did not write it."""
    keys: Keys = ()
    for key in location:
        fields = fields_at(root, keys)
        keys += (key,) if key in fields or ANY in fields or not fields else ()
    return keys


def _paths(root: type, prefix: str = "") -> Iterator[str]:
    for name, annotation in _fields(root).items():
        if name != ANY:
            yield prefix + name
            yield from _paths(annotation, f"{prefix}{name}.")


def _fields(annotation: Any) -> dict[str, Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _fields(arguments[0])
    if origin in (Union, UnionType):
        return {name: field for member in arguments for name, field in _fields(member).items()}
    if origin is dict:
        return {ANY: arguments[1]}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: field.annotation for name, field in annotation.model_fields.items()}
    return get_type_hints(annotation) if is_dataclass(annotation) else {}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
