"""The nine datasets of the paper's table 1: their sizes, and records in their formats with made-up words."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from tests.benchmarks.made_up import Text, between, dealt, draw

COCO = 118_287
"""Pictures of COCO train2017; MIMIC-IT's card counts as many under CGD."""
LLAVA_IMAGES = 81_479
"""Those of which LLaVA has a conversation. With it, 68.9 % of CGD's pairs begin with such a picture, as in
table 1: 48,869 of 70,940 are blended."""
SPARKLES = {"SparklesDialogueCC": (4_521, 12_979), "SparklesDialogueVG": (2_000, 7_000)}
"""Part -> dialogues and pictures that they show (arXiv:2308.16463); here each of them another one."""
PERCOLATING = 60_000
"""Pictures from which `--percolate` draws CGD's pairs: 2.4 a picture, so that most hang together."""

Outcome = Literal["used", "too_many_images", "missing_image"]
text = Text()


@dataclass(frozen=True)
class Style:
    """How long the rounds of a set are: least and most of each."""

    rounds: tuple[int, int]
    answer: tuple[int, int]
    """Words."""


LLAVA = {
    "detail_23k": (Style((1, 1), (70, 130)), 23_240),
    "complex_reasoning_77k": (Style((1, 1), (60, 150)), 76_643),
    "conversation_58k": (Style((2, 5), (10, 45)), 56_681),
}
"""File -> how it is written, and its records (LLaVA-Instruct-150K)."""


@dataclass(frozen=True)
class Subset:
    """A part of MIMIC-IT: instructions in groups that are related and about the same images."""

    name: str
    instructions: int
    groups: int
    used: int
    """Groups with at most eight images, all of which are there."""
    images: tuple[int, int] = (3, 8)
    """Least and most of a group, unless it is crowded."""
    crowded: float = 0.0
    """Share of the other groups that have nine to twelve images; of the rest some are missing."""

    def scaled(self, scale: float) -> "Subset":
        """The same with so many times the groups."""
        sizes = ("instructions", "groups", "used")
        return replace(self, **{size: scaled(getattr(self, size), scale) for size in sizes})

    def outcome(self, group: int) -> Outcome:
        """What has to become of a group."""
        if dealt(self.used, self.groups, group):
            return "used"
        lot = draw(group, "crowded") % 1000
        return "too_many_images" if lot < 1000 * self.crowded else "missing_image"

    def pictures(self, group: int) -> list[str]:
        """The ids of a group's images."""
        crowded = self.outcome(group) == "too_many_images"
        images = between((9, 12) if crowded else self.images, group, "images")
        return [f"{self.name}_IMG_{group:06}_{number:02}" for number in range(images)]

    def stored(self) -> Iterator[str]:
        """The ids of the images that are there: of a group with missing ones every second."""
        for group in range(self.groups):
            step = 2 if self.outcome(group) == "missing_image" else 1
            yield from self.pictures(group)[::step]

    def expected(self) -> dict[str, Any]:
        """What the instructions have to come to."""
        records: Counter[Outcome] = Counter()
        for group in range(self.groups):
            records[self.outcome(group)] += dealt(self.instructions, self.groups, group)
        merged = records.pop("used") - self.used
        return expectation(self.instructions, merged=merged, dropped=dict(records))


CGD = Subset("CGD", 141_869, 70_941, used=70_941)
"""Instructions by MIMIC-IT's card; in table 1 they are 70,940, as the original's grouping loses one."""
BASE64 = (
    Subset("SD", 16_000, 8_007, used=8_007, images=(2, 2)),
    Subset("SN", 6_000, 6_000, used=488, crowded=1.0),
    Subset("TVC", 137_000, 86_000, used=3, crowded=0.2),
    Subset("VST", 32_000, 16_000, used=116, crowded=0.6),
)
"""Instructions in thousands by Otter's issue 318; used groups by table 1, and one that grouping loses; TVC
has 86 thousand clips of 6.7 frames (arXiv:2306.05425). Guessed: how SN's and VST's instructions are
grouped, and why the others do not come through: ids of TVC that are not among its images (Otter's issue
172), pictures of VST that expired."""


class Coco:
    """COCO's pictures by index, of which LLaVA talks about the first; their names are in another order."""

    def __init__(self, images: int, *, of_llava: int) -> None:
        self.images, self.of_llava = images, of_llava

    def name(self, index: int) -> str:
        """What a picture is called, twelve digits."""
        place = index * 1_000_003 % self.images  # a prime, so that all differ
        return f"{9 + place * 581_921 // self.images:012}"

    def pair(self, number: int, pool: int) -> tuple[int, int]:
        """The pictures of one of CGD's pairs: first all in turn, then any; with a `pool`, any of so many."""
        drawn_from = pool or self.images
        one, other = (
            slot if slot < self.images and not pool else draw(slot, "pair") % drawn_from
            for slot in (2 * number, 2 * number + 1)
        )
        return one, (one + 1) % drawn_from if one == other else other


