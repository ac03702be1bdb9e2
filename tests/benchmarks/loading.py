"""How fast images are opened and samples are read: against a DataLoader that does the original's work.

    python -m tests.benchmarks.loading [--write tests/benchmarks/results] [--rounds 9] [--samples 200000]

Images: two processes read, decode, hash and fit photographs to 448 pixels and encode a conversation about
each, as the actors of a preparation do once; or they do what the original does for each sample of each
epoch. Both are driven by a `torch.utils.data.DataLoader`, which hands the results over in shared memory.
Times are of the processor, over all processes, and beside them those of the clock; the two ways take turns.
Samples: encoded ones by index, in random order, from a prepared set; and the first batch of a training that
begins or goes on. About a minute.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import torch
from torch.utils.data import DataLoader

from dsvl.config import BlendConfig, DataConfig, SetConfig, TrainConfig
from dsvl.data.blend import Blender, order
from dsvl.data.encode import Phrases
from dsvl.data.folders import sha256
from dsvl.data.images import ImageProcessor, StoredImage
from dsvl.data.shard import ImageShard
from dsvl.data.store import SAMPLES, Prepared, open_store
from dsvl.data.types import IGNORED, Encoded, Example, Kind
from dsvl.data.writer import Writer
from dsvl.train import Plan
from tests.benchmarks.case import ORIGINAL, OURS
from tests.benchmarks.measure import Figures, ratios, spread
from tests.benchmarks.mmca import machine
from tests.benchmarks.opening import (
    EDGE,
    IMAGE_TOKENS,
    AsPrepared,
    AsTheOriginal,
    write_set,
)

WORKERS = 2
FASTER = 1.5
"""Target: images a second, against the original's."""
RESUMED = 10_000_000
SAMPLES_PER_S = 50_000
"""Target of reading by index."""
READINGS: dict[str, Callable[[Example], Any]] = {
    "by index": lambda example: example,
    "and every token read": lambda example: [
        tokens.max() for tokens in (example.ids, example.labels, example.kinds)
    ],
}
"""What is done with a sample, which is a view of the memory map."""


def images_a_second(folder: Path, *, images: int, rounds: int) -> dict[str, Any]:
    """Both ways in turns; the first round only warms up."""
    chats = write_set(folder, images)
    ways = {
        way: DataLoader(
            samples,
            batch_size=8,
            num_workers=WORKERS,
            persistent_workers=True,
            collate_fn=samples.batch,
        )
        for way, samples in (
            (ORIGINAL, AsTheOriginal(folder, chats)),
            (OURS, AsPrepared(folder, chats)),
        )
    }
    figures = {way: Figures() for way in ways}
    for number in range(rounds + 1):
        for way, loader in ways.items():
            wall, seconds = time.perf_counter(), processor_seconds()
            assert sum(len(pixels) for pixels, *_ in loader) == images
            if number:
                figures[way].seconds.append(processor_seconds() - seconds)
                figures[way].wall.append(time.perf_counter() - wall)
    times = ratios(figures[ORIGINAL], figures[OURS])
    by_the_clock = Figures(figures[ORIGINAL].wall), Figures(figures[OURS].wall)
    return {
        "images": images,
        "rounds": rounds,
        "processes": WORKERS,
        "ways": {
            way: {
                "processor_ms_an_image": spread([1000 * s / images for s in found.seconds]),
                "images_per_s": spread([images / s for s in found.wall]),
            }
            for way, found in figures.items()
        },
        "faster": spread(times),
        "faster_by_the_clock": spread(ratios(*by_the_clock)),
        "target": FASTER,
        "met": spread(times)[0] >= FASTER,
    }


