"""What a worker holds follows ZeRO, the precision and what the decoder really keeps for the backward pass."""

import weakref
from pathlib import Path

import bitsandbytes
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)

from dsvl.config import LoraConfig
from dsvl.data.layout import lay_out
from dsvl.data.types import Kind
from dsvl.decoder import Streams
from dsvl.gated import Block, Gated
from dsvl.head import Head
from dsvl.lora import adapt
from orchestration.compose import load
from orchestration.config import validated
from orchestration.planning.memory import (
    FRAGMENTED,
    GIB,
    QUANTIZED_BYTES,
    RUNTIME_BYTES,
    at_the_loss,
    evaluating,
    gradient_checkpointing,
    host_memory,
    memory,
)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_each_stage_of_zero_divides_one_thing_more(settings, stage):
    settings["train"]["precision"] = "fp32"
    engine, cluster = {"zero_stage": stage}, {"workers": 4}
    alone = memory(validated(settings | {"engine": engine}))
    shared = memory(validated(settings | {"engine": engine, "cluster": cluster}))
    kinds = ("frozen weights", "trainable weights", "optimizer")
    divided = {name for name in kinds if shared[name] * 4 == alone[name]}
    assert {name for name in kinds if shared[name] < alone[name]} == divided
    weights = {"frozen weights", "trainable weights"}
    assert divided == [set(), {"optimizer"}, {"optimizer"}, {"optimizer"} | weights][stage]
    held = at_the_loss(
        validated(settings | {"engine": engine, "cluster": cluster}), recompute=False
    )
    trained, embedding = 4 * (8 * 8 + 8 + 32 * 8), 4 * 32 * 8
    own = (
        trained // 4
    )  # ZeRO 2 leaves whole what a worker has a part of, and ZeRO 1 holds all twice
    assert held["gradients"] == [trained, 2 * trained, min(trained, own + embedding), own][stage]


def test_without_zero_weights_are_their_own_masters(settings):
    settings["train"]["precision"] = "fp32"
    parts = memory(validated(settings | {"engine": {"zero_stage": 0}}))
    assert parts["optimizer"] == 8 * (8 * 8 + 8 + 32 * 8)


def test_one_pass_an_update_holds_no_gradients_while_activations_are_there(settings):
    settings |= {"cluster": {"workers": 12}, "engine": {"zero_stage": 2}}
    assert at_the_loss(validated(settings), recompute=False)["gradients"] == 0
    settings["model"]["language_lora"] = {"rank": 4}  # whose gradients come before the others'
    assert at_the_loss(validated(settings), recompute=False)["buffers"] > 0


def test_the_update_counts_where_samples_are_short(settings):
    settings |= {"engine": {"zero_stage": 1}, "train": settings["train"] | {"batch": 1}}
    settings["data"]["max_tokens"] = 1
    for shape in settings["model"]["languages"].values():
        shape |= {"vocab_size": 100_000, "intermediate_size": 8}
    trained = 8 * 8 + 8 + 100_000 * 8
    parts = memory(validated(settings).with_overrides({"train.precision": "fp32"}))
    assert parts["activations"] == 0
    # Master value and moments; weight, gradient and AdamW's two temporaries.
    states = parts["optimizer"] + parts["trainable weights"] + parts["gradients"] + parts["buffers"]
    assert states == trained * (12 + 4 + 4 + 8)


def test_what_is_offloaded_leaves_the_device_for_its_machine(settings):
    settings |= {"engine": {"zero_stage": 3}, "cluster": {"workers": 4}}
    here = validated(settings)
    away = {"engine.offload_optimizer": "cpu", "engine.offload_parameters": "cpu"}
    there = here.with_overrides(away)
    gone = ("optimizer", "trainable weights", "frozen weights")
    assert all(memory(there)[name] == 0 for name in gone)
    trained = 8 * 8 + 8 + 32 * 8
    moved = sum(memory(here)[name] for name in gone)
    assert host_memory(here) == 0
    assert host_memory(there) == moved + trained // 4 * (4 + 2)  # with gradients and a copy to send
    on_disk = {"engine.offload_parameters": "nvme", "engine.nvme_path": "disk"}
    assert host_memory(here.with_overrides(on_disk)) == 0


