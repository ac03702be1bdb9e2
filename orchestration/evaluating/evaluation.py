"""A trained model measured: on held-out samples and on question suites, with controls and intervals.

RUN/evaluations/STEP-DIGEST/answers/     what the model said, by sample; see `asking`
                            rounds.jsonl     every round, with its question, answer and truth
                            evaluation.json  all figures, as the report and MLflow have them
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from dsvl.converse import Question, answers_of
from dsvl.data.blend import Epoch
from dsvl.data.encode import Encoder
from dsvl.data.sources import BadImage, Images
from dsvl.data.store import Prepared, open_store
from dsvl.data.types import Example, Kind, Part, Turn
from dsvl.evaluate import exchanged
from dsvl.metrics import Objects, images_named
from dsvl.suites import Dialogue, SuiteConfig, dialogues, vocabulary
from dsvl.template import ANSWER, QUESTION
from orchestration.config import Experiment, digest
from orchestration.evaluating.asking import BLANK, Sample, answers_folder, ask, encoder, held_out
from orchestration.evaluating.scores import Row, differences, figures, grouped
from orchestration.planning.memory import GIB, model_bytes
from orchestration.planning.planned import shown
from orchestration.prepare import prepare
from orchestration.problems import Problem, did_you_mean
from orchestration.records.journal import NOTES, Journal, read, sole, write_json, write_whole
from orchestration.records.record import read_if_there
from orchestration.records.results import require_same_data
from orchestration.records.shipping import shipped
from orchestration.trained import Trained
from orchestration.worker import held_out_samples

log = logging.getLogger(__name__)

HELD_OUT = "held out"
"""The name of the set that every evaluation has."""


def evaluate(
    chosen: Trained, *, suites: Sequence[Path] = (), against: Path | None = None
) -> dict[str, Any]:
    """Measure a trained model; what it has answered before is not asked again.

    Args:
        chosen: the model.
        suites: files of questions: YAML that describes a suite, or the questions themselves as `.jsonl` or as
            the original's `.json`.
        against: the folder of a run that has been evaluated, to compare with.

    Returns:
        `checkpoint`, `folder`, and `sets`: by name how many `rounds` and `samples` there are, their
        `figures`, held-out ones also `by` blend, round and images; `against`, their paired differences.

    Raises:
        ValueError: if a suite is not of its format, or has the name of another; if what it is to be compared
            with has not been evaluated; if a GPU cannot hold the model.
        FileNotFoundError: if a file is missing.
    """
    described = {path.stem: read_suite(path) for path in suites}
    if len(described) < len(suites) or HELD_OUT in described:
        raise ValueError(
            f"--suite {' '.join(map(str, suites))}: two files have the same name, or one is called "
            f"{HELD_OUT!r}; rename one"
        )
    other = read_rounds(against) if against else None
    experiment, folder = chosen.experiment, answers_folder(chosen)
    _require_room(experiment)
    prepared, code = open_store(_data(chosen)), encoder(experiment)
    rows: list[Row] = []
    sets: dict[str, Any] = {}
    vocabularies: dict[str, Objects | None] = {}
    with sole(folder):
        epoch = held_out_samples(prepared, experiment)
        rows += _held_out(chosen, epoch, prepared, code, folder)
        sets[HELD_OUT] = _told(rows) | {"by": grouped(rows)}
        for name, (suite, home) in described.items():
            found, faults, objects = _suite(chosen, name, suite, home, prepared, code, folder)
            sets[name] = _told(found, objects) | {"left_out": faults}
            vocabularies[name] = objects
            rows += found
        result: dict[str, Any] = {
            "folder": str(folder),
            "name": experiment.name,
            "run": chosen.folder.name,
            "checkpoint": {"step": chosen.checkpoint.step, "folder": str(chosen.checkpoint.folder)},
            "sets": sets,
        }
        if other is not None:
            compared: dict[str, Any] = {"run": str(against)}
            for name in sets.keys() & {row["set"] for row in other}:
                ours, theirs = (
                    [row for row in some if row["set"] == name] for some in (rows, other)
                )
                compared[name] = differences(ours, theirs, vocabularies.get(name))
            result["against"] = compared
        # Of what nobody said there is no figure: strict JSON has no number for it.
        result = to_jsonable_python(result, inf_nan_mode="null")
        write_whole(folder / "rounds.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_json(folder / "evaluation.json", result)
    _note(chosen, folder, result["sets"])
    return result


def _require_room(experiment: Experiment) -> None:
    need, limit = model_bytes(experiment), experiment.cluster.gpu_memory_gib
    if experiment.cluster.gpus_per_worker and limit is not None and need > limit * GIB:
        raise ValueError(
            f"model.size={experiment.model.size}: a GPU that answers holds the whole model, {shown(need)}, "
            f"but cluster.gpu_memory_gib={limit:g}; evaluate where it fits, or train with "
            "model.quantization=nf4; the training itself, which divides it, records losses and accuracy"
        )


def _note(chosen: Trained, folder: Path, sets: Mapping[str, Any]) -> None:
    """Have what was measured kept with the run's own points in MLflow."""
    values = {
        f"evaluation/{name.replace(' ', '_')}/{figure}": of["value"]
        for name, told in sets.items()
        for figure, of in told["figures"].items()
        if of["value"] is not None
    }
    notes, inside = chosen.folder / NOTES, os.path.relpath(folder, chosen.folder)
    about: dict[str, Any] = {"path": inside, "step": chosen.checkpoint.step, "metrics": values}
    if not any(note.items() >= about.items() for note in read(notes)[0]):  # measured again
        with Journal(notes) as journal:
            journal.evaluation(**about)
    with shipped(chosen.experiment, chosen.root):
        pass


