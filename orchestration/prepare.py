"""Raw datasets -> a prepared set, with Ray Data: read, check and encode, split, store.

The driver reads annotations and writes the store; a pool of actors opens every image once and
encodes every conversation. Results come back in the order of the records, block by block, so that
the set is the same whatever the number of actors and no more than a few blocks are in memory.
"""

import hashlib
import json
import logging
import pickle
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from dsvl.data.blend import Links, assign_split
from dsvl.data.encode import Encoder, load_tokenizer, pad_id
from dsvl.data.images import BadImage, ImageProcessor, StoredImage, load
from dsvl.data.readers import read
from dsvl.data.store import SCHEMA_VERSION, Writer, sha256, verify, write_quarantine
from dsvl.data.types import Conversation, Example, Reason, Rejected
from orchestration.cluster import connect
from orchestration.config import Experiment

log = logging.getLogger(__name__)

BLOCK = 32
"""Records a block: what an actor takes at once."""

REMEDIES: dict[Reason, str] = {
    "missing_image": "download the file, or correct the path or data.sets.SET.images",
    "undecodable_image": "fetch the file again, as JPEG, PNG or WebP",
    "forbidden_path": "name images relative to data.sets.SET.images, without links out of it",
    "image_too_large": "shrink the image, or raise data.max_image_pixels",
    "too_many_images": "split the record, or raise data.max_images",
    "unpaired_round": "give every question an answer",
    "bad_roles": "let human and gpt alternate, from the human",
    "empty_answer": "write the answer, or remove the round",
    "marker_mismatch": "give every image one <image> marker in a question, or none to any",
    "too_long": "shorten the record, or raise data.max_tokens",
    "straddles_split": "declare the split of both sets, or let the sets share no images",
    "held_out": "none is needed: the record belongs to a benchmark",
}

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Task:
    """A conversation to encode, and the images to open: those that no earlier task opens."""

    conversation: Conversation
    folder: str
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task; the example's images are still paths."""

    example: Example | Rejected
    images: dict[str, StoredImage | tuple[Reason, str]]


@dataclass
class Survey:
    """All raw records, gone through."""

    raw: Counter[str] = field(default_factory=Counter)
    """Records of every set."""
    samples: list[tuple[Conversation, tuple[str, ...], str, tuple[str, ...]]] = field(
        default_factory=list
    )
    """(conversation, sha256 keys, split, group keys) of those that came through."""
    quarantine: list[Rejected] = field(default_factory=list)


class Preparer:
    """The actor: opens images and encodes conversations. A bad record is an outcome, no error."""

    def __init__(
        self,
        *,
        checkpoint: str,
        processor: ImageProcessor,
        image_tokens: int,
        max_tokens: int,
        max_pixels: int,
    ) -> None:
        self._processor, self._max_pixels = processor, max_pixels
        self._encoder = Encoder(
            load_tokenizer(checkpoint), image_tokens=image_tokens, max_tokens=max_tokens
        )

    def __call__(self, block: pa.Table) -> pa.Table:
        """A column of pickled tasks -> a column of pickled outcomes."""
        outcomes = [self.outcome(pickle.loads(task.as_py())) for task in block["task"]]
        return pa.table({"outcome": pa.array(map(pickle.dumps, outcomes), pa.large_binary())})

    def outcome(self, task: Task) -> Outcome:
        """Open the task's images and encode its conversation."""
        images: dict[str, StoredImage | tuple[Reason, str]] = {}
        for path in task.paths:
            try:
                images[path] = load(
                    task.folder, path, processor=self._processor, max_pixels=self._max_pixels
                )
            except BadImage as bad:
                images[path] = bad.reason, bad.detail
        paths = [image.path for image in task.conversation.images]
        return Outcome(self._encoder.encode(task.conversation, paths), images)