def test_zero_3_gathers_small_models_whole_and_of_large_ones_a_gibibyte_and_a_half():
    shipped = load(Path(__file__).parents[3] / "configs/experiment/visualchat_70b.yaml")
    gathered = 2 * (500_000_000 + 8192 * 32_000 + 2 * 50_000_000)
    assert memory(shipped)["gathered weights"] == pytest.approx(gathered, rel=1e-3)
    asked = {"engine.deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 0}}}
    assert memory(shipped.with_overrides(asked))["gathered weights"] == pytest.approx(
        gathered - 2 * 500_000_000, rel=1e-3
    )
    assert memory(shipped.with_overrides({"cluster.workers": 1}))["gathered weights"] == 0


def test_a_gpu_takes_an_allowance(settings):
    parts = memory(validated(settings))
    assert parts["allowance"] == 0
    parts = memory(validated(settings).with_overrides({"cluster.gpus_per_worker": 1}))
    passing = ("gradients", "buffers", "gathered weights", "activations", "at work")
    expected = RUNTIME_BYTES + FRAGMENTED * sum(parts[name] for name in passing)
    assert parts["allowance"] == pytest.approx(expected, abs=1)


def test_half_precision_halves_weights_but_not_the_optimizer(settings):
    full = memory(validated(settings).with_overrides({"train.precision": "fp32"}))
    half = memory(validated(settings).with_overrides({"train.precision": "bf16"}))
    assert half["frozen weights"] * 2 == full["frozen weights"]
    assert half["optimizer"] == full["optimizer"] == 12 * (8 * 8 + 8 + 32 * 8)


@pytest.mark.parametrize("adapters", [None, "all", "attention"])
@pytest.mark.parametrize("key_heads", [2, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_a_layer_keeps_is_bounded_closely_from_above(
    settings, recompute, precision, key_heads, adapters
):
    if adapters:
        settings["model"]["language_lora"] = {"rank": 8, "targets": adapters}
    settings["train"]["precision"] = precision
    settings["engine"] = {"gradient_checkpointing": recompute}
    settings["data"]["max_tokens"] = 160
    shape = settings["model"]["languages"]["small"]
    shape |= {"hidden_size": 128, "intermediate_size": 344, "num_attention_heads": 8}
    shape["num_key_value_heads"] = key_heads
    planned, kept = [], []
    for shape["num_hidden_layers"] in (4, 12):
        planned.append(at_the_loss(validated(settings), recompute=recompute)["activations"])
        kept.append(
            kept_for_the_backward_pass(shape, precision, recompute=recompute, adapters=adapters)
        )
    eight_planned, eight_kept = planned[1] - planned[0], kept[1] - kept[0]
    assert eight_kept <= eight_planned <= 1.3 * eight_kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_a_block_of_gated_cross_attention_keeps_is_bounded_closely_from_above(
    settings, recompute, precision
):
    settings["train"]["precision"] = precision
    settings["engine"] = {"gradient_checkpointing": recompute}
    settings["data"]["max_tokens"] = 160
    shape = settings["model"]["languages"]["small"]
    shape |= {"hidden_size": 128, "num_attention_heads": 8, "num_hidden_layers": 4}
    settings["model"]["attention"] = "gated_cross"
    planned, kept = [], []
    for every in (1, 4):
        settings["model"]["cross_every"] = every
        planned.append(at_the_loss(validated(settings), recompute=recompute)["activations"])
        kept.append(kept_for_the_backward_pass(shape, precision, recompute=recompute, every=every))
    three_planned, three_kept = planned[0] - planned[1], kept[0] - kept[1]
    assert three_kept <= three_planned <= 1.3 * three_kept


@pytest.mark.parametrize("vocabulary", [300, 32_000, 152_064])
def test_the_head_holds_the_logits_that_are_planned_in_chunks_worth_a_product(
    settings, vocabulary, monkeypatch
):
    settings["model"]["languages"]["small"]["vocab_size"] = vocabulary
    experiment = validated(settings)
    tokens = experiment.engine.micro_batch * experiment.data.max_tokens
    held = []

    def linear(*arguments):
        held.append(nn.functional.linear(*arguments))
        return held[-1]

    monkeypatch.setattr("dsvl.head.linear", linear)
    Head(nn.Linear(2, vocabulary))(torch.randn(tokens, 2), torch.zeros(tokens, dtype=torch.int64))
    planned = at_the_loss(experiment, recompute=False)["at work"]
    assert planned == 3 * max(logits.nbytes for logits in held)
    assert len(held[0]) >= min(tokens, 128)


def kept_for_the_backward_pass(shape, precision, *, recompute, every=None, adapters=None):
    """Bytes that autograd saves in a decoder's forward pass over 128 text and 32 image tokens.

    With a block of gated cross-attention ahead of `every` so many-th layer, or adapters in some layers.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    config = {name: value for name, value in shape.items() if name != "checkpoint"}
    stock = LlamaForCausalLM(LlamaConfig(**config)).to(dtype).requires_grad_(False)
    if adapters:
        adapt(stock, LoraConfig(rank=8, targets=adapters), dtype=dtype)
    kinds = np.full((1, 160), Kind.TEXT)
    kinds[0, 20:36] = kinds[0, 70:86] = Kind.IMAGE
    wanted = np.zeros((1, 160), bool)
    wanted[0, -40:-1] = True
    text, images = (torch.randn(count, 128, dtype=dtype, requires_grad=True) for count in (128, 32))
    decode = Streams(stock.model, scheme="mmca")
    if every is not None:
        stock.blocks = nn.ModuleList(Block(128, 8) for _ in range(4 // every)).to(dtype)
        decode = Gated(stock.model, stock.blocks, every=every, image_tokens=16)
    return saved_bytes(
        lambda: decode(text, images, lay_out(kinds, wanted), recompute=recompute), stock
    )


def saved_bytes(forward, module):
    """Bytes of all that autograd keeps of a forward pass, weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    held, saved = {}, []

    def keep(tensor):
        saved.append(tensor)  # so that no address is used twice
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(size for address, size in held.items() if address not in weights)


@pytest.mark.parametrize("targets", ["all", "attention"])
def test_a_tower_with_adapters_keeps_no_more_than_is_planned(settings, targets):
    settings["model"]["vision"] |= {"image_size": 32, "hidden_size": 64, "intermediate_size": 256}
    settings["data"] |= {"max_tokens": 256, "max_images": 1}
    settings["train"]["precision"] = "fp32"
    lora = {"rank": 8, "targets": targets}
    without, experiment = (
        validated(settings | {"model": settings["model"] | {"vision_lora": each}})
        for each in ({}, lora)
    )
    shape = {n: v for n, v in settings["model"]["vision"].items() if n != "checkpoint"}
    tower = CLIPVisionModel(CLIPVisionConfig(**shape, num_attention_heads=2)).requires_grad_(False)
    adapt(tower, LoraConfig(**lora), dtype=torch.float32)
    kept = saved_bytes(lambda: tower(torch.randn(1, 3, 32, 32)), tower)
    planned, rest = (
        at_the_loss(each, recompute=False)["activations"] for each in (experiment, without)
    )
    planned -= rest
    assert kept <= planned <= 3 * kept


@pytest.mark.parametrize(("kind", "share"), [("int8", 1 / 2), ("nf4", 1 / 4)])
def test_a_quantised_decoder_takes_a_half_or_a_quarter_and_nothing_else_changes(kind, share):
    shipped = load(Path(__file__).parents[3] / "configs/experiment/llava_7b.yaml", ())
    stock = memory(shipped)
    quantised = memory(shipped.with_overrides({"model.quantization": kind}))
    saved = stock.pop("frozen weights") - quantised.pop("frozen weights")
    assert saved == pytest.approx(2 * 32 * 202_375_168 * (1 - share), rel=0.02)
    assert quantised == stock


def test_a_weight_in_nf4_takes_the_bytes_that_are_planned():
    layer = bitsandbytes.nn.Linear4bit(2048, 2048, bias=False, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    held = (layer.weight, state.absmax, state.code, state.state2.absmax, state.state2.code)
    found = sum(tensor.nbytes for tensor in held)
    assert sum(QUANTIZED_BYTES["nf4"]) * 2048**2 == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("chosen", [None, False, True])
def test_layers_are_recomputed_as_configured_or_only_where_no_more_fits(settings, chosen):
    settings["engine"] = {"gradient_checkpointing": False}
    needed = sum(memory(validated(settings)).values()) / GIB
    settings["engine"] = {"gradient_checkpointing": chosen}
    for limit, scarce in ((None, False), (1.01 * needed, False), (0.99 * needed, True)):
        settings["cluster"] = {"gpu_memory_gib": limit}
        assert gradient_checkpointing(validated(settings)) == (scarce if chosen is None else chosen)


class Peak(TorchDispatchMode):
    """Bytes of the tensors that operations make, at most at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        entering = {id(arg.untyped_storage()) for arg in tree_leaves(args) if torch.is_tensor(arg)}
        for made in tree_leaves(result):
            if torch.is_tensor(made) and id(storage := made.untyped_storage()) not in entering:
                self.now += (size := storage.nbytes())
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._gone, size)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("size", ["7b", "13b", "70b"])
def test_a_plan_has_room_for_what_held_out_samples_take_in_a_layer(size, monkeypatch):
    path = Path(__file__).parents[3] / "configs/experiment/visualchat_7b.yaml"
    experiment = load(path, [f"model.size={size}", "evaluation.batch=1"])
    shape = {name: n for name, n in vars(experiment.model.language).items() if name != "checkpoint"}
    config = LlamaConfig(**shape | {"num_hidden_layers": 2})
    # What has no numbers has no fused kernel: the scores that none would hold are left out.
    fused = "dsvl.attention.scaled_dot_product_attention"
    monkeypatch.setattr(fused, lambda query, *_, **__: torch.empty_like(query))
    with torch.device("meta"), torch.no_grad(), Peak() as peak:
        streams = Streams(LlamaModel(config).bfloat16(), scheme="mmca")
        before = peak.now
        texts, images = (torch.empty(2048, config.hidden_size, dtype=torch.bfloat16) for _ in "ab")
        kinds = np.array([[Kind.TEXT] * 1024 + [Kind.IMAGE] * 2048 + [Kind.TEXT] * 1024], np.int8)
        peak.most = 0
        streams(texts, images, lay_out(kinds, kinds == Kind.TEXT).to(torch.device("meta")))
    needed = sum(evaluating(experiment).values())
    assert 0.7 * needed < peak.most - before < needed
