"""Plans count parameters, bytes and steps as known models have them, and refuse with a remedy."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaModel

from dsvl.config import LoraConfig
from dsvl.data.layout import lay_out
from dsvl.data.types import Kind
from dsvl.decoder import decoder_for
from dsvl.lora import adapt
from orchestration.compose import load
from orchestration.config import Experiment, validated
from orchestration.plan import QUANTIZED_BYTES, PlanError, memory, plan
from tests.orchestration.test_parameters import shape


def test_only_the_projection_and_the_embedding_are_trained(settings):
    (size,) = plan(validated(settings)).sizes
    trained = {name: part.trainable for name, part in size.parameters.items() if part.trainable}
    assert trained == {"projection": 8 * 8 + 8, "embedding": 32 * 8}
    settings["model"]["train_embedding"] = False
    (size,) = plan(validated(settings)).sizes
    assert sum(part.trainable for part in size.parameters.values()) == 8 * 8 + 8


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_stage_of_zero_divides_one_thing_more(settings, stage):
    settings["train"]["precision"] = "fp32"
    alone = memory(validated(settings | {"engine": {"zero_stage": 0}}))
    engine, cluster = {"zero_stage": stage}, {"workers": 4}
    shared = memory(validated(settings | {"engine": engine, "cluster": cluster}))
    divided = {name for name in alone if shared[name] < alone[name]}
    weights = {"frozen weights", "trainable weights"}
    expected = [
        set(),
        {"optimizer"},
        {"optimizer", "gradients"},
        {"optimizer", "gradients"} | weights,
    ]
    assert divided == expected[stage]
    assert all(shared[name] * 4 == alone[name] for name in divided)


def test_half_precision_halves_weights_but_not_the_optimizer(settings):
    full = memory(validated(settings).with_overrides({"train.precision": "fp32"}))
    half = memory(validated(settings).with_overrides({"train.precision": "bf16"}))
    assert half["frozen weights"] * 2 == full["frozen weights"]
    assert half["optimizer"] == full["optimizer"] == 12 * (8 * 8 + 8 + 32 * 8)


@pytest.mark.parametrize(("kind", "share"), [("int8", 1 / 2), ("nf4", 1 / 4)])
def test_a_quantised_decoder_takes_a_half_or_a_quarter_and_nothing_else_changes(kind, share):
    stock, quantised = memory(shipped()), memory(shipped(f"model.quantization={kind}"))
    saved = stock.pop("frozen weights") - quantised.pop("frozen weights")
    assert saved == pytest.approx(2 * 32 * 202_375_168 * (1 - share), rel=0.02)
    assert quantised == stock


def test_a_weight_in_nf4_takes_the_bytes_that_are_planned():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(2048, 2048, bias=False, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    held = (layer.weight, state.absmax, state.code, state.state2.absmax, state.state2.code)
    found = sum(tensor.nbytes for tensor in held)
    assert sum(QUANTIZED_BYTES["nf4"]) * 2048**2 == pytest.approx(found, rel=1e-3)


def saved_values(module: torch.nn.Module, run: Callable[[], object]) -> int:
    """How many float32 values a pass keeps for the way back, beside the weights of the module."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    held: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes() // 4, tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(size for pointer, (size, _) in held.items() if pointer not in weights)


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_adapters_keep_no_more_for_the_way_back_than_is_planned(settings, targets):
    lora = {"rank": 8, "targets": targets}
    settings["model"]["languages"]["small"] |= {"hidden_size": 64, "intermediate_size": 172}
    settings["model"]["vision"] |= {"image_size": 32, "hidden_size": 64, "intermediate_size": 256}
    settings |= {"data": settings["data"] | {"max_tokens": 256, "max_images": 1}}
    settings["train"]["precision"] = "fp32"
    experiment = validated(settings)
    model, found, planned = experiment.model, {}, {}
    language = LlamaModel(LlamaConfig(**shape(model.language))).requires_grad_(False)
    tower = CLIPVisionModel(CLIPVisionConfig(**shape(model.vision), num_attention_heads=2))
    kinds = np.full((1, 256), Kind.TEXT, np.int8)
    kinds[0, 5:69] = Kind.IMAGE
    layout = lay_out(kinds, kinds == kinds)
    text, images = (torch.randn(n, 64, requires_grad=True) for n in (192, 64))
    decode = decoder_for(language, scheme="mmca")
    before = saved_values(language, lambda: decode(text, images, layout))
    config = LoraConfig(rank=8, targets=targets)
    adapt(language, config, dtype=torch.float32)
    adapt(tower.requires_grad_(False), config, dtype=torch.float32)
    after = saved_values(language, lambda: decode(text, images, layout))
    found["language_lora"] = after - before
    found["vision_lora"] = saved_values(tower, lambda: tower(torch.randn(1, 3, 32, 32)))
    for part in found:
        more = memory(experiment.with_overrides({f"model.{part}": lora}))["activations"]
        planned[part] = (more - memory(experiment)["activations"]) // 4
        assert found[part] <= planned[part] <= 3 * found[part], part


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


