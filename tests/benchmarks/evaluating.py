"""Answers to 1,000 chats: in batches that go on from round to round, against the original's procedure.

    dsvl train configs/experiment/quickstart.yaml
    python -m tests.benchmarks.evaluating runs/quickstart --data runs/evaluating

The original answers one chat at a time, and each round reads the whole dialogue and all images anew. Both
are greedy, on one model and one thread; processor time, in turns over parts of the chats. What is compared
must be equal: the answers of all rounds.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from dsvl import pretrained
from dsvl.cache import ImageStore
from dsvl.converse import Question, converse, questions_of
from dsvl.data.collate import collate
from dsvl.data.encode import Encoder
from dsvl.data.store import Examples, Prepared, open_store
from dsvl.data.types import IGNORED, Example, Kind
from dsvl.digits import chats
from dsvl.generate import greedy
from dsvl.model import VisualChat
from orchestration.evaluating.asking import encoder
from orchestration.prepare import prepare
from orchestration.records.results import experiment_of
from orchestration.trained import choose
from tests.benchmarks.case import ORIGINAL, OURS
from tests.benchmarks.measure import Figures, once, ratios, spread

CPU = torch.device("cpu")
TARGET = 4.0
"""How many times faster than the original ours has to be."""
NEW_TOKENS = 64
Answers = list[list[tuple[int, ...]]]
Way = Callable[[Sequence[Sequence[Question]]], Answers]


def as_the_original(
    model: VisualChat,
    code: Encoder,
    conversations: Sequence[Sequence[Question]],
    pixels: Callable[[str], np.ndarray],
) -> Answers:
    """One chat at a time; each round reads all of it anew."""
    answers: Answers = []
    for questions in conversations:
        said: list[tuple[int, ...]] = []
        ids, kinds = np.zeros(0, np.int32), np.zeros(0, np.int8)
        images: tuple[str, ...] = ()
        for question in questions:
            ids = np.concatenate([ids, question.ids])
            kinds = np.concatenate([kinds, question.kinds])
            images += question.images
            batch = collate(
                [Example("chat", ids, np.full_like(ids, IGNORED), kinds, images)],
                pixels=pixels,
                image_tokens=code.image_tokens,
                pad_id=code.pad_id,
            )
            (written,) = greedy(model, batch, end=code.end, max_new_tokens=NEW_TOKENS)
            said.append(tuple(written))
            new = np.array([*written, code.end], np.int32)
            ids = np.concatenate([ids, new])
            kinds = np.concatenate([kinds, np.full(len(new), Kind.TEXT, np.int8)])
        answers.append(said)
    return answers


def in_batches(
    model: VisualChat,
    code: Encoder,
    conversations: Sequence[Sequence[Question]],
    pixels: Callable[[str], np.ndarray],
    *,
    batch: int,
) -> Answers:
    """As `dsvl evaluate` asks them: alike ones together, and nothing is read twice."""
    order = sorted(
        range(len(conversations)),
        key=lambda n: (len(conversations[n]), sum(len(q.ids) for q in conversations[n])),
    )
    store, answers = ImageStore(limit_bytes=2**30), dict[int, list[tuple[int, ...]]]()
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        said = converse(
            model,
            code,
            [conversations[n] for n in some],
            pixels=pixels,
            max_new_tokens=NEW_TOKENS,
            device=CPU,
            store=store,
        )
        answers |= {n: [a.ids for a in of_one] for n, of_one in zip(some, said, strict=True)}
    return [answers[n] for n in range(len(conversations))]


def asked(examples: Examples, prepared: Prepared, count: int) -> list[list[Question]]:
    """What the first conversations ask."""
    if len(examples) < count:
        raise ValueError(f"{count} chats: only {len(examples)} are held out; write more of them")
    tokens = prepared.image_tokens
    return [questions_of(examples[n], image_tokens=tokens) for n in range(count)]


def timed(way: Way, some: Sequence[Sequence[Question]]) -> tuple[Answers, float, float]:
    """The answers, and the seconds of processor and clock that they took."""
    answers: Answers = []
    seconds, wall = once(lambda: answers.extend(way(some)), CPU)
    return answers, seconds, wall


def measure(run: Path, data: Path | None, *, count: int, parts: int) -> dict:
    """Both ways over so many chats that the run holds out, or of digits written to `data`, part by part."""
    torch.set_num_threads(1)
    chosen, experiment = choose(run), experiment_of(run)
    if data:
        if not (data / "digits").exists():
            chats.write(data / "digits", train=64, evaluation=count)
        moved = {"storage.data": str(data), "storage.path": str(data / "runs")}
        experiment = experiment.with_overrides(moved)
    prepared = open_store(prepare(experiment)["folder"])
    model = pretrained.load(chosen.checkpoint.folder, precision="fp32").eval()
    code, batch = encoder(experiment), experiment.evaluation.batch
    conversations = asked(prepared.eval, prepared, count)
    ways: dict[str, Way] = {
        ORIGINAL: lambda some: as_the_original(model, code, some, prepared.pixels),
        OURS: lambda some: in_batches(model, code, some, prepared.pixels, batch=batch),
    }
    figures = {name: Figures() for name in ways}
    equal = rounds = 0
    for way in ways.values():
        way(conversations[:4])  # warms up
    for part in range(parts):
        found = {name: timed(way, conversations[part::parts]) for name, way in ways.items()}
        for name, (_, seconds, wall) in found.items():
            figures[name].seconds.append(seconds)
            figures[name].wall.append(wall)
        pairs = [
            pair
            for one, other in zip(found[ORIGINAL][0], found[OURS][0], strict=True)
            for pair in zip(one, other, strict=True)
        ]
        equal, rounds = equal + sum(a == b for a, b in pairs), rounds + len(pairs)
    middle, least, most = spread(ratios(figures[ORIGINAL], figures[OURS]))
    return {
        "chats": count,
        "rounds": rounds,
        "equal_answers": equal,
        "batch": batch,
        "seconds": {name: sum(each.seconds) for name, each in figures.items()},
        "parts": {name: each.seconds for name, each in figures.items()},
        "faster": {"median": middle, "least": least, "most": most},
        "target": TARGET,
        "run": experiment.name,
        "size": experiment.model.size,
        "load": os.getloadavg()[0],
    }


def render(found: dict) -> str:
    """The figures for people."""
    seconds, faster = found["seconds"], found["faster"]
    span = f"{faster['least']:.1f} to {faster['most']:.1f}; target {found['target']:g}"
    parts, load = len(found["parts"][OURS]), found["load"]
    return f"""# Answers to {found["chats"]:,} chats

`python -m tests.benchmarks.evaluating RUN`: digits that the model (size {found["size"]}, float32) has not
seen, {found["rounds"]:,} rounds, greedy, one thread, processor time, in {parts} paired parts. Measured while
{load:.0f} processes wanted two cores: the ratio is what holds, not the seconds.

| | processor seconds |
|---|---|
| one chat at a time, each round read anew, as the original | {seconds[ORIGINAL]:.1f} |
| in batches of {found["batch"]}, nothing read twice | {seconds[OURS]:.1f} |
| **times faster** | **{faster["median"]:.1f}** ({span}) |
| equal answers | {found["equal_answers"]:,} of {found["rounds"]:,} |
"""


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "run", type=Path, metavar="RUN", help="the folder of a trained run on digits"
    )
    parser.add_argument("--chats", type=int, default=1000)
    parser.add_argument("--parts", type=int, default=4)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="write that many chats here")
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    found = measure(options.run, options.data, count=options.chats, parts=options.parts)
    print(render(found))
    if options.write:
        (options.write / "evaluating.json").write_text(json.dumps(found, indent=1) + "\n")
        (options.write / "evaluating.md").write_text(render(found))


if __name__ == "__main__":
    main()
