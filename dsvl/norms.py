"""Norms of gradient, weights and update of an optimiser step, part by part of what is trained.

A part whose update is much smaller than the others', over its weights, is not learning; one whose gradient is
much larger takes what the clipping leaves. The norm over all parameters shows neither.
"""

from collections import defaultdict
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.linalg import vector_norm

from dsvl.engine import Engine

NAMED = {"cross": "gated", "language": "embedding"}
"""First parts of names that say less than a word; of the decoder itself only the embedding is trained."""
PIECE = 2**22
"""Values looked at together: to tell what AdamW did takes some copies of as many."""


def part(name: str) -> str:
    """What the parameter of a name belongs to: projection, embedding, gated, language_lora or vision_lora."""
    first = name.partition(".")[0]
    return f"{first}_lora" if ".lora_" in name else NAMED.get(first, first)


class Norms:
    """Measures the update that is made within it: `with norms: engine.update(...)`.

    Right after AdamW has updated a master tensor, the gradient it took is still there, and its moments say
    what it did. So every ZeRO stage, with offloading or without, is measured where its shares are.
    """

    def __init__(self, engine: Engine) -> None:
        """Find which parts lie where."""
        self.engine = engine
        self.parts = sorted({part(name) for name in engine.parameters})
        self._places: dict[torch.Tensor, list[tuple[int, slice]]] = defaultdict(list)
        for name, parameter in engine.parameters.items():
            master, place = engine.share(parameter)
            self._places[master].append((self.parts.index(part(name)), place))

    def __enter__(self) -> Self:
        self._sums = torch.zeros(
            len(self.parts), 3, dtype=torch.float64, device=next(iter(self._places)).device
        )
        """(parts, 3) sums of squares of this rank's gradients, weights and updates."""
        self._hook = self.engine.optimizer.register_step_post_hook(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    @torch.no_grad()
    def _add(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            for master in group["params"]:
                if master.grad is None:
                    continue  # it took no part
                state = optimizer.state[master]
                tensors = (master.grad, master, state["exp_avg"], state["exp_avg_sq"])
                for number, place in self._places[master]:
                    pieces = (tensor.flatten()[place].split(PIECE) for tensor in tensors)
                    for gradient, weight, mean, square in zip(*pieces, strict=True):
                        update = taken(weight, mean, square, step=float(state["step"]), group=group)
                        norms = [
                            vector_norm(each, dtype=torch.float64)
                            for each in (gradient, weight, update)
                        ]
                        self._sums[number] += torch.stack(norms).square()

    def metrics(self, grad_norm: float) -> dict[str, float]:
        """Under their names in journals; nothing where fp16 overflowed and made no update. A collective.

        Args:
            grad_norm: of all parameters, before clipping. AdamW saw gradients after it.
        """
        sums = self._sums.to(self.engine.device)
        if self.engine.stage > 0:
            dist.all_reduce(sums)
        if not sums.any():
            return {}
        gradient, weight, update = sums.sqrt().unbind(1)
        clipped = vector_norm(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)
        found = {
            "grad_norm": gradient * grad_norm / clipped,
            "weight_norm": weight,
            "update_ratio": update / weight,
        }
        return {
            f"train/{metric}/{name}": value
            for metric, values in found.items()
            for name, value in zip(self.parts, values.tolist(), strict=True)
        }


def taken(
    after: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    *,
    step: float,
    group: dict[str, Any],
) -> torch.Tensor:
    """What AdamW's last step took from weights, given them and their moments after it (arXiv:1711.05101).

    Computed and not subtracted, as float32 would lose it beside weights that are a million times larger.
    """
    rate, decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
    root = (square / (1 - beta2**step)).sqrt()
    adam = mean / (1 - beta1**step) / (root + group["eps"]) * rate
    if not decay:
        return adam
    before = (after + adam) / (1 - rate * decay)
    return adam + rate * decay * before
