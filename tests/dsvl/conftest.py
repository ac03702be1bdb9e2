"""Models of the real architectures at tiny width, saved and loaded as ordinary checkpoints."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dsvl.config import LanguageConfig, ModelConfig, VisionConfig
from dsvl.model import VisualChat

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with a decoder in `language` and a tower in `vision`, random but fixed."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, initializer_range=0.2)).save_pretrained(
        folder / "language"
    )
    CLIPVisionModel(CLIPVisionConfig(**VISION, num_attention_heads=2)).save_pretrained(
        folder / "vision"
    )
    return folder


@pytest.fixture(scope="session")
def model_config(checkpoints):
    """The configuration of the tiny model."""
    return ModelConfig(
        size="tiny",
        languages={"tiny": LanguageConfig(checkpoint=str(checkpoints / "language"), **SHAPE)},
        vision=VisionConfig(checkpoint=str(checkpoints / "vision"), **VISION),
    )


@pytest.fixture(scope="module")
def language(tokenizer, tmp_path_factory):
    """A tiny decoder that knows every id of the tokenizer."""
    shape = {**SHAPE, "vocab_size": len(tokenizer)}
    folder = tmp_path_factory.mktemp("language")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.2)).save_pretrained(folder)
    return LanguageConfig(checkpoint=str(folder), **shape)


@pytest.fixture
def model(model_config):
    """The tiny model in float32."""
    return VisualChat(model_config, precision="fp32", seed=0)


@pytest.fixture
def gated_model(model_config):
    """The tiny model with gated cross-attention ahead of each layer, its gates open."""
    config = replace(model_config, attention="gated_cross", cross_every=1)
    return open_gates(VisualChat(config, precision="fp32", seed=0))


def open_gates(model: VisualChat) -> VisualChat:
    """A model whose text sees images, as after some training."""
    for name, weight in model.cross.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(weight, 0.7)
    return model
