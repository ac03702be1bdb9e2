"""Sweeps: what a trial is, who competes with whom, and that no finished trial is ever repeated."""

import json
import math
import signal
import time
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from ray.tune.schedulers import TrialScheduler

from orchestration.compose import load
from orchestration.config import validated
from orchestration.planning.cost import flops_of_a_step
from orchestration.records.journal import Journal, read, write_json
from orchestration.records.results import evaluations, trials_folder
from orchestration.search import trial_name
from orchestration.searching.proposals import Listed, Proposal, proposals
from orchestration.searching.schedulers import scheduler
from orchestration.searching.summary import compare, render, summarize
from tests.orchestration.conftest import SEARCH, SETTINGS, digits, histories, run_id, steps_done
from tests.orchestration.machines import wait_until


def grid(*rates: float) -> dict[str, Any]:
    return {"optim.lr": {"kind": "grid", "values": list(rates)}}


def test_a_trial_is_named_by_its_values_alone():
    values = {"model.size": "small", "optim.lr": 0.01, "train.epochs": 2}
    assert trial_name(values) == "size=small,lr=0.01,epochs=2"
    assert trial_name({"optim.lr": 0.000123456}) == "lr=0.000123456"
    assert trial_name({"optim.lr": 0.00012345}) != trial_name({"optim.lr": 0.00012346})
    assert trial_name({"model.languages.small.checkpoint": "../a/b"}) == "checkpoint=..%2Fa%2Fb"
    assert trial_name({"train.epochs": 2}) != trial_name({"train.batch": 2})


def test_a_trial_with_many_values_has_a_name_that_a_folder_can_have():
    values = {f"optim.field_{number}": number / 7 for number in range(20)}
    other = values | {"optim.field_19": 3.0}
    names = [trial_name(each) for each in (values, other)]
    assert names[0] != names[1]
    assert all(len(name) <= 200 for name in names)
    assert names[0].startswith("field_0=0.0,field_1=")


@pytest.fixture
def swept(tmp_path):
    """Make a sweep's folder from trials: lr -> (state, metrics or reason)."""

    def make(trials: dict[float, tuple[str, Any]], **settings: Any):
        chosen = SEARCH | settings
        made = SETTINGS | {"search": chosen, "storage": {"path": str(tmp_path)}}
        experiment = validated(made)
        for lr, (state, said) in trials.items():
            values = {"model.size": "small", "optim.lr": lr}
            folder = trials_folder(experiment) / trial_name(values)
            journal = Journal(folder)
            write_json(folder / "values.json", values)
            if state in ("finished", "stopped"):
                write_json(folder / "result.json", {"state": state, "metrics": said})
            if state != "running":
                journal.end(state, reason=said if state == "failed" else "")
        return experiment

    return make


def test_the_best_trial_comes_first_and_those_without_a_result_are_told_apart(swept):
    experiment = swept(
        {
            1e-4: ("finished", {"eval/loss": 0.5, "eval/accuracy": 0.7}),
            2e-4: ("stopped", {"eval/loss": 0.9, "eval/accuracy": 0.1}),
            3e-4: ("finished", {"eval/loss": 0.4, "eval/accuracy": 0.6}),
            4e-4: ("failed", "ValueError: no such file"),
            5e-4: ("running", None),
        }
    )
    summary = summarize(experiment)
    assert [trial["optim.lr"] for trial in summary["trials"]] == [3e-4, 1e-4, 2e-4]
    assert [trial["state"] for trial in summary["trials"]] == ["finished", "finished", "stopped"]
    assert summary["best"] == summary["trials"][0]
    assert Path(summary["best"]["folder"], "values.json").exists()
    assert summary["failed"] == ["size=small,lr=0.0004: ValueError: no such file"]


def test_a_metric_may_be_the_better_the_higher(swept):
    trials = {
        1e-4: ("finished", {"eval/loss": 0.5, "eval/accuracy": 0.7}),
        3e-4: ("finished", {"eval/loss": 0.4, "eval/accuracy": 0.6}),
    }
    experiment = swept(trials, metric="eval/accuracy")
    assert summarize(experiment)["best"]["optim.lr"] == 1e-4


@pytest.mark.parametrize("metric", ["eval/loss", "eval/accuracy"])
def test_a_trial_that_diverged_is_never_the_best(swept, metric):
    trials = {
        1e-4: ("finished", {metric: math.nan}),
        2e-4: ("finished", {metric: 0.5}),
        3e-4: ("finished", {metric: math.nan}),
        4e-4: ("finished", {metric: 0.5}),
    }
    summary = summarize(swept(trials, metric=metric))
    assert [trial[metric] for trial in summary["trials"][:2]] == [0.5, 0.5]
    assert len(summary["trials"]) == 4


