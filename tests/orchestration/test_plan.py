"""Plans count parameters, bytes and steps as known models have them, and refuse with a remedy."""

import json
from pathlib import Path

import pytest

from orchestration.compose import load
from orchestration.config import Experiment, validated
from orchestration.plan import PlanError, blends_file, plan
from orchestration.planning.parameters import Part


def test_only_the_projection_and_the_embedding_are_trained(settings):
    (size,) = plan(validated(settings)).sizes
    trained = {name: part.trainable for name, part in size.parameters.items() if part.trainable}
    assert trained == {"projection": 8 * 8 + 8, "embedding": 32 * 8}
    settings["model"]["train_embedding"] = False
    (size,) = plan(validated(settings)).sizes
    assert sum(part.trainable for part in size.parameters.values()) == 8 * 8 + 8


def test_steps_are_unknown_until_the_samples_are(settings):
    planned = plan(validated(settings))
    assert (planned.samples, planned.steps) == (None, None)
    assert planned.samples_from == "unknown until prepare"
    assert "unknown until prepare" in planned.render()


def test_steps_follow_from_the_known_records(settings):
    chats = settings["data"]["sets"]["chats"]
    chats["records"] = 1000
    settings["data"]["sets"]["held_out"] = chats | {"split": "eval", "records": None}
    planned = plan(validated(settings))
    assert planned.samples == 900  # a tenth of an automatic split is held out
    assert (planned.steps_per_epoch, planned.steps) == (75, 150)
    assert planned.tokens_per_step == 12 * 64


def blended(settings, *, known: int | None = 1000, **blend) -> Experiment:
    settings["data"]["sets"]["chats"]["records"] = known
    settings["data"]["blends"] = {"chats": {"sets": ["chats"], **blend}}
    return validated(settings)


@pytest.mark.parametrize(
    ("blend", "samples"),
    [
        ({}, 900),  # a tenth of an automatic split is held out
        ({"concat": [1, 3]}, 450),
        ({"concat": [2, 3]}, 360),
        ({"samples": 100}, 100),
        ({"samples": 1000}, 900),
        ({"concat": [1, 3], "samples": 600}, 450),
        ({"epochs": 2.5}, 2250),
        ({"concat": [1, 3], "epochs": 0.5}, 225),
        ({"weight": 5}, 900),
        ({"join": True}, None),  # depends on images that conversations share
        ({"join": True, "records": 500}, 450),
        ({"concat": [1, 3], "records": 500}, 450),
    ],
)
def test_samples_follow_from_the_known_records_and_the_blend(settings, blend, samples):
    planned = plan(blended(settings, **blend))
    assert planned.samples == samples
    where = "unknown until prepare" if samples is None else "records of data.sets and data.blends"
    assert planned.samples_from == where


def test_a_blend_whose_samples_are_known_needs_no_records_of_its_sets(settings):
    assert plan(blended(settings, known=None)).samples is None
    assert plan(blended(settings, known=None, records=500)).samples == 450


def test_prepared_data_is_believed_before_anything_else(settings, tmp_path):
    settings |= {"storage": {"path": str(tmp_path)}}
    experiment = blended(settings, concat=[1, 3])
    prepared = tmp_path / "prepared/tiny"
    prepared.mkdir(parents=True)
    identity = {**experiment.preparation(), "tokenizer": "unseen"}
    (prepared / "manifest.json").write_text(json.dumps({"identity": identity}))
    counts = {"chats": {"train": 200, "eval": 9}, "others": {"train": 40, "eval": 1}}
    counted = blends_file(prepared, experiment)
    counted.write_text(json.dumps(counts))
    assert plan(experiment).samples == 240
    assert plan(experiment).samples_from == str(counted)
    for change in (
        {"data.max_images": 3},
        {"data.seed": 1},
        {"model.template": "original"},
        {"model.vision.class_token": True},
        {"model.projection": "perceiver"},
        {"data.blends.chats.weight": 2},  # of these data, but they were counted for other blends
        {"data.max_rounds": 3},
    ):
        assert plan(experiment.with_overrides(change)).samples == 450
    for damaged in ('{"half": ', "{}", '{"identity": 7}'):
        other = tmp_path / "prepared/other/manifest.json"
        other.parent.mkdir(exist_ok=True)
        other.write_text(damaged)
        assert plan(experiment).samples == 240
    for same in (
        {"model.size": "large", "optim.lr": 1},
        {"model.projection": "mlp"},
        {"data.sets.chats.records": 7, "data.blends.chats.records": 7},
    ):
        assert plan(experiment.with_overrides(same)).samples == 240


def test_thousands_of_workers_are_planned_for(settings):
    settings["cluster"] = {"workers": 4096}
    settings["train"] |= {"batch": 8192}
    settings["engine"] = {"micro_batch": 2}
    assert plan(validated(settings)).sizes[0].workers == 4096


def test_a_batch_larger_than_the_data_is_refused(settings):
    settings["data"]["sets"]["chats"] |= {"records": 5, "split": "train"}
    with pytest.raises(PlanError, match=r"train\.batch=12 must not exceed the 5 training samples"):
        plan(validated(settings))


def test_a_batch_that_a_search_tries_is_no_larger_than_the_data_either(settings, search):
    settings["search"] = search
    search["space"]["train.batch"] = {"kind": "grid", "values": [12, 1200]}
    settings["data"]["sets"]["chats"] |= {"records": 500, "split": "train"}
    with pytest.raises(PlanError, match=r"train\.batch=1200 must not exceed the 500 training"):
        plan(validated(settings))


