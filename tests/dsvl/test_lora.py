"""Adapters begin as nothing, are trained as if they were in the weights, and can be put there."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dsvl import pretrained
from dsvl.cache import ImageStore
from dsvl.config import LoraConfig, OptimConfig
from dsvl.generate import generate, greedy
from dsvl.lora import merged
from dsvl.model import VisualChat
from tests.dsvl import test_train
from tests.dsvl.test_model import batch_of, example, wanting
from tests.dsvl.test_train import plain, run

BOTH = {"language_lora": LoraConfig(rank=3), "vision_lora": LoraConfig(rank=2, alpha=5.0)}
MIXED = ("t1tTTtT", "tTTT", "t11ttTtTT")


def built(config, *, precision="fp32", seed=0, moved=True, **settings) -> VisualChat:
    """A model whose adapters add something, as after training."""
    model = VisualChat(replace(config, **settings), precision=precision, seed=seed)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.trainable().items():
        if moved and "lora_B" in name:
            parameter.data.normal_(0.0, 0.1, generator=generator)
    return model


def mixed():
    return batch_of(*(example(layout, seed=k) for k, layout in enumerate(MIXED)))


def logits(model, batch):
    with torch.no_grad():
        return model.logits(model.states(wanting(batch, True)))


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(batch).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("attention", ["mmca", "causal"])
def test_adapters_begin_by_changing_nothing(model_config, attention):
    config = replace(model_config, attention=attention)
    base, adapted = (built(config, moved=False, **kind) for kind in ({}, BOTH))
    assert torch.equal(logits(adapted, mixed()), logits(base, mixed()))


def test_adapters_are_drawn_from_the_seed_and_leave_the_projection_as_it_was(model_config):
    one, same, other = (built(model_config, moved=False, seed=s, **BOTH) for s in (1, 1, 2))
    name = "language.model.layers.0.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(one.trainable()[name], same.trainable()[name])
    assert not torch.equal(one.trainable()[name], other.trainable()[name])
    assert torch.equal(one.projection.weight, built(model_config, seed=1).projection.weight)


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_what_is_trained_has_the_names_of_the_layers_and_the_precision_of_the_model(
    model_config, targets
):
    lora = LoraConfig(rank=3, targets=targets)
    model = built(model_config, precision="bf16", language_lora=lora, vision_lora=lora)
    before = VisualChat(model_config, precision="bf16", seed=0)
    layers = {
        name.removesuffix(".weight")
        for name, weight in before.named_parameters()
        if ".layers." in name and weight.ndim == 2
        if targets == "all" or "self_attn" in name
    }
    added = model.trainable().keys() - before.trainable().keys()
    assert added == {
        f"{layer}.lora_{side}.default.weight" for layer in layers for side in ("A", "B")
    }
    assert all(weight.dtype == torch.bfloat16 for weight in model.trainable().values())


@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("recompute", [False, True])
def test_adapters_get_the_gradient_that_the_weights_of_their_layer_would(
    model_config, attention, recompute
):
    model = built(replace(model_config, attention=attention), **BOTH)
    model.recompute = recompute
    found = gradients(model, mixed())
    dense = gradients(merged(model).requires_grad_(True), mixed())
    weights = dict(model.named_parameters())
    adapted = [name for name in found if "lora_A" in name]
    assert len(adapted) == 3 * 7 + 2 * 6
    for name in adapted:
        layer, other = name.partition(".lora_A")[0], name.replace("lora_A", "lora_B")
        scale = 16.0 / 3 if name.startswith("language") else 5.0 / 2
        slope = scale * dense[f"{layer}.weight"]
        torch.testing.assert_close(
            found[other], slope @ weights[name].T, rtol=1e-3, atol=1e-4, msg=other
        )
        torch.testing.assert_close(
            found[name], weights[other].T @ slope, rtol=1e-3, atol=1e-4, msg=name
        )
    assert found.keys() == model.trainable().keys()


ALONE = ("t1T", "1TTT", "tTT", "tttt", "1", "t1t1tT", "t111tTTtT")


@pytest.mark.parametrize("attention", ["mmca", "causal_cross", "causal"])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_come_in_one_order_whatever_a_batch_holds(model_config, attention, recompute):
    # Under ZeRO 2 each rank sends them on as they come, and all ranks must send the same.
    model = built(replace(model_config, attention=attention), **BOTH)
    model.recompute = recompute
    order, orders = [], {}
    for name, parameter in model.trainable().items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    for layout in ALONE:
        order.clear()
        model(batch_of(example(layout))).backward()
        orders[layout] = list(order)
    assert set(orders["t1T"]) == model.trainable().keys()
    assert all(order == orders["t1T"] for order in orders.values())


def test_text_alone_gives_the_adapters_of_the_tower_a_gradient_of_zero(model_config):
    found = gradients(built(model_config, **BOTH), batch_of(example("ttTT")))
    tower = [gradient for name, gradient in found.items() if name.startswith("vision")]
    assert len(tower) == 2 * 2 * 6
    assert not any(gradient.any() for gradient in tower)


def test_features_made_by_another_tower_are_refused_where_the_tower_is_trained(model_config):
    batch = mixed()
    frozen = built(model_config, language_lora=BOTH["language_lora"])
    with torch.no_grad():
        ready = replace(batch, pixels=frozen.vision(batch.pixels))
    torch.testing.assert_close(frozen(ready), frozen(batch))
    with pytest.raises(ValueError, match=r"model\.vision_lora\.rank=2: trains the tower"):
        built(model_config, **BOTH)(ready)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_merged_model_is_a_plain_one_that_says_the_same(model_config, precision):
    model = built(model_config, precision=precision, **BOTH).eval()
    before = deepcopy(model.state_dict())
    plain = merged(model)
    bounds = {"rtol": 1e-4, "atol": 1e-4} if precision == "fp32" else {"rtol": 0.1, "atol": 0.5}
    assert not torch.allclose(logits(built(model_config), mixed()), logits(model, mixed()))
    torch.testing.assert_close(logits(plain, mixed()), logits(model, mixed()), **bounds)
    stock = VisualChat(model_config, precision=precision, seed=0)
    assert plain.config == model_config
    assert plain.state_dict().keys() == stock.state_dict().keys()
    assert plain.trainable().keys() == stock.trainable().keys()
    assert [type(module) for module in plain.modules()] == [type(m) for m in stock.modules()]
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_adapted_model_writes_what_its_merged_copy_writes(model_config):
    model = built(model_config, **BOTH).eval()
    prompts = batch_of(example("t1tt"), example("ttt"), example("t11t"))
    written = greedy(model, prompts, end=0, max_new_tokens=6)
    assert greedy(merged(model), prompts, end=0, max_new_tokens=6) == written
    batch, store = batch_of(example("t1tt")), ImageStore(limit_bytes=10**6)
    for _ in range(2):  # the second time the image is known
        tokens = [t for (t,) in generate(model, batch, end=0, max_new_tokens=6, store=store)]
        assert tokens == written[0]


@pytest.fixture
def gentle(monkeypatch):
    """A learning rate at which adapters of a tiny model do not run away from rounding."""
    monkeypatch.setattr(test_train, "OPTIM", OptimConfig(lr=2e-3, warmup_fraction=0.2))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adapters_train_in_every_stage_as_in_a_plain_loop(model_config, gentle, tmp_path, stage):
    config = replace(model_config, **BOTH)
    records = run(config, tmp_path, stage=stage, world=2, save=(12,))
    expected, parameters = plain(config)
    np.testing.assert_allclose(records, expected, rtol=2e-5, atol=2e-6)
    model = VisualChat(config, precision="fp32", seed=1)
    folder = tmp_path / "step-000012"
    pretrained.put(model, load_file(folder / "parameters.safetensors"), where=folder)
    for name, value in model.trainable().items():
        torch.testing.assert_close(value, parameters[name], rtol=1e-4, atol=1e-5)


def test_adapters_resume_bit_for_bit(model_config, gentle, tmp_path):
    config = replace(model_config, **BOTH)
    options = {"stage": 2, "precision": "bf16", "save": (5, 12)}
    unbroken = run(config, tmp_path / "unbroken", **options)
    first = run(config, tmp_path / "broken", stop=5, **options)
    assert first + run(config, tmp_path / "broken", **options) == unbroken


def test_a_checkpoint_without_the_adapters_is_refused(model_config, tmp_path):
    plain = built(model_config).trainable()
    with pytest.raises(ValueError, match=r"of 3 parameters held .*, 66 differ: language\.model"):
        pretrained.put(built(model_config, **BOTH), plain, where=tmp_path)
