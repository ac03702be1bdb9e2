"""What each Ray Train worker does: build, resume, and the `for` over the library's steps."""

import logging
import time
from dataclasses import asdict
from pathlib import Path

import ray.train
import torch
from transformers import AutoTokenizer

from dsvl import checkpoint
from dsvl.chat import transcript
from dsvl.data.store import open_store
from dsvl.engine import Engine, join
from dsvl.evaluate import evaluate
from dsvl.model import VisualChat
from dsvl.train import Plan, steps
from orchestration.config import Experiment
from orchestration.journal import Journal, write_json

SAMPLE_CHATS = 4
"""Held-out chats that a finished model answers for the report."""


def work(config: dict) -> None:
    """Train one run to its end, from its newest valid checkpoint if it has one.

    `config` holds the `experiment` as a dict, the run's `folder` and the `prepared` data's folder. Rank 0
    alone writes to the run's folder: journal, checkpoints and, when all is done, `result.json`.
    """
    experiment = Experiment.model_validate(config["experiment"])
    folder, prepared = Path(config["folder"]), open_store(Path(config["prepared"]))
    began = time.time()
    torch.set_num_threads(max(1, int(experiment.cluster.cpus_per_worker)))
    join(backend="nccl" if experiment.cluster.gpus_per_worker else "gloo")
    model = VisualChat(experiment.model, precision=experiment.train.precision, seed=experiment.train.seed)
    engine = Engine(
        model, engine=experiment.engine, train=experiment.train, optim_config=experiment.optim
    )
    frozen = {
        "language": checkpoint.digest(experiment.model.language.checkpoint),
        "vision": checkpoint.digest(experiment.model.vision.checkpoint),
    }
    start = resume(engine, experiment, folder, frozen=frozen)
    plan = Plan(len(prepared.train), experiment.train)
    first = engine.rank == 0
    journal = Journal(folder) if first else None
    if journal:
        journal.start(identity=experiment.identity(), params=experiment.params(), step=start)

    metrics: dict[str, float] = {}
    for step in steps(engine, prepared, train=experiment.train, config=experiment.engine, start=start):
        metrics = step.metrics()
        if step.ends_epoch:
            metrics |= evaluate(
                model,
                prepared,
                batch=experiment.evaluation.batch,
                samples=experiment.evaluation.samples,
                device=engine.device,
            ).metrics()
            metrics["eval/accuracy_majority"] = prepared.majority_accuracy
        if journal:
            journal.metrics(step.number, metrics)
        if step.number % experiment.checkpoint.every == 0 or step.number == plan.steps:
            checkpoint.save(
                engine,
                folder / "checkpoints",
                step=step.number,
                position=divmod(step.number, plan.steps_per_epoch),
                identity=experiment.identity(),
                fields=experiment.identity_fields(),
                frozen=frozen,
                keep=experiment.checkpoint.keep,
            )
        if step.ends_epoch:
            ray.train.report(metrics | {"epoch": step.epoch + 1, "step": step.number})
