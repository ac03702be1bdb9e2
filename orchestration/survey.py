"""Going through all raw records with Ray Data: read, check images, encode, split.

The driver reads annotations and keeps what comes through; a pool of actors opens every image once
and encodes every conversation. Results come back in the order of the records, block by block: they
are the same whatever the number of actors, and only a few blocks are in memory at a time.
"""

import logging
import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

from dsvl.data.encode import Encoder, load_tokenizer
from dsvl.data.images import ImageProcessor, StoredImage, load
from dsvl.data.sources import BadImage, Images
from dsvl.data.split import Links, assign_split
from dsvl.data.types import Conversation, Encoded, Reason, Rejected
from dsvl.data.writer import Sample, Writer
from orchestration.config import Experiment

BLOCK = 32
"""Records a block: what an actor takes at once."""
SAY_EVERY = 10.0
"""Seconds between two lines of progress."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why an image cannot be used."""

    reason: Reason
    detail: str
    stamp: list[int] | None
    """What its file was, by `stamp`."""


@dataclass
class Survey:
    """All raw records, gone through."""

    raw: Counter[str]
    """Records of every set."""
    samples: list[Sample] = field(default_factory=list)
    """What came through, in the order of the records."""
    quarantine: list[Rejected] = field(default_factory=list)
    bad_images: list[dict[str, Any]] = field(default_factory=list)
    """`source`, `path` and `stamp` of every image that cannot be used."""

    def drop(self, conversation: Conversation, reason: Reason, detail: str) -> None:
        """Put all raw records of a conversation into the quarantine."""
        for record in conversation.records:
            self.quarantine.append(Rejected(conversation.source, record, reason, detail))


@dataclass(frozen=True, slots=True)
class Task:
    """A conversation to encode, and the images to open: those that no earlier task opens."""

    conversation: Conversation
    folder: str
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task; the example's images are still paths."""

    record: str
    example: Encoded | Rejected
    images: dict[str, StoredImage]
    faults: dict[str, Fault]


