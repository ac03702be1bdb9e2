"""What each Ray Train worker does: build, resume, and the `for` over the library's steps."""

import logging
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import gethostname

import ray.train
import torch
from transformers import PreTrainedTokenizerFast

from dsvl import pretrained
from dsvl.chat import transcript
from dsvl.data.blend import Blender, Epoch, order
from dsvl.data.encode import fingerprint, load_tokenizer
from dsvl.data.store import Prepared, open_store
from dsvl.engine import Engine, divided, from_rank_0, join
from dsvl.evaluate import evaluate, majority_accuracy
from dsvl.features import Features
from dsvl.guard import Guard, guarded
from dsvl.model import VisualChat
from dsvl.rehearse import rehearse
from dsvl.train import Plan
from orchestration.config import Experiment
from orchestration.planning.cost import flops_of_a_step
from orchestration.planning.flops import flop_utilisation
from orchestration.planning.memory import gradient_checkpointing
from orchestration.preparing.features import features_folder
from orchestration.records import load
from orchestration.records.journal import Journal, write_json
from orchestration.records.meters import Meters
from orchestration.records.reckoning import came_to, foretold, peak_memory_gib
from orchestration.records.results import logs, note_place, write_result
from orchestration.storing.mirroring import Uploads, catch_up, mirror_of, require_prepared
from orchestration.training.checkpoints import Checkpoints
from orchestration.training.faults import inject
from orchestration.training.watchdog import Watchdog


