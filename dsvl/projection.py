"""From the feature vectors of the tower to vectors of the decoder's width.

Each is made of (vision_width, language_width, layers, queries), the last two ignored by the simple ones.
It maps (I, tokens, vision_width) to (I, tokens, language_width); a perceiver and a qformer give `queries`
vectors an image, whatever the tower gives. Their layers have the width of the tower.

Shape suffixes: I images, F vectors of the tower, Q queries, D width of the tower, N heads, H width of a head.
"""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Blip2QFormerConfig, Blip2QFormerModel, CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer


def linear(vision_width: int, language_width: int, **_: int) -> nn.Module:
    """One linear layer (paper, section 3)."""
    return nn.Linear(vision_width, language_width)


def mlp(vision_width: int, language_width: int, **_: int) -> nn.Module:
    """Two linear layers with a GELU between (LLaVA-1.5, arXiv:2310.03744)."""
    return nn.Sequential(
        nn.Linear(vision_width, language_width),
        nn.GELU(),
        nn.Linear(language_width, language_width),
    )


class Vit(nn.Module):
    """Layers of a vision transformer, then a linear one (paper, section 5.2.4)."""

    def __init__(self, vision_width: int, language_width: int, *, layers: int, **_: int) -> None:
        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=vision_width,
            intermediate_size=4 * vision_width,
            num_attention_heads=heads(vision_width),
            hidden_act="gelu",
        )
        config._attn_implementation = "sdpa"  # set by a whole model, of which this is a part
        self.layers = nn.ModuleList(CLIPEncoderLayer(config) for _ in range(layers))
        self.output = nn.Linear(vision_width, language_width)

    def forward(self, features_IFD: torch.Tensor) -> torch.Tensor:
        """(I, F, D) -> (I, F, language_width)."""
        for layer in self.layers:
            features_IFD = layer(features_IFD, attention_mask=None)
        return self.output(features_IFD)


class Perceiver(nn.Module):
    """Learned queries that look at the features and at themselves (Flamingo, arXiv:2204.14198)."""

    def __init__(self, vision_width: int, language_width: int, *, layers: int, queries: int):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(queries, vision_width))
        self.layers = nn.ModuleList(_PerceiverLayer(vision_width) for _ in range(layers))
        self.norm = nn.LayerNorm(vision_width)
        self.output = nn.Linear(vision_width, language_width)

    def forward(self, features_IFD: torch.Tensor) -> torch.Tensor:
        """(I, F, D) -> (I, Q, language_width)."""
        queries_IQD = self.queries.expand(len(features_IFD), -1, -1)
        for layer in self.layers:
            queries_IQD = layer(queries_IQD, features_IFD)
        return self.output(self.norm(queries_IQD))


class _PerceiverLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = heads(width)
        self.norm_features = nn.LayerNorm(width)
        self.norm_queries = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, queries_IQD: torch.Tensor, features_IFD: torch.Tensor) -> torch.Tensor:
        normed_IQD = self.norm_queries(queries_IQD)
        seen_ISD = torch.cat([self.norm_features(features_IFD), normed_IQD], dim=1)
        q_INQH, k_INSH, v_INSH = (
            vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for vectors in (self.query(normed_IQD), *self.key_value(seen_ISD).chunk(2, dim=-1))
        )
        attended_INQH = scaled_dot_product_attention(q_INQH, k_INSH, v_INSH)
        queries_IQD = queries_IQD + self.output(attended_INQH.transpose(1, 2).flatten(2))
        return queries_IQD + self.feed_forward(queries_IQD)


class QFormer(nn.Module):
    """Learned queries in a BERT that looks at the features in every other layer, the first among them.

    From BLIP-2 (arXiv:2301.12597, section 3.1), without its text side and without dropout: a step is a
    function of the parameters and the batch.
    """

    def __init__(self, vision_width: int, language_width: int, *, layers: int, queries: int):
        super().__init__()
        self.queries = nn.Parameter(0.02 * torch.randn(queries, vision_width))
        self.encoder = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=vision_width,
                intermediate_size=4 * vision_width,
                encoder_hidden_size=vision_width,
                num_hidden_layers=layers,
                num_attention_heads=heads(vision_width),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
        self.output = nn.Linear(vision_width, language_width)

    def forward(self, features_IFD: torch.Tensor) -> torch.Tensor:
        """(I, F, D) -> (I, Q, language_width)."""
        queries_IQD = self.queries.expand(len(features_IFD), -1, -1)
        found = self.encoder(query_embeds=queries_IQD, encoder_hidden_states=features_IFD)
        return self.output(found.last_hidden_state)


def heads(width: int) -> int:
    """Heads 64 wide, as in all the models above; one where 64 does not divide the width."""
    return width // 64 if width % 64 == 0 else 1


PROJECTIONS = {"linear": linear, "mlp": mlp, "vit": Vit, "perceiver": Perceiver, "qformer": QFormer}
