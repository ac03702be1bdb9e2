"""Going through all raw records with Ray Data: read, check images, encode, split.

Readers put the records of each set into shards; a pool of actors checks and encodes them, each shard by
itself. All results are files, which a run that was killed finds again; the driver then goes through them in
the order of the records. So what comes out is the same whatever the number of actors, and the driver holds
no conversation and no image.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq

from dsvl.data.encode import Encoder, fingerprint, load_tokenizer
from dsvl.data.images import ImageProcessor
from dsvl.data.shard import Checker, Result, Task
from dsvl.data.split import Links, assign_split
from dsvl.data.spool import Row, path_digest, path_of, samples
from dsvl.data.types import Reason, Rejected
from dsvl.data.writer import Writer
from orchestration.config import Experiment, digest
from orchestration.preparing.pool import Progress, each
from orchestration.preparing.reading import spools

SAY_EVERY = 10.0
"""Seconds between two lines of progress."""


@dataclass
class Survey:
    """All raw records, gone through."""

    raw: Counter[str]
    """Records of every set, as the next two."""
    used: Counter[str] = field(default_factory=Counter)
    merged: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    """Samples on each side."""
    quarantine: list[Rejected] = field(default_factory=list)
    bad_images: list[dict[str, Any]] = field(default_factory=list)
    """`source`, `path` and `stamp` of every image that cannot be used."""
    percolations: list[dict[str, Any]] = field(default_factory=list)
    """Groups that hold over half of a set, and what splitting them costs (`dsvl.data.split`)."""
    unreadable: list[str] = field(default_factory=list)
    """Why sets cannot be read at all, a line each; nothing is known of their records."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A conversation that came through, before the split."""

    task: int
    row: int
    records: tuple[str, ...]
    links: Links


def survey(
    experiment: Experiment,
    *,
    processor: ImageProcessor,
    work: Path,
    writer: Writer | None,
    progress: Progress,
) -> Survey:
    """Check, encode and split the records; the writer, if any, gets images, examples and samples.

    Intermediate files are below `work`, which every machine must see.
    """
    seen = Survey(Counter(dict.fromkeys(sorted(experiment.data.sets), 0)))
    folders, seen.unreadable = spools(experiment, work, progress)
    tasks, places = _tasks(experiment, folders, work, processor=processor, keep=writer is not None)
    _check(experiment, tasks, processor=processor, keep=writer is not None, progress=progress)
    kept = _split(experiment, _gather(tasks, places, seen), seen)
    if writer:
        _write(tasks, kept, writer)
    return seen


def _tasks(
    experiment: Experiment,
    spools: Mapping[str, Path],
    work: Path,
    *,
    processor: ImageProcessor,
    keep: bool,
) -> tuple[list[Task], list[np.ndarray]]:
    """Every shard as a task, and which image each of its paths is: the same number, the same image."""
    settings = {
        "processor": asdict(processor),
        "tokenizer": fingerprint(load_tokenizer(experiment.model.language.checkpoint)),
        "image_tokens": experiment.model.image_tokens,
        "max_tokens": experiment.data.max_tokens,
        "template": experiment.model.template,
        "max_pixels": experiment.data.max_image_pixels,
        "keep": keep,
    }
    taken: dict[bytes, int] = {}
    tasks, places = [], []
    for source, folder in spools.items():
        images = image_folder(experiment, source)
        for file in sorted(folder.iterdir()):
            paths = pq.read_table(file, columns=["paths"])["paths"].combine_chunks().flatten()
            own: list[int] = []
            fresh: list[int] = []
            for place, path in enumerate(paths.to_pylist()):
                before = len(taken)
                own.append(taken.setdefault(path_digest(images, path), before))
                if own[-1] == before:
                    fresh.append(place)
            identity = [settings, folder.name, file.name, images, fresh]
            result = work / f"shard-{digest(identity)}"
            tasks.append(Task(source, str(file), images, tuple(fresh), str(result)))
            places.append(np.array(own, np.int64))
    return tasks, places


class _Preparer:
    """The actor that checks shards."""

    def __init__(
        self, encoder: dict[str, Any], *, checkpoint: str, processor: ImageProcessor, **options: Any
    ) -> None:
        tokenizer = load_tokenizer(checkpoint)
        self._checker = Checker(Encoder(tokenizer, **encoder), processor=processor, **options)

    def __call__(self, job: tuple[int, Task]) -> tuple[int, bool]:
        number, task = job
        return number, self._checker.check(task)


def _check(
    experiment: Experiment,
    tasks: Sequence[Task],
    *,
    processor: ImageProcessor,
    keep: bool,
    progress: Progress,
) -> None:
    checkpoint = Path(experiment.model.language.checkpoint)
    settings = {
        "encoder": encoder_settings(experiment),
        "checkpoint": str(checkpoint.absolute() if checkpoint.is_dir() else checkpoint),
        "processor": processor,
        "max_pixels": experiment.data.max_image_pixels,
        "keep": keep,
    }
    records = [pq.read_metadata(task.records).num_rows for task in tasks]
    began = said = time.monotonic()
    done = found = before = 0
    cluster = experiment.cluster
    for number, made in each(
        list(enumerate(tasks)),
        _Preparer,
        settings,
        most=cluster.preparers,
        labels=cluster.cpu_labels,
    ):
        done, found, now = (
            done + records[number],
            found + (not made) * records[number],
            time.monotonic(),
        )
        if (
            done - found == records[number]
        ):  # the first waits for the actors, which tells nothing of the rest
            began, before = now, done
        elif now - said > SAY_EVERY:
            said = now
            minutes = (now - began) / (done - before) * (sum(records) - done) / 60
            progress(f"{_checked(done, records, found)}, about {minutes:.0f} minutes to go")
    progress(_checked(done, records, found))