def _data(chosen: Trained) -> Path:
    """The prepared data that a run was held to, made again where they are gone."""
    held = read_if_there(chosen.folder / "data.json")
    folder = Path(held.get("folder", ""))
    manifest = read_if_there(folder / "manifest.json") if held else {}
    if manifest and digest(manifest["files"]) == held["digest"]:
        return folder
    folder = Path(prepare(chosen.experiment)["folder"])
    require_same_data(chosen.experiment, chosen.folder, folder)
    return folder


def read_suite(path: Path) -> tuple[SuiteConfig, Path]:
    """The suite that a file describes or is, and the folder at which its paths start.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it describes none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--suite {path}: no such file")
    if path.suffix not in (".yaml", ".yml"):
        form = "jsonl" if path.suffix in (".jsonl", ".ndjson") else "visualchat"
        return SuiteConfig(format=form, files=(path.name,)), path.parent
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"--suite {path}: is no YAML: {error}") from None
    known = [field.name for field in fields(SuiteConfig)]
    if not isinstance(settings, dict):
        raise ValueError(f"--suite {path}: must describe a suite by {', '.join(known)}")
    told = [
        f"{name}: no such field{did_you_mean(str(name), known)}"
        for name in settings
        if name not in known
    ]
    suite = None
    try:
        suite = TypeAdapter(SuiteConfig).validate_python(settings)
    except ValidationError as error:
        told += [
            str(Problem(each["loc"], each["msg"].removeprefix("Value error, ")))
            for each in error.errors()
        ]
    if told or suite is None:
        raise ValueError("\n".join(f"--suite {path}: {each}" for each in told))
    return suite, path.parent


def read_rounds(run: Path) -> list[Row]:
    """The rounds of the newest evaluation of a run."""
    found = sorted(run.glob("evaluations/*/rounds.jsonl"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"--against {run}: holds no evaluation; run dsvl evaluate {run} first")
    return [json.loads(line) for line in found[-1].read_text(encoding="utf-8").splitlines()]


def _held_out(
    chosen: Trained, epoch: Epoch, prepared: Prepared, code: Encoder, folder: Path
) -> list[Row]:
    blends = list(chosen.experiment.data.all_blends())
    examples = [epoch[index] for index in range(len(epoch))]
    another = exchanged(key for example in examples for key in example.images)
    samples = [
        held_out(example, _ways(example.images, another), image_tokens=prepared.image_tokens)
        for example in examples
    ]
    results = ask(
        chosen,
        {sample.key: sample for sample in samples},
        folder,
        prepared=prepared.folder,
        images=None,
        progress=log.info,
    )
    rows = []
    for index, (example, sample) in enumerate(zip(examples, samples, strict=True)):
        result, blend = results[sample.key], blends[int(epoch.blends[index])]
        for number, row in enumerate(_rounds(example, sample, code)):
            told = {way: result[way][number] for way in sample.scored}
            said = _said(result, number)
            rows.append(
                {"set": HELD_OUT, "sample": sample.key, "blend": blend, **row, **told, **said}
            )
    return rows


def _rounds(example: Example, sample: Sample, code: Encoder) -> Iterator[Row]:
    """What is asked in each round of a held-out sample, and what is true."""
    shown = 0
    asked = zip(sample.questions, answers_of(example), strict=True)
    for number, (question, (start, end)) in enumerate(asked, 1):
        earlier, shown = shown, shown + len(question.images)
        said = code.decode(question.ids[question.kinds == Kind.TEXT].tolist())
        text = said.partition(QUESTION)[2].removesuffix(ANSWER)
        yield {
            "round": number,
            "images": shown,
            "shows": list(question.images),
            "question": text,
            "kind": "said",
            "expected": [code.decode(example.ids[start : end - 1].tolist())],
            "earlier": any(0 < image <= earlier for image in images_named(text)),
        }


def _suite(
    chosen: Trained,
    name: str,
    suite: SuiteConfig,
    home: Path,
    prepared: Prepared,
    code: Encoder,
    folder: Path,
) -> tuple[list[Row], dict[str, str], Objects | None]:
    """The rounds of a suite, what of it could not be asked, and the vocabulary of its objects."""
    asked, root = dialogues(suite, home), home / suite.images
    held, faults, names = Images(root), dict[str, str](), dict[str, str]()
    for dialogue in asked:
        try:
            for image in {
                image for each in dialogue.rounds for image in each.images
            } - names.keys():
                names[image] = hashlib.sha256(held.read(image)).hexdigest()
        except BadImage as bad:
            faults[dialogue.id] = str(bad)
    if len(faults) == len(asked):
        raise ValueError(
            f"--suite {name}: no image of it can be used: {next(iter(faults.values()))}"
        )
    asked = [dialogue for dialogue in asked if dialogue.id not in faults]
    another = exchanged(names.values())
    plain = {dialogue.id: _questions(dialogue, names, code) for dialogue in asked}
    files = {key: image for image, key in names.items()}
    ways: dict[str, dict[str, Sample]] = {}
    for way in _ways((), another):
        ways[way] = {
            dialogue.id: _seen(plain[dialogue.id], files, way, another)
            for dialogue in asked
            if way == "seen" or (suite.controls and any(each.expected for each in dialogue.rounds))
        }
    samples = {sample.key: sample for some in ways.values() for sample in some.values()}
    results = ask(chosen, samples, folder, prepared=prepared.folder, images=root, progress=log.info)
    rows = []
    for dialogue in asked:
        said = {
            way: results[some[dialogue.id].key] for way, some in ways.items() if dialogue.id in some
        }
        if fault := said["seen"].get("fault"):
            faults[dialogue.id] = fault
            continue
        shown = 0
        for number, each in enumerate(dialogue.rounds):
            earlier, shown = shown, shown + len(each.images)
            rows.append(
                {
                    "set": name,
                    "sample": ways["seen"][dialogue.id].key,
                    "id": dialogue.id,
                    "round": number + 1,
                    "images": shown,
                    "question": each.question,
                    "kind": each.kind,
                    "expected": list(each.expected),
                    "group": each.group,
                    "earlier": any(0 < k <= earlier for k in images_named(each.question)),
                    **_said(said["seen"], number),
                    **{
                        f"answer_{way}": _said(said[way], number)["answer"]
                        for way in ("blind", "shuffled")
                        if way in said
                    },
                }
            )
    objects = Objects(vocabulary(home / suite.files[1])) if suite.format == "chair" else None
    return rows, faults, objects


def _questions(dialogue: Dialogue, names: Mapping[str, str], code: Encoder) -> list[Question]:
    """What the rounds of a dialogue put to the model."""
    turns: list[Turn] = []
    questions, shown = [], 0
    for each in dialogue.rounds:
        images = [Part("image", image=shown + k) for k in range(len(each.images))]
        shown += len(images)
        turns.append(Turn("user", (*images, Part("text", text=each.question))))
        ids, kinds = code.prompt(turns)
        questions.append(Question(ids, kinds, tuple(names[image] for image in each.images)))
        turns.append(Turn("assistant", ()))  # of which the next prompt takes nothing
    return questions


def _seen(
    questions: Sequence[Question], files: Mapping[str, str], way: str, another: Mapping[str, str]
) -> Sample:
    """A dialogue with its images seen some way."""
    changed = [
        Question(each.ids, each.kinds, _ways(each.images, another)[way]) for each in questions
    ]
    used = {key for each in changed for key in each.images if key != BLANK}
    return Sample(tuple(changed), {}, {key: files[key] for key in sorted(used)})


def _ways(images: Sequence[str], another: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The keys of images that are seen as they are, as zeros, and as others."""
    return {
        "seen": tuple(images),
        "blind": (BLANK,) * len(images),
        "shuffled": tuple(another[key] for key in images),
    }


