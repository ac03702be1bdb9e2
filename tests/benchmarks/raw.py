"""The nine datasets of the paper's table 1 as they are downloaded, but made up: to rehearse a preparation.

    python -m tests.benchmarks.raw FOLDER [--scale 1.0] [--edge 64] [--percolate]

Files, layouts, fields, numbers of records and links between pictures are those of the originals, as
`configs/data` expects them below `storage.data`; texts are random words, and pictures small JPEGs of which no
two have the same bytes. Prints what every set has to come to, by construction, as JSON. At scale 1 there are
0.8 million records and 0.7 million pictures, of which 138,266 are files of their own: 1.8 GB on disk, written
in half a minute on a core. Everything depends on the options alone.
"""

import argparse
import json
import time
from base64 import b64encode
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.made_up import Pictures
from tests.benchmarks.nine_sets import NineSets, Subset, instructions, llava, sparkles


def write(folder: Path, sets: NineSets, *, edge: int) -> None:
    """Write all files below `folder`, pictures so many pixels wide."""
    picture, coco = Pictures(edge), sets.coco
    for name in map(coco.name, range(coco.images)):
        save(folder / f"coco/train2017/{name}.jpg", picture(name))
    for file, (style, numbers) in sets.llava.items():
        found = (llava(number, coco.name(number % coco.of_llava), style) for number in numbers)
        stream(folder / f"llava/{file}.json", map(json.dumps, found))

    pairs = ([f"CGD_IMG_{coco.name(index)}" for index in pair] for pair in sets.pairs)
    write_instructions(folder, sets.cgd, pairs)
    for part in sets.base64:
        write_instructions(folder, part, map(part.pictures, range(part.groups)))
        coded = ((name, b64encode(picture(name)).decode()) for name in part.stored())
        stream(folder / f"MIMIC-IT/{part.name}.json", map(member, coded), ("{", "}"))

    for part, (dialogues, images) in sets.sparkles.items():
        found = (sparkles(number, dialogues, images) for number in range(dialogues))
        stream(folder / f"{part}/annotations/{part}.json", map(json.dumps, found))
        for number in range(images):
            save(folder / f"{part}/images/{number}.jpg", picture(f"{part}_{number}"))


def write_instructions(folder: Path, part: Subset, images: Iterable[Sequence[str]]) -> None:
    """The annotations of a part of MIMIC-IT; `images` are the ids of each group's."""
    ends = ('{"meta": {"version": "0.0.1", "time": "2023-06", "author": ""}, "data": {', "}}")
    path = folder / f"MIMIC-IT/{part.name}_instructions.json"
    stream(path, map(member, instructions(part, images)), ends)


def member(named: tuple[str, Any]) -> str:
    """A member of a JSON object."""
    name, value = named
    return f'"{name}": {json.dumps(value)}'


def save(path: Path, data: bytes) -> None:
    """Write a file whose folder may not exist yet."""
    try:
        path.write_bytes(data)
    except FileNotFoundError:
        path.parent.mkdir(parents=True)
        path.write_bytes(data)


def stream(path: Path, pieces: Iterable[str], ends: tuple[str, str] = ("[", "]")) -> None:
    """Write pieces of JSON between what opens and closes them, so that but one is in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        separator = ends[0]
        for piece in pieces:
            file.write(separator + piece)
            separator = ",\n"
        file.write(ends[1])


def main() -> None:
    """Write the files and print what they have to come to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the records, at most 1")
    parser.add_argument("--edge", type=int, default=64, help="width of the pictures in pixels")
    parser.add_argument("--percolate", action="store_true", help="let CGD's pairs hang together")
    options = parser.parse_args()
    if not 0 < options.scale <= 1:
        parser.error(f"--scale={options.scale}: must lie in (0, 1]")
    began = time.monotonic()
    sets = NineSets(options.scale, options.percolate)
    write(options.folder, sets, edge=options.edge)
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"sets": sets.expected(), "seconds": seconds}, indent=1))


if __name__ == "__main__":
    main()
