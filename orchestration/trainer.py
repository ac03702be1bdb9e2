"""One training: a TorchTrainer made from an Experiment, and what it left in the run's folder."""

import json
import sys
from pathlib import Path

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestration.config import Experiment
from orchestration.journal import Journal, points, read, write_json


def fit(
    experiment: Experiment,
    folder: Path,
    prepared: Path,
    *,
    workers: int,
    callbacks: list[UserCallback] | None = None,
) -> None:
    """Run Ray Train to the end of the training; a failure is journaled with its cause and raised."""
    use_gpu = experiment.cluster.gpus_per_worker > 0
    resources = {"CPU": experiment.cluster.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = experiment.cluster.gpus_per_worker
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "experiment": experiment.as_dict(),
            "folder": str(folder),
            "prepared": str(prepared),
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str((folder / "ray").absolute()),
            failure_config=FailureConfig(max_failures=experiment.cluster.failures),
            callbacks=callbacks or [],
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        Journal(folder).end("failed", reason=first_cause(error))
        raise


def work(config: dict) -> None:
    """What Ray calls on each worker: the model's modules are imported there, the driver needs none."""
    # DeepSpeed's autotuner imports MLflow (1.4 s) to see whether it is there; no worker needs it.
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
    from orchestration.worker import work as run

    run(config)


def finished(experiment: Experiment, folder: Path) -> dict | None:
    """The result of a finished run, or None while there is none.

    Raises:
        ValueError: if it is the result of another experiment; the differing fields are named.
    """
    path = folder / "result.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    _refuse_another(experiment, folder, result)
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
    """Leave the resolved experiment in its run folder.

    Raises:
        ValueError: if the folder holds the run of another experiment; the differing fields are named.
    """
    path = folder / "experiment.json"
    if path.exists():
        before = json.loads(path.read_text())
        _refuse_another(experiment, folder, before)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "identity": experiment.identity(),
            "fields": experiment.identity_fields(),
            "experiment": experiment.as_dict(),
        },
    )


def _refuse_another(experiment: Experiment, folder: Path, before: dict) -> None:
    if before["identity"] != experiment.identity():
        raise ValueError(
            f"{folder} holds another run: {'; '.join(experiment.differences(before['fields']))}. "
            "Give this one another name, or remove the folder"
        )


def first_cause(error: BaseException) -> str:
    """The innermost exception of a chain, as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