def _said(result: Mapping[str, Any], number: int) -> Row:
    """The answer of a round; none where there was no room for it, or a fault."""
    answers = result.get("answers", [])
    if number >= len(answers):
        return {"answer": None}
    text, tokens, ended = answers[number]
    return {"answer": text, "tokens": tokens, "ended": ended}


def _told(rows: Sequence[Row], objects: Objects | None = None) -> dict[str, Any]:
    return {
        "samples": len({row["sample"] for row in rows}),
        "rounds": len(rows),
        "figures": figures(rows, objects),
    }


def render(result: Mapping[str, Any]) -> str:
    """The figures for people, a table a set."""
    lines = [f"{result['run']}, update {result['checkpoint']['step']}: {result['folder']}"]
    for name, told in result["sets"].items():
        lines += ["", f"{name}: {told['rounds']:,} rounds of {told['samples']:,} conversations"]
        if told.get("left_out"):
            lines.append(f"  left out: {len(told['left_out']):,} with images that cannot be used")
        lines += _table(told["figures"])
        for dimension, groups in told.get("by", {}).items():
            for group, some in groups.items():
                shown = ", ".join(
                    f"{key} {_number(some[key]['value'])}" for key in some if key != "rounds"
                )
                lines.append(f"  by {dimension} {group}: {some['rounds']:,} rounds, {shown}")
    for name, told in result.get("against", {}).items():
        if name != "run":
            lines += ["", f"{name}, less {result['against']['run']}: {told['rounds']:,} rounds"]
            lines += _table({key: of for key, of in told.items() if key != "rounds"})
    return "\n".join(lines)


def _table(told: Mapping[str, Mapping[str, float]]) -> list[str]:
    width = max(map(len, told), default=0)
    return [
        f"  {name:<{width}}  {_number(of['value']):>9}  [{_number(of['low'])}, {_number(of['high'])}]"
        for name, of in told.items()
    ]


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4f}"
