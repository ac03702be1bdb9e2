"""Norms of every part are those of a plain PyTorch loop, at every ZeRO stage and on any number of workers."""

from dataclasses import replace

import pytest
import torch

from dsvl import norms
from dsvl.config import EngineConfig, LoraConfig, OptimConfig, TrainConfig
from dsvl.engine import Engine
from dsvl.model import VisualChat
from dsvl.norms import part
from dsvl.optim import groups, learning_rate
from dsvl.train import Plan, steps
from tests.dsvl.ranks import on_ranks
from tests.dsvl.test_model import batch_of
from tests.dsvl.test_train import LAYOUTS, Examples, Prepared

TRAIN = TrainConfig(epochs=1, batch=6, precision="fp32", seed=7)
OPTIM = OptimConfig(
    lr=0.01, projection_lr=0.03, betas=(0.6, 0.95), eps=1e-3, weight_decay=0.1, clip=0.5
)
PARTS = {"projection", "embedding", "gated", "language_lora", "vision_lora"}


SAMPLES = Examples(tuple(layout.replace("1T", "1tT") for layout in LAYOUTS))
"""With text between every image and an answer, as gated cross-attention asks for."""


@pytest.fixture(autouse=True)
def samples_and_pieces(monkeypatch):
    monkeypatch.setattr(Prepared, "train", SAMPLES)
    monkeypatch.setattr(norms, "PIECE", 100)


@pytest.fixture(scope="module")
def config(model_config):
    """A model in which all is trained that can be."""
    return replace(
        model_config,
        attention="gated_cross",
        cross_every=1,
        projection="mlp",
        language_lora=LoraConfig(rank=2),
        vision_lora=LoraConfig(rank=2),
    )


@pytest.fixture(scope="module")
def expected(config):
    """Of each update, by the definition: weights before and after, and gradients that nobody clipped."""
    torch.set_num_threads(1)
    model = VisualChat(config, precision="fp32", seed=0)
    parameters = model.trainable()
    optimizer = torch.optim.AdamW(
        groups(parameters, OPTIM), lr=1.0, betas=OPTIM.betas, eps=OPTIM.eps
    )
    plan, found = Plan(len(SAMPLES), TRAIN), []
    for step in range(plan.steps):
        batch = batch_of(*(SAMPLES[int(i)] for i in plan.indices(step)))
        optimizer.zero_grad()
        (model(batch) / batch.targets).backward()
        gradients = {name: p.grad.clone() for name, p in parameters.items()}
        torch.nn.utils.clip_grad_norm_(parameters.values(), OPTIM.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["lr_ratio"] * learning_rate(step, plan.steps, OPTIM)
        before = {name: p.detach().double() for name, p in parameters.items()}
        optimizer.step()
        weights = {name: p.detach().double() for name, p in parameters.items()}
        updates = {name: weights[name] - before[name] for name in weights}

        def norm(values, which):
            of = [values[name].flatten() for name in values if part(name) == which]
            return torch.cat(of).norm().item()

        found.append(
            {f"train/grad_norm/{which}": norm(gradients, which) for which in PARTS}
            | {f"train/weight_norm/{which}": norm(weights, which) for which in PARTS}
            | {
                f"train/update_ratio/{which}": norm(updates, which) / norm(weights, which)
                for which in PARTS
            }
        )
    return found


def inspected(rank, config, engine, every=1, precision="fp32"):
    """What is measured in each update."""
    train = replace(TRAIN, precision=precision)
    model = VisualChat(config, precision=precision, seed=0)
    built = Engine(model, engine=engine, train=train, optim_config=OPTIM)
    loop = steps(built, Prepared(), Prepared.train, train=train, config=engine, inspect_every=every)
    return [{k: v for k, v in step.metrics().items() if k.count("/") == 2} for step in loop]


def each(rank, config, engines, *options):
    """The same with one engine after another."""
    return [inspected(rank, config, engine, *options) for engine in engines]


def staged(*micro_batches):
    """ZeRO stages from 0 on."""
    return [EngineConfig(zero_stage=stage, micro_batch=n) for stage, n in enumerate(micro_batches)]


OFFLOADED = [
    EngineConfig(zero_stage=2, offload_optimizer="cpu"),
    EngineConfig(  # masters in several pieces
        zero_stage=3,
        offload_optimizer="cpu",
        offload_parameters="cpu",
        deepspeed={"zero_optimization": {"sub_group_size": 4000}},
    ),
]


@pytest.mark.parametrize(
    ("world", "engines"),
    [(1, staged(2, 1, 6, 3)), (2, staged(3, 1, 1, 3)), (2, OFFLOADED), (3, staged(1, 2, 1, 2))],
)
def test_norms_of_every_part_are_those_of_a_plain_loop(config, expected, world, engines):
    for of_rank in on_ranks(world, each, config, engines):
        for found, engine in zip(of_rank, engines, strict=True):
            assert len(found) == len(expected) == 3
            for one, other in zip(found, expected, strict=True):
                assert one == pytest.approx(other, rel=1e-3), engine


def test_norms_in_bf16_are_nearly_those_of_float32(config, expected):
    found, _ = on_ranks(2, each, config, staged(1, 1, 1, 1)[1:], 1, "bf16")
    for first, *_ in found:
        assert first == pytest.approx(expected[0], rel=0.15)


def test_updates_between_two_looks_are_as_others(config, expected):
    engine = EngineConfig(zero_stage=2)
    found, always = (on_ranks(2, inspected, config, engine, every)[0] for every in (3, 1))
    assert found == [{}, {}, always[2]]
    assert always[2].keys() == expected[2].keys()


def test_parts_are_named_as_in_the_configuration():
    names = {
        "projection.0.weight": "projection",
        "language.model.embed_tokens.weight": "embedding",
        "cross.3.attention_gate": "gated",
        "language.model.layers.0.mlp.up_proj.lora_A.default.weight": "language_lora",
        "vision.encoder.layers.0.self_attn.q_proj.lora_B.default.weight": "vision_lora",
    }
    assert {name: part(name) for name in names} == names
