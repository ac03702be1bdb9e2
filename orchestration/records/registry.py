"""What MLflow has of a run beside its points: files, data, and models.

Its checkpoints are models that lie elsewhere; those that were exported are versions of a registered model.
"""

import io
import json
from collections.abc import Sequence
from itertools import islice
from math import isfinite
from pathlib import Path, PurePath
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
)
from mlflow.exceptions import MlflowException
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_MODEL_IS_EXTERNAL
from PIL import Image, ImageOps

from orchestration.config import digest
from orchestration.records import journal
from orchestration.records.record import read_if_there, read_images

FILES = ("experiment.json", "environment.json", "data.json")
"""Of a run's folder, kept with it as they are when it begins or goes on."""
FILED, NOTED = "dsvl.filed", "dsvl.noted"
"""Tags that say which state of these files the store has, and how many bytes of the run's notes."""
BATCH = 1000
"""Most metrics that MLflow takes at once; a tenth of it for parameters."""
TABLE = ("set", "sample", "round", "question", "expected", "answer")
"""Of the rounds of an evaluation, what MLflow shows side by side with those of other runs."""
PICTURED, SIDE = 50, 128
"""How many of the rounds that show images it shows with them, and their height."""
CONTEXTS = {"train": "training", "eval": "validation"}


class Registry:
    """Those of one MLflow run."""

    def __init__(self, client: MlflowClient, folder: Path, run_id: str, *, project: str) -> None:
        """`project` is the name that exported models are registered under."""
        self.client, self.folder, self.run_id, self.project = client, folder, run_id, project
        run = client.get_run(run_id)
        self.experiment_id = run.info.experiment_id
        self.filed, self.noted = run.data.tags.get(FILED), int(run.data.tags.get(NOTED, 0))
        self.has_data = run.inputs is not None and bool(run.inputs.dataset_inputs)
        self._models: dict[int, str] | None = None

    def files(self) -> None:
        """Keep the files that say what was run."""
        there = [path for name in FILES if (path := self.folder / name).exists()]
        state = digest([path.read_text(encoding="utf-8") for path in there])
        if state != self.filed:
            for path in there:
                self.client.log_artifact(self.run_id, str(path))
            self.client.set_tag(self.run_id, FILED, state)
            self.filed = state

    def data(self) -> None:
        """Say which prepared data are trained on and held out: every blend, with its share of the samples."""
        found = read_if_there(self.folder / "data.json")
        if self.has_data or not found:
            return
        inputs = []
        for side, context in CONTEXTS.items():
            sizes = {name: sides[side] for name, sides in found["blends"].items() if sides[side]}
            for name, samples in sizes.items():
                dataset = Dataset(
                    name=name if side == "train" else f"{name} held out",
                    digest=found["digest"],
                    source_type="local",
                    source=json.dumps({"uri": found["folder"]}),
                    profile=json.dumps({"samples": samples, "sets": found["sources"]}),
                )
                share = f"{samples / sum(sizes.values()):.4f}"
                tags = {MLFLOW_DATASET_CONTEXT: context, "samples": str(samples), "share": share}
                inputs.append(DatasetInput(dataset, [InputTag(*tag) for tag in tags.items()]))
        self.client.log_inputs(self.run_id, inputs)
        self.client.set_tag(self.run_id, "dsvl.data", found["digest"])
        self.has_data = True

    def checkpoint(self, step: int, metrics: dict[str, float]) -> None:
        """Name a checkpoint as a model that lies elsewhere, with what was measured of it.

        Its points are those that the run has of this step already, so none is there twice.
        """
        if step in self.models:
            return
        path = self.folder / f"checkpoints/step-{step:06d}"
        model = self.client.create_logged_model(
            self.experiment_id,
            name=path.name,
            source_run_id=self.run_id,
            model_type="dsvl",
            tags={MLFLOW_MODEL_IS_EXTERNAL: "true", "dsvl.folder": str(path)},
        )
        points = [
            Metric(point.key, point.value, point.timestamp, step, model_id=model.model_id)
            for key in metrics
            for point in self.client.get_metric_history(self.run_id, key)
            if point.step == step
        ]
        self.client.log_batch(self.run_id, metrics=points)
        self.client.log_outputs(self.run_id, [LoggedModelOutput(model.model_id, step)])
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        self.models[step] = model.model_id

    @property
    def models(self) -> dict[int, str]:
        """Step -> id of the models that are whole in the store."""
        if self._models is None:
            found = self.client.search_logged_models(
                [self.experiment_id], f"source_run_id = '{self.run_id}'"
            )
            self._models = {
                int(model.name.removeprefix("step-")): model.model_id
                for model in found
                if model.status == LoggedModelStatus.READY
            }
        return self._models

    def notes(self) -> None:
        """Keep what was made of the run: files, and exported models as versions of a registered one."""
        notes, offset = journal.read(self.folder / journal.NOTES, self.noted)
        for note in notes:
            path = self.folder / note["path"]
            if note["kind"] == "export":
                self._register(path, note)
            elif not path.exists():  # it was removed before the store came back
                continue
            elif note["kind"] == "evaluation":
                self._evaluation(path, note)
            else:
                inside = PurePath(note["path"]).parent.name.replace("..", "")
                self.client.log_artifact(self.run_id, str(path), inside or None)
        if notes:
            self.client.set_tag(self.run_id, NOTED, str(offset))
            self.noted = offset

    def _evaluation(self, folder: Path, note: dict[str, Any]) -> None:
        """What was measured of the model after an update, as points, a file and a table of its answers."""
        moment = int(1000 * note["time"])
        points = [Metric(key, v, moment, note["step"]) for key, v in note["metrics"].items()]
        for first in range(0, len(points), BATCH):
            self.client.log_batch(self.run_id, metrics=points[first : first + BATCH])
        self.client.log_artifact(self.run_id, str(folder / "evaluation.json"))
        with (folder / "rounds.jsonl").open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in islice(file, BATCH)]
        kept = {held.path for held in self.client.list_artifacts(self.run_id)}
        pictured = [row for row in rows if row.get("shows")][:PICTURED]
        for name, some in (("rounds", rows), ("pictured", pictured)):
            columns: dict[str, list[Any]] = {key: [str(row[key]) for row in some] for key in TABLE}
            # MLflow appends to a table that is there: a name of its content keeps it from doing so twice.
            file = f"{name}-{digest(columns)}.json"
            if file in kept:
                continue
            if name == "pictured":
                images = self._images([row["shows"] for row in some])
                if not images:  # the prepared data are gone, or nothing was shown
                    continue
                columns = {"images": images} | columns
            self.client.log_table(self.run_id, columns, file)

    def _images(self, shown: Sequence[Sequence[str]]) -> list[Image.Image]:
        """Prepared images by their keys, those of a round side by side; none where some are gone."""
        about, keys = (
            read_if_there(self.folder / "data.json"),
            {key for some in shown for key in some},
        )
        images = read_images(Path(about["folder"]), keys) if about else {}
        if keys - images.keys():
            return []
        return [
            abreast(
                [
                    ImageOps.exif_transpose(Image.open(io.BytesIO(images[key]["bytes"])))
                    for key in some
                ]
            )
            for some in shown
        ]

    def _register(self, path: Path, note: dict[str, Any]) -> None:
        """The newest exported model is the candidate, and the champion if no champion does better."""
        self.checkpoint(note["step"], {})  # without measurements unless it has been evaluated
        about = {"folder": str(path), "step": str(note["step"]), note["metric"]: str(note["value"])}
        champion = self._champion(note["metric"])
        try:
            self.client.create_registered_model(self.project)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(
            self.project,
            source=f"models:/{self.models[note['step']]}",
            run_id=self.run_id,
            model_id=self.models[note["step"]],
            tags=about,
            await_creation_for=0,
        )
        sign = 1 if note["mode"] == "min" else -1
        better = isfinite(note["value"]) and (
            champion is None or sign * note["value"] < sign * champion
        )
        for alias in ("candidate", *(["champion"] if better else [])):
            self.client.set_registered_model_alias(self.project, alias, version.version)

    def _champion(self, metric: str) -> float | None:
        """What was measured of the champion, if there is one that was measured by this."""
        try:
            version = self.client.get_model_version_by_alias(self.project, "champion")
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None
        return float(version.tags[metric]) if metric in version.tags else None


def abreast(images: Sequence[Image.Image]) -> Image.Image:
    """Images side by side, as high as one another."""
    scaled = [
        image.convert("RGB").resize((max(1, SIDE * image.width // image.height), SIDE))
        for image in images
    ]
    whole = Image.new("RGB", (sum(image.width + 4 for image in scaled) - 4, SIDE), "white")
    left = 0
    for image in scaled:
        whole.paste(image, (left, 0))
        left += image.width + 4
    return whole
