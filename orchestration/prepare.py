"""Raw datasets -> a prepared set, made once; or a list of what is wrong with them."""

import hashlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsvl.data.blend import Blender
from dsvl.data.encode import Encoder, fingerprint, load_tokenizer
from dsvl.data.folders import discard
from dsvl.data.images import ImageProcessor
from dsvl.data.shard import stamp
from dsvl.data.store import open_store, verify
from dsvl.data.types import Reason, Rejected
from dsvl.data.writer import Writer, claim, write_quarantine
from orchestration.cluster import connect
from orchestration.config import Experiment
from orchestration.plan import blends_file
from orchestration.pool import Progress
from orchestration.problems import harmless
from orchestration.reading import annotation_digests
from orchestration.survey import (
    Survey,
    encoder_settings,
    image_folder,
    survey,
)

log = logging.getLogger(__name__)

WORK = ".work"
"""The folder, beside prepared sets, of what a preparation has finished."""

REMEDIES: dict[Reason, str] = {
    "missing_image": "download the file, or correct its path or data.sets.SET.images",
    "undecodable_image": "fetch the file again, as JPEG, PNG or WebP",
    "forbidden_path": "name images relative to data.sets.SET.images, without links out of it",
    "image_too_large": "shrink the image, or raise data.max_image_pixels",
    "too_many_images": "split the record, or raise data.max_images",
    "unpaired_round": "give every question an answer",
    "bad_roles": "let human and gpt alternate, beginning with the human",
    "empty_answer": "write the answer, or remove the round",
    "marker_mismatch": "give each image one <image> marker in a question, or no image any",
    "too_long": "shorten the record, or raise data.max_tokens",
    "straddles_split": "let the sets share no images, or declare data.sets.SET.split",
    "held_out": "none is needed: the record belongs to a benchmark",
}


def prepare(experiment: Experiment, *, progress: Progress = log.info) -> dict[str, Any]:
    """Prepare the experiment's data, unless that is done; returns its `folder` and what is in it.

    Connects to the experiment's cluster if Ray is not initialised, and only if there is work.

    Raises:
        ValueError: if a set loses more than `data.max_dropped`, naming the reasons and where the
            quarantine is; if a side of the split is empty; if a file as a whole cannot be read.
        FileNotFoundError: if an annotation file or a checkpoint's file is missing.
    """
    began = time.monotonic()
    processor, identity = _processor(experiment), _identity(experiment)
    folder = prepared_folder(experiment, identity)
    if _faults(experiment, folder):
        with claim(folder):
            faults = _faults(experiment, folder)  # none if another process has mended it meanwhile
            if faults:
                if folder.exists():
                    log.warning("data: preparing again, as %s", "; ".join(faults))
                _make(experiment, folder, processor, identity, progress=progress)
    else:
        faults = []
        progress(f"data: {folder} is prepared already; remove it to have images read anew")
    if experiment.engine.stored_features:
        from orchestration.features import store_features  # takes seconds to import, for the tower

        store_features(experiment, folder, progress)
    return _summary(experiment, folder, began, reused=not faults)


def check(experiment: Experiment, *, progress: Progress = log.info) -> dict[str, Any]:
    """Find every problem of the raw data, storing nothing.

    Returns `ok` (whether `prepare` would succeed), the `errors` that would stop it, the records
    of every set by what becomes of them, and `problems`: for each set and reason the count,
    the first examples and the remedy.

    Raises:
        ValueError: if a checkpoint does not fit the experiment.
        FileNotFoundError: if a checkpoint's file is missing.
    """
    processor = _processor(experiment)
    with _scratch(experiment) as work, connect(experiment):
        found = survey(experiment, processor=processor, work=work, writer=None, progress=progress)
    errors = [*found.unreadable, *([] if found.unreadable else _errors(experiment, found))]
    dropped: dict[tuple[str, Reason], list[Rejected]] = {}
    for rejected in found.quarantine:
        dropped.setdefault((rejected.source, rejected.reason), []).append(rejected)
    return {
        "ok": not errors,
        "errors": errors,
        "sets": {
            source: {
                "raw": raw,
                "used": found.used[source],
                "merged": found.merged[source],
                "dropped": {
                    reason: len(those) for (of, reason), those in dropped.items() if of == source
                },
            }
            for source, raw in found.raw.items()
        },
        "problems": [
            {
                "source": source,
                "reason": reason,
                "count": len(those),
                "examples": [f"{bad.record}: {bad.detail}" for bad in those[:3]],
                "remedy": REMEDIES[reason].replace("SET", source),
            }
            for (source, reason), those in sorted(dropped.items(), key=lambda item: -len(item[1]))
        ],
    }


