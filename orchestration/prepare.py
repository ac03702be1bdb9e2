"""Raw datasets -> a prepared set, made once."""

import hashlib
import json
import logging
import math
import re
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsvl.data.blend import Blender
from dsvl.data.encode import Encoder, fingerprint, load_tokenizer
from dsvl.data.folders import claim, discard
from dsvl.data.images import ImageProcessor
from dsvl.data.shard import stamp
from dsvl.data.store import open_store, verify
from dsvl.data.writer import Writer, write_quarantine
from orchestration.cluster import connect
from orchestration.config import Experiment
from orchestration.plan import blends_file
from orchestration.preparing.check import errors_of
from orchestration.preparing.pool import Progress
from orchestration.preparing.reading import annotation_digests
from orchestration.preparing.survey import (
    encoder_settings,
    image_folder,
    image_processor,
    survey,
)
from orchestration.problems import harmless
from orchestration.records.journal import write_json
from orchestration.records.record import read_if_there
from orchestration.storing.mirroring import mirror_of, require_access

log = logging.getLogger(__name__)

WORK = ".work"
"""The folder, beside prepared sets, of what a preparation has finished."""


def prepare(experiment: Experiment, *, progress: Progress = log.info) -> dict[str, Any]:
    """Prepare the experiment's data, unless that is done; returns its `folder` and what is in it.

    Connects to the experiment's cluster if Ray is not initialised, and only if there is work.

    Raises:
        ValueError: if a set loses more than `data.max_dropped`, naming the reasons and where the
            quarantine is; if a side of the split is empty; if a file as a whole cannot be read.
        FileNotFoundError: if an annotation file or a checkpoint's file is missing.
    """
    began = time.monotonic()
    if mirror := mirror_of(experiment):
        require_access(mirror)
    processor, identity = image_processor(experiment), _identity(experiment)
    folder = prepared_folder(experiment, identity)
    if mirror and verify(folder):
        with claim(folder):
            if verify(folder):  # unless another process has fetched it meanwhile
                mirror.fetch_prepared(folder)
    if mirror and experiment.engine.stored_features:
        mirror.fetch_features(folder)
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
        from orchestration.preparing.features import (
            store_features,  # takes seconds to import, for the tower
        )

        store_features(experiment, folder, progress)
    if mirror:
        mirror.push_prepared(folder)
    return _summary(experiment, folder, began, reused=not faults)


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
        errors = found.unreadable or errors_of(experiment, found)
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
        "processor": asdict(image_processor(experiment)),
    }


def _tidy(work: Path) -> None:
    """Remove what nobody has used for a day: records, images that no prepared set holds, unfinished work."""
    before = time.time() - 24 * 3600
    for made in work.iterdir():
        with suppress(FileNotFoundError):  # of another process that prepares, and goes on meanwhile
            if _last_used(made) < before:
                discard(made)


def _last_used(made: Path) -> float:
    if not made.name.startswith("shard-"):
        return made.stat().st_mtime
    pixels = (made / "pixels.npy").stat()
    return pixels.st_ctime if pixels.st_nlink == 1 else math.inf


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
    prepared, data = open_store(folder), experiment.data
    sides = {
        side: Blender(prepared, side, data=data, seed=experiment.seed_of(side))
        for side in ("train", "eval")
    }
    blends = {
        name: {side: blender.sizes[place] for side, blender in sides.items()}
        for place, name in enumerate(experiment.data.all_blends())
    }
    if empty := [name for name in data.blends if not any(blends[name].values())]:
        raise ValueError(
            f"data.blends.{empty[0]}: no sample can be made of its sets; join takes conversations "
            "over several images, after some over one of these alone: leave the blend out, or add such sets"
        )
    if read_if_there(kept := blends_file(folder, experiment)) != blends:
        write_json(kept, blends)
    return blends
