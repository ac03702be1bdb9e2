"""The image tower of Qwen-VL (arXiv:2308.12966, section 2): a ViT-bigG, and a resampler to 256 vectors.

A model of transformers whose parameters have the names that follow `transformer.visual.` in the Qwen-VL
checkpoints, so that these load without remote code; `extract` takes them out of such a checkpoint.

Shape suffixes: I images, S patches, Q queries, T what attends, D a width, N heads, H width of a head.
"""

import json
from collections.abc import Iterator
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import interpolate, linear, scaled_dot_product_attention
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from dsvl.config import require
from dsvl.data.folders import complete

PREFIX = "transformer.visual."
FILES = ("model.safetensors", "pytorch_model.bin")
POSITIONS = 256
"""Learned positions of patches, 16 x 16: the tower was pretrained at 224 pixels."""
HEAD = 128
"""Width of a head of the resampler."""
EPSILON = 1e-6


class QwenVisionConfig(PreTrainedConfig):
    """The shape of the tower; the defaults are those of Qwen-VL and Qwen-VL-Chat."""

    model_type = "qwen_vl_vision"

    image_size: int = 448
    patch_size: int = 14
    hidden_size: int = 1664
    intermediate_size: int = 8192
    num_hidden_layers: int = 48
    num_attention_heads: int = 16
    queries: int = 256
    """Feature vectors of an image, a square number."""
    output_size: int = 4096
    """Their width, a multiple of 128."""


class QwenVisionModel(PreTrainedModel):
    """Patches -> transformer -> resampler -> linear map, with 1,935,610,624 parameters as published."""

    config: QwenVisionConfig
    config_class = QwenVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__(config)
        width, patch, output = config.hidden_size, config.patch_size, config.output_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(POSITIONS, width))
        self.ln_pre = nn.LayerNorm(width, eps=EPSILON)
        self.transformer = _Transformer(config)
        self.attn_pool = _Resampler(width, output, config.queries)
        self.ln_post = nn.LayerNorm(output, eps=EPSILON)
        self.proj = nn.Parameter(output**-0.5 * torch.randn(output, output))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        """(I, 3, P, P) normalised pixels -> last_hidden_state (I, Q, output_size)."""
        patches_ISD = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        patches_ISD = patches_ISD + resized(self.positional_embedding, patches_ISD.shape[1])
        patches_ISD = self.transformer(self.ln_pre(patches_ISD))
        return BaseModelOutput(self.ln_post(self.attn_pool(patches_ISD)) @ self.proj)


class _Transformer(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))

    def forward(self, patches_ISD: torch.Tensor) -> torch.Tensor:
        for block in self.resblocks:
            patches_ISD = block(patches_ISD)
        return patches_ISD


class _Block(nn.Module):
    def __init__(self, config: QwenVisionConfig) -> None:
        super().__init__()
        width, wide = config.hidden_size, config.intermediate_size
        self.ln_1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = _SelfAttention(width, config.num_attention_heads)
        self.ln_2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, wide))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(wide, width))

    def forward(self, patches_ISD: torch.Tensor) -> torch.Tensor:
        patches_ISD = patches_ISD + self.attn(self.ln_1(patches_ISD))
        return patches_ISD + self.mlp(self.ln_2(patches_ISD))