def _checked(done: int, records: Sequence[int], found: int) -> str:
    before = f", {found:,} of them by an earlier run" if found else ""
    return f"data: {done:,} of {sum(records):,} records checked{before}"


def _gather(tasks: Sequence[Task], places: Sequence[np.ndarray], seen: Survey) -> list[Kept]:
    """What became of every record before the split, in order."""
    keys: dict[int, str] = {}
    faults: dict[int, list[Any]] = {}
    kept: list[Kept] = []
    for number, (task, numbers) in enumerate(zip(tasks, places, strict=True)):
        result = Result(Path(task.result))
        columns = ["record", "merged", "reason", "detail", "key", "paths"]
        rows = pq.read_table(task.records, columns=columns)
        paths = rows["paths"].combine_chunks().flatten()
        for place, fault in result.faults.items():
            path = path_of(paths[place].as_py())
            faults[int(numbers[place])] = fault
            if not path.startswith("data:"):
                about = {"source": task.source, "path": path, "stamp": result.stamps[path]}
                seen.bad_images.append(about)
        keys |= {int(numbers[place]): key for place, key in result.images.items()}
        rejected, table = result.rejected, rows.to_pylist()
        counts = [len(raw["paths"] or ()) for raw in table]
        ends = np.cumsum(counts).tolist()
        for row, (raw, end, count) in enumerate(zip(table, ends, counts, strict=True)):
            records = (raw["record"], *(raw["merged"] or ()))
            seen.raw[task.source] += len(records)
            own = numbers[end - count : end].tolist()
            bad: Sequence[Any] | None = (raw["reason"], raw["detail"]) if raw["reason"] else None
            bad = bad or next((faults[image] for image in own if image in faults), None)
            bad = bad or rejected.get(row)
            if bad:
                reason, detail = cast(Reason, bad[0]), bad[1]
                seen.quarantine += [Rejected(task.source, r, reason, detail) for r in records]
                continue
            images = tuple(keys[image] for image in own)
            kept.append(Kept(number, row, records, Links(task.source, raw["key"], images)))
    return kept


def _split(experiment: Experiment, kept: Sequence[Kept], seen: Survey) -> dict[int, dict[int, Row]]:
    """What is kept of each shard, after the split: the shard's number -> row -> what is known of it."""
    split = assign_split(
        [one.links for one in kept],
        declared={source: config.split for source, config in experiment.data.sets.items()},
        eval_fraction=experiment.data.eval_fraction,
        seed=experiment.data.seed,
    )
    seen.percolations = [asdict(found) for found in split.percolations]
    by_task: dict[int, dict[int, Row]] = {}
    for one, side in zip(kept, split.sides, strict=True):
        links = one.links
        if side == "straddles_split":
            detail = "its images, or its record, are on both sides of the split"
            seen.quarantine += [Rejected(links.source, r, side, detail) for r in one.records]
            continue
        seen.used[links.source] += 1
        seen.merged[links.source] += len(one.records) - 1
        seen.splits[side] += 1
        row = Row(one.row, links.images, side, links.group_keys)
        by_task.setdefault(one.task, {})[one.row] = row
    return by_task


def _write(tasks: Sequence[Task], kept: Mapping[int, Mapping[int, Row]], writer: Writer) -> None:
    """Store what is kept, and the images that it shows."""
    shown = {key for rows in kept.values() for row in rows.values() for key in row.images}
    for task in tasks:
        result = Result(Path(task.result))
        if result.images:
            writer.images(result.folder, result.sha256, wanted=shown)
    for number, rows in sorted(kept.items()):
        task = tasks[number]
        conversations = samples(Path(task.records), task.source, list(rows.values()))
        ids = dict(zip(rows, conversations["id"].to_pylist(), strict=True))
        for place, example in Result(Path(task.result)).examples(ids, task.source):
            images = tuple(rows[place].images[int(image)] for image in example.images)
            writer.example(replace(example, images=images))
        writer.samples(conversations)


def encoder_settings(experiment: Experiment) -> dict[str, Any]:
    """What decides how the experiment's conversations are encoded, beside its tokenizer."""
    return {
        "image_tokens": experiment.model.image_tokens,
        "max_tokens": experiment.data.max_tokens,
        "template": experiment.model.template,
    }


def image_folder(experiment: Experiment, source: str) -> str:
    """Folder or file of a set's images: absolute, as actors have working directories of their own."""
    return str(Path(experiment.storage.data, experiment.data.sets[source].images).absolute())


def image_processor(experiment: Experiment) -> ImageProcessor:
    """How images are prepared for the experiment's tower.

    Raises ValueError where it is not of `model.vision.image_size`, FileNotFoundError where there is none.
    """
    vision = experiment.model.vision
    processor = ImageProcessor.from_checkpoint(vision.checkpoint)
    if processor.size != vision.image_size:
        raise ValueError(
            f"model.vision.image_size={vision.image_size}: must be {processor.size}, as in "
            f"{vision.checkpoint}/preprocessor_config.json"
        )
    return processor
