"""MIMIC-IT: {"data": {ID: {"instruction", "answer", "image_ids": [...], "rel_ins_ids": [...]}}}.

Of CGD, SD, SN, TVC and VST alike; they differ in where images lie and what they are called. Related
instructions become the rounds of one conversation, if they are about the same images in the same order.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from sys import intern

from dsvl.data.readers.records import Chat, Fault, Record
from dsvl.data.readers.rounds import asked
from dsvl.data.types import Conversation, Rejected, Turn

RELATED = "related"


def parse(record: Record) -> Chat:
    """One instruction and its answer, before they are merged; raises Fault."""
    named = record.value.get("image_ids")
    if not isinstance(named, list):
        raise Fault("missing_image", f"image_ids is a {type(named).__name__}, not a list")
    images = record.images(named, "image_ids")
    turns = asked(record.value.get("instruction"), record.value.get("answer"), images=len(images))
    related = record.value.get("rel_ins_ids")
    names = [name for name in related if isinstance(name, str)] if isinstance(related, list) else []
    return Chat(images, turns, {RELATED: json.dumps(names)})


def merged(
    read: Callable[[], Iterable[Conversation | Rejected]],
) -> Iterator[Conversation | Rejected]:
    """Conversations that are related, directly or through others, and have equal images, as one.

    Rounds stand in the order of their records, and the whole where its last record stands. `read` is
    called twice, as memory holds no conversation but those whose last record is still to come.
    """
    group = _groups(read())
    last = {group[place]: place for place in sorted(group)}
    waiting: dict[int, list[Conversation]] = defaultdict(list)
    for place, record in enumerate(read()):
        if isinstance(record, Rejected):
            yield record
            continue
        waiting[group[place]].append(record)
        if place == last[group[place]]:
            yield _joined(waiting.pop(group[place]))


def _joined(members: list[Conversation]) -> Conversation:
    first, *others = members
    turns = [*first.turns, *(_without_images(turn) for other in others for turn in other.turns)]
    return replace(
        first,
        turns=tuple(turns),
        meta={name: value for name, value in first.meta.items() if name != RELATED},
        merged=tuple(other.record for other in others),
    )


def _without_images(turn: Turn) -> Turn:
    return Turn(turn.role, tuple(part for part in turn.content if part.type != "image"))


def _groups(records: Iterable[Conversation | Rejected]) -> dict[int, int]:
    """The place of every conversation -> the place of the first in its group."""
    place_of: dict[str, int] = {}
    images: dict[int, tuple[str, ...]] = {}
    related: dict[int, list[str]] = {}
    for place, record in enumerate(records):
        if isinstance(record, Conversation):
            images[place] = tuple(intern(image.path) for image in record.images)
            if place_of.setdefault(intern(record.meta["key"]), place) == place:
                names = json.loads(record.meta.get(RELATED, "[]"))
                related[place] = [intern(f"{record.source}/{name}") for name in names]

    group = {place: place for place in images}

    def first(place: int) -> int:
        while group[place] != place:
            group[place] = group[group[place]]
            place = group[place]
        return place

    for place, names in related.items():
        for other in (place_of[name] for name in names if name in place_of):
            if images[other] == images[place]:
                here, there = sorted((first(place), first(other)))
                group[there] = here
    return {place: first(place) for place in group}
