"""Time and money follow from operations, the stated share of the stated peak, and the price."""

import pytest

from orchestration.config import validated
from orchestration.planning.cost import (
    disk,
    flops_of_a_step,
    run_cost,
    seconds_of_a_step,
    sweep_cost,
)

CLUSTER = {"workers": 4, "gpu_tflops": 2e-6, "utilisation": 0.25, "gpu_hour_price": 3.0}


def test_seconds_are_operations_by_the_share_of_all_peaks(settings):
    experiment = validated(settings | {"cluster": CLUSTER})
    operations = sum(flops_of_a_step(experiment).values())
    assert seconds_of_a_step(experiment) == pytest.approx(operations / (4 * 2e6 * 0.25))
    assert seconds_of_a_step(validated(settings)) is None


def test_money_is_hours_of_all_workers_at_their_price(settings):
    experiment = validated(settings | {"cluster": CLUSTER})
    cost = run_cost(experiment, 120)
    assert cost.steps == 2 * 10  # two epochs, a batch of twelve
    assert cost.hours == pytest.approx(20 * seconds_of_a_step(experiment) / 3600)
    assert cost.gpu_hours == pytest.approx(4 * cost.hours)
    assert cost.money == pytest.approx(3 * cost.gpu_hours)
    without = run_cost(experiment.with_overrides({"cluster.gpu_hour_price": None}), 120)
    assert (without.money, without.gpu_hours) == (None, cost.gpu_hours)
    assert run_cost(experiment, None).flops is None


def test_a_sweep_costs_what_its_trials_cost_to_their_ends(settings):
    space = {
        "train.epochs": {"kind": "grid", "values": [1, 3]},
        "model.size": {"kind": "grid", "values": ["small", "large"]},
        "optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
    }
    search = {"space": space, "samples": 5, "concurrent": 2, "workers": 2}
    experiment = validated(settings | {"cluster": CLUSTER, "search": search})
    trials = [
        run_cost(experiment.trial({"train.epochs": epochs, "model.size": size}), 120)
        for epochs in (1, 3)
        for size in ("small", "large")
    ]
    cost = sweep_cost(experiment, 120)
    assert cost.steps == 5 * sum(trial.steps for trial in trials) == 5 * 2 * (10 + 30)
    assert cost.gpu_hours == pytest.approx(5 * sum(trial.gpu_hours for trial in trials))
    assert cost.hours == pytest.approx(5 * sum(trial.hours for trial in trials) / 2)
    assert cost.money == pytest.approx(3 * cost.gpu_hours)


@pytest.mark.parametrize(
    ("search", "at_once"),
    [
        ({"workers": 1}, 12),
        ({"workers": 4}, 3),
        ({"workers": 12}, 1),
        ({"workers": 4, "concurrent": 2}, 2),
        ({"workers": 1, "samples": 5}, 5),
    ],
)
def test_as_many_trials_run_at_once_as_there_are_workers_for(settings, search, at_once):
    space = {"optim.lr": {"kind": "uniform", "low": 1e-4, "high": 1e-2}}
    cluster = {"cluster": CLUSTER | {"workers": 12}, "engine": {"micro_batch": 1}}
    experiment = validated(
        settings | cluster | {"search": {"space": space, "samples": 30} | search}
    )
    assert experiment.trials_at_once == at_once


def test_a_branch_costs_its_decay(settings):
    space = {"train.epochs": {"kind": "grid", "values": [1, 3, 2]}}
    optim = {"schedule": "wsd", "warmup_steps": 1, "decay_fraction": 0.3}
    experiment = validated(settings | {"optim": optim, "search": {"space": space}})
    assert sweep_cost(experiment, 120).steps == 30 + 6 + 3
    cosine = experiment.with_overrides({"optim.schedule": "cosine"})
    assert sweep_cost(cosine, 120).steps == 30 + 20 + 10


def test_what_is_drawn_counts_as_drawn_and_what_results_decide_as_the_dearest(settings):
    space = {"train.epochs": {"kind": "choice", "values": [1, 7, 3]}}
    search = {
        "space": space | {"optim.lr": {"kind": "uniform", "low": 0.1, "high": 1}},
        "samples": 4,
    }
    drawn = validated(settings | {"search": search})
    lengths = [values["train.epochs"] for values in drawn.search.points()]
    assert len(lengths) == 4
    assert sweep_cost(drawn, 120).steps == 10 * sum(lengths) < 4 * 7 * 10
    learnt = drawn.with_overrides({"search.sampler": "tpe"})
    assert sweep_cost(learnt, 120).steps == 4 * 7 * 10


def test_what_a_condition_leaves_out_costs_nothing(settings):
    lengths = {"kind": "grid", "values": [1, 3], "when": {"model.size": "large"}}
    sizes = {"kind": "grid", "values": ["small", "large"]}
    search = {"space": {"model.size": sizes, "train.epochs": lengths}}
    experiment = validated(settings | {"search": search})
    assert sweep_cost(experiment, 120).steps == 10 * (
        2 + 1 + 3
    )  # two epochs are the experiment's own


def test_disk_holds_one_checkpoint_more_than_are_kept(settings, tmp_path):
    experiment = validated(settings | {"checkpoint": {"keep": 3}})
    sizes = disk(experiment, None)
    assert sizes["checkpoints"] == 4 * 12 * (8 * 8 + 8 + 32 * 8)
    branching = {"optim.schedule": "wsd", "optim.warmup_steps": 1, "train.epochs": 9}
    more = {"checkpoint.keep_best": 2, "checkpoint.branch_epochs": [1, 2]}
    more = disk(experiment.with_overrides(branching | more), None)  # and the end of its own plateau
    assert more["checkpoints"] == 2.25 * sizes["checkpoints"]
    assert sizes["pixels of an image"] == 3 * 8 * 8
    assert sizes["prepared data"] is None
    assert "features of an image" not in sizes
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/0.parquet").write_bytes(b"1234567")
    stored = experiment.with_overrides({"engine.stored_features": True})
    assert disk(stored, tmp_path)["prepared data"] == 7
    assert disk(stored, tmp_path)["features of an image"] == 4 * 8 * 2
