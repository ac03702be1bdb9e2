"""The frozen tower's features of all prepared images, computed once by a pool of actors."""

from pathlib import Path

import torch

from dsvl import features
from dsvl.data.store import open_store
from dsvl.model import DTYPES
from dsvl.pretrained import digest
from dsvl.vision import VisionTower
from orchestration.cluster import connect
from orchestration.config import Experiment
from orchestration.preparing.pool import Progress, each


def store_features(experiment: Experiment, prepared: Path, progress: Progress) -> Path:
    """Compute what is not there yet and return the folder of the features."""
    prepared = prepared.absolute()
    folder = features_folder(experiment, prepared, tower=digest(experiment.model.vision.checkpoint))
    shards = open_store(prepared).shards
    missing = [shard for shard in range(shards) if not (folder / f"{shard:05}.npy").is_file()]
    if missing:
        settings = {"experiment": experiment.as_dict(), "prepared": prepared, "folder": folder}
        cluster = experiment.cluster
        most = cluster.workers if cluster.gpus_per_worker else cluster.preparers
        with connect(experiment):
            done = each(
                missing,
                Tower,
                settings,
                most=most,
                gpus=cluster.gpus_per_worker,
                labels=cluster.gpu_labels,
            )
            for number, _ in enumerate(done, start=1):
                progress(f"data: features of {number:,} of {len(missing):,} shards of images")
    return folder


def features_folder(experiment: Experiment, prepared: Path, *, tower: str) -> Path:
    """Where the features of the experiment's tower are, whose digest is `tower`."""
    return features.folder_of(
        prepared, experiment.model.vision, tower=tower, precision=experiment.train.precision
    )


class Tower:
    """The actor that computes features, a shard of images at a time."""

    def __init__(self, experiment: dict, prepared: Path, folder: Path) -> None:
        settings = Experiment.model_validate(experiment)
        torch.set_num_threads(
            1
        )  # as an actor has one CPU; then an image's batch changes no bit of it
        device = "cuda" if settings.cluster.gpus_per_worker else "cpu"
        dtype = DTYPES[settings.train.precision]
        self._tower = (
            VisionTower(settings.model.vision, dtype=dtype).to(torch.device(device)).eval()
        )
        self._prepared, self._folder = open_store(prepared), folder

    def __call__(self, shard: int) -> int:
        """Write the features of a shard."""
        features.write(self._tower, self._prepared, shard, self._folder)
        return shard