def processor_seconds() -> float:
    """Of this process and all that it has started."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def samples_a_second(folder: Path, *, samples: int, rounds: int) -> dict[str, Any]:
    """Reading by index, in another random order each round; the first round only warms up."""
    prepared = write_prepared(folder / "prepared", samples)
    examples = prepared.train
    figures: dict[str, list[float]] = {way: [] for way in READINGS}
    for epoch in range(rounds + 1):
        indices = order(len(examples), seed=0, epoch=epoch).tolist()
        for way, read in READINGS.items():
            began = time.perf_counter()
            for index in indices:
                read(examples[index])
            if epoch:
                figures[way].append(len(indices) / (time.perf_counter() - began))
    rates = {way: spread(found) for way, found in figures.items()}
    return {
        "samples": samples,
        "rounds": rounds,
        "positions": int(examples.lengths.sum()),
        "samples_per_s": rates,
        "target": SAMPLES_PER_S,
        "met": rates["by index"][0] >= SAMPLES_PER_S,
        "resumption": resumption(prepared, rounds=rounds),
    }


def resumption(prepared: Prepared, *, rounds: int) -> dict[str, Any]:
    """The time to the first batch of a training that begins, and of one that goes on at sample 10 million."""
    made = SetConfig(reader="llava_json", annotations=("made.json",), images="images")
    data = DataConfig(
        sets={"made": made}, blends={"pairs": BlendConfig(sets=("made",), concat=(1, 3))}
    )
    train = TrainConfig(epochs=1000, batch=min(128, len(prepared.train) // 4))
    seconds: dict[str, list[float]] = {"at sample 0": [], f"at sample {RESUMED:,}": []}
    for number in range(rounds + 1):
        for found, sample in zip(seconds.values(), (0, RESUMED), strict=True):
            began = time.perf_counter()
            blender = Blender(prepared, "train", data=data, seed=number)
            plan, step = Plan(len(blender), train), sample // train.batch
            samples = blender.epoch(plan.epoch(step))
            assert len([samples[int(index)] for index in plan.indices(step)]) == train.batch
            if number:
                found.append(time.perf_counter() - began)
    return {
        "seconds_to_the_first_batch": {at: spread(found) for at, found in seconds.items()},
        "ratio": spread([b / a for a, b in zip(*seconds.values(), strict=True)]),
    }


def write_prepared(folder: Path, samples: int) -> Prepared:
    """A prepared set of short samples with an image each, of which there are a thousand tiny ones."""
    lot = np.random.default_rng(0)
    processor = ImageProcessor(8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    keys = [f"{number:064x}" for number in range(1000)]
    header = [[1, 2, 3, 4]] * 8
    phrases = Phrases([1] * 9, [], header, header, [5], [6, 7], header, header, header)
    with (
        tempfile.TemporaryDirectory() as shard,
        Writer(
            folder, processor=processor, image_tokens=IMAGE_TOKENS, pad_id=0, phrases=phrases
        ) as writer,
    ):
        images = ImageShard(Path(shard), edge=8)
        for key in keys:
            fitted = lot.integers(0, 256, (3, 8, 8), np.uint8)
            image = StoredImage(key, key.encode(), f"{key}.jpg", 8, 8, "image/jpeg", fitted)
            images.append(image, source_id=f"made/{key}")
        images.close()
        digests = {path.name: sha256(path) for path in Path(shard).iterdir()}
        writer.images(Path(shard), digests, wanted=keys)
        for number, words in enumerate(lot.integers(40, 240, samples).tolist()):
            end, answer = IMAGE_TOKENS + words, IMAGE_TOKENS + words // 2
            kinds = np.repeat(np.array([Kind.IMAGE, Kind.TEXT], np.int8), (IMAGE_TOKENS, words))
            ids = np.where(kinds == Kind.TEXT, number % 32_000, 0).astype(np.int32)
            labels = np.where(np.arange(end) >= answer, ids, IGNORED).astype(np.int32)
            writer.example(
                Encoded(
                    id=f"made/{number}",
                    ids=ids,
                    labels=labels,
                    kinds=kinds,
                    images=(keys[number % len(keys)],),
                    source="made",
                    alone=False,
                    rounds=np.array([[IMAGE_TOKENS, answer, end, 1]], np.int32),
                    refs=np.empty((0, 4), np.int32),
                )
            )
        rows = [
            {
                "id": f"made/{number}",
                "source": "made",
                "images": [keys[number % len(keys)]],
                "split": "train" if number else "eval",
            }
            for number in range(samples)
        ]
        writer.samples(pa.Table.from_pylist(rows, SAMPLES))
        counts = {"raw": {"made": samples}, "merged": {}, "identity": {}, "about": {}}
        writer.finish(quarantine=(), bad_images=(), **counts)
    return open_store(folder)


def table(document: dict[str, Any]) -> str:
    """All figures as Markdown."""
    images, samples, of = document["images"], document["samples"], document["machine"]
    lines = [
        f"`{document['command']}`, {document['seconds']} s in all.",
        f"{of['device']}, {of['cores']} cores, torch {of['torch']}. Medians, least and most in brackets.",
        "",
        f"### {images['images']} photographs of 640 x 480 to {EDGE} pixels, each with a conversation",
        "",
        f"| {images['processes']} processes, {images['rounds']} rounds | ms of the processor an image "
        "| images/s by the clock |",
        "|---|---|---|",
    ]
    for way, found in images["ways"].items():
        ms, rate = found["processor_ms_an_image"], found["images_per_s"]
        lines.append(f"| {way} | {_spread(ms, 2)} | {_spread(rate, 0)} |")
    reached = {True: "met", False: "MISSED"}
    lines += [
        "",
        f"dsvl is {_spread(images['faster'], 2)} times as fast (target {images['target']}: "
        f"{reached[images['met']]}), by the clock {_spread(images['faster_by_the_clock'], 2)}.",
        "",
        f"### Samples by index, of {samples['samples']:,} with {samples['positions']:,} positions in all",
        "",
        f"| {samples['rounds']} rounds, one process | samples/s |",
        "|---|---|",
        *(f"| {way} | {_spread(found, 0)} |" for way, found in samples["samples_per_s"].items()),
        "",
        f"Target: {samples['target']:,} by index: {reached[samples['met']]}.",
        "",
        "To the first batch of 128 samples, which are blended by concatenating one to three: "
        + ", ".join(
            f"{_spread(found, 2)} s {at}"
            for at, found in samples["resumption"]["seconds_to_the_first_batch"].items()
        )
        + f", {_spread(samples['resumption']['ratio'], 2)} times as long.",
    ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int) -> str:
    median, least, most = (f"{value:,.{digits}f}" for value in values)
    return f"{median} [{least}..{most}]"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        images = images_a_second(Path(folder), images=options.images, rounds=options.rounds)
        samples = samples_a_second(Path(folder), samples=options.samples, rounds=options.rounds)
    document = {
        "machine": machine(torch.device("cpu")),
        "command": f"python -m tests.benchmarks.loading {' '.join(sys.argv[1:])}".strip(),
        "seconds": round(time.monotonic() - began),
        "images": images,
        "samples": samples,
    }
    print(table(document))
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1) + "\n"
        (options.write / "loading.json").write_text(text, encoding="utf-8")
        (options.write / "loading.md").write_text(table(document), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core a process
    main()