def test_where_every_trial_diverged_there_is_no_best_one(swept):
    summary = summarize(swept({1e-4: ("finished", {"eval/loss": math.nan})}))
    assert (summary["best"], len(summary["trials"])) == (None, 1)


def test_trials_of_an_earlier_space_under_the_same_name_do_not_count(swept):
    trials = {lr: ("finished", {"eval/loss": lr}) for lr in (1e-5, 1e-4, 1e-3)}
    summary = summarize(swept(trials))
    assert [trial["optim.lr"] for trial in summary["trials"]] == [1e-4, 1e-3]


def test_a_sweep_without_results_has_no_best_trial(swept):
    nothing = {"objectives": ["eval/loss"], "trials": []}
    expected = {"best": None, "front": nothing, "trials": [], "failed": []}
    assert summarize(swept({})) == expected


def test_with_several_objectives_the_answer_is_what_none_beats_in_all_of_them(swept):
    ended = {
        1e-4: (0.5, 0.7, 3e12),
        2e-4: (0.6, 0.7, 3e12),
        3e-4: (0.4, 0.6, 9e14),
        4e-4: (0.9, 0.9, 1e12),
    }
    metrics = ("eval/loss", "eval/accuracy", "train/flops")
    trials = {
        lr: ("finished", dict(zip(metrics, found, strict=True))) for lr, found in ended.items()
    }
    trials[5e-4] = ("finished", {"eval/loss": 0.1, "eval/accuracy": 1.0})  # as older ones ended
    summary = summarize(swept(trials, tradeoffs=["train/flops"]))
    assert summary["best"]["optim.lr"] == 5e-4
    names = [f"size=small,lr={lr}" for lr in (3e-4, 1e-4, 4e-4)]
    assert summary["front"] == {"objectives": ["eval/loss", "train/flops"], "trials": names}
    for trial in summary["trials"]:
        trial["eval/accuracy_blind"] = 0.2
    told = render(summary | {"effects": [], "relative": True})
    assert "  loss 0.5000, 3.0000 TFLOP: size=small,lr=0.0001\n" in told
    assert "  loss 0.4000, 0.90 PFLOP: size=small,lr=0.0003\n" in told
    assert "TFLOP: size=small,lr=0.0002" not in told


def test_trials_of_another_schedule_are_no_ranking_with_the_best_ones(swept):
    schedules = {"kind": "grid", "values": ["cosine", "wsd"]}
    experiment = swept({}, space={"optim.schedule": schedules, **grid(1e-4, 1e-3)}, samples=1)
    ended = {("wsd", 1e-4): 0.2, ("cosine", 1e-4): 0.3, ("wsd", 1e-3): 0.4, ("cosine", 1e-3): 0.5}
    for (schedule, lr), loss in ended.items():
        values = {"optim.schedule": schedule, "optim.lr": lr}
        folder = trials_folder(experiment) / trial_name(values)
        Journal(folder).metrics(1, {"train/loss": loss})
        write_json(folder / "values.json", values)
        metrics = {"eval/loss": loss, "eval/accuracy": 0.5, "eval/accuracy_blind": 0.2}
        write_json(folder / "result.json", {"state": "finished", "metrics": metrics})
    summary = summarize(experiment)
    assert [trial["eval/loss"] for trial in summary["trials"]] == [0.2, 0.4, 0.3, 0.5]
    compared = compare(experiment, summary["trials"])
    (effect,) = (one for one in compared["effects"] if one["path"] == "optim.schedule")
    assert (effect["value"], effect["against"], effect["pairs"]) == ("wsd", "cosine", 2)
    assert effect["change"] == pytest.approx((0.2 / 0.3 + 0.4 / 0.5) / 2 - 1)
    told = render(summary | compared)
    assert "optim.schedule wsd against cosine: -26.67 % (" in told
    assert "2 pairs, 1.00 of the updates" in told


class Peer(SimpleNamespace):
    """A trial, as schedulers know one."""

    __hash__ = object.__hash__


