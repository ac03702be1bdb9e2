"""Trainings on two gloo workers: killed in every way, they end with the bits of an unbroken one."""

import json
import random
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch.distributed as dist
from mlflow import MlflowClient

from orchestration import cli, commands, trainer
from orchestration.compose import load
from orchestration.config import Experiment
from orchestration.records.journal import curve, read
from orchestration.training import faults
from tests.orchestration.conftest import digits, histories, run_folder, run_id, steps_done

pytestmark = pytest.mark.ray

STEPS = 48
MOMENT = random.randint(7, 20)
"""After which update processes are killed: anew in each session."""


def wait_until(true: Callable[[], bool], *, running: Callable[[], bool]) -> None:
    while not true():
        assert running(), "it ended too early"
        time.sleep(0.01)


def starts(folder: Path) -> list[int]:
    """After how many updates the run began, and went on each time."""
    return [entry["step"] for entry in read(folder)[0] if entry["kind"] == "start"]


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def final_checkpoint(folder: Path) -> dict[str, bytes]:
    """Parameters, optimizer, random numbers, state and manifest, byte by byte."""
    return files(folder / f"checkpoints/step-{STEPS:06d}")


def logged(experiment: Experiment) -> dict[str, list[tuple[int, float]]]:
    """What MLflow has of a run, without what its machine had to do with."""
    client = MlflowClient(experiment.tracking_uri)
    found = histories(client, run_id(experiment.run_folder))
    machine = ("throughput/", "actual/", "system/", "train/flops")
    return {key: points for key, points in found.items() if not key.startswith(machine)}


def test_a_training_on_two_workers_leaves_all_that_a_run_has(trained_run):
    experiment = load(trained_run)
    folder = experiment.run_folder
    assert starts(folder) == [0]
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-000045", "step-000048"]
    result = json.loads((folder / "result.json").read_text())
    assert result["state"] == "finished"
    assert result["identity"] == experiment.identity()
    (chat,) = json.loads((folder / "chats.json").read_text())
    assert all(turn["model"] for turn in chat["rounds"])
    earlier = {line["step"]: line["chats"] for line in read(folder)[0] if line["kind"] == "chats"}
    assert {step: told["id"] for step, (told,) in earlier.items()} == dict.fromkeys(
        (12, 24, 36), chat["id"]
    )
    found = logged(experiment)
    for metric in ("train/loss", "train/lr", "train/grad_norm"):
        assert [step for step, _ in found[metric]] == list(range(1, STEPS + 1))
    for metric in ("grad_norm", "weight_norm", "update_ratio"):
        for part in ("embedding", "projection"):
            steps = [step for step, _ in found[f"train/{metric}/{part}"]]
            assert steps == list(range(8, STEPS + 1, 8))
    assert found["data/quarantined"] == [(0, 0)]
    for metric in ("loss", "accuracy", "accuracy_blind", "accuracy_shuffled", "accuracy_majority"):
        assert [step for step, _ in found[f"eval/{metric}"]] == [12, 24, 36, 48]
    assert result["metrics"]["eval/loss"] == found["eval/loss"][-1][1] < found["eval/loss"][0][1]
    assert 0 < found["plan/memory_gib"][0][1] < 2 * result["metrics"]["actual/memory_gib"]
    assert result["metrics"]["actual/hours"] > 0
    run = MlflowClient(experiment.tracking_uri).get_run(run_id(folder))
    shares = {data.dataset.name: data.tags for data in run.inputs.dataset_inputs}
    assert shares.keys() == {"digits_train", "digits_eval held out"}
    assert [output.step for output in run.outputs.model_outputs] == [STEPS]
    client = MlflowClient(experiment.tracking_uri)
    kept = {
        file.path
        for path in ("", "figures")
        for file in client.list_artifacts(run.info.run_id, path)
    }
    assert kept >= {"report.html", "figures/loss-nats-a-token.png", "figures/learning-rate.png"}
    loads = [key for key in run.data.metrics if key.startswith("system/")]
    assert any(key.endswith("cpu_utilization_percentage") for key in loads)


