"""The floating-point operations of an update, by part of the model.

2 a weight and token forward and 2 backward, for the gradient of the input; 2 more where it is trained, and 2
more where layers are recomputed. Attention: 4 D forward for a query and a key that it sees, and 10 D
backward, as fused kernels compute scores anew. Norms, rotations, optimizer and evaluation do not count.
"""

from dataclasses import dataclass

from dsvl.config import ModelConfig
from orchestration.config import Experiment
from orchestration.planning.parameters import (
    adapter_parameters,
    linear_weights,
    projection_parameters,
)


@dataclass(frozen=True)
class Lengths:
    """What a sample holds, or samples hold in the mean."""

    text: float
    """Text tokens."""
    images: float
    answers: float
    """Text tokens that are trained, at most."""


def fullest(experiment: Experiment) -> Lengths:
    """A sample that fills `data.max_tokens` and has room for no further image; all text may be answers."""
    data, width = experiment.data, experiment.model.image_tokens
    images = min(data.max_images, data.max_tokens // width)
    text = data.max_tokens - images * width
    return Lengths(text, images, text)


def flop_utilisation(
    experiment: Experiment,
    *,
    tokens: int,
    targets: int,
    images: int,
    seconds: float,
    workers: int,
) -> float:
    """The share of the devices' peak that an update reached, from what its whole batch held.

    Recomputed layers count once, as they give nothing new (PaLM's model FLOP utilisation, arXiv 2204.02311).
    """
    batch, peak = experiment.train.batch, experiment.cluster.gpu_tflops
    assert peak is not None, "without a peak there is no share of it"
    pictures = images * experiment.model.image_tokens
    mean = Lengths((tokens - pictures) / batch, images / batch, targets / batch)
    flops = sum(step_flops(experiment, mean, recompute=False).values())
    return flops / (seconds * workers * peak * 1e12)


def step_flops(experiment: Experiment, lengths: Lengths, *, recompute: bool) -> dict[str, float]:
    """Operations of an update over all workers, by part, if every sample has these lengths."""
    model = experiment.model
    parts = {
        "decoder": _decoder(model, lengths, recompute=recompute),
        "attention": _attention(model, lengths, recompute=recompute),
        "head": 4 * lengths.answers * model.language.vocab_size * model.language.hidden_size,
        "projection": _projection(model, lengths),
        "tower": 0.0
        if experiment.engine.stored_features
        else lengths.images * _tower(model, recompute=recompute),
    }
    return {part: float(experiment.train.batch * flops) for part, flops in parts.items()}


def _decoder(model: ModelConfig, lengths: Lengths, *, recompute: bool) -> float:
    """Its linear layers: an image asks nothing under MMCA, and the last layer gives what is wanted alone."""
    text, layers = lengths.text, model.language.num_hidden_layers
    pictures = lengths.images * model.image_tokens
    query, keys_values, rest = linear_weights(model.language)
    again = 2 if recompute else 0
    if model.attention == "causal":
        products = layers * (query + keys_values + rest) * (text + pictures)
    else:
        seen = text + (0 if model.attention == "gated_cross" else pictures)
        products = layers * keys_values * seen
        products += query * ((layers - 1) * text + lengths.answers)
        products += rest * ((layers - 1) * seen + lengths.answers)
    adapters = adapter_parameters(model)["language"] * (text + pictures)
    square = model.language.hidden_size**2
    blocks = model.cross_blocks * square * (10 * text + 2 * pictures)
    return (4 + again) * products + (6 + again) * (adapters + blocks)


def _attention(model: ModelConfig, lengths: Lengths, *, recompute: bool) -> float:
    """Scores and sums; images stand ahead of equal shares of the text."""
    text, images, layers = lengths.text, lengths.images, model.language.num_hidden_layers
    pictures = images * model.image_tokens
    last = lengths.answers / text if text else 0.0
    words = text * (text + 1) / 2
    seen = text * pictures * (images + 1) / (2 * images) if images > 1 else text * pictures
    if model.attention == "causal":
        pairs = layers * (text + pictures) * (text + pictures + 1) / 2
    elif model.attention == "gated_cross":
        shown = text * model.image_tokens if images else 0
        pairs = (layers - 1 + last) * words + model.cross_blocks * shown
    else:
        pairs = (layers - 1 + last) * (words + seen)
    return (14 + (4 if recompute else 0)) * model.language.hidden_size * pairs


def _projection(model: ModelConfig, lengths: Lengths) -> float:
    """Of a linear one the input needs no gradient, unless the tower is trained."""
    inner = model.projection != "linear" or model.vision_lora.rank
    weights = projection_parameters(model) - model.language.hidden_size
    return (6 if inner else 4) * weights * lengths.images * model.vision.tokens


def _tower(model: ModelConfig, *, recompute: bool) -> float:
    """Of one image: forward alone, unless it is trained."""
    vision, trained = model.vision, model.vision_lora.rank > 0
    hidden, output = vision.hidden_size, vision.output_size
    patches = vision.patches + int(vision.kind == "clip")
    layers = vision.num_hidden_layers
    weights = layers * (4 * hidden * hidden + 2 * hidden * vision.intermediate_size) * patches
    weights += 3 * vision.patch_size**2 * hidden * vision.patches
    pairs = layers * hidden * patches * patches
    if output:  # the resampler: queries look at patches once; a map
        weights += (hidden * output + 2 * output * output) * patches
        weights += 3 * output * output * vision.queries
        pairs += output * patches * vision.queries
    adapters = adapter_parameters(model)["vision"] * patches
    again = 1 if trained and recompute else 0
    return (
        (2 + 2 * trained + 2 * again) * weights
        + (4 + 10 * trained + 4 * again) * pairs
        + (6 + 2 * again) * adapters
    )