def _faults(experiment: Experiment, folder: Path) -> list[str]:
    """Why a prepared set must be made (again), a line each."""
    faults = verify(folder)
    if faults:
        return faults
    lines = (folder / "bad_images.jsonl").read_text(encoding="utf-8").splitlines()
    changed = [
        bad["path"]
        for bad in map(json.loads, lines)
        if stamp(image_folder(experiment, bad["source"]), bad["path"]) not in (None, bad["stamp"])
    ]
    shown = harmless(", ".join(changed[:3])) + (", ..." if changed[3:] else "")
    return [f"images that could not be used have changed: {shown}"] if changed else []


def _make(
    experiment: Experiment,
    folder: Path,
    processor: ImageProcessor,
    identity: dict[str, Any],
    *,
    progress: Progress,
) -> None:
    """Prepare the data in `folder`."""
    tokenizer = load_tokenizer(experiment.model.language.checkpoint)
    encoder = Encoder(tokenizer, **encoder_settings(experiment))
    writer = Writer(
        folder,
        processor=processor,
        image_tokens=encoder.image_tokens,
        pad_id=encoder.pad_id,
        phrases=encoder.phrases(experiment.data.max_images),
    )
    work = (folder.parent / WORK).absolute()
    with writer, connect(experiment):
        found = survey(experiment, processor=processor, work=work, writer=writer, progress=progress)
        errors = found.unreadable or _errors(experiment, found)
        if errors:
            if not found.unreadable:
                left = folder.with_name(f"{folder.name}.quarantine.jsonl")
                write_quarantine(left, found.quarantine)
                errors.append(f"every dropped record is listed in {left}")
            raise ValueError("\n".join(errors))
        writer.finish(
            quarantine=found.quarantine,
            bad_images=found.bad_images,
            raw=found.raw,
            merged=found.merged,
            identity=identity,
            about={"percolations": found.percolations},
        )
    _tidy(work)
    splits = found.splits
    progress(
        f"data: {splits['train']} training and {splits['eval']} held-out samples in {folder}; "
        f"{len(found.quarantine)} of {found.raw.total()} records quarantined"
    )


def require_one_tokenizer(experiment: Experiment) -> None:
    """Raise ValueError where the sizes that a search tries cannot share prepared data."""
    model, search = experiment.model, experiment.search
    domain = search.space.get("model.size") if search else None
    prints = {
        size: fingerprint(load_tokenizer(model.languages[size].checkpoint))
        for size in {model.size: None} | dict.fromkeys(domain.probes() if domain else ())
    }
    others = [size for size in prints if prints[size] != prints[model.size]]
    if others:
        raise ValueError(
            f"search.space.model.size: {', '.join(others)} must have the tokenizer of "
            f"model.size={model.size}, as all trials share its prepared data; "
            "give sizes with another tokenizer an experiment of their own"
        )


def prepared_folder(experiment: Experiment, identity: dict[str, Any]) -> Path:
    """`prepared/NAME-DIGEST`: the names of the sets and a digest of all that decides a sample."""
    name = re.sub(r"[^\w.-]+", "_", "-".join(sorted(experiment.data.sets)))[:80]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return Path(experiment.storage.path) / "prepared" / f"{name}-{digest[:12]}"


def _identity(experiment: Experiment) -> dict[str, Any]:
    """All that decides what a sample is; equal for models that share tokenizer and processor."""
    return {
        **experiment.preparation(),
        "annotations": {
            source: annotation_digests(experiment, source) for source in experiment.data.sets
        },
        **fingerprint(load_tokenizer(experiment.model.language.checkpoint)),
        "processor": asdict(_processor(experiment)),
    }


