"""Adapters (LoRA, arXiv:2106.09685) in a frozen part, and how they are merged into its weights.

The layers are those of the peft library, put where a part has linear layers. It takes seconds to import,
which models without adapters need not pay.
"""

from copy import deepcopy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dsvl.config import LoraConfig
from dsvl.quantization import dequantized

if TYPE_CHECKING:
    from dsvl.model import VisualChat

ADAPTER = "default"
"""What peft calls the one adapter of a layer: a part of its parameters' names."""


def adapt(part: nn.Module, config: LoraConfig, *, dtype: torch.dtype) -> None:
    """Give linear layers of a frozen part trained adapters, drawn from torch's generator, that begin as 0.

    They are named after the layer: `LAYER.lora_A.default.weight`, (rank, in), and `lora_B`, (out, rank).
    """
    if not config.rank:
        return
    from peft import LoraConfig as Settings
    from peft import inject_adapter_in_model

    layers = [
        name
        for name, layer in part.named_modules()
        if isinstance(layer, nn.Linear) and (config.targets == "all" or "attn" in name)
    ]
    alpha: Any = config.alpha  # which peft declares to be whole, and only divides by the rank
    inject_adapter_in_model(
        Settings(r=config.rank, lora_alpha=alpha, target_modules=layers), part, ADAPTER
    )
    for parameter in part.parameters():
        if parameter.requires_grad:  # beside quantised weights peft leaves float32
            parameter.data = parameter.data.to(dtype)


def merged(model: "VisualChat") -> "VisualChat":
    """A copy of a model, merged."""
    plain = deepcopy(model)
    merge(plain)
    return plain


def merge(model: "VisualChat") -> None:
    """Make the linear layers of a model plain, with what adapters add in their weights, one after another.

    Quantised weights become what they stand for; a sum is rounded once, to the precision of the model.
    """
    for part in (model.language, model.vision):
        _make_plain(part, dtype=model.embedding.weight.dtype)
    if model.config.quantization != "none":  # or what is saved says that it is quantised
        model.language.hf_quantizer.remove_quantization_config(model.language)
    none = LoraConfig()
    model.config = replace(model.config, language_lora=none, vision_lora=none, quantization="none")


def _make_plain(module: nn.Module, *, dtype: torch.dtype) -> None:
    layer: Any
    for name, layer in module.named_children():
        adapted = hasattr(layer, "lora_A")
        base: Any = layer.base_layer if adapted else layer
        if not isinstance(base, nn.Linear):
            _make_plain(layer, dtype=dtype)
        elif adapted or not base.weight.is_floating_point():
            weight = dequantized(base)
            if adapted:
                down, up = (part[ADAPTER].weight for part in (layer.lora_A, layer.lora_B))
                weight = weight + layer.scaling[ADAPTER] * (up.float() @ down.float())
            plain = nn.Linear(base.in_features, base.out_features, device="meta")
            plain.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            plain.bias = base.bias
            setattr(module, name, plain)
    if hasattr(module, "peft_config"):
        del module.peft_config