def work(config: dict) -> None:
    """Train one run to its end, from its newest valid checkpoint if it has one.

    `config` holds the `experiment` as a dict, the run's `folder` and the `prepared` data's folder. Rank 0
    alone writes to the run's folder: journal, checkpoints and, when all is done, `result.json`; and brings
    them to the store, if there is one.
    """
    experiment = Experiment.model_validate(config["experiment"])
    folder = Path(config["folder"])
    require_prepared(experiment, Path(config["prepared"]), config["content"])
    prepared = open_store(config["prepared"])
    tokenizer = load_tokenizer(experiment.model.language.checkpoint)
    require_encoded_with(tokenizer, prepared)
    torch.set_num_threads(max(1, int(experiment.cluster.cpus_per_worker)))
    join(backend="nccl" if experiment.cluster.gpus_per_worker else "gloo")
    train, rank, journal = experiment.train, torch.distributed.get_rank(), None
    if rank == 0:
        catch_up(experiment, folder, lambda mirror: mirror.fetch(folder, writer=True))
        # Before anything is read: a killed run's last process may still be writing.
        journal = Journal(folder)
    watchdog = Watchdog(logs(folder), rank=rank, seconds=experiment.cluster.hang_timeout_s)
    note_place(log := logs(folder) / f"rank-{rank}.log", f"{gethostname()}, process {os.getpid()}")
    keep_log(log)
    if ray.train.get_context().get_local_rank() == 0:
        load.watch(folder)
    memory_before = peak_memory_gib()
    # What fits among all workers need not fit among the few that an elastic training may have.
    world = {"cluster.workers": torch.distributed.get_world_size(), "cluster.min_workers": None}
    experiment = experiment.with_overrides(world)
    checkpointing = gradient_checkpointing(experiment)
    engine_config = replace(experiment.engine, gradient_checkpointing=checkpointing)
    with divided(experiment.model, engine=engine_config, train=train):
        model = VisualChat(experiment.model, precision=train.precision, seed=train.seed)
    watchdog.wind("handing the model to DeepSpeed")
    engine = Engine(model, engine=engine_config, train=train, optim_config=experiment.optim)
    # Ray leaves it to chance, and loading weights that are divided draws some of it.
    torch.manual_seed(train.seed + rank)
    watchdog.wind("hashing the frozen parts")
    frozen = from_rank_0(lambda: pretrained.digests(experiment.model))
    if experiment.engine.stored_features:
        features = Features(
            prepared, features_folder(experiment, prepared.folder, tower=frozen["vision"])
        )
        prepared.vision_input, prepared.vision_shape = features, features.shape
    blender = Blender(prepared, "train", data=experiment.data, seed=train.seed)
    samples = held_out_samples(prepared, experiment)
    plan, guard = Plan(len(blender), train), Guard(train)
    flops = sum(flops_of_a_step(experiment).values())

    checkpoints = Checkpoints(
        engine, experiment, folder, frozen=frozen, plan=plan, guard=guard, journal=journal
    )

    watchdog.wind("saving the untrained model")
    checkpoints.begin()
    mirror = mirror_of(experiment) if rank == 0 else None
    uploads = mirror and Uploads(mirror, folder, experiment.checkpoint, checkpoints.branches)
    watchdog.wind("passing the longest samples")
    batch = experiment.evaluation.batch
    rehearse(
        engine, prepared, blender, config=engine_config, epoch=0, held_out=samples,
        evaluation_batch=batch,
    )  # fmt: skip
    start = checkpoints.resume()
    meters = Meters(folder) if journal else None
    if meters:
        meters.begin(quarantined=prepared.quarantined)
    if journal and start == 0:
        about = {"data/quarantined": prepared.quarantined}
        journal.metrics(0, about | foretold(experiment, len(blender)))
    majority = majority_accuracy(blender.epoch(0), samples) if rank == 0 else 0.0

    answers = partial(
        transcript, model, tokenizer, prepared, max_tokens=experiment.data.max_tokens,
        device=engine.device, alive=partial(watchdog.wind, "answering"),
    )  # fmt: skip

    for step in guarded(
        engine, prepared, blender, train=train, config=engine_config, start=start,
        guard=guard, back=checkpoints.go_back, inspect_every=experiment.evaluation.inspect_every,
    ):  # fmt: skip
        inject(config["faults"], folder, rank=rank, step=step.number, model=model)
        measured: dict[str, float] = {}
        if step.ends_epoch:
            alive = partial(watchdog.wind, f"evaluating after update {step.number}")
            alive()
            tally = evaluate(
                model, prepared, samples, batch=batch, device=engine.device, alive=alive
            )
            measured = tally.metrics() | {"eval/accuracy_majority": majority}
            measured["train/epoch"] = step.epoch + 1
        metrics = step.metrics() | measured
        if step.ends_epoch:
            metrics["train/flops"] = step.number * flops
        if experiment.cluster.gpu_tflops and not step.skipped:
            metrics["throughput/flop_utilisation"] = flop_utilisation(
                experiment,
                tokens=step.tokens,
                targets=step.targets,
                images=step.images,
                seconds=step.seconds,
                workers=engine.workers,
            )
        chats = []
        if step.ends_epoch and step.number < plan.steps:
            chats = answers(count=min(1, experiment.evaluation.chats))
        if journal and meters:
            meters.update(step, metrics)
            journal.metrics(step.number, metrics)
            if chats:
                journal.chats(step.number, chats)
        if checkpoints.due(step.number, ends_epoch=step.ends_epoch):
            watchdog.wind(f"saving update {step.number}")
            checkpoints.save(step.number, measured)
        if step.ends_epoch:
            ray.train.report(metrics | {"epoch": step.epoch + 1})
        watchdog.wind(f"update {step.number + 1}")

    watchdog.wind("answering")
    chats = answers(count=experiment.evaluation.chats)
    if journal:
        write_json(folder / "chats.json", chats)
        journal.metrics(plan.steps, came_to(experiment, folder, memory_before=memory_before))
        journal.end("finished")
        write_result(experiment, folder, state="finished")
    watchdog.stop()
    if uploads:
        uploads.close()


def keep_log(path: Path) -> None:
    """Write what is worth saying into the run's folder: of a worker's output Ray alone knows where it is."""
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for package in ("dsvl", "orchestration"):
        logging.getLogger(package).addHandler(handler)


def require_encoded_with(tokenizer: PreTrainedTokenizerFast, prepared: Prepared) -> None:
    """Raise ValueError where the ids of prepared data are another tokenizer's."""
    if not fingerprint(tokenizer).items() <= prepared.manifest["identity"].items():
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer must be that which encoded {prepared.folder}; "
            "prepare the data with the model.size that is trained"
        )


def held_out_samples(prepared: Prepared, experiment: Experiment) -> Epoch:
    """What every evaluation measures: the same samples, drawn from all blends alike."""
    seed, most = experiment.seed_of("eval"), experiment.evaluation.samples
    epoch = Blender(prepared, "eval", data=experiment.data, seed=seed).epoch(0)
    return epoch.take(order(len(epoch), seed=seed, epoch=0)[:most])
