"""What a trained model answers: each sample asked once by a pool of actors, and kept.

A folder holds the answers of one checkpoint, decoded one way: files of results by sample, each written whole
by the actor that asked. A sample is known by what is put to the model, so that it is never asked again,
whatever suite it is of, and however often the command is killed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsvl import pretrained
from dsvl.cache import ImageStore
from dsvl.converse import Answer, Question, converse, questions_of
from dsvl.data.collate import collate
from dsvl.data.encode import Encoder, load_tokenizer
from dsvl.data.images import ImageProcessor, load
from dsvl.data.sources import BadImage, Images
from dsvl.data.store import open_store
from dsvl.data.types import Example
from dsvl.evaluate import score_rounds
from orchestration.cluster import connect
from orchestration.config import Experiment
from orchestration.preparing.pool import Progress, each
from orchestration.records.journal import read_json, write_json
from orchestration.trained import Trained

BLANK = ""
"""The key of an image that is zero throughout."""
STORE_BYTES = 2**30
"""Most that an actor holds of images which the decoder knows."""

Result = dict[str, Any]
"""`answers`, a [text, tokens, ended] a round; for each way of `Sample.scored`, a [loss, targets, right] a
round; or `fault`, why it was not asked."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation to be had with the model."""

    questions: tuple[Question, ...]
    scored: Mapping[str, Example]
    """The same with its true answers, to be scored after the true history; by how its images are seen."""
    images: Mapping[str, str]
    """sha256 key -> what an image of a suite is called; those of held-out samples are prepared."""

    @property
    def key(self) -> str:
        """Names all that is put to the model."""
        total = hashlib.sha256()
        for asked in self.questions:
            total.update(asked.ids.tobytes() + asked.kinds.tobytes() + _joined(asked.images))
        for way, example in self.scored.items():
            total.update(way.encode() + example.labels.tobytes() + _joined(example.images))
        return total.hexdigest()[:32]


def _joined(keys: Sequence[str]) -> bytes:
    return b"|".join(key.encode() for key in keys) + b"."


def held_out(example: Example, ways: Mapping[str, tuple[str, ...]], *, image_tokens: int) -> Sample:
    """A held-out sample; `ways` of seeing it name the images that take the place of its own."""
    asked = tuple(questions_of(example, image_tokens=image_tokens))
    return Sample(asked, {way: replace(example, images=keys) for way, keys in ways.items()}, {})


def ask(
    chosen: Trained,
    samples: Mapping[str, Sample],
    folder: Path,
    *,
    prepared: Path,
    images: Path | None,
    progress: Progress,
) -> dict[str, Result]:
    """The results of samples by their keys: those of a folder, and of the rest once it has been asked.

    Connects to the experiment's cluster only if there is work.

    Args:
        chosen: the model.
        samples: by key.
        folder: of the answers of this checkpoint.
        prepared: the prepared data of held-out samples.
        images: below which those of a suite are.
        progress: is told how far it is.
    """
    experiment = chosen.experiment
    known = kept(folder)
    missing = [(key, sample) for key, sample in samples.items() if key not in known]
    # Alike ones together: rows of a batch wait for the longest, and for that with most rounds.
    missing.sort(key=lambda one: (len(one[1].questions), _length(one[1])))
    batch = experiment.evaluation.batch
    jobs = [missing[first : first + batch] for first in range(0, len(missing), batch)]
    if jobs:
        settings = {
            "experiment": experiment.as_dict(),
            "checkpoint": chosen.checkpoint.folder.absolute(),
            "prepared": prepared.absolute(),
            "images": images and images.absolute(),
            "folder": folder.absolute(),
        }
        cluster, done = experiment.cluster, len(samples) - len(missing)
        with connect(experiment):
            for count in each(
                jobs,
                Asker,
                settings,
                most=cluster.workers,
                gpus=cluster.gpus_per_worker,
                labels=cluster.gpu_labels,
            ):
                done += count
                progress(f"evaluate: {done:,} of {len(samples):,} conversations")
        known = kept(folder)
    return {key: known[key] for key in samples}


def kept(folder: Path) -> dict[str, Result]:
    """All results of a folder, by the key of their sample."""
    results: dict[str, Result] = {}
    for path in sorted(folder.glob("answers/*.json")):
        results |= read_json(path)
    return results


def _length(sample: Sample) -> int:
    return sum(len(asked.ids) for asked in sample.questions)