def prepare(experiment: Experiment, *, progress: Progress = log.info) -> dict[str, Any]:
    """Prepare the experiment's data, unless that is done; returns its `folder` and what is in it.

    Connects to the experiment's cluster if Ray is not initialised, and only if there is work.
    Raises ValueError where a set loses more than `data.max_dropped`, naming the reasons and
    where the quarantine is, or where a side of the split is left empty; FileNotFoundError or
    ValueError, naming file and line, where a file as a whole cannot be read.
    """
    began = time.monotonic()
    processor, identity = _processor(experiment), _identity(experiment)
    folder = prepared_folder(experiment, identity)
    if (folder / "manifest.json").is_file():
        faults = verify(folder)
        if not faults:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            progress(f"data: {folder} is prepared already")
            return _summary(folder, manifest, began, reused=True)
        log.warning("data: preparing again, as %s", "; ".join(faults))
    vision = experiment.model.vision
    tokenizer = load_tokenizer(experiment.model.language.checkpoint)
    with (
        connect(experiment),
        Writer(
            folder, processor=processor, image_tokens=vision.tokens, pad_id=pad_id(tokenizer)
        ) as writer,
    ):
        records, unreadable = _records(experiment)
        if unreadable:
            raise ValueError("\n".join(unreadable.values()))
        survey = _survey(experiment, records, writer=writer, progress=progress)
        problems = _problems(experiment, survey)
        if problems:
            left = folder.with_name(f"{folder.name}.quarantine.jsonl")
            write_quarantine(left, survey.quarantine)
            raise ValueError("\n".join([*problems, f"every dropped record is listed in {left}"]))
        manifest = writer.finish(
            survey.samples, quarantine=survey.quarantine, raw=survey.raw, identity=identity
        )
    progress(
        f"data: {manifest['splits']['train']} training and {manifest['splits']['eval']} held-out "
        f"samples in {folder}; {len(survey.quarantine)} records quarantined"
    )
    return _summary(folder, manifest, began, reused=False)


def check(experiment: Experiment, *, progress: Progress = log.info) -> dict[str, Any]:
    """Find every problem of the raw data, storing nothing.

    Returns `ok` (whether `prepare` would succeed), the `errors` that would stop it, the records
    of every set by what becomes of them, and `problems`: for each set and reason the count,
    the first examples and the remedy.
    """
    with connect(experiment):
        records, unreadable = _records(experiment)
        survey = _survey(experiment, records, writer=None, progress=progress)
    errors = [*unreadable.values(), *_problems(experiment, survey)]
    found: dict[tuple[str, Reason], list[Rejected]] = {}
    for rejected in survey.quarantine:
        found.setdefault((rejected.source, rejected.reason), []).append(rejected)
    used = Counter(conversation.source for conversation, *_ in survey.samples)
    return {
        "ok": not errors,
        "errors": errors,
        "sets": {
            source: {
                "raw": raw,
                "used": used[source],
                "dropped": {
                    reason: len(those) for (of, reason), those in found.items() if of == source
                },
            }
            for source, raw in survey.raw.items()
        },
        "problems": [
            {
                "source": source,
                "reason": reason,
                "count": len(those),
                "examples": [f"{bad.record}: {bad.detail}" for bad in those[:3]],
                "remedy": REMEDIES[reason].replace("SET", source),
            }
            for (source, reason), those in sorted(found.items(), key=lambda item: -len(item[1]))
        ],
    }


def prepared_folder(experiment: Experiment, identity: dict[str, Any]) -> Path:
    """`prepared/NAME-DIGEST`: the names of the sets and a digest of all that decides a sample."""
    name = re.sub(r"[^\w.-]+", "_", "-".join(experiment.data.sets))[:80]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Path(experiment.storage.path) / "prepared" / f"{name}-{digest[:12]}"


