"""Multi-image, multi-round chats over scikit-learn's handwritten digits, in the LLaVA JSON layout.

A chat introduces two or three images over two or three rounds and asks to read one, for its
parity, or to compare two. Its last round always refers to an image of an earlier round, so no chat
can be answered from its newest image alone. Every tenth image is held out: it appears in
`eval.json` and nowhere else.
"""

import json
import random
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dsvl.data.types import Part, Turn

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
READ = (
    "What digit is in image {i}?",
    "Which digit does image {i} show?",
    "Read the digit in image {i}.",
)
PARITY = (
    "Is the digit in image {i} even or odd?",
    "Does image {i} show an even or an odd digit?",
)
FIND = (
    "Which image shows the digit {digit}?",
    "Where is the digit {digit}?",
)
LARGER = (
    "Which digit is larger, image {i} or image {j}?",
    "What is the larger digit of image {i} and image {j}?",
)
SMALLER = (
    "Which digit is smaller, image {i} or image {j}?",
    "What is the smaller digit of image {i} and image {j}?",
)
SAME = (
    "Do image {i} and image {j} show the same digit?",
    "Is the digit in image {i} the same as in image {j}?",
)


@dataclass(frozen=True)
class Round:
    """One question and its answer; `images` are the digits (0 to 1796) that it introduces."""

    images: tuple[int, ...]
    question: str
    answer: str


def held_out(index: int) -> bool:
    """Whether digit `index` is kept for evaluation: no chat and no tower may be trained on it."""
    return index % 10 == 0


@cache
def labels() -> tuple[int, ...]:
    """The digit (0 to 9) that each of the 1,797 images shows."""
    from sklearn.datasets import load_digits

    return tuple(load_digits().target.tolist())  # pyright: ignore


def draw(
    split: str,
    number: int,
    seed: int = 0,
    *,
    images: tuple[int, int] = (2, 3),
    rounds: tuple[int, int] = (2, 3),
    kinds: tuple[int, int, int, int] = (50, 15, 0, 35),
) -> list[Round]:
    """Chat `number` of `split` ("train" or "eval"): a pure function of its arguments.

    `images` and `rounds` bound their numbers; `kinds` weighs questions to read one, for its parity,
    to find a digit and to compare two.
    """
    rng = random.Random(f"{seed}/{split}/{number}")
    turns = rng.randint(*rounds)
    shown = _images(rng, _pool(split), count=rng.randint(*images))
    digits = [labels()[index] for index in shown]
    # The first image opens the chat; each other one appears in one of the first three rounds.
    opens = [0, *sorted(rng.randrange(min(turns, 3)) for _ in shown[1:])]
    chat = []
    for turn in range(turns):
        seen = [i for i, first in enumerate(opens) if first <= turn]
        last = turn == turns - 1
        subject = rng.choice([i for i in seen if opens[i] < turn] if last else seen)
        new = tuple(shown[i] for i in seen if opens[i] == turn)
        chat.append(Round(new, *_ask(rng, kinds, digits, seen, subject)))
    return chat


def turns(chat: list[Round]) -> list[Turn]:
    """The chat as a conversation: image `i` is the i-th that its rounds introduce."""
    conversation, shown = [], 0
    for turn in chat:
        images = tuple(Part("image", image=shown + i) for i in range(len(turn.images)))
        conversation.append(Turn("user", (*images, Part("text", text=turn.question))))
        conversation.append(Turn("assistant", (Part("text", text=turn.answer),)))
        shown += len(images)
    return conversation


def in_words(chat: list[Round], repeat: int = 4) -> list[str]:
    """What each image shows, in words that take its place where a chat is told without images.

    A digit's word is written `repeat` times, as a tower of four patches gives four features.
    """
    return [" ".join([WORDS[labels()[index]]] * repeat) for turn in chat for index in turn.images]


def write(folder: Path, *, train: int = 1500, evaluation: int = 300, seed: int = 0) -> None:
    """Write `train.json`, `eval.json` and the `images/` they use: 8x8 grey PNG, 15 x the value.

    The folder appears whole or not at all; one that is already there is replaced.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        used: set[int] = set()
        for split, count in (("train", train), ("eval", evaluation)):
            chats = [draw(split, number, seed) for number in range(count)]
            used.update(index for chat in chats for turn in chat for index in turn.images)
            records = [_record(f"{split}-{number:04d}", chat) for number, chat in enumerate(chats)]
            text = json.dumps(records, indent=1) + "\n"
            (making / f"{split}.json").write_text(text, encoding="utf-8")
        pictures = load_digits().images  # pyright: ignore
        (making / "images").mkdir()
        for index in sorted(used):
            pixels = (pictures[index] * 15).astype("uint8")
            Image.fromarray(pixels).save(making / "images" / _name(index))
        shutil.rmtree(folder, ignore_errors=True)
        making.chmod(0o755)  # mkdtemp makes it private
        making.replace(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


@cache
def _pool(split: str) -> list[list[int]]:
    """The images of `split`, by the digit they show."""
    pool: list[list[int]] = [[] for _ in WORDS]
    for index, digit in enumerate(labels()):
        if held_out(index) == (split == "eval"):
            pool[digit].append(index)
    return pool


def _name(index: int) -> str:
    return f"digit-{index:04d}.png"


def _record(name: str, chat: list[Round]) -> dict:
    conversations = []
    for turn in chat:
        markers = "<image>\n" * len(turn.images)
        conversations.append({"from": "human", "value": markers + turn.question})
        conversations.append({"from": "gpt", "value": turn.answer})
    images = [_name(index) for turn in chat for index in turn.images]
    return {"id": name, "image": images, "conversations": conversations}


def _images(rng: random.Random, pool: list[list[int]], count: int) -> list[int]:
    """Distinct images; one often repeats an earlier digit, so that "the same?" is worth asking."""
    images = [rng.choice(rng.choice(pool))]
    while len(images) < count:
        digit = labels()[rng.choice(images)] if rng.random() < 0.25 else rng.randrange(10)
        images.append(rng.choice([index for index in pool[digit] if index not in images]))
    return images


def _ask(
    rng: random.Random, kinds: tuple[int, ...], digits: list[int], seen: list[int], i: int
) -> tuple[str, str]:
    """A question about image `i` (from 0), alone or with another one seen, and its answer."""
    others = [j for j in seen if j != i]
    unique = all(digits[i] != digits[j] for j in others)
    possible = (True, True, bool(others) and unique, bool(others))
    weights = [weight * can for weight, can in zip(kinds, possible, strict=True)]
    kind = rng.choices(("read", "parity", "find", "compare"), weights)[0]
    if kind == "read":
        return rng.choice(READ).format(i=i + 1), WORDS[digits[i]]
    if kind == "parity":
        return rng.choice(PARITY).format(i=i + 1), ("even", "odd")[digits[i] % 2]
    if kind == "find":
        return rng.choice(FIND).format(digit=WORDS[digits[i]]), f"image {i + 1}"
    i, j = rng.sample((i, rng.choice(others)), 2)
    if digits[i] == digits[j]:
        return rng.choice(SAME).format(i=i + 1, j=j + 1), "yes"
    phrasings, answer = rng.choice(
        (
            (LARGER, WORDS[max(digits[i], digits[j])]),
            (SMALLER, WORDS[min(digits[i], digits[j])]),
            (SAME, "no"),
        )
    )
    return rng.choice(phrasings).format(i=i + 1, j=j + 1), answer
