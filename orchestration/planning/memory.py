"""What a worker has to hold while it trains: bytes by component at the moment when they are most.

There are four such moments: the loss is known, and every layer has kept what its backward pass needs; that
pass has come to the embedding, the last to get its gradient; the optimizer updates; held-out samples pass.
DeepSpeed's part is that of its code (0.19). `tests.benchmarks.planning` holds the sum to what real trainings
take.
"""

from typing import Any

from dsvl.config import ModelConfig, logit_rows
from orchestration.config import Experiment
from orchestration.planning.parameters import linear_parameters, parameters

GIB = 1024**3
STATE_BYTES = 12
"""Of a trained parameter: its float32 master value and two moments."""
QUANTIZED_BYTES = {"int8": (1.0, 0.0), "nf4": (1 / 2, 1 / 64 + 4 / (64 * 256))}
"""Of a quantised weight, and of its share in scales: NF4's are one a block of 64, quantised themselves."""
RUNTIME_BYTES = int(1.3 * GIB)
"""What CUDA takes of a GPU before anything is put there (transformers, "Anatomy of model's memory")."""
FRAGMENTED = 0.15
"""Of what comes and goes on a GPU, on top for gaps between it (GMLake, arXiv:2401.08156: 15 % on average)."""
BUCKET, PREFETCH, REUSE = 500_000_000, 50_000_000, 1_000_000_000
"""DeepSpeed's reduce_bucket_size, stage3_prefetch_bucket_size and stage3_max_reuse_distance: weights."""


def memory(experiment: Experiment) -> dict[str, int]:
    """Bytes that a worker needs on its device, by component; full samples of nothing but text are counted."""
    return _memory(experiment, recompute=gradient_checkpointing(experiment))


