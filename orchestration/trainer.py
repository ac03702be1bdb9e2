"""One training: a TorchTrainer made from an Experiment."""

import math
import os
import sys
from functools import partial
from pathlib import Path

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestration import faults
from orchestration.config import Experiment
from orchestration.elastic import ElasticTrainer
from orchestration.journal import Journal
from orchestration.placement import resources


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
    counts = experiment.worker_counts(workers)
    kind = partial(ElasticTrainer, counts=counts) if len(counts) > 1 else TorchTrainer
    trainer = kind(
        work,
        train_loop_config={
            "experiment": experiment.as_dict(),
            "folder": str(folder.absolute()),
            "prepared": str(prepared.absolute()),
            "directory": str(Path.cwd()),
            "faults": faults.asked(),
        },
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo",
            timeout_s=math.ceil(experiment.cluster.hang_timeout_s),
        ),
        scaling_config=ScalingConfig(
            num_workers=(counts[0], workers) if len(counts) > 1 else workers,
            use_gpu=use_gpu,
            resources_per_worker=resources(experiment),
            label_selector=experiment.cluster.gpu_labels or None,
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
        cause = first_cause(error)
        Journal(folder).end("failed", reason=cause)
        raise RuntimeError(cause) from error


def work(config: dict) -> None:
    """What Ray calls on each worker: the model's modules are imported there, the driver needs none."""
    os.chdir(config["directory"])  # what relative paths of the experiment start at
    if not config["experiment"]["cluster"]["gpus_per_worker"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # Ray leaves a GPU visible to who did not ask for one
        )
    # DeepSpeed's autotuner imports MLflow (1.4 s) to see whether it is there; no worker needs it.
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
    from orchestration.worker import work as run

    run(config)


def first_cause(error: BaseException) -> str:
    """The innermost exception of a chain, as one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, ray.train.WorkerGroupError):
        return lines[-1]  # the end of a worker's traceback
    return f"{type(error).__name__}: {lines[-1]}"