def decisions(
    reports: list[tuple[dict[str, Any], list[float]]], *, kind: str = "asha"
) -> list[str]:
    """What a scheduler decides on each trial's losses: trials report one after another."""
    decides = scheduler(validated(SETTINGS | {"search": SEARCH | {"scheduler": {"kind": kind}}}))
    decides.set_search_properties("eval/loss", "min")
    decided = []
    for number, (values, losses) in enumerate(reports):
        trial = Peer(trial_id=str(number), config=values)
        decides.on_trial_add(None, trial)
        for epoch, loss in enumerate(losses, start=1):
            result = {"epoch": epoch, "eval/loss": loss}
            action = decides.on_trial_result(None, trial, result)
            if action == TrialScheduler.STOP:
                decides.on_trial_complete(None, trial, result)
                break
        else:
            decides.on_trial_complete(None, trial, result)
        decided.append(action)
    return decided


def test_asha_stops_a_trial_that_does_worse_than_its_peers():
    peers = [({"model.size": "small", "train.epochs": 2}, losses) for losses in ([1, 1], [2, 2])]
    assert decisions(peers) == [TrialScheduler.CONTINUE, TrialScheduler.STOP]
    better = [peers[1], peers[0]]
    assert decisions(better) == [TrialScheduler.CONTINUE] * 2


def test_a_trial_below_the_median_of_its_peers_stops():
    values = {"model.size": "small", "train.epochs": 4}
    peers = [(values, [1.0, 1.0, 1.0, 1.0])] * 3
    *others, last = decisions([*peers, (values, [9.0, 9.0, 9.0])], kind="median")
    assert others == [TrialScheduler.CONTINUE] * 3
    assert last == TrialScheduler.STOP
    better = decisions([*peers, (values, [9.0, 0.5, 0.5])], kind="median")
    assert better[3] == TrialScheduler.STOP  # at its first epoch, before it could be better
    assert decisions([*peers, (values, [0.5, 0.5])], kind="median")[3] == TrialScheduler.CONTINUE


def test_brackets_grant_some_trials_more_epochs_than_asha_does():
    values = {"model.size": "small", "train.epochs": 8}
    trials = [(values, [1.0 + k] * 8) for k in range(40)]
    stopped = {kind: decisions(trials, kind=kind).count("STOP") for kind in ("asha", "hyperband")}
    assert 0 < stopped["hyperband"] <= stopped["asha"] == 39


@pytest.mark.parametrize(
    "other", [{"model.size": "large"}, {"train.epochs": 4}, {"optim.schedule": "wsd"}]
)
def test_asha_compares_no_trials_of_different_sizes_or_epochs(other):
    values = {"model.size": "small", "train.epochs": 2, "optim.lr": 0.1}
    assert decisions([(values, [1, 1]), (values | other, [9, 9])]) == [TrialScheduler.CONTINUE] * 2


def test_asha_compares_trials_that_differ_in_nothing_else_but_the_rest():
    values = {"model.size": "small", "train.epochs": 2, "optim.lr": 0.1}
    decided = decisions([(values, [1, 1]), (values | {"optim.lr": 0.2}, [9, 9])])
    assert decided == [TrialScheduler.CONTINUE, TrialScheduler.STOP]


def test_asha_stops_no_trial_at_its_last_epoch():
    values = {"model.size": "small", "train.epochs": 1, "optim.lr": 0.1}
    assert decisions([(values, [1]), (values, [9])]) == [TrialScheduler.CONTINUE] * 2