def host_memory(experiment: Experiment) -> int:
    """Bytes that a worker keeps in its machine's memory because they are offloaded there.

    The optimizer goes with its gradients in float32 and a copy of the weights in the training's precision.
    """
    engine, width = experiment.engine, weight_bytes(experiment)
    frozen, scales, trained = _weights(experiment)
    own = -(-trained // experiment.cluster.workers)
    optimizer = own * (STATE_BYTES + 4 + width) if engine.offload_optimizer == "cpu" else 0
    weights = -(-(frozen + trained * width) // experiment.cluster.workers) + scales
    return optimizer + (weights if engine.offload_parameters == "cpu" else 0)


def model_bytes(experiment: Experiment) -> int:
    """Bytes of all weights, as who answers with the model holds them on one device."""
    frozen, scales, trained = _weights(experiment)
    return frozen + scales + trained * weight_bytes(experiment)


def gradient_checkpointing(experiment: Experiment) -> bool:
    """Whether a layer keeps only its input for the backward pass: as configured, else where no more fits.

    Computing the layers anew costs a forward pass, a third of a step, so it is done for want of memory alone.
    """
    chosen, limit = experiment.engine.gradient_checkpointing, experiment.cluster.gpu_memory_gib
    if chosen is not None or limit is None:
        return bool(chosen)
    return sum(_memory(experiment, recompute=False).values()) > limit * GIB


def weight_bytes(experiment: Experiment) -> int:
    """Of a number in the training's precision."""
    return 4 if experiment.train.precision == "fp32" else 2


def _memory(experiment: Experiment, *, recompute: bool) -> dict[str, int]:
    passing = max(
        at_the_loss(experiment, recompute=recompute),
        *updating(experiment),
        evaluating(experiment),
        key=lambda parts: sum(parts.values()),
    )
    allowance = 0
    if experiment.cluster.gpus_per_worker:
        allowance = RUNTIME_BYTES + int(FRAGMENTED * sum(passing.values()))
    return {**staying(experiment), **passing, "allowance": allowance}


def staying(experiment: Experiment) -> dict[str, int]:
    """A worker's share of weights and states: ZeRO 1 divides the optimizer, 3 the weights too."""
    engine, workers = experiment.engine, experiment.cluster.workers
    frozen, scales, trained = _weights(experiment)
    own = -(-trained // workers)
    states = (
        own * STATE_BYTES if engine.zero_stage else trained * 8
    )  # its weights are their own masters

    def weights(size: int) -> int:
        if engine.offload_parameters != "none":
            return 0
        return -(-size // workers) if engine.zero_stage == 3 else size

    return {
        "frozen weights": weights(frozen) + scales,
        "trainable weights": weights(trained * weight_bytes(experiment)),
        "optimizer": states if engine.offload_optimizer == "none" else 0,
    }


def at_the_loss(experiment: Experiment, *, recompute: bool) -> dict[str, int]:
    """What is there beside it when the loss is known, or while the last layer is differentiated."""
    model, engine, width = experiment.model, experiment.engine, weight_bytes(experiment)
    language, stage = model.language, engine.zero_stage
    gradient, share, bucket = _gradients(experiment)
    passes = experiment.train.batch // (experiment.cluster.workers * engine.micro_batch)
    held = share if stage == 3 else 0
    if passes > 1:  # what earlier passes gave, which ZeRO 1 holds twice
        held = (gradient, 2 * gradient, share, share)[stage]
    early = bool(model.language_lora.rank or model.cross_blocks)
    if early and stage == 0:  # gradients of layers come while what others kept is still there
        held = gradient
    tokens = engine.micro_batch * experiment.data.max_tokens
    layer, block = _kept_by_a_layer(model, width, stage=stage), _kept_by_a_block(model) * width
    layers, blocks = language.num_hidden_layers, model.cross_blocks
    embedded = 2 * width * language.hidden_size  # alone, and in order
    inputs = layers * width * language.hidden_size
    kept = embedded + (inputs + layer + block if recompute else layers * layer + blocks * block)
    # Float32 logits of one chunk and the next, in half precision their gradient too.
    logits = (8 if width == 4 else 12) * language.vocab_size
    logits *= min(tokens, logit_rows(language.vocab_size))
    return {
        "gradients": held,
        "buffers": bucket if stage == 3 or (early and stage) else 0,
        "gathered weights": _gathered(experiment),
        "activations": tokens * kept + _kept_by_the_tower(experiment) * width,
        "at work": max(logits, tokens * 3 * language.intermediate_size * width),
    }


def updating(experiment: Experiment) -> list[dict[str, int]]:
    """What is there when the backward pass ends, and while the optimizer updates."""
    engine, width = experiment.engine, weight_bytes(experiment)
    stage, (gradient, share, bucket) = engine.zero_stage, _gradients(experiment)
    trained = gradient // width
    own = -(-trained // experiment.cluster.workers) if stage else trained
    passes = experiment.train.batch // (experiment.cluster.workers * engine.micro_batch)
    fresh = (2 * gradient, gradient, gradient, gradient + share)[stage]
    fresh += gradient if stage in (1, 2) and passes > 1 else 0
    # AdamW's temporaries, of which on a GPU there is one at a time; and the gradient in float32.
    temporary = 4 * own * (1 if experiment.cluster.gpus_per_worker else 2)
    temporary += 4 * own if stage == 3 or (stage and width < 4) else 0
    if engine.offload_optimizer != "none":
        temporary = 0
    none = {"gathered weights": 0, "activations": 0, "at work": 0}
    return [
        {"gradients": fresh, "buffers": bucket, **none},
        {
            "gradients": gradient if stage == 0 else share,
            "buffers": temporary + (bucket if stage == 3 else 0),
            **none,
        },
    ]


def evaluating(experiment: Experiment) -> dict[str, int]:
    """What is there while held-out samples pass through a layer, which lets go of nothing before its end."""
    language, width = experiment.model.language, weight_bytes(experiment)
    most, batch = experiment.evaluation.samples, experiment.evaluation.batch
    tokens = min(batch, most or batch) * experiment.data.max_tokens
    hidden, wide = language.hidden_size, language.intermediate_size
    grouped = hidden * language.num_key_value_heads // language.num_attention_heads
    return {
        "gradients": 0,
        "buffers": 0,
        "gathered weights": _gathered(experiment),
        "activations": tokens * 2 * hidden * width,
        "at work": tokens * (3 * wide + 7 * hidden + 2 * grouped) * width,
    }


def _weights(experiment: Experiment) -> tuple[int, int, int]:
    """Bytes of the frozen weights and of their scales, and how many weights are trained."""
    model, width = experiment.model, weight_bytes(experiment)
    counts = parameters(model).values()
    trained = sum(part.trainable for part in counts)
    frozen, scales = (sum(part.total for part in counts) - trained) * width, 0
    if model.quantization != "none":
        quantized = linear_parameters(model.language)
        weight, scale = QUANTIZED_BYTES[model.quantization]
        frozen += int(quantized * (weight - width))
        scales = int(quantized * scale)
    return frozen, scales, trained


def _gradients(experiment: Experiment) -> tuple[int, int, int]:
    """Bytes of all gradients, of those that a worker is left with, and of the buckets they are summed up in.

    ZeRO 1 and 2 leave it every parameter whole of which its share has a part.
    """
    engine, width = experiment.engine, weight_bytes(experiment)
    counts = [part.trainable for part in parameters(experiment.model).values()]
    trained = sum(counts)
    own = -(-trained // experiment.cluster.workers)
    if engine.zero_stage in (1, 2):
        own = min(trained, own + max(counts)) if experiment.cluster.workers > 1 else trained
    share = 0 if engine.offload_optimizer != "none" else own * width
    overlapped = 2 if experiment.cluster.gpus_per_worker and engine.zero_stage < 3 else 1
    bucket = min(trained, _deepspeed(experiment, "reduce_bucket_size", BUCKET))
    return trained * width, share, bucket * width * overlapped if engine.zero_stage else 0


def _gathered(experiment: Experiment) -> int:
    """Bytes of weights that ZeRO 3 has brought together for the layers at work.

    Weights stay that the backward pass soon needs again, and the next ones arrive, which are copied then.
    """
    if experiment.engine.zero_stage < 3 or experiment.cluster.workers == 1:
        return 0
    frozen, _, trained = _weights(experiment)
    total = sum(part.total for part in parameters(experiment.model).values())
    arriving = _deepspeed(experiment, "stage3_prefetch_bucket_size", PREFETCH)
    reused = _deepspeed(experiment, "stage3_max_reuse_distance", REUSE) // 2
    live = min(total, reused + experiment.model.language.largest_weight + arriving) + min(
        total, arriving
    )
    return int((frozen + trained * weight_bytes(experiment)) / total * live)


def _deepspeed(experiment: Experiment, name: str, default: int) -> int:
    """A field of DeepSpeed's configuration of ZeRO."""
    settings: dict[str, Any] = experiment.engine.deepspeed.get("zero_optimization", {})
    return int(settings.get(name, default))


def _kept_by_a_layer(model: ModelConfig, width: int, *, stage: int) -> int:
    """Bytes that a frozen layer of the decoder keeps for the backward pass, a token.

    Three values of its MLP; queries, keys, values and what they were mixed to, laid out anew; and its two
    norms, which work in float32. Adapters keep what enters them and their layer; so do under ZeRO 3 all
    linear layers, frozen or not (DeepSpeed's LinearFunctionForZeroStage3).
    """
    language, lora = model.language, model.language_lora
    hidden, wide = language.hidden_size, language.intermediate_size
    grouped = hidden * language.num_key_value_heads // language.num_attention_heads
    kept = 3 * wide + 4 * hidden + 2 * grouped
    if lora.rank and lora.targets == "attention":
        kept += 3 * hidden + 4 * lora.rank
    elif lora.rank:
        kept += 4 * hidden + wide + 7 * lora.rank
    if stage == 3 and not (lora.rank and lora.targets == "all"):
        kept += 3 * hidden + wide
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
