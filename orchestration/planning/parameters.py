"""The parameters of a model, counted from its settings alone: no torch, no weights."""

from dataclasses import dataclass
from typing import Literal

from dsvl.config import LanguageConfig, ModelConfig, VisionConfig


@dataclass(frozen=True)
class Part:
    """Parameters of a part of the model."""

    total: int
    trainable: int


def parameters(model: ModelConfig) -> dict[str, Part]:
    """Parameters of the model, total and trainable, by part."""
    projection = projection_parameters(model)
    frozen = {"vision": vision_parameters(model.vision)} | language_parameters(model.language)
    parts = {name: Part(total, 0) for name, total in frozen.items()}
    if model.train_embedding:
        parts["embedding"] = Part(frozen["embedding"], frozen["embedding"])
    trained = {"projection": projection, "cross-attention": cross_parameters(model)}
    trained |= {f"{part} adapters": n for part, n in adapter_parameters(model).items()}
    return {name: Part(n, n) for name, n in trained.items() if n} | parts


def cross_parameters(model: ModelConfig) -> int:
    """Parameters of the blocks of gated cross-attention."""
    width = model.language.hidden_size
    return model.cross_blocks * (12 * width * width + 2 * 2 * width + 2)  # two norms, two gates


def language_parameters(language: LanguageConfig) -> dict[str, int]:
    """Parameters of a LLaMA decoder with an untied head, by part."""
    hidden, norms = language.hidden_size, 2 * language.hidden_size
    return {
        "embedding": language.vocab_size * hidden,
        "layers": linear_parameters(language) + language.num_hidden_layers * norms,
        "norm": hidden,
        "head": language.vocab_size * hidden,
    }


def linear_parameters(language: LanguageConfig) -> int:
    """Weights of the linear layers of a decoder: what may be quantised."""
    return language.num_hidden_layers * sum(i * o for i, o in _linear(language, "all"))


def adapter_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of the adapters of decoder and tower: rank x (in + out) for each linear layer."""
    language, vision, lora = model.language, model.vision, model.vision_lora
    hidden, wide, output = vision.hidden_size, vision.intermediate_size, vision.output_size
    attention = [(hidden, 3 * hidden), (hidden, hidden)] if output else [(hidden, hidden)] * 4
    mlp = [(hidden, wide), (wide, hidden)] if lora.targets == "all" else []
    resampler = [(hidden, output), (output, output)] if output else []
    return {
        "language": model.language_lora.rank
        * _ends(_linear(language, model.language_lora.targets) * language.num_hidden_layers),
        "vision": lora.rank * _ends((attention + mlp) * vision.num_hidden_layers + resampler),
    }


def vision_parameters(vision: VisionConfig) -> int:
    """Parameters of an image tower, without what pools its vectors to compare them with texts."""
    hidden, output = vision.hidden_size, vision.output_size
    patches = vision.patches
    layers = vision.num_hidden_layers * _layer(hidden, vision.intermediate_size)
    rest = {
        "clip": hidden + (patches + 1) * hidden + 4 * hidden,  # class, positions, two norms
        "siglip": hidden + patches * hidden + 2 * hidden,  # bias of the patches, positions, norm
        "qwen": 256 * hidden + 2 * hidden  # positions, norm; the resampler with three norms; a map
        + (2 * vision.queries + hidden + 6) * output + _attention(output) + output * output,
    }  # fmt: skip
    return 3 * vision.patch_size**2 * hidden + layers + rest[vision.kind]


def projection_parameters(model: ModelConfig) -> int:
    """Parameters of the projection."""
    width, output = model.vision.width, model.language.hidden_size
    layers, queries = model.projection_layers, model.projection_queries * width
    looking = (layers + 1) // 2  # layers of a Q-Former that look at the image: every other one
    inner = {
        "linear": 0,
        "mlp": output * output + output,
        "vit": layers * _layer(width, 4 * width),
        "perceiver": queries + layers * (12 * width * width + 6 * width) + 2 * width,
        "qformer": queries + layers * _layer(width, 4 * width)
        + looking * (_attention(width) + 2 * width) + 2 * width,
    }  # fmt: skip
    return inner[model.projection] + width * output + output


def _linear(
    language: LanguageConfig, targets: Literal["all", "attention"]
) -> list[tuple[int, int]]:
    """(in, out) of the linear layers in one layer of a decoder."""
    hidden, wide = language.hidden_size, language.intermediate_size
    grouped = hidden // language.num_attention_heads * language.num_key_value_heads
    attention = [(hidden, hidden), (hidden, grouped), (hidden, grouped), (hidden, hidden)]
    return attention + ([(hidden, wide)] * 2 + [(wide, hidden)] if targets == "all" else [])


def linear_weights(language: LanguageConfig) -> tuple[int, int, int]:
    """Weights of a decoder's layer: of queries, of keys and values, and of all that follows attention."""
    query, key, value, *rest = (i * o for i, o in _linear(language, "all"))
    return query, key + value, sum(rest)


def _ends(layers: list[tuple[int, int]]) -> int:
    return sum(map(sum, layers))


def _layer(hidden: int, wide: int) -> int:
    """A transformer layer with biases: attention, two linear layers, two norms."""
    return _attention(hidden) + 2 * hidden * wide + wide + hidden + 4 * hidden


def _attention(hidden: int) -> int:
    """Query, key, value and output."""
    return 4 * (hidden * hidden + hidden)