def test_without_a_scheduler_every_trial_runs_to_its_end():
    first_come = scheduler(validated(SETTINGS | {"search": SEARCH}))
    bad = Peer(trial_id="bad", config={})
    for loss in (1.0, 9.0):
        result = {"epoch": 1, "eval/loss": loss}
        assert first_come.on_trial_result(None, bad, result) == TrialScheduler.CONTINUE


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_an_interrupted_and_then_killed_sweep_goes_on_and_trains_no_finished_trial_again(
    storage, dsvl
):
    """Three trials of one size, on one worker each; the driver dies after the first result.

    One of the two rates is tried with two norms, which the other has no use for.
    """
    space = grid(1e-2, 3e-2)
    space["optim.clip"] = {"kind": "grid", "values": [1.0, 0.5], "when": {"optim.lr": 3e-2}}
    path = digits(
        storage,
        "swept",
        train={"batch": 8, "epochs": 1, "precision": "fp32"},
        search={"space": space, "concurrent": 2, "tradeoffs": ["train/flops"]},
    )
    experiment = load(path)
    root = trials_folder(experiment)
    driver = dsvl("sweep", path, stderr=PIPE)
    wait_until(lambda: any(map(steps_done, root.glob("lr=*"))) or driver.poll() is not None)
    driver.send_signal(signal.SIGINT)
    assert driver.communicate()[1].endswith("sweep was interrupted\n")
    assert driver.returncode == 1
    assert [entry["kind"] for entry in read(root)[0]] == ["start"]

    driver = dsvl("sweep", path)
    while not list(root.glob("*/result.json")):
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    done = {result: fingerprint(result) for result in root.glob("*/result.json")}
    journals = {result.parent: (result.parent / "journal.jsonl").read_bytes() for result in done}
    parent = run_id(root)
    assert len(done) < 3

    again = dsvl("sweep", path, "--json", stdout=PIPE)
    summary = json.loads(again.communicate()[0])
    assert again.returncode == 0
    assert summary["failed"] == []
    assert experiment.search is not None
    values = experiment.search.points()
    assert len(values) == 3
    names = [trial_name(one) for one in values]
    assert sorted(trial["trial"] for trial in summary["trials"]) == sorted(names)
    operations = 12 * sum(flops_of_a_step(experiment).values())
    assert {trial["train/flops"] for trial in summary["trials"]} == {operations}
    assert summary["front"]["trials"] == [summary["best"]["trial"]]
    losses = [trial["eval/loss"] for trial in summary["trials"]]
    assert losses == sorted(losses)
    assert {result: fingerprint(result) for result in done} == done
    for folder, text in journals.items():
        assert (folder / "journal.jsonl").read_bytes() == text
        assert [entry["kind"] for entry in read(folder)[0]].count("end") == 1

    client = MlflowClient(experiment.tracking_uri)
    assert run_id(root) == parent
    (number,) = {client.get_run(parent).info.experiment_id}
    children = client.search_runs([number], f"tags.mlflow.parentRunId = '{parent}'")
    asked = {child.info.run_name: child.data.params for child in children}
    assert sorted(asked) == sorted(names)
    for one, name in zip(values, names, strict=True):
        assert float(asked[name]["optim.lr"]) == one["optim.lr"]
        assert float(asked[name]["optim.clip"]) == one.get("optim.clip", 1.0)
        assert asked[name].keys() == asked[names[0]].keys()
    for child in children:
        assert child.info.status == "FINISHED"
        found = histories(client, child.info.run_id)
        assert [step for step, _ in found["train/loss"]] == list(range(1, 13))
        assert [step for step, _ in found["eval/loss"]] == [12]
    sweeps = client.search_runs([number], "attributes.run_name = 'swept sweep'")
    assert [sweep.info.run_id for sweep in sweeps] == [parent]


def fingerprint(path: Path) -> tuple[bytes, int]:
    return path.read_bytes(), path.stat().st_mtime_ns


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_with_asha_ends_though_one_trial_is_stopped_and_another_fails(storage, dsvl):
    path = digits(
        storage,
        "halved",
        train={"batch": 8, "epochs": 10, "precision": "fp32"},
        cluster={"workers": 1, "cpus_per_worker": 0.75, "failures": 0},
        # The second learns next to nothing; the third is more than a float32 can be.
        search={"space": grid(1e-2, 1e-7, 1e300), "scheduler": {"kind": "asha"}},
    )
    sweep = dsvl("sweep", path, "--json", stdout=PIPE, stderr=PIPE)
    out, err = sweep.communicate()
    assert sweep.returncode == 0, err
    summary = json.loads(out)
    states = {trial["optim.lr"]: trial["state"] for trial in summary["trials"]}
    assert states == {1e-2: "finished", 1e-7: "stopped"}
    assert summary["best"]["optim.lr"] == 1e-2
    (failure,) = summary["failed"]
    assert failure.startswith("lr=1e+300: ")
    assert "RuntimeError: value cannot be converted to type float without overflow" in failure
    assert failure in err

    experiment = load(path)
    root = trials_folder(experiment)
    client = MlflowClient(experiment.tracking_uri)
    ends = {
        name: client.get_run(run_id(root / name)) for name in ("lr=0.01", "lr=1e-07", "lr=1e+300")
    }
    assert [run.info.status for run in ends.values()] == ["FINISHED", "FINISHED", "FAILED"]
    assert ends["lr=1e-07"].data.tags["stopped_by"] == "scheduler"
    assert "overflow" in ends["lr=1e+300"].data.tags["failure"]
    assert len(evaluations(root / "lr=0.01")) == 10
    assert len(evaluations(root / "lr=1e-07")) < 10


WSD = {"lr": 1e-2, "schedule": "wsd", "warmup_steps": 4, "decay_fraction": 0.25}


