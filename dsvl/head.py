"""The frozen output head, at the wanted positions alone and a few of them at a time."""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from dsvl.config import logit_rows


class Head(nn.Module):
    """States to scores over the vocabulary of V tokens, and their cross-entropy."""

    def __init__(self, stock: nn.Linear) -> None:
        """Share the weights (V, D), and the bias if there is one, of the decoder's own head."""
        super().__init__()
        self.weight, self.bias = stock.weight, stock.bias

    def forward(
        self, states: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, D) states and (n,) labels -> the summed cross-entropy in nats, and (n,) likeliest tokens.

        Logits exist for a chunk of positions at a time, in float32. Their gradient is formed at once, so that
        none are kept for the backward pass.
        """
        return _Scores.apply(states, labels, self.weight, self.bias)  # pyright: ignore[reportReturnType]


class _Scores(torch.autograd.Function):
    """Cross-entropy whose gradient is worked out in the forward pass; weights are frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        labels: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunk = logit_rows(len(weight))
        total = torch.zeros((), device=states.device)
        likeliest = torch.empty_like(labels)
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states), chunk):
            rows = slice(start, start + chunk)
            logits_cV = linear(states[rows], weight, bias).float()
            most_c1, likeliest[rows, None] = logits_cV.max(-1, keepdim=True)
            label_c1 = labels[rows, None]
            logit_c1 = logits_cV.gather(1, label_c1)
            # From here on in place: a second tensor of this size would double the memory.
            weights_cV = logits_cV.sub_(most_c1).exp_()
            sum_c1 = weights_cV.sum(-1, keepdim=True)
            total += (sum_c1.log() + most_c1 - logit_c1).sum()
            if gradient is not None:
                # Softmax less one at the label.
                slope_cV = weights_cV.div_(sum_c1)
                slope_cV.scatter_add_(1, label_c1, slope_cV.new_full(label_c1.shape, -1.0))
                gradient[rows] = slope_cV.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(likeliest)
        return total, likeliest

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,) = ctx.saved_tensors
        # In float32, as the scale of a float16 loss is more than float16 can hold.
        return (gradient.float() * slope).to(gradient.dtype), None, None, None