@dataclass(frozen=True)
class NineSets:
    """How much there is of everything."""

    scale: float = 1.0
    """Share of the originals' records and pictures, at most 1."""
    percolate: bool = False
    """Draw CGD's pairs so that most of them hang together by pictures."""

    @cached_property
    def coco(self) -> Coco:
        """COCO's pictures."""
        return Coco(scaled(COCO, self.scale), of_llava=scaled(LLAVA_IMAGES, self.scale))

    @cached_property
    def llava(self) -> dict[str, tuple[Style, range]]:
        """File -> how it is written, and the numbers of its records among all of LLaVA's."""
        found, first = {}, 0
        for file, (style, records) in LLAVA.items():
            found[file] = style, range(first, first := first + scaled(records, self.scale))
        return found

    @cached_property
    def cgd(self) -> Subset:
        """CGD's instructions; a group is about one of the `pairs`."""
        return CGD.scaled(self.scale)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        """CGD's pairs of COCO's pictures, by index."""
        pool = scaled(PERCOLATING, self.scale) if self.percolate else 0
        return [self.coco.pair(group, pool) for group in range(self.cgd.groups)]

    @cached_property
    def base64(self) -> list[Subset]:
        """The parts of MIMIC-IT that have pictures of their own."""
        return [subset.scaled(self.scale) for subset in BASE64]

    @cached_property
    def sparkles(self) -> dict[str, tuple[int, int]]:
        """Part -> dialogues and pictures."""
        return {
            part: (scaled(dialogues, self.scale), scaled(images, self.scale))
            for part, (dialogues, images) in SPARKLES.items()
        }

    def expected(self) -> dict[str, dict[str, Any]]:
        """What the raw records of every set have to come to, before they are split and blended.

        `joinable` counts CGD's pairs whose first picture LLaVA talks about: those that can be blended.
        """
        detail, reasoning, dialogue = (len(records) for _, records in self.llava.values())
        cgd = self.cgd.expected()
        both, merged = detail + reasoning + dialogue + cgd["raw"], cgd["merged"]
        joinable = sum(first < self.coco.of_llava for first, _ in self.pairs)
        return {
            "llava": expectation(detail + reasoning),
            "llava_dial": expectation(dialogue),
            "otter_mimicit_cgd": cgd,
            **{f"otter_mimicit_{part.name.lower()}": part.expected() for part in self.base64},
            "llava_otter_blend": expectation(both, merged=merged) | {"joinable": joinable},
            "sparkles_dialogue": expectation(sum(n for n, _ in self.sparkles.values())),
        }


def scaled(number: int, scale: float) -> int:
    """So many times the number, but at least one."""
    return max(1, round(number * scale))


def expectation(raw: int, *, merged: int = 0, dropped: dict[Any, int] | None = None) -> dict:
    """So many records, of which so many are not conversations of their own."""
    dropped = dropped or {}
    used = raw - merged - sum(dropped.values())
    return {"raw": raw, "used": used, "merged": merged, "dropped": dropped}


def question(counter: int, purpose: str) -> str:
    """Of six to fourteen words."""
    return text(between((6, 14), counter, purpose), counter, purpose, "?")


def llava(number: int, image: str, style: Style) -> dict[str, Any]:
    """A conversation about a picture."""
    said = []
    for turn in range(between(style.rounds, number, "rounds")):
        asked = question(number, f"question {turn}")
        if not turn:
            asked = f"<image>\n{asked}" if number % 2 else f"{asked}\n<image>"
        words = between(style.answer, number, f"words {turn}")
        said.append({"from": "human", "value": asked})
        said.append({"from": "gpt", "value": text(words, number, f"answer {turn}")})
    return {"id": image, "image": f"{image}.jpg", "conversations": said}


def instructions(
    subset: Subset, images: Iterable[Sequence[str]]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The instructions of a part of MIMIC-IT, with their ids."""
    first = 0
    for group, ids in enumerate(images):
        numbers = range(first, first := first + dealt(subset.instructions, subset.groups, group))
        names = [f"{subset.name}_INS_{number:06}" for number in numbers]
        for number, name in zip(numbers, names, strict=True):
            words = between((10, 60), number, f"words {subset.name}")
            yield (
                name,
                {
                    "instruction": question(number, subset.name),
                    "answer": text(words, number, f"answer {subset.name}"),
                    "image_ids": ids,
                    "rel_ins_ids": [other for other in names if other != name],
                },
            )


def sparkles(number: int, dialogues: int, images: int) -> dict[str, Any]:
    """A dialogue of two rounds, of which the second shows one more picture."""
    first = number * images // dialogues
    ids = range(first, first + dealt(images, dialogues, number))
    dialogue = []
    for shown, seen in ((ids[:-1], ids[:-1]), (ids[-1:], ids)):
        asked = question(ids[-1], f"sparkles {len(seen)}")
        marked = (f"IMAGE#{image}<Img><ImageHere></Img>" for image in shown)
        told = (f"IMAGE#{i}: {text(between((25, 60), i, 'words'), i, 'sparkles')}" for i in seen)
        captions = [{"image_id": i, "caption": text(10, i, "caption")} for i in shown]
        content = " ".join([asked, *marked])
        dialogue.append({"role": "user", "content": content, "images": captions})
        dialogue.append({"role": "assistant", "content": " ".join(told)})
    return {"dialogue": dialogue}