def _identity(experiment: Experiment) -> dict[str, Any]:
    """Everything that decides what a sample is; equal for models that share a tokenizer."""
    data = asdict(experiment.data)
    for settings in data["sets"].values():
        del settings["records"]  # a hint for plans
    tokenizer = load_tokenizer(experiment.model.language.checkpoint)
    vocabulary = tokenizer.backend_tokenizer.to_str()
    return {
        "schema_version": SCHEMA_VERSION,
        "data": data,
        "annotations": {
            source: [sha256(path) for path in _annotations(experiment, source)]
            for source in experiment.data.sets
        },
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
        "special_tokens": [tokenizer.bos_token_id, tokenizer.eos_token_id, pad_id(tokenizer)],
        "processor": asdict(_processor(experiment)),
        "image_tokens": experiment.model.vision.tokens,
        "seed": experiment.train.seed,
    }


def _annotations(experiment: Experiment, source: str) -> list[Path]:
    names = experiment.data.sets[source].annotations
    paths = [Path(experiment.storage.data) / name for name in names]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(
                f"data.sets.{source}.annotations: {path}: no such file; relative paths start at "
                f"storage.data={experiment.storage.data}"
            )
    return paths


def _processor(experiment: Experiment) -> ImageProcessor:
    vision = experiment.model.vision
    processor = ImageProcessor.from_checkpoint(vision.checkpoint)
    if processor.size != vision.image_size:
        raise ValueError(
            f"model.vision.image_size={vision.image_size}: must be {processor.size}, as in "
            f"{vision.checkpoint}/preprocessor_config.json"
        )
    return processor


def _records(
    experiment: Experiment,
) -> tuple[list[Conversation | Rejected], dict[str, str]]:
    """The raw records of all sets in order, and for each set that cannot be read, why."""
    records: list[Conversation | Rejected] = []
    unreadable: dict[str, str] = {}
    data, root = experiment.data, Path(experiment.storage.data)
    for source, config in data.sets.items():
        try:
            _annotations(experiment, source)
            records += list(read(source, config=config, root=root, max_images=data.max_images))
        except (OSError, ValueError) as error:
            unreadable[source] = str(error)
    return records, unreadable


def _survey(
    experiment: Experiment,
    records: Sequence[Conversation | Rejected],
    *,
    writer: Writer | None,
    progress: Progress,
) -> Survey:
    """Check, encode and split the records; what is worth keeping goes to the writer."""
    survey = Survey({source: 0 for source in experiment.data.sets})
    tasks = _tasks(experiment, records)
    outcomes = _outcomes(experiment, tasks)
    opened: dict[tuple[str, str], str | tuple[Reason, str]] = {}
    kept: list[tuple[Conversation, tuple[str, ...], Links]] = []
    said = time.monotonic()
    for number, record in enumerate(records, start=1):
        survey.raw[record.source] += 1
        if time.monotonic() - said > 10:
            said = time.monotonic()
            progress(f"data: {number} of {len(records)} records checked")
        if isinstance(record, Rejected):
            survey.quarantine.append(record)
            continue
        folder, outcome = _images(experiment, record.source), next(outcomes)
        for path, found in outcome.images.items():
            if isinstance(found, StoredImage):
                opened[folder, path] = found.key
                if writer:
                    writer.image(found, source_id=f"{record.source}/{path}")
            else:
                opened[folder, path] = found
        found = [opened[folder, image.path] for image in record.images]
        faults = [fault for fault in found if not isinstance(fault, str)]
        if faults:
            survey.quarantine.append(Rejected(record.source, record.record, *faults[0]))
        elif isinstance(outcome.example, Rejected):
            survey.quarantine.append(outcome.example)
        else:
            keys = tuple(found)
            if writer:
                writer.example(replace(outcome.example, images=keys))
            kept.append((record, keys, Links(record.source, record.meta["key"], keys)))
    _split(experiment, kept, survey)
    return survey


