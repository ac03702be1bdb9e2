"""What settings are made of: sections, and trees of them that are merged and reached by dotted paths."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from orchestration.problems import ConfigError, Problem


class Section(BaseModel):
    """Settings that belong together.

    Its `extra="forbid"` reaches the plain dataclasses inside it, which else ignore unknown keys.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def merge(base: Any, over: Any) -> Any:
    """`over` on top of `base`: mappings merge, all else (lists too) is replaced.

    A mapping of another `kind` is another thing, and replaced as well.
    """
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    if "kind" in base and base["kind"] != over.get("kind", base["kind"]):
        return over
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


def place(settings: Mapping[str, Any], keys: Sequence[str], value: object) -> dict[str, Any]:
    """`settings` with `value` merged in at `keys`; a ConfigError where a value is in the way."""
    inside: Any = settings
    for end, key in enumerate(keys[:-1], start=1):
        inside = inside.get(key)
        if inside is None:
            break
        if not isinstance(inside, Mapping):
            through = ".".join(keys[:end])
            text = f"{through} is a value ({inside!r}), not a section; set {through} itself"
            raise ConfigError([Problem(tuple(keys), text)])
    for key in reversed(keys):
        value = {key: value}
    return merge(settings, value)


def path_keys(path: str) -> tuple[str, ...]:
    """The keys of a dotted path; a field that is searched is itself a single, dotted key."""
    keys = tuple(path.split("."))
    if keys[:2] == ("search", "space") and len(keys) > 2:
        end = len(keys) - (keys[-1] in ("kind", "values", "low", "high", "when"))
        keys = (*keys[:2], ".".join(keys[2:end]), *keys[end:])
    return keys
