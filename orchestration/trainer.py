"""One training: a TorchTrainer made from an Experiment."""

import logging
import math
import os
import sys
import time
from pathlib import Path

import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from orchestration import faults
from orchestration.config import Experiment, legal_workers
from orchestration.journal import Journal

POLL_SECONDS = 5
log = logging.getLogger(__name__)


def fit(
    experiment: Experiment,
    folder: Path,
    prepared: Path,
    *,
    workers: int,
    callbacks: list[UserCallback] | None = None,
) -> None:
    """Run Ray Train to the end of the training; a failure is journaled with its cause and raised.

    Ray restarts a training on as many workers as before. Where it may have fewer we restart it, on a number
    that divides the batch, which Ray's own elastic trainings know nothing of.
    """
    elastic = experiment.cluster.min_workers is not None
    left = experiment.cluster.failures
    while True:
        count = _workers_that_fit(experiment) if elastic else workers
        restarts = FailureConfig(max_failures=0, controller_failure_limit=0)
        if not elastic:
            restarts = FailureConfig(max_failures=left)
        trainer = _trainer(experiment, folder, prepared, count, restarts, callbacks or [])
        try:
            trainer.fit()
            return
        except ray.train.TrainingFailedError as error:
            cause = first_cause(error)
            if not elastic or not left:
                Journal(folder).end("failed", reason=cause)
                raise RuntimeError(cause) from error
        left -= 1
        log.warning("the training of %d workers failed (%s) and starts anew", count, cause)


def _trainer(
    experiment: Experiment,
    folder: Path,
    prepared: Path,
    workers: int,
    restarts: FailureConfig,
    callbacks: list[UserCallback],
) -> TorchTrainer:
    use_gpu = experiment.cluster.gpus_per_worker > 0
    return TorchTrainer(
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
            num_workers=workers, use_gpu=use_gpu, resources_per_worker=_resources(experiment)
        ),
        run_config=RunConfig(
            name="train",
            storage_path=str((folder / "ray").absolute()),
            failure_config=restarts,
            callbacks=callbacks,
        ),
    )


def _resources(experiment: Experiment) -> dict[str, float]:
    """Of a worker."""
    resources: dict[str, float] = {"CPU": experiment.cluster.cpus_per_worker}
    if experiment.cluster.gpus_per_worker:
        resources["GPU"] = experiment.cluster.gpus_per_worker
    return resources


def _workers_that_fit(experiment: Experiment) -> int:
    """The most that the living nodes hold and the batch divides among; waits for the fewest allowed."""
    cluster, needed = experiment.cluster, _resources(experiment)
    assert cluster.min_workers is not None
    legal = legal_workers(experiment.train.batch, experiment.engine.micro_batch)
    legal = [count for count in legal if cluster.min_workers <= count <= cluster.workers]
    while True:
        room = sum(
            min(int(node["Resources"].get(kind, 0) / amount) for kind, amount in needed.items())
            for node in ray.nodes()
            if node["Alive"]
        )
        if fitting := [count for count in legal if count <= room]:
            return fitting[-1]
        log.warning("the nodes hold %d workers; waiting until they hold %d", room, legal[0])
        time.sleep(POLL_SECONDS)


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