def _split(
    experiment: Experiment,
    kept: Sequence[tuple[Conversation, tuple[str, ...], Links]],
    survey: Survey,
) -> None:
    sides = assign_split(
        [links for _, _, links in kept],
        declared={source: config.split for source, config in experiment.data.sets.items()},
        eval_fraction=experiment.data.eval_fraction,
        seed=experiment.train.seed,
    )
    for (conversation, keys, links), side in zip(kept, sides, strict=True):
        if side == "straddles_split":
            detail = "its images or its record are on both sides of the split"
            survey.quarantine.append(
                Rejected(conversation.source, conversation.record, side, detail)
            )
        else:
            survey.samples.append((conversation, keys, side, links.group_keys))


def _tasks(experiment: Experiment, records: Sequence[Conversation | Rejected]) -> list[Task]:
    seen: set[tuple[str, str]] = set()
    tasks = []
    for record in records:
        if isinstance(record, Conversation):
            folder = _images(experiment, record.source)
            paths = dict.fromkeys(image.path for image in record.images)
            new = tuple(path for path in paths if (folder, path) not in seen)
            seen.update((folder, path) for path in new)
            tasks.append(Task(record, folder, new))
    return tasks


def _images(experiment: Experiment, source: str) -> str:
    return str(Path(experiment.storage.data, experiment.data.sets[source].images).absolute())


def _outcomes(experiment: Experiment, tasks: Sequence[Task]) -> Iterator[Outcome]:
    """The outcomes of the tasks, in their order."""
    import ray.data

    if not tasks:
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it has no bars
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    folder = Path(experiment.model.language.checkpoint)  # else a name on the hub
    blocks = [
        pa.table({"task": pa.array(map(pickle.dumps, tasks[i : i + BLOCK]), pa.large_binary())})
        for i in range(0, len(tasks), BLOCK)
    ]
    with ray.data.DataContext.current(context):
        outcomes = ray.data.from_arrow(blocks).map_batches(
            Preparer,
            fn_constructor_kwargs={
                "checkpoint": str(folder.absolute()) if folder.is_dir() else str(folder),
                "processor": _processor(experiment),
                "image_tokens": experiment.model.vision.tokens,
                "max_tokens": experiment.data.max_tokens,
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


def _problems(experiment: Experiment, survey: Survey) -> list[str]:
    """Why the survey must not be used, one line a reason."""
    problems = []
    for source, raw in survey.raw.items():
        # Straddling records are the price of the split, not a fault of the data.
        dropped = [
            rejected
            for rejected in survey.quarantine
            if rejected.source == source and rejected.reason not in ("held_out", "straddles_split")
        ]
        if len(dropped) > experiment.data.max_dropped * raw:
            top = "; ".join(
                f"{count} {reason} ({_first(dropped, reason)})"
                for reason, count in Counter(bad.reason for bad in dropped).most_common(3)
            )
            problems.append(
                f"data.sets.{source}: {len(dropped)} of {raw} records dropped "
                f"({len(dropped) / raw:.1%}), more than data.max_dropped="
                f"{experiment.data.max_dropped} allows: {top}; repair them or raise the limit"
            )
    sides = Counter(split for _, _, split, _ in survey.samples)
    for split, remedy in (
        ("train", "give a set data.sets.SET.split=train or auto"),
        ("eval", "raise data.eval_fraction or give a set data.sets.SET.split=eval"),
    ):
        if not sides[split]:
            problems.append(
                f"data.sets: no sample is left on the {split} side of the split "
                f"({len(survey.samples)} samples, {len(survey.quarantine)} dropped); {remedy}"
            )
    return problems


def _first(dropped: Sequence[Rejected], reason: Reason) -> str:
    first = next(rejected for rejected in dropped if rejected.reason == reason)
    return f"{first.record}: {first.detail}"


def _summary(
    folder: Path, manifest: dict[str, Any], began: float, *, reused: bool
) -> dict[str, Any]:
    shown = {name: manifest[name] for name in ("sources", "splits", "mix", "images")}
    seconds = round(time.monotonic() - began, 1)
    return {"folder": str(folder), "reused": reused, "seconds": seconds, **shown}