@pytest.mark.slow
def test_a_training_whose_weights_are_all_divided_ends_with_chats(storage, cluster):
    """As those of 70B are: DeepSpeed keeps weights as small as these whole unless it is told not to.

    It also trains on after the chat that ends an epoch.
    """
    divide = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    engine = {"zero_stage": 3, "micro_batch": 4, "deepspeed": divide}
    experiment = load(
        digits(storage, "divided", engine=engine), ["train.epochs=2", "optim.lr=1e-3"]
    )
    commands.train(experiment)
    (chat,) = json.loads((experiment.run_folder / "chats.json").read_text())
    assert all(turn["model"] for turn in chat["rounds"])
    whole = load(digits(storage, "undivided"), ["train.epochs=2", "optim.lr=1e-3"])
    commands.train(whole)
    assert json.loads((whole.run_folder / "chats.json").read_text()) == [chat]
    losses = [curve(run.run_folder, "train/loss") for run in (whole, experiment)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.slow
def test_features_from_the_store_train_to_the_same_bits_as_those_computed_in_the_step(
    storage, trained_run
):
    unbroken = load(trained_run)
    experiment = load(digits(storage, "features"), ["engine.stored_features=true"])
    assert experiment.identity() == unbroken.identity()
    commands.train(experiment)
    assert final_checkpoint(experiment.run_folder) == final_checkpoint(unbroken.run_folder)
    assert logged(experiment) == logged(unbroken)

    (stored,) = storage.glob("runs/prepared/*/features/*")
    for path in stored.iterdir():
        np.save(path, -np.load(path))
    poisoned = digits(storage, "poisoned")
    commands.train(load(poisoned, ["engine.stored_features=true", "train.epochs=1"]))
    first, expected = (curve(run_folder(path), "train/loss")[0] for path in (poisoned, trained_run))
    assert first != expected, "they were not used"
    shutil.rmtree(stored)


def test_a_training_whose_driver_is_killed_goes_on_and_ends_with_the_same_bits(
    storage, trained_run, dsvl
):
    path = digits(storage, "killed")
    experiment, folder = load(path), run_folder(path)
    driver = dsvl("train", path)
    record = folder / "mlflow.json"
    wait_until(
        lambda: steps_done(folder) >= MOMENT and record.exists(),
        running=lambda: driver.poll() is None,
    )
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    before = run_id(folder)
    commands.train(experiment)  # at once, while workers of the killed driver may still be dying
    first, second = starts(folder)
    assert first == 0
    assert second in {*range(5, STEPS, 5), STEPS}, f"killed after {MOMENT}"  # orphans may finish
    assert final_checkpoint(folder) == final_checkpoint(run_folder(trained_run))
    assert run_id(folder) == before
    assert logged(experiment) == logged(load(trained_run))


def test_a_training_that_loses_a_worker_goes_on_by_itself_and_ends_with_the_same_bits(
    storage, trained_run
):
    path = digits(storage, "maimed")
    experiment, folder = load(path), run_folder(path)
    ended = threading.Event()
    with ThreadPoolExecutor() as pool:
        killing = pool.submit(kill_rank_1, folder, ended)
        try:
            commands.train(experiment)
        finally:
            ended.set()
        killing.result()
    first, second = starts(folder)
    assert first == 0
    assert second in range(5, STEPS, 5), f"killed after {MOMENT}"
    assert final_checkpoint(folder) == final_checkpoint(run_folder(trained_run))
    assert logged(experiment) == logged(load(trained_run))


@pytest.mark.slow
def test_a_worker_that_hangs_leaves_its_stacks_and_the_training_ends_with_the_same_bits(
    storage, trained_run, monkeypatch
):
    path = digits(storage, "hanging")
    experiment = load(path, ["cluster.hang_timeout_s=45"])
    fault = {"action": "hang", "rank": 1, "step": MOMENT}
    monkeypatch.setenv(faults.VARIABLE, json.dumps([fault]))
    commands.train(experiment)
    first, second = starts(experiment.run_folder)
    assert (first, second) == (0, MOMENT // 5 * 5)
    (stacks,) = experiment.run_folder.glob("logs/rank-1.*.stacks")
    text = stacks.read_text()
    assert f"update {MOMENT}\nTimeout (0:00:45)!" in text
    assert "in _strike" in text
    assert final_checkpoint(experiment.run_folder) == final_checkpoint(run_folder(trained_run))


def test_updates_that_are_undone_are_on_record(storage, trained_run, monkeypatch):
    path = digits(storage, "corrupted", train={"batch": 8, "epochs": 2, "precision": "fp32"})
    experiment = load(path)
    fault = {"action": "corrupt", "rank": 0, "step": MOMENT}
    monkeypatch.setenv(faults.VARIABLE, json.dumps([fault]))
    commands.train(experiment)
    folder = experiment.run_folder
    assert starts(folder) == [0, MOMENT // 5 * 5]
    (undone,) = [entry for entry in read(folder)[0] if entry["kind"] == "undone"]
    assert undone["fault"].startswith(f"update {MOMENT + 1}: its loss is nan")
    said = (folder / "logs/rank-0.log").read_text()
    assert f"WARNING update {MOMENT + 1} is undone and its batch skipped" in said
    assert logged(experiment)["train/skipped"] == [(MOMENT + 1, 1.0)]
    assert np.isfinite([loss for _, loss in logged(experiment)["train/loss"]]).all()


def test_a_worker_that_refuses_what_is_asked_ends_the_training_at_once(
    storage, cluster, monkeypatch, capsys
):
    path = digits(storage, "refused")
    fault = {"action": "sing", "rank": 1, "step": 3}
    monkeypatch.setenv(faults.VARIABLE, json.dumps([fault]))
    assert cli.main(["train", str(path), "--json"]) == 2
    told = "DSVL_FAULTS: action 'sing' must be kill, raise, exhaust, hang, slow or corrupt"
    assert json.loads(capsys.readouterr().out) == {"error": [told]}
    folder = run_folder(path)
    assert starts(folder) == [0]
    end = read(folder)[0][-1]
    assert end["state"] == "failed"
    where = rf"rank 1 on {re.escape(socket.gethostname())}, process \d+"
    assert re.fullmatch(f"{where}: ValueError: {re.escape(told)}", end["reason"])


def test_a_value_error_of_a_library_refuses_nothing(tmp_path, monkeypatch):
    worker = SimpleNamespace(work=lambda config: json.loads('{"half'))
    monkeypatch.setitem(sys.modules, "orchestration.worker", worker)
    monkeypatch.setitem(sys.modules, "mlflow", sys.modules["mlflow"])  # to have it again after
    monkeypatch.chdir(tmp_path)
    cluster = {"gpus_per_worker": 1}
    with pytest.raises(RuntimeError, match="JSONDecodeError: Unterminated string"):
        trainer.work({"directory": str(tmp_path), "experiment": {"cluster": cluster}})


def test_a_worker_that_holds_the_others_up_is_on_record(storage, cluster, monkeypatch):
    experiment = load(digits(storage, "slow"), ["train.epochs=2"])
    fault = {"action": "slow", "rank": 1, "step": 11}  # for five seconds
    monkeypatch.setenv(faults.VARIABLE, json.dumps([fault]))
    commands.train(experiment)
    waited = dict(curve(experiment.run_folder, "throughput/waited_s"))
    assert list(waited) == [8, 16, 24]
    assert waited[16] == pytest.approx(5 / 8, rel=0.5)
    assert waited[24] < waited[16] / 2
    said = (experiment.run_folder / "logs/rank-0.log").read_text()
    assert re.search(r"WARNING rank 1 on \S+ is late: it takes", said)


def kill_rank_1(folder: Path, ended: threading.Event) -> None:
    """Kill the process of this cluster that trains and has no journal open."""
    wait_until(lambda: steps_done(folder) >= MOMENT, running=lambda: not ended.is_set())
    workers = [
        process
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    assert len(workers) == 2
    (victim,) = [
        worker
        for worker in workers
        if not any(file.path.endswith("journal.jsonl") for file in worker.open_files())
    ]
    victim.kill()


def test_a_finished_run_that_is_typed_again_does_no_work(trained_run, monkeypatch, capsys):
    experiment = load(trained_run)
    before, told = files(experiment.run_folder), logged(experiment)
    monkeypatch.setattr(commands, "connect", lambda _: pytest.fail("it asked for a cluster"))
    assert cli.main(["train", str(trained_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "finished"
    assert files(experiment.run_folder) == before
    assert logged(experiment) == told


def test_a_run_folder_of_another_experiment_is_refused_with_the_fields_that_differ(
    trained_run, capsys
):
    before = files(run_folder(trained_run))
    assert cli.main(["train", str(trained_run), "optim.lr=0.02", "train.seed=1"]) == 2
    said = capsys.readouterr().err
    assert "optim.lr (0.01 before, 0.02 now); train.seed (1234 before, 1 now)" in said
    assert str(run_folder(trained_run)) in said
    assert "another name" in said
    assert files(run_folder(trained_run)) == before


@pytest.fixture
def alone(tmp_path):
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_of_another_experiment_is_refused_by_the_worker(trained_run):
    from orchestration.training.checkpoints import load_newest

    other = load(trained_run, ["train.epochs=8"])
    with pytest.raises(
        ValueError, match=r"train\.epochs \(4 before, 8 now\); set these fields back"
    ):
        load_newest(None, other, other.run_folder, frozen={})
