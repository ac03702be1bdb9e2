"""Ways of training compared over seeds: the table and the learning curves of a sweep over `train.seed`.

    dsvl sweep configs/experiment/attention.yaml
    python -m tests.benchmarks.comparing configs/experiment/attention.yaml [--write FILE.md]

reads the run folders of a sweep. With `--train` it first trains those that have no result in this process, by
the library's own loop and DeepSpeed, without Ray: the updates on the samples that `dsvl sweep` makes with a
worker a trial, without checkpoints; an unfinished one begins anew.
"""

import argparse
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from dsvl.data.blend import Blender
from dsvl.data.store import open_store
from dsvl.engine import Engine, join
from dsvl.evaluate import evaluate
from dsvl.model import VisualChat
from dsvl.train import steps
from orchestration.compose import load
from orchestration.config import Experiment
from orchestration.prepare import prepare
from orchestration.records.journal import Journal, write_json
from orchestration.records.record import Record
from orchestration.records.results import begin, finished, write_result
from orchestration.search import trial_name, trials_folder
from orchestration.searching.comparison import compare
from orchestration.searching.proposals import proposals
from orchestration.worker import held_out_samples

log = logging.getLogger(__name__)


def train_here(experiment: Experiment) -> None:
    """Train every trial of a sweep that has no result yet."""
    torch.set_num_threads(1)
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    join(backend="gloo")
    folder = prepare(experiment)["folder"]
    listed = [one.values for one in proposals(experiment)]
    for number, values in enumerate(listed, 1):
        trial, run = experiment.trial(values), trials_folder(experiment) / trial_name(values)
        if finished(trial, run) is None:
            began = time.perf_counter()
            _train(trial, run, Path(folder), values)
            log.info(
                "%d of %d: %s, %.0f s", number, len(listed), run.name, time.perf_counter() - began
            )
    dist.destroy_process_group()


def _train(trial: Experiment, run: Path, folder: Path, values: dict) -> None:
    prepared, train = open_store(folder), trial.train
    (run / "journal.jsonl").unlink(missing_ok=True)
    begin(trial, run)
    write_json(run / "values.json", values)
    journal = Journal(run)
    journal.start(identity=trial.identity(), params={}, step=0, workers=1)
    torch.manual_seed(train.seed)
    model = VisualChat(trial.model, precision=train.precision, seed=train.seed)
    engine = Engine(model, engine=trial.engine, train=train, optim_config=trial.optim)
    blender = Blender(prepared, "train", data=trial.data, seed=train.seed)
    samples = held_out_samples(prepared, trial)
    for step in steps(engine, prepared, blender, train=train, config=trial.engine):
        told = step.metrics()
        if step.ends_epoch:
            tally = evaluate(
                model, prepared, samples, batch=trial.evaluation.batch, device=engine.device
            )
            told |= tally.metrics() | {"train/epoch": step.epoch + 1}
        journal.metrics(step.number, told)
    journal.end("finished")
    write_result(trial, run, state="finished")


def render(experiment: Experiment, ways: Sequence[dict], *, notes: str) -> str:
    """The table and the curves for people."""

    def between(of: Sequence[float] | None, scale: float = 100) -> str:
        return (
            "—"
            if of is None
            else f"{scale * of[0]:.1f} ({scale * of[1]:.1f} to {scale * of[2]:.1f})"
        )

    train, model = experiment.train, experiment.model
    lines = [
        f"# {experiment.name}: ways of training compared over seeds",
        "",
        f"Decoder of size {model.size}, batches of {train.batch}, {train.epochs} epochs. {notes}",
        "Percent of held-out rounds answered exactly after the true history: mean over seeds, and a 95 %",
        "interval by Student's t; differences are paired by seed.",
        "",
        "| way | seeds | right | less than the first | images zeroed | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    for way in ways:
        mean, low, high = way["loss"]
        lines.append(
            f"| {way['way']} | {way['seeds']} | {between(way['accuracy'])} | {between(way['difference'])} "
            f"| {between(way['blind'])} | {mean:.3f} ({low:.3f} to {high:.3f}) |"
        )
    seen = [f"{int(point[0]):,}" for point in ways[0]["curve"]] if ways else []
    lines += [
        "",
        "Right, by training samples seen:",
        "",
        f"| way | {' | '.join(seen)} |",
        f"|---|{'---|' * len(seen)}",
        *(
            f"| {way['way']} | {' | '.join(between(point[1:]) for point in way['curve'])} |"
            for way in ways
        ),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Train what is missing if asked, then print and write."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", metavar="EXPERIMENT")
    parser.add_argument("overrides", metavar="section.field=value", nargs="*")
    parser.add_argument("--train", action="store_true", help="those without a result, here")
    parser.add_argument("--notes", default="", help="what to say of the measurement")
    parser.add_argument("--write", type=Path, metavar="FILE.md")
    options = parser.parse_intermixed_args()
    experiment = load(options.experiment, options.overrides)
    if options.train:
        train_here(experiment)
    ways = compare(Record(experiment))
    print(render(experiment, ways, notes=options.notes))
    if options.write:
        options.write.write_text(render(experiment, ways, notes=options.notes), encoding="utf-8")
        found = json.dumps({"fields": experiment.identity_fields(), "ways": ways}, indent=1)
        options.write.with_suffix(".json").write_text(found + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
