"""What a run leaves in its folder: whose it is, its result, and its evaluations."""

import os
from datetime import UTC, datetime
from pathlib import Path

from orchestration.config import Experiment, StorageConfig, digest, validated
from orchestration.plan import blends_file
from orchestration.records.environment import environment
from orchestration.records.journal import points, read, read_json, write_json

EVIDENCE = "evidence.json"
"""What a search across sizes has found, in the run folder of its experiment."""
JOB = "DSVL_JOB"
"""Names, in the environment of all its processes, the job that a cluster runs."""


def logs(folder: Path) -> Path:
    """Where a run keeps its logs: what a cluster runs has a folder for each job."""
    return folder / "logs" / os.environ.get(JOB, "")


BEGINS = "begins on "


def note_place(log: Path, place: str) -> None:
    """Begin a rank's log, or go on with it, by where it runs."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} {BEGINS}{place}\n")


def place_of(folder: Path, rank: int) -> str:
    """Where a rank of a run ran when it was last begun, as its log says."""
    log = logs(folder) / f"rank-{rank}.log"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    begun = [line.partition(BEGINS)[2] for line in lines if BEGINS in line]
    return begun[-1] if begun else "an unknown node"


def experiment_of(folder: Path) -> Experiment:
    """The experiment of a run or a trial, whose run folder is this one wherever it lies now.

    Raises:
        ValueError: if the folder is of no run.
    """
    path = folder / "experiment.json"
    if not path.is_file():
        raise ValueError(
            f"{folder}: holds no {path.name}; name the folder of a run or a trial, or a YAML file"
        )
    experiment = validated(read_json(path)["experiment"])
    here = StorageConfig(path=str(folder.absolute().parent), data=experiment.storage.data)
    settings = {"name": folder.absolute().name, "storage": here, "search": None}
    return experiment.model_copy(update=settings)


def trials_folder(experiment: Experiment) -> Path:
    """Where the trials of a sweep lie, each a run folder of its own."""
    return experiment.run_folder / "trials"


def finished(experiment: Experiment, folder: Path) -> dict | None:
    """The result of a finished run, or None while there is none.

    Raises:
        ValueError: if it is the result of another experiment; the differing fields are named.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    result = read_json(path)
    refuse_another(experiment, result, where=path)
    return result


def write_result(experiment: Experiment, folder: Path, *, state: str) -> None:
    """Write down that a run is over, with the last of each of its metrics; it is never trained again."""
    latest = {key: value for key, _, value, _ in points(read(folder)[0])}
    write_json(
        folder / "result.json",
        {
            "state": state,
            "identity": experiment.identity(),
            "fields": experiment.identity_fields(),
            "metrics": latest,
        },
    )


def begin(experiment: Experiment, folder: Path) -> None:
    """Leave the resolved experiment in its run folder, and what it is run with.

    What was refused before anything was trained leaves the name to another experiment.

    Raises:
        ValueError: if the folder holds the run of another experiment; the differing fields are named.
    """
    path = folder / "experiment.json"
    if path.exists():
        stored = read_json(path)
        if read(folder)[0]:
            refuse_another(experiment, stored, where=path)
        elif stored["identity"] != experiment.identity():
            (folder / "data.json").unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "identity": experiment.identity(),
            "fields": experiment.identity_fields(),
            "experiment": experiment.as_dict(),
        },
    )
    write_json(folder / "environment.json", environment())


def refuse_another(experiment: Experiment, stored: dict, *, where: Path) -> None:
    """Raise ValueError, naming the differing fields, where a stored identity is not the experiment's."""
    if stored["identity"] != experiment.identity():
        raise ValueError(
            f"{where} belongs to another run: {'; '.join(experiment.differences(stored['fields']))}; "
            "set these fields back, or give this run another name"
        )


def require_same_data(experiment: Experiment, folder: Path, prepared: Path) -> None:
    """Hold a run to the prepared data that it began with, and that its trunk was trained on.

    Raises:
        ValueError: if they are others in content; an update would take other samples from now on.
    """
    manifest, blends = read_json(prepared / "manifest.json"), blends_file(prepared, experiment)
    ours = {
        "folder": str(prepared),
        "digest": content_of(prepared),
        "sources": manifest["sources"],
        "blends": read_json(blends) if blends.exists() else {},
    }
    trunk = experiment.checkpoint.trunk
    for run in (folder, *([Path(trunk)] if trunk else [])):
        path = run / "data.json"
        if path.exists() and (theirs := read_json(path))["digest"] != ours["digest"]:
            raise ValueError(
                f"{run}: trained on {theirs['folder']}; the raw data, or what came of them, have "
                f"changed since ({prepared}); restore the raw data, or give this run another name"
            )
    write_json(folder / "data.json", ours)


def content_of(prepared: Path) -> str | None:
    """A digest of all that is in prepared data, or None where there are none."""
    path = prepared / "manifest.json"
    return digest(read_json(path)["files"]) if path.is_file() else None


BRANCHING = ("train.epochs", "optim.schedule", "optim.decay_fraction")
"""In what a branch may differ from its trunk: fields that change nothing before the decay."""


def trunk_of(experiment: Experiment) -> Experiment | None:
    """The experiment that `checkpoint.trunk` names.

    Raises:
        ValueError: if it trains something else, from the beginning; the differing fields are named.
    """
    if experiment.checkpoint.trunk is None:
        return None
    trunk = experiment_of(Path(experiment.checkpoint.trunk))
    fields = trunk.identity_fields()
    if not trunk.optim.branching:
        raise ValueError(
            f"{trunk.run_folder}: trained with optim.schedule={trunk.optim.schedule} and optim.warmup_steps="
            f"{trunk.optim.warmup_steps}; a trunk has the schedule wsd and warmup_steps"
        )
    off = {"checkpoint.trunk": None, "checkpoint.branch_epochs": ()}
    alike = experiment.with_overrides({name: fields[name] for name in BRANCHING} | off)
    refuse_another(alike, {"identity": trunk.identity(), "fields": fields}, where=trunk.run_folder)
    return trunk


def evaluations(folder: Path) -> list[dict[str, float]]:
    """The held-out metrics of a run, epoch by epoch, from its journal."""
    latest = {
        entry["step"]: entry["metrics"]
        for entry in read(folder)[0]
        if entry["kind"] == "metrics" and "eval/loss" in entry["metrics"]
    }
    return [latest[step] for step in sorted(latest)]
