"""What the two streams are measured against: MMCA as the original computes it, and its loss.

The original is `LlamaAttention.forward` of DeepSpeed-VisualChat (microsoft/DeepSpeedExamples,
applications/DeepSpeed-VisualChat, with `enable_mmca_attention`): all S x S scores, two additive masks, two
softmaxes in float32, and the product of their sum with the values. Here the masks are made before the clock
starts, in its favour: the original fills them with a Python loop over all positions in every forward pass.

B batch, N heads, S positions, H head size, D width, V vocabulary, n labelled positions.
"""

from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear, softmax
from transformers import AttentionInterface

from dsvl.data.types import IGNORED, Kind


class Masks(NamedTuple):
    """What the dense form needs beside queries, keys and values."""

    images: torch.Tensor
    """(1, 1, S, S): added to the scores of the softmax over images."""
    text: torch.Tensor
    """The same for the softmax over text."""
    surplus: torch.Tensor
    """(1, 1, S, 1): how often a row's own value is too many in the sum.

    A row to which a softmax gives nothing to see, sees itself in it. (The original lets it see all positions
    alike, later ones included.) Taking it off again makes this the paper's definition for a vector a row.
    """


def masks_of(kinds: torch.Tensor, dtype: torch.dtype) -> Masks:
    """The masks of (S,) kinds without padding."""
    places = torch.arange(len(kinds), device=kinds.device)
    earlier = places <= places[:, None]
    itself = places == places[:, None]
    is_text, is_image = kinds == Kind.TEXT, kinds == Kind.IMAGE
    surplus = torch.zeros(len(kinds), dtype=dtype, device=kinds.device)
    added = []
    for seen in (is_image, is_text):
        visible = earlier & seen & is_text[:, None]
        nothing = ~visible.any(-1)
        visible |= itself & nothing[:, None]
        surplus += nothing
        mask = torch.zeros(visible.shape, dtype=dtype, device=kinds.device)
        added.append(mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None])
    # An image row sees itself once, in the softmax over images, as in the original.
    surplus -= is_image.to(dtype)
    return Masks(*added, surplus[None, None, :, None])


def dense(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: Masks
) -> torch.Tensor:
    """MMCA over (B, N, S, H), as many key as query heads."""
    scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    images, text = scores + masks.images, scores + masks.text
    images = softmax(images, dim=-1, dtype=torch.float32).to(query.dtype)
    text = softmax(text, dim=-1, dtype=torch.float32).to(query.dtype)
    scores = images + text
    return scores @ value - masks.surplus * value


def _hook(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    masks: Masks,
    **others: object,
) -> tuple[torch.Tensor, None]:
    return dense(query, key, value, masks).transpose(1, 2), None


def loss_of_all(head: nn.Linear, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The summed cross-entropy as `DeepSpeedViLModel.forward` has it: all scores, shifted, then some chosen.

    Args:
        head: (V, D).
        hidden: (S, D) final states.
        labels: (S,) a token, or IGNORED, not shifted.
    """
    logits = linear(hidden, head.weight, head.bias).float()
    shifted, following = logits[:-1].clone(), labels[1:]
    chosen = following != IGNORED
    shifted, following = shifted[chosen], following[chosen]
    return cross_entropy(shifted, following, reduction="sum")


AttentionInterface.register("dense_mmca", _hook)
