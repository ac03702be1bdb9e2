"""The frozen image tower: pixels in, feature vectors out."""

import torch
from torch import nn
from transformers import CLIPVisionModel

from dsvl.config import VisionConfig, require


class VisionTower(nn.Module):
    """A CLIP vision model whose last hidden states are the features of an image."""

    def __init__(self, config: VisionConfig, *, dtype: torch.dtype) -> None:
        """Load the frozen weights; raises ValueError where checkpoint and configuration disagree."""
        super().__init__()
        self.config = config
        self.encoder = CLIPVisionModel.from_pretrained(
            config.checkpoint, dtype=dtype
        ).requires_grad_(False)
        check_shape(config, self.encoder.config, section="model.vision")

    @torch.no_grad()
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """(I, 3, P, P) normalised pixels -> (I, tokens, hidden_size)."""
        hidden = self.encoder(pixels.to(self.encoder.dtype)).last_hidden_state
        return hidden if self.config.class_token else hidden[:, 1:]


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
