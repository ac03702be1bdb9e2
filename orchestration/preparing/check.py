"""What is wrong with raw datasets: every problem with its count and remedy, and what stops a preparation."""

import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsvl.data.types import Reason, Rejected
from dsvl.data.writer import conservation
from orchestration.cluster import connect
from orchestration.config import Experiment
from orchestration.preparing.pool import Progress
from orchestration.preparing.survey import Survey, image_processor, survey

log = logging.getLogger(__name__)

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


def check(experiment: Experiment, *, progress: Progress = log.info) -> dict[str, Any]:
    """Find every problem of the raw data, storing nothing.

    Returns `ok` (whether `prepare` would succeed), the `errors` that would stop it, the records
    of every set by what becomes of them (`held_out` are those of benchmarks), how many samples are on
    each side of the `splits`, and `problems`: for each set and reason the count, the records and the remedy.

    Raises:
        ValueError: if a checkpoint does not fit the experiment.
        FileNotFoundError: if a checkpoint's file is missing.
    """
    processor = image_processor(experiment)
    with _scratch(experiment) as work, connect(experiment):
        found = survey(experiment, processor=processor, work=work, writer=None, progress=progress)
    errors = found.unreadable or errors_of(experiment, found)
    dropped: dict[tuple[str, Reason], list[Rejected]] = {}
    for rejected in found.quarantine:
        dropped.setdefault((rejected.source, rejected.reason), []).append(rejected)
    return {
        "ok": not errors,
        "errors": errors,
        "sets": conservation(
            found.raw, used=found.used, merged=found.merged, quarantine=found.quarantine
        ),
        "splits": dict(found.splits),
        "problems": [
            {
                "source": source,
                "reason": reason,
                "count": len(those),
                "records": [f"{bad.record}: {bad.detail}" for bad in those],
                "remedy": REMEDIES[reason].replace("SET", source),
            }
            for (source, reason), those in sorted(dropped.items(), key=lambda item: -len(item[1]))
        ],
    }


def errors_of(experiment: Experiment, found: Survey) -> list[str]:
    """Why the survey's samples must not be used, a line each."""
    errors = []
    for source, raw in found.raw.items():
        if not raw:
            errors.append(f"data.sets.{source}: its annotations hold no record; name others")
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