class _SelfAttention(nn.Module):
    """Bidirectional; the rows of `in_proj` are ordered by head, and within a head query, key, value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, patches_ISD: torch.Tensor) -> torch.Tensor:
        mixed_INSH = self.in_proj(patches_ISD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        attended_INSH = scaled_dot_product_attention(*mixed_INSH.chunk(3, dim=-1))
        return self.out_proj(attended_INSH.transpose(1, 2).flatten(2))


class _Resampler(nn.Module):
    """Learned queries attend to the patches once; both carry their place as sines and cosines."""

    def __init__(self, width: int, output: int, queries: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(queries, output))
        self.pos_embed = nn.Parameter(sines(isqrt(queries), output), requires_grad=False)
        self.kv_proj = nn.Linear(width, output, bias=False)
        self.attn = _CrossAttention(output)
        self.ln_q = nn.LayerNorm(output, eps=EPSILON)
        self.ln_kv = nn.LayerNorm(output, eps=EPSILON)

    def forward(self, patches_ISD: torch.Tensor) -> torch.Tensor:
        """(I, S, width) -> (I, Q, output)."""
        value_ISD = self.ln_kv(self.kv_proj(patches_ISD))
        key_ISD = value_ISD + resized(self.pos_embed, value_ISD.shape[1])
        query_QD = self.ln_q(self.query) + self.pos_embed
        return self.attn(query_QD.expand(len(key_ISD), -1, -1), key_ISD, value_ISD)


class _CrossAttention(nn.Module):
    """The attention of torch.nn.MultiheadAttention, under its names."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(width**-0.5 * torch.randn(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, *query_key_value: torch.Tensor) -> torch.Tensor:
        """Query (I, Q, D), key and value (I, S, D) -> (I, Q, D)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q_INQH, k_INSH, v_INSH = (
            linear(given_ITD, weight, bias).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for given_ITD, weight, bias in zip(query_key_value, weights, biases, strict=True)
        )
        attended_INQH = scaled_dot_product_attention(q_INQH, k_INSH, v_INSH)
        return self.out_proj(attended_INQH.transpose(1, 2).flatten(2))


def resized(positions_QD: torch.Tensor, patches: int) -> torch.Tensor:
    """(Q, D) positions of a square grid -> (patches, D) of another, by bicubic interpolation in float32."""
    if len(positions_QD) == patches:
        return positions_QD
    grid_1DXY = positions_QD.T.float().unflatten(1, (isqrt(len(positions_QD)), -1))[None]
    grid_1DXY = interpolate(grid_1DXY, size=(isqrt(patches),) * 2, mode="bicubic")
    return grid_1DXY[0].flatten(1).T.to(positions_QD.dtype)


def sines(edge: int, width: int) -> torch.Tensor:
    """(edge * edge, width) of a grid, row by row: sines and cosines of the column, then of the row."""
    rates = 10000 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(edge)[:, None] * rates
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([waves.repeat(edge, 1), waves.repeat_interleave(edge, 0)], dim=1)


def extract(source: str | Path, target: str | Path) -> None:
    """Write the tower of a Qwen-VL checkpoint, a folder, as a checkpoint of its own.

    Of the source only `config.json`, the index and the shards that hold a weight of the tower are opened, and
    nothing in them is run. The target appears whole or not at all.

    Raises:
        ValueError: naming the weights that are missing, unknown or of another shape, or what `config.json`
            does not say of the tower; if the target exists.
        FileNotFoundError: if the source, or a file in it, does not exist.
    """
    source, target = Path(source), Path(target)
    require(not target.exists(), "target", str(target), "exists; remove it or name another folder")
    config = _stated(source / "config.json")
    with torch.device("meta"):
        expected = QwenVisionModel(config).state_dict()
    weights = dict(_visual(source))
    wrong = {
        "lacks": expected.keys() - weights.keys(),
        "has unknown": weights.keys() - expected.keys(),
        "has another shape of": {
            name
            for name in expected.keys() & weights.keys()
            if expected[name].shape != weights[name].shape
        },
    }
    faults = [f"{how} {', '.join(sorted(names))}" for how, names in wrong.items() if names]
    rule = f"{'; '.join(faults)}; name a whole Qwen-VL checkpoint"
    require(not faults, "source", str(source), rule)
    with complete(target) as making:
        config.dtype = weights["proj"].dtype
        config.architectures = [QwenVisionModel.__name__]
        config.save_pretrained(making)
        save_file(weights, making / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(_processor(config.image_size), indent=2)
        (making / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


def _stated(path: Path) -> QwenVisionConfig:
    """The shape of the tower, as the `config.json` of a Qwen-VL checkpoint says it."""
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))["visual"]
        return QwenVisionConfig(
            image_size=stated["image_size"],
            patch_size=stated["patch_size"],
            hidden_size=stated["width"],
            intermediate_size=int(stated["width"] * stated["mlp_ratio"]),
            num_hidden_layers=stated["layers"],
            num_attention_heads=stated["heads"],
            queries=stated.get("n_queries", 256),
            output_size=stated["output_dim"],
        )
    except KeyError as missing:
        rule = f"has no {missing}, which that of Qwen-VL has; name a whole Qwen-VL checkpoint"
        raise ValueError(f"{path}: {rule}") from missing


def _visual(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by their names below the prefix, from one file or from the shards that hold any."""
    file = next((file for file in FILES if list(source.glob(f"{file}*"))), FILES[0])
    index, shards = source / f"{file}.index.json", {file}
    if index.is_file():
        held = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {shard for name, shard in held.items() if name.startswith(PREFIX)}
    for shard in sorted(shards):
        for name, weight in _weights(source / shard):
            yield name.removeprefix(PREFIX), weight


def _weights(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights of the tower in a shard, which is mapped into memory and not read whole."""
    if shard.suffix == ".safetensors":
        with safe_open(shard, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                if name.startswith(PREFIX):
                    yield name, opened.get_tensor(name)
    else:
        held = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
        yield from ((name, held[name]) for name in held if name.startswith(PREFIX))


def _processor(size: int) -> dict[str, Any]:
    """How Qwen-VL prepares an image: the whole of it, squeezed into a square, in CLIP's normal form."""
    return {
        "do_center_crop": False,
        "size": {"height": size, "width": size},
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
