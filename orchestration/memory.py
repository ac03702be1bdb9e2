"""What a worker has to hold while it trains, and the nearest settings that fit where it is too much."""

from typing import Literal

from dsvl.config import LOGIT_BYTES
from orchestration.config import Experiment, legal_workers
from orchestration.parameters import parameters

GIB = 1024**3
STATE_BYTES = 12
"""Of a trained parameter: its float32 master value and two moments."""


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
    now = (recompute, engine.zero_stage, engine.micro_batch, experiment.cluster.workers)
    choices = [
        (again, stage, micro, count)
        for again in ((recompute,) if recompute is not False else (False, True))
        for stage in range(engine.zero_stage, 4)
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
    language, engine = experiment.model.language, experiment.engine
    width = 4 if experiment.train.precision == "fp32" else 2
    counts = parameters(experiment.model).values()
    trainable = sum(part.trainable for part in counts)
    frozen = sum(part.total for part in counts) - trainable
    tokens = engine.micro_batch * experiment.data.max_tokens
    hidden, layers = language.hidden_size, language.num_hidden_layers
    grouped = hidden * language.num_key_value_heads // language.num_attention_heads
    # A frozen layer keeps, a token: three of its MLP; queries, keys, values and what they were mixed to, laid
    # out anew; and its two norms, which work in float32.
    layer = width * (3 * language.intermediate_size + 4 * hidden + 2 * grouped) + 4 * 2 * hidden
    # A block of gated cross-attention keeps, as its weights are trained, what enters each product: of a token
    # two vectors four times as wide, and ten more.
    blocks = experiment.model.cross_blocks
    block = width * (2 * 4 + 10) * hidden if blocks else 0
    # In the backward pass one layer is at work beside what was kept.
    kept = (
        layers * width * hidden + 2 * (layer + block)
        if recompute
        else (layers + 1) * layer + (blocks + 1) * block
    )

    def share(size: int, from_stage: int) -> int:
        return -(-size // experiment.cluster.workers) if engine.zero_stage >= from_stage else size

    return {
        "frozen weights": share(frozen * width, 3),
        "trainable weights": share(trainable * width, 3),
        "gradients": share(trainable * width, 2),
        "optimizer": share(trainable * STATE_BYTES, 1),
        "activations": tokens * kept,
        # Of a chunk: as computed, in float32, and their gradient.
        "logits": 3 * min(LOGIT_BYTES, 4 * tokens * language.vocab_size),
    }
