"""One training: Ray Train's trainer made from an Experiment."""

import math
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig

from orchestration.clusters.placement import resources
from orchestration.config import Experiment
from orchestration.problems import raised_by_us
from orchestration.records.journal import Journal
from orchestration.records.results import JOB, content_of
from orchestration.storing.mirroring import newest_known
from orchestration.training import faults
from orchestration.training.recovery import Legal, Patience, RecoveringTrainer, first_cause, told


def fit(
    experiment: Experiment,
    folder: Path,
    prepared: Path,
    *,
    workers: int,
    callbacks: list[UserCallback] | None = None,
) -> None:
    """Run Ray Train to the end of the training; a failure is journaled with its cause and raised.

    Raises:
        ValueError: if a worker refuses what is asked for.
        RuntimeError: if the training fails of anything else.
    """
    use_gpu = experiment.cluster.gpus_per_worker > 0
    counts = experiment.worker_counts(workers)
    failures = FailureConfig(max_failures=experiment.cluster.failures)
    scaling = ScalingConfig(
        num_workers=(counts[0], workers) if len(counts) > 1 else workers,
        use_gpu=use_gpu,
        resources_per_worker=resources(experiment),
        label_selector=experiment.cluster.gpu_labels or None,
    )
    newest = partial(newest_known, experiment, folder.absolute())
    policies: dict[str, Any] = {"failure_policy": Patience(failures, newest)}
    if len(counts) > 1:
        policies["scaling_policy"] = Legal(scaling, counts)
    trainer = RecoveringTrainer(
        work,
        train_loop_config={
            "experiment": experiment.as_dict(),
            "folder": str(folder.absolute()),
            "prepared": str(prepared.absolute()),
            "content": content_of(prepared),
            "directory": str(Path.cwd()),
            "faults": faults.asked(),
        },
        torch_config=TorchConfig(
            backend="nccl" if use_gpu else "gloo",
            timeout_s=math.ceil(experiment.cluster.hang_timeout_s),
        ),
        policies=policies,
        scaling_config=scaling,
        run_config=RunConfig(
            name="train",
            storage_path=str((folder / "ray").absolute()),
            failure_config=failures,
            callbacks=callbacks or [],
        ),
    )
    began, heard = time.time(), signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except SystemExit:  # what Ray makes of Ctrl-C, with a status of 0
        raise KeyboardInterrupt from None
    except ray.train.TrainingFailedError as error:
        cause = first_cause(error)
        reason = told(error, folder)
        Journal(folder).end("failed", reason=reason, since=began)
        if isinstance(cause, ValueError) and isinstance(error, ray.train.WorkerGroupError):
            raise ValueError(str(cause)) from error
        raise RuntimeError(reason) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, heard)  # Ray leaves its own, which asks for what has ended


def work(config: dict) -> None:
    """What Ray calls on each worker: the model's modules are imported there, the driver needs none."""
    if JOB not in os.environ:  # to which Ray has given a folder of its own on each node
        os.chdir(config["directory"])  # what relative paths of the experiment start at
    if not config["experiment"]["cluster"]["gpus_per_worker"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # Ray leaves a GPU visible to who did not ask for one
        )
    # DeepSpeed's autotuner imports MLflow (1.4 s) to see whether it is there; no worker needs it.
    sys.modules["mlflow"] = None  # pyright: ignore[reportArgumentType]
    from orchestration.worker import work as run

    try:
        run(config)
    except ValueError as error:
        if raised_by_us(error):
            raise
        # A library's, of a file half read perhaps: no refusal of the request, so it may mend.
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