def listed(optim: dict[str, Any], space: dict[str, Any], **settings: Any) -> list[Proposal]:
    search = {"space": space, **settings}
    return proposals(validated(SETTINGS | {"optim": optim, "search": search}))


EPOCHS = {"kind": "grid", "values": [1, 4, 2]}
RATES = {"kind": "loguniform", "low": 1e-4, "high": 1e-2}


def test_every_draw_is_tried_at_the_whole_grid():
    space = {"optim.lr": RATES, "train.epochs": EPOCHS, "model.size": SEARCH["space"]["model.size"]}
    found = [proposal.values for proposal in listed({}, space, samples=3)]
    assert len(found) == 3 * 3 * 2
    assert [list(values) for values in found] == [list(space)] * len(found)
    rates = [values["optim.lr"] for values in found]
    assert rates == [rates[0]] * 6 + [rates[6]] * 6 + [rates[12]] * 6
    assert len(set(rates)) == 3
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    points = {(values["train.epochs"], values["model.size"]) for values in found[:6]}
    assert len(points) == 6


def test_a_search_proposes_the_same_whenever_it_is_asked_and_otherwise_with_another_seed():
    space = {"optim.lr": RATES, "train.seed": {"kind": "choice", "values": [1, 2, 3]}}
    assert listed({}, space, samples=9) == listed({}, space, samples=9)
    assert listed({}, space, samples=9) != listed({}, space, samples=9, seed=1)
    first = listed({}, space, samples=3)
    assert (
        listed({}, space, samples=9)[:3] == first
    )  # more draws leave the earlier ones as they are


def test_with_a_plateau_shorter_trials_branch_off_the_longest():
    found = listed(WSD, {"optim.lr": RATES, "train.epochs": EPOCHS}, samples=2)
    for trunk, *branches in (found[:3], found[3:]):
        assert (trunk.values["train.epochs"], trunk.trunk, trunk.branches) == (4, None, (1, 2))
        assert [branch.values["train.epochs"] for branch in branches] == [2, 1]
        assert all(branch.trunk == trunk.values for branch in branches)
        assert {p.values["optim.lr"] for p in branches} == {trunk.values["optim.lr"]}


@pytest.mark.parametrize("optim", [{}, {"schedule": "wsd"}, {"schedule": "linear"}])
def test_without_one_every_trial_stands_by_itself(optim):
    found = listed(optim, {"train.epochs": EPOCHS})
    assert all((proposal.trunk, proposal.branches) == (None, ()) for proposal in found)


def test_a_branch_waits_until_its_trunk_has_trained_for_as_long():
    found = listed(WSD, {"optim.lr": RATES, "train.epochs": EPOCHS}, samples=2)
    searcher = Listed(found)
    assert [searcher.suggest("a"), searcher.suggest("b")] == [found[0].values, found[3].values]
    assert searcher.suggest("c") is None
    searcher.on_trial_result("b", {"epoch": 1})
    assert searcher.suggest("c") == found[5].values
    searcher.on_trial_result("a", {"epoch": 2})
    assert [searcher.suggest("d"), searcher.suggest("e")] == [found[1].values, found[2].values]
    assert searcher.suggest("f") is None
    searcher.on_trial_complete("b", error=True)  # what would have been shared is trained anew
    assert searcher.suggest("f") == found[4].values
    assert searcher.suggest("g") is None


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_of_several_lengths_train_what_they_share_once(storage, dsvl):
    """And end as trainings of their own would: see test_branches.py."""
    search = {"space": {"train.epochs": EPOCHS}, "concurrent": 2}
    train = {"batch": 8, "epochs": 1, "precision": "fp32"}
    path = digits(storage, "branched", train=train, optim=WSD, search=search)
    sweep = dsvl("sweep", path, "--json", stdout=PIPE)
    summary = json.loads(sweep.communicate()[0])
    assert sweep.returncode == 0
    assert summary["failed"] == []
    root = trials_folder(load(path))
    starts = {
        epochs: [e["step"] for e in read(root / f"epochs={epochs}")[0] if e["kind"] == "start"]
        for epochs in (4, 2, 1)
    }
    assert starts == {4: [0], 2: [18], 1: [9]}
    assert sorted(trial["train.epochs"] for trial in summary["trials"]) == [1, 2, 4]
    ends = {epochs: read(root / f"epochs={epochs}")[0][-2]["step"] for epochs in (4, 2, 1)}
    assert ends == {4: 48, 2: 24, 1: 12}
