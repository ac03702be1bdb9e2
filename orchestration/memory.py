"""What a worker has to hold while it trains, and the nearest settings that fit where it is too much."""

from typing import Literal

from dsvl.config import ModelConfig, logit_rows
from orchestration.config import Experiment, legal_workers
from orchestration.parameters import linear_parameters, parameters

GIB = 1024**3
STATE_BYTES = 12
"""Of a trained parameter: its float32 master value and two moments."""
QUANTIZED_BYTES = {"int8": (1.0, 0.0), "nf4": (1 / 2, 1 / 64 + 4 / (64 * 256))}
"""Of a quantised weight, and of its share in scales: NF4's are one a block of 64, quantised themselves."""


def memory(experiment: Experiment) -> dict[str, int]:
    """Bytes that a worker needs, by component; activations and logits are estimates from above."""
    return _memory(experiment, recompute=gradient_checkpointing(experiment))


def gradient_checkpointing(experiment: Experiment) -> bool:
    """Whether a layer keeps only its input for the backward pass: as configured, else where no more fits.

    Computing the layers anew costs a forward pass, a third of a step, so it is done for want of memory alone.
    """
    chosen, limit = experiment.engine.gradient_checkpointing, experiment.cluster.gpu_memory_gib
    if chosen is not None or limit is None:
        return bool(chosen)
    return sum(_memory(experiment, recompute=False).values()) > limit * GIB


def remedy(experiment: Experiment, purpose: Literal["run", "trial"]) -> str:
    """The fewest and smallest changes of recomputation, ZeRO stage, micro batch and workers that fit."""
    batch, engine = experiment.train.batch, experiment.engine
    recompute = engine.gradient_checkpointing
    last = 2 if experiment.model.quantization == "int8" else 3
    now = (recompute, engine.zero_stage, engine.micro_batch, experiment.cluster.workers)
    choices = [
        (again, stage, micro, count)
        for again in ((recompute,) if recompute is not False else (False, True))
        for stage in range(engine.zero_stage, last + 1)
        for micro in range(engine.micro_batch, 0, -1)
        if batch % micro == 0
        for count in legal_workers(batch, micro)
        if count >= experiment.cluster.workers
    ]

    def distance(choice: tuple[bool | None, int, int, int]) -> tuple[int, int, int, int]:
        changed = sum(value != before for value, before in zip(choice, now, strict=True))
        return changed, choice[3], choice[1], -choice[2]

    for choice in sorted(choices, key=distance):
        names = ("engine.gradient_checkpointing", "engine.zero_stage", "engine.micro_batch",
                 "cluster.workers")  # fmt: skip
        other = experiment.with_overrides({**dict(zip(names, choice, strict=True)), "search": None})
        if sum(memory(other).values()) <= (experiment.cluster.gpu_memory_gib or 0) * GIB:
            workers = "cluster.workers" if purpose == "run" else "search.workers"
            settings = zip((*names[:3], workers), choice, now, strict=True)
            return "set " + " ".join(
                f"{name}={str(new).lower()}" for name, new, old in settings if new != old
            )
    return (
        "no ZeRO stage, micro batch or number of workers fits; lower data.max_tokens, "
        "choose a smaller model.size or a GPU with more memory"
    )


def _memory(experiment: Experiment, *, recompute: bool) -> dict[str, int]:
    """As `memory`.

    A worker holds its share of what the ZeRO stage divides: 1 the optimizer, 2 the gradients too,
    3 the weights too.
    """
    model, engine = experiment.model, experiment.engine
    language = model.language
    width = 4 if experiment.train.precision == "fp32" else 2
    counts = parameters(model).values()
    trainable = sum(part.trainable for part in counts)
    frozen = sum(part.total for part in counts) - trainable
    frozen_bytes, scales = frozen * width, 0
    if model.quantization != "none":
        quantized = linear_parameters(language)
        weight, scale = QUANTIZED_BYTES[model.quantization]
        frozen_bytes += int(quantized * (weight - width))
        scales = int(quantized * scale)
    tokens = engine.micro_batch * experiment.data.max_tokens
    layer, block = _kept_by_a_layer(model, width), _kept_by_a_block(model) * width
    # In the backward pass one layer is at work beside what was kept.
    layers, blocks = language.num_hidden_layers, model.cross_blocks
    inputs = layers * width * language.hidden_size
    kept = (
        inputs + 2 * (layer + block) if recompute else (layers + 1) * layer + (blocks + 1) * block
    )

    def share(size: int, from_stage: int) -> int:
        return -(-size // experiment.cluster.workers) if engine.zero_stage >= from_stage else size

    return {
        "frozen weights": share(frozen_bytes, 3) + scales,
        "trainable weights": share(trainable * width, 3),
        "gradients": share(trainable * width, 2),
        "optimizer": share(trainable * STATE_BYTES, 1),
        "activations": tokens * kept + _kept_by_the_tower(experiment) * width,
        # Of a chunk: as computed, in float32, and their gradient.
        "logits": 3 * 4 * language.vocab_size * min(tokens, logit_rows(language.vocab_size)),
    }


def _kept_by_a_layer(model: ModelConfig, width: int) -> int:
    """Bytes that a frozen layer of the decoder keeps for the backward pass, a token.

    Three values of its MLP; queries, keys, values and what they were mixed to, laid out anew; and its two
    norms, which work in float32. Adapters keep what enters them and their layer.
    """
    language, lora = model.language, model.language_lora
    hidden, wide = language.hidden_size, language.intermediate_size
    grouped = hidden * language.num_key_value_heads // language.num_attention_heads
    kept = 3 * wide + 4 * hidden + 2 * grouped
    if lora.rank and lora.targets == "attention":
        kept += 3 * hidden + 4 * lora.rank
    elif lora.rank:
        kept += 4 * hidden + wide + 7 * lora.rank
    return kept * width + 4 * 2 * hidden


def _kept_by_a_block(model: ModelConfig) -> int:
    """Values that a block of gated cross-attention keeps, a token; without such blocks, none.

    As its weights are trained, what enters each product: two vectors four times as wide, and ten more.
    """
    return (2 * 4 + 10) * model.language.hidden_size if model.cross_blocks else 0


def _kept_by_the_tower(experiment: Experiment) -> int:
    """Values that a tower with adapters keeps, if a micro batch is full of images; without them, none.

    At most 5 hidden + 4 intermediate values a patch and layer.
    """
    model, vision, data = experiment.model, experiment.model.vision, experiment.data
    if not model.vision_lora.rank:
        return 0
    images = experiment.engine.micro_batch * min(
        data.max_images, data.max_tokens // model.image_tokens
    )
    kept = 5 * vision.hidden_size + 4 * vision.intermediate_size + 6 * model.vision_lora.rank
    return images * vision.patches * vision.num_hidden_layers * kept
