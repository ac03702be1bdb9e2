"""The records of every set, read into files by Ray Data: a set at a time, several sets at once."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dsvl.config import SCHEMA_VERSION
from dsvl.data.folders import sha256
from dsvl.data.readers import read
from dsvl.data.spool import spool
from orchestration.config import Experiment, digest
from orchestration.preparing.pool import Progress, each

READ_HERE = 32 << 20
"""Bytes of annotations that the driver reads itself, sooner than an actor would have started."""


def spools(
    experiment: Experiment, work: Path, progress: Progress
) -> tuple[dict[str, Path], list[str]]:
    """The records of every set, in the order of the names of sets and files.

    Returns the folder of shards of each set, and why sets could not be read, a line each.
    """
    root, data = Path(experiment.storage.data).absolute(), experiment.data
    jobs: list[tuple[Any, ...]] = []
    folders: dict[str, Path] = {}
    unreadable: list[str] = []
    for source in sorted(data.sets):
        try:
            digests = annotation_digests(experiment, source)
        except OSError as error:
            unreadable.append(str(error))
            continue
        # However the files are listed, the records are the same.
        config = replace(
            data.sets[source], annotations=tuple(sorted(data.sets[source].annotations))
        )
        identity = {
            "schema_version": SCHEMA_VERSION,
            "source": source,
            "config": asdict(replace(config, records=None, max_dropped=None, split="auto")),
            "annotations": digests,
            "max_images": data.max_images,
            "seed": data.seed,
        }
        folders[source] = work / f"records-{source}-{digest(identity)}"
        if folders[source].is_dir():
            os.utime(folders[source])  # used, so that nobody tidies it away
        else:
            jobs.append((source, config, root, data.max_images, data.seed, folders[source]))
    size = sum((root / name).stat().st_size for job in jobs for name in job[1].annotations)
    if size < READ_HERE:
        results = map(_Reader(), jobs)
    else:
        progress(f"data: {len(jobs)} sets to read, {size / 2**30:.1f} GiB")
        cluster = experiment.cluster
        results = each(jobs, _Reader, {}, most=cluster.preparers, labels=cluster.cpu_labels)
    for done, (source, problem) in enumerate(results, start=1):
        if size >= READ_HERE:
            progress(f"data: {source} read, {done} of {len(jobs)} sets")
        if problem:
            unreadable.append(problem)
            del folders[source]
    return folders, sorted(unreadable)


class _Reader:
    """Puts the records of a set into shards; says why, where that cannot be done."""

    def __call__(self, job: tuple) -> tuple[str, str | None]:
        source, config, root, max_images, seed, folder = job
        try:
            spool(read(source, config=config, root=root, max_images=max_images, seed=seed), folder)
        except (OSError, ValueError) as error:
            return source, str(error)
        return source, None


def annotation_digests(experiment: Experiment, source: str) -> dict[str, str]:
    """sha256 of every annotation file of a set; raises FileNotFoundError where one is missing."""
    digests = {}
    for name in sorted(experiment.data.sets[source].annotations):
        path = Path(experiment.storage.data) / name
        if not path.is_file():
            raise FileNotFoundError(
                f"data.sets.{source}.annotations: {path}: no such file; relative paths start at "
                f"storage.data={experiment.storage.data}"
            )
        digests[name] = sha256(path)
    return digests
