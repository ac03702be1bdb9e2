"""Question suites: what is asked of a model beside held-out data, in the formats that such sets come in.

A suite is files of one format and a folder of images. `FORMATS` has a parser for each format.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit

from dsvl.config import require
from dsvl.data.readers.captions import LONG, SHORT
from dsvl.metrics import Objects

Kind = Literal["open", "answer", "people", "caption", "yes_no", "choice", "objects"]
"""How an answer is measured: not at all; by whether it is one of those expected; by how many people agree;
as a caption; as a yes or no; as a letter; by the objects that it names."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A round of a suite."""

    question: str
    images: tuple[str, ...] = ()
    """What those that it shows are called, or `data:` URIs."""
    kind: Kind = "open"
    expected: tuple[str, ...] = ()
    group: str = ""
    """Rewordings of one question share it."""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Rounds that follow one another."""

    id: str
    rounds: tuple[Asked, ...]


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """A suite; relative paths start at the folder of the file that describes it."""

    format: str
    """One of `FORMATS`."""
    files: tuple[str, ...]
    """What the format is made of, in its order."""
    images: str = "."
    """The folder or archive that holds the images; nothing outside it is opened."""
    image_name: str = "{image}"
    """What an image is called in there, as `COCO_val2014_{image:0>12}.jpg`."""
    prompt: str = "{question}"
    """How a question is put, as `{question} Answer with a word or phrase.`"""
    samples: int | None = None
    """How many are asked, from the first; all when empty."""
    controls: bool = True
    """Ask again with images zeroed, and with those of others, where an answer is expected."""

    def __post_init__(self) -> None:
        rule = f"must be one of {', '.join(FORMATS)}"
        require(self.format in FORMATS, "format", self.format, rule)
        require(len(self.files) > 0, "files", self.files, "must name at least one file")
        for name, field in (("image_name", "image"), ("prompt", "question")):
            text = getattr(self, name)
            try:
                found = text.format(**{field: "?"})
            except (LookupError, ValueError):
                found = ""
            require("?" in found, name, text, f"must hold {{{field}}} and no other field")
        rule = "must be positive"
        require(self.samples is None or self.samples > 0, "samples", self.samples, rule)


def dialogues(suite: SuiteConfig, folder: Path) -> list[Dialogue]:
    """Read a suite whose paths start at a folder.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if one is not of the format; file and record are named.
    """
    paths = [folder / file for file in suite.files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file of the suite")
    found: list[Dialogue] = []
    names: Counter[str] = Counter()
    try:
        for dialogue in FORMATS[suite.format](paths):
            names[dialogue.id] += 1
            if (number := names[dialogue.id]) > 1:  # what is asked and said is kept by name
                dialogue = replace(dialogue, id=f"{dialogue.id}#{number}")
            found.append(_put(dialogue, suite))
            if len(found) == suite.samples:
                break
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{paths[0]}: record {len(found)} is not of format {suite.format} ({what}); name its own format "
            f"({', '.join(FORMATS)}), or mend the record"
        ) from error
    if not found:
        raise ValueError(f"{paths[0]}: holds no question of format {suite.format}; name another")
    return found


def _put(dialogue: Dialogue, suite: SuiteConfig) -> Dialogue:
    """With questions and images as the suite wants them put and called."""
    rounds = tuple(
        Asked(
            suite.prompt.format(question=asked.question.replace("\n", " ")),
            tuple(
                name if name.startswith("data:") else suite.image_name.format(image=name)
                for name in asked.images
            ),
            asked.kind,
            asked.expected,
            asked.group,
        )
        for asked in dialogue.rounds
    )
    return Dialogue(dialogue.id, rounds)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8-sig").split(
        "\n"
    ):  # a text may hold other ends of lines
        if line.strip():
            yield json.loads(line)


def _one(name: object, *asked: Any) -> Dialogue:
    return Dialogue(str(name), (Asked(*asked),))


def _visualchat(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """The original's: {name: [[question, "image image"], [question], ...]}, without answers."""
    for name, rounds in _json(paths[0]).items():
        asked = [Asked(str(each[0]), tuple(" ".join(each[1:2]).split())) for each in rounds]
        yield Dialogue(name, tuple(asked))