def test_prepared_data_is_believed_before_anything_else(settings, tmp_path):
    settings |= {"storage": {"path": str(tmp_path)}}
    settings["data"]["sets"]["chats"]["records"] = 1000
    experiment = validated(settings)
    manifest = tmp_path / "prepared/tiny/manifest.json"
    manifest.parent.mkdir(parents=True)
    data = experiment.as_dict()["data"]
    del data["sets"]["chats"]["records"]
    identity = {"data": data, "seed": 1234, "image_tokens": 4, "tokenizer": "unseen"}
    content = {"identity": identity, "splits": {"train": 240, "eval": 9}}
    manifest.write_text(json.dumps(content))
    assert plan(experiment).samples == 240
    assert plan(experiment).samples_from == str(manifest)
    for change in (
        {"data.max_images": 3},
        {"train.seed": 1},
        {"model.vision.class_token": True},
        {"model.projection": "perceiver"},
    ):
        assert plan(experiment.with_overrides(change)).samples == 900
    assert plan(experiment.with_overrides({"model.size": "large", "optim.lr": 1})).samples == 240
    assert plan(experiment.with_overrides({"model.projection": "mlp"})).samples == 240


def test_a_batch_larger_than_the_data_is_refused(settings):
    settings["data"]["sets"]["chats"] |= {"records": 5, "split": "train"}
    with pytest.raises(PlanError, match=r"train\.batch=12 must not exceed the 5 training samples"):
        plan(validated(settings))


def test_accumulation_makes_up_the_batch(settings):
    settings |= {"cluster": {"workers": 2}, "engine": {"micro_batch": 3}}
    assert plan(validated(settings)).sizes[0].accumulation == 2


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
        (["engine.micro_batch=16"], "set engine.micro_batch=4"),
        (["model.size=70b", "data.max_tokens=1024"], "set engine.zero_stage=3"),
        (
            ["engine.zero_stage=3", "data.max_tokens=512", "model.size=70b", "cluster.workers=1"],
            "set cluster.workers=4",
        ),
        (
            ["model.size=70b", "data.max_tokens=1024", "engine.micro_batch=4"],
            "set engine.zero_stage=3 engine.micro_batch=2",
        ),
        (["model.size=70b"], "no ZeRO stage, micro batch or number of workers fits"),
        (  # ZeRO 3 would do, were it not refused
            ["model.size=70b", "data.max_tokens=1024", "model.quantization=int8"],
            "no ZeRO stage, micro batch or number of workers fits",
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
    with pytest.raises(PlanError, match=r"model\.size=small: a worker of this run needs"):
        plan(validated(settings))
    small = plan(validated(settings).with_overrides({"cluster.gpu_memory_gib": None}))
    limit = small.sizes[1].memory_bytes / 1024**3
    with pytest.raises(PlanError, match=r"model\.size=large: a worker of this trial needs"):
        plan(validated(settings).with_overrides({"cluster.gpu_memory_gib": limit}))


def test_without_a_limit_nothing_is_refused():
    assert plan(shipped("model.size=70b", "cluster.gpu_memory_gib=null")).sizes[0].memory_bytes
