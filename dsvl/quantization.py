"""Frozen linear layers in 8 or 4 bits, by the bitsandbytes library.

It takes seconds to import, which models without such layers need not pay.
"""

import logging
from typing import Any, Literal

import torch
from torch import nn
from transformers import BitsAndBytesConfig

# It says at every product that int8 works on float16, and without `kernels` that there is another way.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def how_to_load(
    kind: Literal["none", "int8", "nf4"], *, dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """What `from_pretrained` needs to know to quantise a decoder, all but its head, as it is loaded.

    Weights are rounded on the current GPU, if there is one, and stay there.
    """
    match kind:
        case "none":
            return None
        case "int8":
            return BitsAndBytesConfig(
                load_in_8bit=True,
                # Else a column with an outlier in one token is computed in float16 for all tokens of a pass:
                # a token would depend on later ones and on other samples.
                llm_int8_threshold=0.0,
                llm_int8_skip_modules=["lm_head"],
            )
        case "nf4":
            return BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=dtype,
                llm_int8_skip_modules=["lm_head"],
            )


def keep_trainable(decoder: nn.Module) -> None:
    """Forbid quantised layers to repack their weights for inference.

    On CPUs with AVX512-BF16 they would in their first pass without gradients, and from then on compute in
    bfloat16 and let no gradient through.
    """
    layer: Any
    for layer in decoder.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def dequantized(layer: Any) -> torch.Tensor:
    """(out, in) float32: what the weights of a linear layer stand for, quantised or not."""
    if layer.weight.is_floating_point():
        return layer.weight.float()
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    state = getattr(layer, "state", None)  # where int8 layers have their scales once they ran
    return dequantize_bnb_weight(layer.weight, state).float()