def test_accumulation_makes_up_the_batch(settings):
    settings |= {"cluster": {"workers": 2}, "engine": {"micro_batch": 3}}
    assert plan(validated(settings)).sizes[0].accumulation == 2


def test_the_fewest_workers_must_have_room_too(settings):
    settings |= {"engine": {"zero_stage": 3, "gradient_checkpointing": False}}
    settings["cluster"] = {"workers": 12, "gpus_per_worker": 1}
    alone = [
        plan(validated(settings).with_overrides({"cluster.workers": n})).sizes[0].memory_bytes
        for n in (12, 4)
    ]
    assert alone[0] < alone[1]
    elastic = validated(settings).with_overrides({"cluster.min_workers": 4})
    assert [size.memory_bytes for size in plan(elastic).sizes] == alone
    tight = {"cluster.gpu_memory_gib": sum(alone) / 2 / 2**30}
    plan(elastic.with_overrides(tight | {"cluster.min_workers": None}))
    with pytest.raises(PlanError, match=r"model\.size=small: a worker of this run needs"):
        plan(elastic.with_overrides(tight))


def test_a_sweep_is_planned_for_each_size_with_the_workers_of_a_trial(settings, search):
    settings |= {"cluster": {"workers": 4}, "search": search | {"workers": 2}}
    planned = plan(validated(settings))
    assert (planned.trials, planned.trials_at_once) == (6, 4)
    assert [(size.purpose, size.size, size.workers) for size in planned.sizes] == [
        ("run", "small", 4),
        ("trial", "small", 2),
        ("trial", "large", 2),
    ]
    small, large = planned.sizes[1:]
    assert large.parameters["layers"].total == 2 * small.parameters["layers"].total


def test_a_sweep_over_attention_is_planned_for_the_scheme_with_parameters_too(settings):
    settings["model"]["cross_every"] = 1
    space = {
        "model.attention": {"kind": "grid", "values": ["causal", "mmca", "gated_cross"]},
        "model.size": {"kind": "grid", "values": ["small", "large"]},
    }
    planned = plan(validated(settings | {"search": {"space": space}}))
    blocks = [
        size.parameters.get("cross-attention", Part(0, 0)).trainable for size in planned.sizes
    ]
    block = 12 * 8 * 8 + 4 * 8 + 2
    assert blocks == [0, 0, 0, 2 * block, 0, 0, 4 * block]
    assert [size.attention for size in planned.sizes[1:4]] == ["causal", "mmca", "gated_cross"]
    small, gated = planned.sizes[2:4]
    assert gated.memory["optimizer"] - small.memory["optimizer"] == 12 * 2 * block
    table = [line.split() for line in planned.render().splitlines()]
    assert ["cross-attention", "(trained)", *(f"{count:,}" for count in blocks)] in table


def test_a_plan_is_json_and_an_aligned_text(settings, search):
    planned = plan(validated(settings | {"search": search}))
    described = json.loads(json.dumps(planned.as_dict()))
    assert described["identity"] == planned.identity
    assert described["sizes"][0]["memory_bytes"] == planned.sizes[0].memory_bytes
    table = planned.render().split("\n\n")[1].splitlines()
    assert len({len(line) for line in table}) == 1


def shipped(*overrides: str) -> Experiment:
    return load(Path(__file__).parents[2] / "configs/experiment/llava_7b.yaml", overrides)


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["engine.micro_batch=8", "data.max_tokens=16384"], "set engine.micro_batch=4"),
        (
            ["engine.micro_batch=16", "engine.gradient_checkpointing=false"],
            "set engine.gradient_checkpointing=true",
        ),
        (["model.size=70b"], "set engine.zero_stage=3"),
        (
            ["engine.zero_stage=3", "data.max_tokens=8192", "model.size=70b", "cluster.workers=1"],
            "set engine.offload_parameters=cpu",
        ),
        (
            ["model.size=70b", "data.max_tokens=8192", "engine.micro_batch=8"],
            "set engine.zero_stage=3 engine.micro_batch=2",
        ),
        (
            ["model.size=70b", "data.max_tokens=300000"],
            "no ZeRO stage, offloading, micro batch or number of workers fits",
        ),
        (  # ZeRO 3 would do, were it not refused
            ["model.size=70b", "data.max_tokens=8192", "model.quantization=int8"],
            "no ZeRO stage, offloading, micro batch or number of workers fits",
        ),
    ],
)
def test_what_does_not_fit_names_its_parts_and_the_nearest_that_does(overrides, remedy):
    with pytest.raises(PlanError) as caught:
        plan(shipped(*overrides))
    message = str(caught.value)
    assert "frozen weights" in message
    assert "activations" in message
    assert "cluster.gpu_memory_gib=80" in message
    assert remedy in message
    if remedy.startswith("set "):
        fitting = message.rpartition("; set ")[2].split(" ")
        plan(shipped(*overrides, *fitting))


def test_a_trial_that_does_not_fit_is_refused_too(settings, search):
    settings |= {"search": search, "cluster": {"gpu_memory_gib": 1e-6}}
    settings["engine"] = {"gradient_checkpointing": False}
    with pytest.raises(PlanError, match=r"model\.size=small: a worker of this run needs"):
        plan(validated(settings))
    small = plan(validated(settings).with_overrides({"cluster.gpu_memory_gib": None}))
    limit = small.sizes[1].memory_bytes / 1024**3
    with pytest.raises(PlanError, match=r"model\.size=large: a worker of this trial needs"):
        plan(validated(settings).with_overrides({"cluster.gpu_memory_gib": limit}))


def test_without_a_limit_nothing_is_refused():
    assert plan(shipped("model.size=70b", "cluster.gpu_memory_gib=null")).sizes[0].memory_bytes