def _jsonl(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """A line a conversation: {"id", "rounds": [{"question", "images", "answers", "kind", "group"}]}.

    Or the fields of its only round at once; `answer` is one of `answers`, `image` one of `images`. With
    answers, the kind is `answer` unless it is given.
    """
    for number, record in enumerate(_lines(paths[0])):
        rounds = record.get("rounds", [record])
        asked = []
        for each in rounds:
            if wrong := _misspelt(each.keys() | (record.keys() - {"id", "rounds"})):
                raise ValueError("no field {!r}; did you mean {!r}?".format(*wrong))
            images, expected = _several(each, "image"), _several(each, "answer")
            kind = each.get("kind", "answer" if expected else "open")
            if kind not in ("open", "answer", "people", "caption", "yes_no", "choice"):
                raise ValueError(f"kind {kind!r} is none of a line's")
            asked.append(
                Asked(str(each["question"]), images, kind, expected, each.get("group", ""))
            )
        yield Dialogue(str(record.get("id", number)), tuple(asked))


def _misspelt(names: Collection[str]) -> tuple[str, str] | None:
    """A field that is near to one of a round's that is not there, and that."""
    fields = ({"question"}, {"image", "images"}, {"answer", "answers"}, {"kind"}, {"group"})
    missing = set().union(*(field for field in fields if not field & set(names)))
    near = {name: get_close_matches(name, missing, 1, cutoff=0.75) for name in sorted(names)}
    return next(((name, found[0]) for name, found in near.items() if found), None)


def _several(record: Mapping[str, Any], name: str) -> tuple[str, ...]:
    found = record.get(f"{name}s", record.get(name, ()))
    return tuple(map(str, [found] if isinstance(found, str | int) else found))


def _vqav2(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """VQAv2: the file of questions, and that of annotations with the answers of ten people."""
    said = {each["question_id"]: each["answers"] for each in _json(paths[1])["annotations"]}
    for each in _json(paths[0])["questions"]:
        people = tuple(answer["answer"] for answer in said[each["question_id"]])
        image = (str(each["image_id"]),)
        yield _one(each["question_id"], each["question"], image, "people", people)


def _aokvqa(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """A-OKVQA, its direct answers; those that are hard to answer directly are left out, as in its score."""
    for each in _json(paths[0]):
        if not each.get("difficult_direct_answer"):
            image, people = (str(each["image_id"]),), tuple(each["direct_answers"])
            yield _one(each["question_id"], each["question"], image, "people", people)


def _ocr_vqa(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """OCR-VQA: the questions about covers of the test split."""
    for name, cover in _json(paths[0]).items():
        if cover["split"] == 3:
            image = (name + PurePosixPath(urlsplit(cover["imageURL"]).path).suffix,)
            pairs = zip(cover["questions"], cover["answers"], strict=True)
            for number, (question, answer) in enumerate(pairs):
                yield _one(f"{name}/{number}", question, image, "answer", (str(answer),))


def _coco_caption(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """COCO captions: Karpathy's test split, or a file of annotations as COCO hands it out."""
    document = _json(paths[0])
    if "annotations" not in document:
        for each in document["images"]:
            if each["split"] == "test":
                said = tuple(sentence["raw"] for sentence in each["sentences"])
                yield _one(each["filename"], SHORT[0], (each["filename"],), "caption", said)
        return
    captions: dict[int, list[str]] = {}
    for each in document["annotations"]:
        captions.setdefault(each["image_id"], []).append(each["caption"])
    for each in document["images"]:
        if each["id"] in captions:
            image = (each["file_name"],)
            yield _one(each["id"], SHORT[0], image, "caption", tuple(captions[each["id"]]))


def _pope(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """POPE: lines of {"question_id", "image", "text", "label"}."""
    for each in _lines(paths[0]):
        label = "no" if each["label"] == "no" else "yes"
        yield _one(each["question_id"], each["text"], (each["image"],), "yes_no", (label,))


def _gqa(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """GQA: {id: {"imageId", "question", "answer"}}."""
    for name, each in _json(paths[0]).items():
        yield _one(name, each["question"], (each["imageId"],), "answer", (each["answer"],))


def _mmbench(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """MMBench and its kin: a table of index, image in base64, question, hint, A to F and answer, a letter."""
    csv.field_size_limit(1 << 28)
    with paths[0].open(encoding="utf-8-sig", newline="") as file:
        for each in csv.DictReader(file, delimiter="\t"):
            options = {letter: each[letter] for letter in "ABCDEF" if each.get(letter)}
            listed = " ".join(f"{letter}. {text}" for letter, text in options.items())
            hint = each.get("hint") or ""
            question = f"{hint} {each['question']} {listed} Answer with the letter.".strip()
            image = ("data:image/jpeg;base64," + each["image"],)
            # The first is the right one; all that might be chosen follow.
            expected = (each["answer"], *options)
            yield _one(each["index"], question, image, "choice", expected)


def _chair(paths: Sequence[Path]) -> Iterator[Dialogue]:
    """CHAIR on COCO: instances, synonyms, and captions whose objects count as seen as well."""
    document, objects = _json(paths[0]), Objects(vocabulary(paths[1]))
    names = {each["id"]: each["name"] for each in document["categories"]}
    there: dict[int, set[str]] = {each["id"]: set() for each in document["images"]}
    for each in document["annotations"]:
        there[each["image_id"]].update(objects.named(names[each["category_id"]]))
    for each in _json(paths[2])["annotations"] if len(paths) > 2 else ():
        there[each["image_id"]].update(objects.named(each["caption"]))
    for each in document["images"]:
        image, seen = (each["file_name"],), tuple(sorted(there[each["id"]]))
        yield _one(each["id"], LONG[0], image, "objects", seen)


def vocabulary(path: Path) -> dict[str, list[str]]:
    """Object -> what it may be called, from lines of `object, synonym, synonym`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [[word.strip() for word in line.split(",")] for line in lines if line.strip()]
    return {row[0]: row for row in rows}


FORMATS: dict[str, Callable[[Sequence[Path]], Iterator[Dialogue]]] = {
    "visualchat": _visualchat,
    "jsonl": _jsonl,
    "vqav2": _vqav2,
    "aokvqa": _aokvqa,
    "ocr_vqa": _ocr_vqa,
    "coco_caption": _coco_caption,
    "pope": _pope,
    "gqa": _gqa,
    "mmbench": _mmbench,
    "chair": _chair,
}
