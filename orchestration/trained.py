"""Which trained model is meant: of the best trial or of the training, at which checkpoint."""

from pathlib import Path
from typing import Any, NamedTuple

from dsvl import checkpoint_folder
from dsvl.config import require
from orchestration.config import Experiment
from orchestration.records.journal import read_json
from orchestration.records.results import experiment_of, refuse_another, trials_folder
from orchestration.searching.summary import summarize
from orchestration.storing.mirroring import mirror_of

CHAT = "chat.json"
"""In an exported model: how one chats with it."""


class Subject(NamedTuple):
    """A model to talk to."""

    name: str
    folder: Path
    """Of the model."""
    tokenizer: str
    """The folder that has it, or a name on the hub."""
    processor: str
    """The same."""
    manner: dict[str, Any]


def find(source: Experiment | Path) -> Subject:
    """The model of an exported folder, else what `choose` chooses, with what it raises."""
    if isinstance(source, Path) and (source / CHAT).is_file():
        name = source.resolve().name
        return Subject(name, source, str(source), str(source), read_json(source / CHAT))
    experiment, _, checkpoint = choose(source)
    parts = experiment.model.language.checkpoint, experiment.model.vision.checkpoint
    return Subject(experiment.name, checkpoint.folder, *parts, manner(experiment))


class Trained(NamedTuple):
    """A model as it was at some update."""

    experiment: Experiment
    """What was trained; a trial's own."""
    folder: Path
    """Of its run."""
    checkpoint: checkpoint_folder.Checkpoint

    @property
    def root(self) -> Path:
        """Whose journals are shipped together: its run's, or those of the sweep that it is a trial of."""
        return self.folder.parent if (self.folder / "values.json").exists() else self.folder


def choose(source: Experiment | Path, *, step: int | None = None) -> Trained:
    """The model of the best finished trial of an experiment's sweep, else of its training.

    Args:
        source: the experiment; or the folder of a run or trial, which is then meant itself.
        step: of which checkpoint; the newest that is whole when empty.

    Raises:
        FileNotFoundError: if there is no checkpoint yet.
        ValueError: if there is none of that step, or it is damaged or of another experiment, the differing
            fields being named; if the folder is of no run.
    """
    by_folder = isinstance(source, Path)
    experiment = experiment_of(source) if by_folder else source
    folder = experiment.run_folder
    mirror = mirror_of(experiment)
    if mirror:
        mirror.fetch(folder)
    if experiment.search and trials_folder(experiment).exists():
        best = summarize(experiment)["best"]
        if best:
            folder = Path(best["folder"])
            experiment = experiment.trial(read_json(folder / "values.json"))
    held = folder / "checkpoints"
    if mirror and step is None:
        mirror.fetch_newest(folder)
    elif mirror and step is not None and step not in checkpoint_folder.held(held):
        mirror.fetch_checkpoint(folder, step)
    found = checkpoint_folder.newest(held) if step is None else _at(held, step)
    if found is None:
        raise FileNotFoundError(f"{held}: no checkpoint yet; train or sweep first")
    if not by_folder:
        refuse_another(experiment, found.manifest, where=found.folder)
    return Trained(experiment, folder, found)


def manner(experiment: Experiment) -> dict[str, Any]:
    """How one chats with a model: what it was trained in, and on."""
    data = experiment.data
    return {
        "precision": experiment.train.precision,
        "max_tokens": data.max_tokens,
        "max_image_pixels": data.max_image_pixels,
    }


def _at(held: Path, step: int) -> checkpoint_folder.Checkpoint | None:
    """The checkpoint of a step among those that are held, or None where none are."""
    paths = checkpoint_folder.held(held)
    if not paths:
        return None
    there = ", ".join(map(str, sorted(paths)))
    require(step in paths, "checkpoint", step, f"must be one of those in {held}: {there}")
    fault = checkpoint_folder.find_fault(paths[step])
    require(not fault, "checkpoint", step, f"is damaged: {fault}; choose another of {there}")
    manifest = checkpoint_folder.read_manifest(paths[step])
    return checkpoint_folder.Checkpoint(paths[step], manifest)