def _processor(experiment: Experiment) -> ImageProcessor:
    vision = experiment.model.vision
    processor = ImageProcessor.from_checkpoint(vision.checkpoint)
    if processor.size != vision.image_size:
        raise ValueError(
            f"model.vision.image_size={vision.image_size}: must be {processor.size}, as in "
            f"{vision.checkpoint}/preprocessor_config.json"
        )
    return processor


def _tidy(work: Path) -> None:
    """Remove what is a day old: finished shards whose images no prepared set holds, and unfinished work."""
    before = time.time() - 24 * 3600
    for shard in work.glob("shard-*"):
        pixels = (shard / "pixels.npy").stat()
        if pixels.st_nlink == 1 and pixels.st_ctime < before:
            discard(shard)
    for unfinished in work.glob(".*"):
        if unfinished.stat().st_mtime < before:
            shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed


@contextmanager
def _scratch(experiment: Experiment) -> Iterator[Path]:
    """A folder for a while, in the storage, which every machine sees; nothing is left of it."""
    storage = Path(experiment.storage.path)
    there = storage.exists()
    storage.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".check-", dir=storage.absolute()) as folder:
            yield Path(folder)
    finally:
        if not there and not any(storage.iterdir()):
            storage.rmdir()


def _errors(experiment: Experiment, found: Survey) -> list[str]:
    """Why the survey's samples must not be used, a line each."""
    errors = []
    for source, raw in found.raw.items():
        field, limit = "data.max_dropped", experiment.data.max_dropped
        if (own := experiment.data.sets[source].max_dropped) is not None:
            field, limit = f"data.sets.{source}.max_dropped", own
        # Straddling records are the price of the split, not a fault of the data.
        dropped = [
            bad
            for bad in found.quarantine
            if bad.source == source and bad.reason not in ("held_out", "straddles_split")
        ]
        if len(dropped) > limit * raw:
            errors.append(
                f"data.sets.{source}: {len(dropped)} of {raw} records dropped "
                f"({len(dropped) / raw:.1%}), more than {field}={limit} allows: "
                f"{_top(dropped)}; repair them, or raise the limit"
            )
    for split, remedy in (
        ("train", "give a set split: train or auto"),
        ("eval", "raise data.eval_fraction, or give a set split: eval"),
    ):
        if not found.splits[split]:
            errors.append(
                f"data.sets: no sample is on the {split} side of the split, of "
                f"{found.raw.total()} records with {len(found.quarantine)} dropped; {remedy}"
            )
    return errors


def _top(dropped: Sequence[Rejected]) -> str:
    """The three most frequent reasons, each with its count and first record."""
    by_reason: dict[Reason, list[Rejected]] = {}
    for bad in dropped:
        by_reason.setdefault(bad.reason, []).append(bad)
    return "; ".join(
        f"{len(those)} {reason} ({those[0].record}: {those[0].detail})"
        for reason, those in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:3]
    )


def _summary(experiment: Experiment, folder: Path, began: float, *, reused: bool) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    shown = {name: manifest[name] for name in ("sources", "splits", "mix", "images")}
    return {
        "folder": str(folder),
        "reused": reused,
        "seconds": round(time.monotonic() - began, 1),
        **shown,
        "blends": _blends(experiment, folder),
    }


def _blends(experiment: Experiment, folder: Path) -> dict[str, dict[str, int]]:
    """The samples that each blend has in an epoch, on both sides of the split; kept for plans."""
    prepared, seed = open_store(folder), experiment.train.seed
    sides = {
        side: Blender(prepared, side, data=experiment.data, seed=seed) for side in ("train", "eval")
    }
    blends = {
        name: {side: blender.sizes[place] for side, blender in sides.items()}
        for place, name in enumerate(experiment.data.all_blends())
    }
    kept = blends_file(folder, experiment)
    kept.write_text(json.dumps(blends, indent=1) + "\n", encoding="utf-8")
    return blends