class Asker:
    """The actor that asks, a batch of samples at a time."""

    def __init__(
        self, experiment: dict, checkpoint: Path, prepared: Path, images: Path | None, folder: Path
    ) -> None:
        settings = Experiment.model_validate(experiment)
        torch.set_num_threads(max(1, int(settings.cluster.cpus_per_worker)))
        self._device = torch.device("cuda" if settings.cluster.gpus_per_worker else "cpu")
        model = pretrained.load(checkpoint, precision=settings.train.precision)
        self._model = model.to(self._device).eval()
        self._encoder = encoder(settings)
        self._new_tokens = settings.evaluation.new_tokens
        self._prepared, self._folder = open_store(prepared), folder
        self._images = Images(images) if images else None
        self._processor = ImageProcessor.from_checkpoint(settings.model.vision.checkpoint)
        self._most = settings.data.max_image_pixels
        self._store = ImageStore(limit_bytes=STORE_BYTES)

    def __call__(self, job: Sequence[tuple[str, Sample]]) -> int:
        """Ask the samples of a job, keep the results and return how many there are.

        Where they need more memory than the GPU has, they are asked in halves.
        """
        try:
            return self._ask(job)
        except torch.OutOfMemoryError:
            if len(job) == 1:
                raise
        torch.cuda.empty_cache()
        half = len(job) // 2
        return self(job[:half]) + self(job[half:])

    def _ask(self, job: Sequence[tuple[str, Sample]]) -> int:
        shown, faults = self._look(job)
        fine = [(key, sample) for key, sample in job if key not in faults]
        results: dict[str, Result] = {key: {"fault": fault} for key, fault in faults.items()}

        def pixels(key: str) -> np.ndarray:
            if key == BLANK:
                return np.zeros((3, self._processor.size, self._processor.size), np.float32)
            return shown[key] if key in shown else self._prepared.pixels(key)

        said = converse(
            self._model,
            self._encoder,
            [sample.questions for _, sample in fine],
            pixels=pixels,
            max_new_tokens=self._new_tokens,
            device=self._device,
            store=self._store,
        )
        results |= {
            key: {"answers": [self._told(answer) for answer in answers]}
            for (key, _), answers in zip(fine, said, strict=True)
        }
        for way in fine[0][1].scored if fine else ():
            self._score([(key, sample.scored[way]) for key, sample in fine], way, pixels, results)
        name = hashlib.sha256("".join(key for key, _ in job).encode()).hexdigest()[:24]
        (self._folder / "answers").mkdir(parents=True, exist_ok=True)
        write_json(self._folder / f"answers/{name}.json", results)
        return len(results)

    def _score(
        self,
        examples: Sequence[tuple[str, Example]],
        way: str,
        pixels: Callable[[str], np.ndarray],
        results: dict[str, Result],
    ) -> None:
        batch = collate(
            [example for _, example in examples],
            pixels=pixels,
            image_tokens=self._encoder.image_tokens,
            pad_id=self._encoder.pad_id,
        )
        rounds = score_rounds(self._model, batch.to(self._device))
        for (key, _), told in zip(examples, rounds, strict=True):
            results[key][way] = [[each.loss, each.targets, each.right] for each in told]

    def _told(self, answer: Answer) -> list[Any]:
        return [self._encoder.decode(answer.ids), len(answer.ids), answer.ended]

    def _look(
        self, job: Sequence[tuple[str, Sample]]
    ) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """The pixels of a suite's images by key; and why some of its samples cannot be asked."""
        shown: dict[str, np.ndarray] = {}
        faults: dict[str, str] = {}
        for key, sample in job:
            for image, name in sample.images.items():
                if image in shown:
                    continue
                assert self._images is not None
                try:
                    found = load(
                        self._images, name, processor=self._processor, max_pixels=self._most
                    )
                    shown[image] = self._processor.normalise(found.fitted)
                except BadImage as bad:
                    faults[key] = str(bad)
        return shown, faults


def encoder(experiment: Experiment) -> Encoder:
    """What turns questions into ids, as the model was trained."""
    return Encoder(
        load_tokenizer(experiment.model.language.checkpoint),
        image_tokens=experiment.model.image_tokens,
        max_tokens=experiment.data.max_tokens,
        template=experiment.model.template,
    )


def answers_folder(chosen: Trained) -> Path:
    """Where the answers of a checkpoint are: it is named by all that decides them."""
    _, frozen, parameters = pretrained.described(chosen.checkpoint.folder)
    it = chosen.experiment
    decoding = [it.train.precision, it.data.max_tokens, it.evaluation.new_tokens]
    identity = json.dumps([parameters, frozen, decoding], sort_keys=True)
    name = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return chosen.folder / "evaluations" / f"{chosen.checkpoint.folder.name}-{name}"
