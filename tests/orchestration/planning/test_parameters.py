"""Parameters are counted as published models have them, and as the modules themselves do on no device."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dsvl.config import LanguageConfig, LoraConfig, ModelConfig, VisionConfig
from dsvl.gated import blocks
from dsvl.lora import adapt
from dsvl.model import VisualChat
from dsvl.projection import PROJECTIONS
from dsvl.qwen_vision import QwenVisionConfig, QwenVisionModel
from orchestration.planning.parameters import (
    Part,
    adapter_parameters,
    language_parameters,
    linear_parameters,
    parameters,
    projection_parameters,
    vision_parameters,
)
from tests.benchmarks import planning


def llama(hidden: int, wide: int, layers: int, heads: int, grouped: int) -> LanguageConfig:
    return LanguageConfig(
        checkpoint="llama",
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=grouped,
    )


def tower(kind: str, size: int, patch: int, hidden: int, wide: int, layers: int) -> VisionConfig:
    return VisionConfig(
        checkpoint=kind,
        kind=kind,
        image_size=size,
        patch_size=patch,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        queries=256 if kind == "qwen" else 0,
        output_size=4096 if kind == "qwen" else 0,
    )


LLAMA_2 = {
    "7b": (llama(4096, 11008, 32, 32, 32), 6_738_415_616),
    "13b": (llama(5120, 13824, 40, 40, 40), 13_015_864_320),
    "70b": (llama(8192, 28672, 80, 64, 8), 68_976_648_192),
}
CLIP_LARGE = tower("clip", 224, 14, 1024, 4096, 24)
QWEN = tower("qwen", 448, 14, 1664, 8192, 48)
TOWERS = {
    "clip-large": (CLIP_LARGE, CLIPVisionConfig, CLIPVisionModel, 16),
    "clip-small": (tower("clip", 8, 4, 16, 24, 2), CLIPVisionConfig, CLIPVisionModel, 2),
    "siglip-so400m": (
        tower("siglip", 384, 14, 1152, 4304, 27), SiglipVisionConfig, SiglipVisionModel, 16
    ),
    "siglip-small": (tower("siglip", 8, 4, 16, 24, 2), SiglipVisionConfig, SiglipVisionModel, 2),
    "qwen": (QWEN, QwenVisionConfig, QwenVisionModel, 16),
    "qwen-small": (
        replace(tower("qwen", 28, 7, 24, 36, 2), queries=9, output_size=256),
        QwenVisionConfig, QwenVisionModel, 3,
    ),
}  # fmt: skip


def count(module: torch.nn.Module) -> int:
    assert all(weight.is_meta for weight in module.parameters())
    return sum(weight.numel() for weight in module.parameters())


def shape(config: object) -> dict[str, int]:
    """What the settings say of a shape, under the names of `config.json`."""
    return {name: value for name, value in vars(config).items() if isinstance(value, int)}


@pytest.mark.parametrize("size", LLAMA_2)
def test_llama_2_has_its_published_number_of_parameters(size):
    language, published = LLAMA_2[size]
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(LlamaConfig(**shape(language)))
    assert sum(language_parameters(language).values()) == count(decoder) == published
    assert language_parameters(language)["embedding"] == count(decoder.get_input_embeddings())


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_has_as_many_parameters_as_its_module(name):
    vision, settings, model, heads = TOWERS[name]
    extra = {"vision_use_head": False} if vision.kind == "siglip" else {}
    with torch.device("meta"):
        module = model(settings(num_attention_heads=heads, **shape(vision), **extra))
    assert vision_parameters(vision) == count(module)


def test_towers_have_their_published_number_of_parameters():
    assert vision_parameters(CLIP_LARGE) == 303_179_776
    assert vision_parameters(QWEN) == 9_656_935_168 - 7_721_324_544  # Qwen-VL less Qwen-7B


def linear(module: torch.nn.Module) -> int:
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    return sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("targets", ["all", "attention"])
@pytest.mark.parametrize("name", ["clip-small", "siglip-so400m", "qwen-small"])
def test_adapters_have_as_many_parameters_as_their_modules(name, targets):
    vision, settings, tower, heads = TOWERS[name]
    language = llama(64, 160, 3, 8, 2)
    loras = LoraConfig(rank=4, targets=targets), LoraConfig(rank=7, targets=targets)
    model = ModelConfig(
        size="t",
        languages={"t": language},
        vision=vision,
        language_lora=loras[0],
        vision_lora=loras[1],
        train_embedding=False,
    )
    extra = {"vision_use_head": False} if vision.kind == "siglip" else {}
    with torch.device("meta"):
        parts = {
            "language": AutoModelForCausalLM.from_config(LlamaConfig(**shape(language))).model,
            "vision": tower(settings(num_attention_heads=heads, **shape(vision), **extra)),
        }
        assert linear_parameters(language) == linear(parts["language"])
        for part, lora in zip(parts.values(), loras, strict=True):
            adapt(part.requires_grad_(False), lora, dtype=torch.bfloat16)
    added = {
        name: sum(weight.numel() for weight in part.parameters() if weight.requires_grad)
        for name, part in parts.items()
    }
    assert adapter_parameters(model) == added
    counted = {name: part.trainable for name, part in parameters(model).items() if part.trainable}
    del counted["projection"]
    assert counted == {f"{name} adapters": count for name, count in added.items()}


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("vision", [CLIP_LARGE, QWEN], ids=lambda vision: vision.kind)
def test_a_projection_has_as_many_parameters_as_its_module(kind, layers, vision):
    model = ModelConfig(
        size="7b",
        languages={"7b": LLAMA_2["7b"][0]},
        vision=vision,
        projection=kind,
        projection_layers=layers,
        projection_queries=32,
    )
    with torch.device("meta"):
        module = PROJECTIONS[kind](vision.width, 4096, layers=layers, queries=32)
    assert projection_parameters(model) == count(module)


@pytest.mark.parametrize("every", [1, 4, 7])
@pytest.mark.parametrize("size", LLAMA_2)
def test_gated_cross_attention_has_as_many_parameters_as_its_modules(size, every):
    model = ModelConfig(
        size=size,
        languages={size: LLAMA_2[size][0]},
        vision=CLIP_LARGE,
        attention="gated_cross",
        cross_every=every,
    )
    with torch.device("meta"):
        modules = blocks(model)
    assert len(modules) == model.language.num_hidden_layers // every
    assert parameters(model)["cross-attention"] == Part(count(modules), count(modules))
    assert "cross-attention" not in parameters(replace(model, attention="mmca"))


@pytest.mark.parametrize(("vision", "projection"), [(CLIP_LARGE, 1025 * 4096), (QWEN, 4097 * 4096)])
def test_projection_and_embedding_are_what_the_paper_trains_at_7b(vision, projection):
    model = ModelConfig(size="7b", languages={"7b": LLAMA_2["7b"][0]}, vision=vision)
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(LlamaConfig(**shape(model.language)))
        module = PROJECTIONS["linear"](vision.width, 4096, layers=1, queries=1)
    trained = {name: part.trainable for name, part in parameters(model).items() if part.trainable}
    assert trained == {"projection": projection, "embedding": 131_072_000}
    assert trained == {
        "projection": count(module),
        "embedding": count(decoder.get_input_embeddings()),
    }


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.train_embedding": False},
        {"model.projection": "qformer", "model.projection_layers": 2},
        {"model.attention": "gated_cross", "model.cross_every": 1},
        {"model.language_lora.rank": 4, "model.vision_lora.rank": 2},
    ],
    ids=lambda overrides: ",".join(map(str, overrides.values())) or "as it is",
)
def test_a_whole_model_has_as_many_parameters_as_are_planned(overrides, tmp_path):
    experiment = planning.small(planning.experiment(overrides, tmp_path))
    planning.write_checkpoints(experiment)
    model = VisualChat(experiment.model, precision="fp32", seed=0)
    planned = parameters(experiment.model).values()
    assert sum(part.total for part in planned) == sum(w.numel() for w in model.parameters())
    assert sum(part.trainable for part in planned) == sum(
        weight.numel() for weight in model.trainable().values()
    )
