"""Whether every trial of a search would be an experiment."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from graphlib import CycleError
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import to_jsonable_python

from dsvl.config import ModelConfig
from orchestration.domains import Domain, Values
from orchestration.problems import Problem, explain, fields_at, unknown_field
from orchestration.settings import path_keys, place
from orchestration.space import EPOCHS, SearchConfig

WHAT = ("model", "data", "optim", "train")
"""The sections that say what is trained; the others say where, and how it is watched."""


def search_problems(
    schema: type[BaseModel], search: SearchConfig, sections: Mapping[str, Any]
) -> list[Problem]:
    """Compose every probed value into the sections that are legal themselves, and then whole trials."""
    base = to_jsonable_python(dict(sections))
    broken = schema.model_fields.keys() - sections.keys() - {"search"}
    told: list[Problem] = []

    def compose(settings: dict[str, Any]) -> list[Problem]:
        try:
            schema.model_validate(settings, context={"workers": "search.workers"})
        except ValidationError as error:
            found = explain(error, schema)
            return [p for p in found if p.keys[0] not in broken and p not in told]
        return []

    told = compose(base)  # what the experiment breaks without any search
    if "cluster" in base:
        base = place(base, ("cluster",), {"workers": search.workers, "min_workers": None})
    problems = [Problem(("search", "workers"), str(problem)) for problem in compose(base)]
    if problems:
        return problems
    try:
        fields = search.order
    except CycleError as error:
        circle = " needs ".join(error.args[1][::-1])
        return [Problem(("search", "space"), f"{circle}; leave one `when` of them out")]
    for path in fields:
        domain = search.space[path]
        keys, where = path_keys(path), ("search", "space", path)
        unmet = _never_holds(search, path)
        if (unknown := unknown_field(schema, keys)) is not None:
            problems.append(Problem(where, unknown))
        elif _decides_data(keys, domain, sections.get("model")):
            text = "decides the prepared data, which all trials share; give each its own experiment"
            problems.append(Problem(where, text))
        elif keys[0] not in WHAT:
            text = f"a search varies what is trained: fields of {', '.join(WHAT)}"
            problems.append(Problem(where, text))
        elif fields_at(schema, keys):
            problems.append(Problem(where, "is a section; name one of its fields"))
        elif unmet:
            problems.append(Problem((*where, "when"), unmet))
        elif keys[0] not in broken:
            around = _under_its_condition(search, path, base)
            problems += [
                Problem(where, problem.text if problem.keys == keys else f"{value!r}: {problem}")
                for value in domain.probes()
                for problem in compose(place(around, keys, value))
            ]
    return problems if problems or broken else _together(search, base, compose)


def _together(
    search: SearchConfig,
    base: dict[str, Any],
    compose: Callable[[dict[str, Any]], list[Problem]],
) -> list[Problem]:
    """What is wrong with trials of values that are legal one by one, where trials are known beforehand."""
    if search.across or search.sampler != "random":
        return []
    found: dict[str, Problem] = {}
    listed = [path for path, domain in search.space.items() if isinstance(domain, Values)]
    for values, _ in search.shapes(listed):
        trial = base
        for path, value in values.items():
            trial = place(trial, path_keys(path), value)
        shown = ", ".join(f"{path}={value}" for path, value in values.items())
        for problem in compose(trial):
            text = f"with {shown}: {problem}"
            found.setdefault(str(problem), Problem(("search", "space"), text))
    return list(found.values())


def _never_holds(search: SearchConfig, path: str) -> str | None:
    """Why no trial has a field that is searched under a condition; None where some have."""
    for other, value in search.space[path].when.items():
        if other not in search.space:
            return f"{other} is not searched; search it as well, or leave this out"
        domain = search.space[other]
        if not (isinstance(domain, Values) and domain.holds(value)):
            values = ", ".join(map(str, domain.values)) if isinstance(domain, Values) else "numbers"
            return f"{other} is never {value!r}; it is searched over {values}"
    return None


def _under_its_condition(
    search: SearchConfig, path: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Settings with which a field is searched."""
    for other, value in search.space[path].when.items():
        settings = place(_under_its_condition(search, other, settings), path_keys(other), value)
    return settings


def across_problems(search: SearchConfig, sections: Mapping[str, Any]) -> list[Problem]:
    """Why an experiment is none that a search across sizes could mend, or none whose trials branch."""
    problems = []
    model, optim, train = (sections.get(name) for name in ("model", "optim", "train"))
    target, epochs = search.space["model.size"].probes()[-1], search.space[EPOCHS].probes()
    if model and model.size != target:
        text = f"{model.size!r} must be the last of search.space.model.size, {target!r}"
        problems.append(Problem(("model", "size"), text))
    if train and train.epochs not in epochs:
        text = f"{train.epochs} must be one of search.space.{EPOCHS}, {list(epochs)}, to be judged"
        problems.append(Problem(("train", "epochs"), text))
    fixed = {
        keys[1]: v for p, v in search.constants.items() if (keys := path_keys(p))[0] == "optim"
    }
    if optim and not replace(optim, **fixed).branching:
        text = (
            "a search across sizes shares trunks: give optim.schedule wsd, and optim.warmup_steps"
        )
        problems.append(Problem(("search", "space"), f"{text}, as grids of one value"))
    return problems


def _decides_data(keys: tuple[str, ...], domain: Domain, model: ModelConfig | None) -> bool:
    """Whether trials that differ in a field could differ in their prepared data."""
    if keys == ("model", "projection") and model is not None:
        others = (replace(model, projection=value) for value in domain.probes())
        return any(other.image_tokens != model.image_tokens for other in others)
    deciding = {("model", name) for name in ("vision", "projection_queries", "template")}
    return keys[0] == "data" or keys[:2] in deciding