class Preparer:
    """The actor: opens images and encodes conversations. A bad record is an outcome, no error."""

    def __init__(
        self,
        *,
        checkpoint: str,
        processor: ImageProcessor,
        image_tokens: int,
        max_tokens: int,
        template: str,
        max_pixels: int,
    ) -> None:
        self._processor, self._max_pixels = processor, max_pixels
        self._images = cache(Images)  # archives stay open
        self._encoder = Encoder(
            load_tokenizer(checkpoint),
            image_tokens=image_tokens,
            max_tokens=max_tokens,
            template=template,
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """A column of pickled tasks -> a column of pickled outcomes."""
        outcomes = [self.outcome(pickle.loads(task.as_py())) for task in block["task"]]
        return pa.table({"outcome": pa.array(map(pickle.dumps, outcomes), pa.large_binary())})

    def outcome(self, task: Task) -> Outcome:
        """Open the task's images and encode its conversation."""
        conversation = task.conversation
        paths = [image.path for image in conversation.images]
        outcome = Outcome(
            conversation.record, self._encoder.encode(conversation, paths), images={}, faults={}
        )
        for path in task.paths:
            try:
                outcome.images[path] = load(
                    self._images(task.folder),
                    path,
                    processor=self._processor,
                    max_pixels=self._max_pixels,
                )
            except BadImage as bad:
                found = stamp(task.folder, path)
                outcome.faults[path] = Fault(bad.reason, bad.detail, found)
        return outcome


def survey(
    experiment: Experiment,
    records: Sequence[Conversation | Rejected],
    *,
    processor: ImageProcessor,
    writer: Writer | None,
    progress: Callable[[str], None],
) -> Survey:
    """Check, encode and split the records; the writer, if any, gets images and examples."""
    seen = Survey(Counter(dict.fromkeys(experiment.data.sets, 0)))
    linked: list[tuple[Conversation, Links]] = []
    keys: dict[tuple[str, str], str] = {}
    faults: dict[tuple[str, str], Fault] = {}
    outcomes = _outcomes(experiment, _tasks(experiment, records), processor)
    for record in _told(records, seen, progress):
        if isinstance(record, Rejected):
            seen.raw[record.source] += 1
            seen.quarantine.append(record)
            continue
        seen.raw[record.source] += len(record.records)
        folder, outcome = image_folder(experiment, record.source), next(outcomes)
        assert outcome.record == record.record, f"{outcome.record} came for {record.record}"
        for path, image in outcome.images.items():
            keys[folder, path] = image.key
            if writer:
                writer.image(image, source_id=f"{record.source}/{image.path}")
        for path, fault in outcome.faults.items():
            faults[folder, path] = fault
            if not path.startswith("data:"):  # which only another annotation file can mend
                about = {"source": record.source, "path": path, "stamp": fault.stamp}
                seen.bad_images.append(about)
        places = [(folder, image.path) for image in record.images]
        bad = next((faults[place] for place in places if place in faults), None)
        if bad:
            seen.drop(record, bad.reason, bad.detail)
        elif isinstance(outcome.example, Rejected):
            seen.drop(record, outcome.example.reason, outcome.example.detail)
        else:
            images = tuple(keys[place] for place in places)
            if writer:
                writer.example(replace(outcome.example, images=images))
            linked.append((record, Links(record.source, record.meta["key"], images)))
    _split(experiment, linked, seen)
    return seen


def encoder_of(experiment: Experiment) -> Encoder:
    """What encodes the experiment's conversations."""
    return Encoder(
        load_tokenizer(experiment.model.language.checkpoint),
        image_tokens=experiment.model.image_tokens,
        max_tokens=experiment.data.max_tokens,
        template=experiment.model.template,
    )


def _told(
    records: Sequence[Conversation | Rejected], seen: Survey, progress: Callable[[str], None]
) -> Iterator[Conversation | Rejected]:
    """The records one by one; says how far they are now and then, and when all have been taken."""
    began = said = time.monotonic()
    for number, record in enumerate(records):
        now = time.monotonic()
        if number == 1:  # the first waits for the actors to start, which tells nothing of the rest
            began = said = now
        if number > 1 and now - said > SAY_EVERY:
            said = now
            minutes = (now - began) / (number - 1) * (len(records) - number) / 60
            progress(f"{_checked(number, records, seen)}, about {minutes:.0f} minutes to go")
        yield record
    progress(_checked(len(records), records, seen))


def _checked(number: int, records: Sequence[object], seen: Survey) -> str:
    bad = len(seen.quarantine)
    return f"data: {number:,} of {len(records):,} records checked, {bad:,} quarantined"


def _split(
    experiment: Experiment, linked: Sequence[tuple[Conversation, Links]], seen: Survey
) -> None:
    sides = assign_split(
        [links for _, links in linked],
        declared={source: config.split for source, config in experiment.data.sets.items()},
        eval_fraction=experiment.data.eval_fraction,
        seed=experiment.train.seed,
    )
    for (conversation, links), side in zip(linked, sides, strict=True):
        if side == "straddles_split":
            seen.drop(
                conversation, side, "its images, or its record, are on both sides of the split"
            )
        else:
            seen.samples.append(Sample(conversation, links.images, side, links.group_keys))


def _tasks(experiment: Experiment, records: Sequence[Conversation | Rejected]) -> list[Task]:
    taken: set[tuple[str, str]] = set()
    tasks = []
    for record in records:
        if isinstance(record, Conversation):
            folder = image_folder(experiment, record.source)
            paths = dict.fromkeys(image.path for image in record.images)
            new = tuple(path for path in paths if (folder, path) not in taken)
            taken.update((folder, path) for path in new)
            tasks.append(Task(record, folder, new))
    return tasks


def stamp(folder: str, path: str) -> list[int] | None:
    """Size and time of the last change (ns) of a file, or the archive that it is in; else None."""
    for place in (Path(folder, path), *Path(folder, path).parents):
        try:
            found = place.stat()
        except NotADirectoryError:  # something on the way is a file: an archive
            continue
        except (OSError, ValueError):  # ValueError: a path that no file can have
            return None
        return [found.st_size, found.st_mtime_ns]
    return None


def image_folder(experiment: Experiment, source: str) -> str:
    """Folder or file of a set's images: absolute, as actors have working directories of their own."""
    return str(Path(experiment.storage.data, experiment.data.sets[source].images).absolute())


def _outcomes(
    experiment: Experiment, tasks: Sequence[Task], processor: ImageProcessor
) -> Iterator[Outcome]:
    """The outcomes of the tasks, in their order."""
    import ray.data  # takes seconds, and a set that is prepared already needs none

    if not tasks:
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    checkpoint = Path(experiment.model.language.checkpoint)
    blocks = [
        pa.table({"task": pa.array(map(pickle.dumps, tasks[i : i + BLOCK]), pa.large_binary())})
        for i in range(0, len(tasks), BLOCK)
    ]
    with ray.data.DataContext.current(context):  # a dataset takes its context when it is made
        outcomes = ray.data.from_arrow(blocks).map_batches(
            Preparer,
            fn_constructor_kwargs={
                "checkpoint": str(checkpoint.absolute() if checkpoint.is_dir() else checkpoint),
                "processor": processor,
                "image_tokens": experiment.model.image_tokens,
                "max_tokens": experiment.data.max_tokens,
                "template": experiment.model.template,
                "max_pixels": experiment.data.max_image_pixels,
            },
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=min(experiment.cluster.preparers, len(blocks))
            ),
        )
    for block in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
        for outcome in block["outcome"]:
            yield pickle.loads(outcome.as_py())
