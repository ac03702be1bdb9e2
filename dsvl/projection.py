"""From the width of the vision tower to the width of the decoder."""

from torch import nn


def linear(vision_width: int, language_width: int) -> nn.Module:
    """One linear layer (paper, section 3): (I, tokens, vision_width) -> (I, tokens, language_width)."""
    return nn.Linear(vision_width, language_width)


PROJECTIONS = {"linear": linear}
