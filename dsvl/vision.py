"""The frozen image tower: pixels in, feature vectors out."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPVisionModel, SiglipVisionModel

from dsvl.config import VisionConfig, require
from dsvl.qwen_vision import QwenVisionModel


class VisionTower(nn.Module):
    """A vision model whose last hidden states are the features of an image."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        """Load the frozen weights.

        Raises:
            ValueError: where checkpoint and configuration disagree, or the checkpoint lacks a weight.
        """
        super().__init__()
        self.config = config
        # SigLIP's pooled vector is not used: its weights are left where they are.
        unused: dict[str, Any] = {"vision_use_head": False} if config.kind == "siglip" else {}
        self.encoder, found = TOWERS[config.kind].from_pretrained(
            config.checkpoint,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, as missing ones are
            **unused,
        )
        check_whole(
            found,
            config.checkpoint,
            section="model.vision",
            rule=f"a tower of kind={config.kind} has; set model.vision.kind to the checkpoint's",
        )
        check_shape(config, self.encoder.config, section="model.vision")
        self.encoder.requires_grad_(False)

    def forward(self, pixels: torch.Tensor, *, recompute: bool = False) -> torch.Tensor:
        """(I, 3, P, P) normalised pixels -> (I, tokens, width).

        Without gradients, unless something within the tower is trained.

        Args:
            pixels: of I images.
            recompute: keep nothing for the backward pass but the pixels.

        Raises:
            ValueError: if P is not the size of the tower.
        """
        size = (self.config.image_size,) * 2
        if pixels.shape[-2:] != size:
            raise ValueError(
                f"images of {tuple(pixels.shape[-2:])} pixels, but model.vision.image_size asks for "
                f"{size}; prepare the data with this tower"
            )
        trained = any(weight.requires_grad for weight in self.encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            pixels = pixels.to(self.encoder.dtype)
            if recompute and torch.is_grad_enabled():
                hidden = checkpoint(self.encoder, pixels, use_reentrant=False).last_hidden_state
            else:
                hidden = self.encoder(pixels).last_hidden_state
        dropped = int(self.config.kind == "clip" and not self.config.class_token)
        # Else a projection rounds otherwise for many images than for one, or for features that were stored.
        return hidden[:, dropped:].contiguous()


def check_whole(found: dict[str, Any], checkpoint: str, *, section: str, rule: str) -> None:
    """Raise ValueError where a checkpoint lacks weights, for transformers would draw them at random.

    Args:
        found: what `from_pretrained` says of its loading.
        checkpoint: the folder or name that was loaded.
        section: of the configuration, that names it.
        rule: who has these weights, and what to do.
    """
    misfits = found["missing_keys"] | {name for name, *_ in found["mismatched_keys"]}
    require(
        not misfits,
        f"{section}.checkpoint",
        checkpoint,
        f"has no {' and no '.join(sorted(misfits)[:2])} ({len(misfits)} in all) as {rule}",
    )


def check_shape(stated: object, found: object, *, section: str) -> None:
    """Raise ValueError where a shape that the configuration states is not the checkpoint's own."""
    for name, value in vars(stated).items():
        if hasattr(found, name):
            actual = getattr(found, name)
            require(
                actual == value,
                f"{section}.{name}",
                value,
                f"the checkpoint {vars(stated)['checkpoint']!r} has {actual}; set it to that",
            )


TOWERS: dict[str, Any] = {
    "clip": CLIPVisionModel,
    "siglip": SiglipVisionModel,
    "qwen": QwenVisionModel,
}
