"""Every setting of the library, as frozen dataclasses; standard library only, so planning needs no torch.

The string under a field is its documentation. A rule that a value breaks raises ValueError with the
field, the value, the rule and the remedy.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, isqrt
from typing import Any, Literal

SCHEMA_VERSION = 3
"""Of prepared data; see `dsvl.data.store`."""
LOGIT_BYTES = 2**24
"""Float32 logits that the output head holds at once, unless that is fewer than `LOGIT_ROWS`."""
LOGIT_ROWS = 128
"""Fewest positions of a chunk, however large the vocabulary: each chunk reads all of the head anew."""


def logit_rows(vocabulary: int) -> int:
    """Positions whose logits over so many tokens the output head holds at once."""
    return max(LOGIT_ROWS, LOGIT_BYTES // (4 * vocabulary))


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise ValueError naming the field, its value and the rule (which says what to set) unless it holds."""
    if not holds:
        raise ValueError(f"{name}={value!r}: {rule}")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """A frozen decoder, and its shape under the names of its `config.json`, so that plans need no weights."""

    checkpoint: str
    """A folder in Hugging Face layout, or a name on the hub."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads"):  # fmt: skip
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_key_value_heads",
            self.num_key_value_heads,
            f"must divide num_attention_heads={self.num_attention_heads}",
        )

    @property
    def largest_weight(self) -> int:
        """Values of its largest matrix."""
        return self.hidden_size * max(self.vocab_size, self.intermediate_size)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A frozen image tower, and its shape under the names of its `config.json`."""

    checkpoint: str
    """A folder in Hugging Face layout, or a name on the hub."""
    kind: Literal["clip", "siglip", "qwen"] = "clip"
    """The architecture. `python -m jobs.extract_qwen_vision` makes a checkpoint of kind qwen."""
    image_size: int
    patch_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    class_token: bool = False
    """Pass the class token on, before the patches; only clip has one."""
    queries: int = 0
    """Feature vectors that qwen resamples its patches to (256 in Qwen-VL); 0 for the others."""
    output_size: int = 0
    """Their width (4096 in Qwen-VL); 0 for the others, whose vectors have `hidden_size`."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "hidden_size", "intermediate_size",
                     "num_hidden_layers"):  # fmt: skip
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        # SigLIP's so400m cuts 384 pixels into patches of 14 and leaves the last six out.
        require(
            self.image_size % self.patch_size == 0 or self.kind == "siglip",
            "patch_size",
            self.patch_size,
            f"must divide image_size={self.image_size}",
        )
        require(
            self.kind == "clip" or not self.class_token,
            "class_token",
            self.class_token,
            f"must be false: kind={self.kind} has none",
        )
        resampled = self.kind == "qwen"
        require(
            (self.queries > 0) == resampled and self.queries == isqrt(abs(self.queries)) ** 2,
            "queries",
            self.queries,
            "must be a square for kind=qwen (256 in Qwen-VL), and 0 for the others",
        )
        require(
            (self.output_size > 0) == resampled and self.output_size % 128 == 0,
            "output_size",
            self.output_size,
            "must be a multiple of 128 for kind=qwen (4096 in Qwen-VL), and 0 for the others",
        )

    @property
    def tokens(self) -> int:
        """Feature vectors that the tower makes of an image."""
        return self.queries or self.patches + int(self.class_token)

    @property
    def patches(self) -> int:
        """Squares that an image is cut into."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def width(self) -> int:
        """Numbers in a feature vector."""
        return self.output_size or self.hidden_size


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters: linear layers W of a frozen part become W + alpha / rank * B A (arXiv:2106.09685)."""

    rank: int = 0
    """Rows of A and columns of B, which are trained; 0 adds none."""
    alpha: float = 16.0
    """How much adapters weigh; Adam moves them in proportion to it, so it tunes their learning rate."""
    targets: Literal["all", "attention"] = "all"
    """Which linear layers have one: all, or only those of the attention."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, "rank", self.rank, "must not be negative; 0 adds no adapters")
        require(self.alpha > 0, "alpha", self.alpha, "must be positive, for instance 16")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Frozen tower + projection + frozen decoder (paper, section 3)."""

    size: str
    """Which of `languages` to use: model.size=13b changes the size of a run, or is searched."""
    languages: dict[str, LanguageConfig]
    """The family: one decoder a size, sharing a tokenizer."""
    vision: VisionConfig
    attention: Literal["causal", "causal_cross", "mmca", "gated_cross"] = "mmca"
    """Multi-modal causal attention, or one of its rivals (paper, section 4.1).

    gated_cross alone adds parameters (`dsvl/gated.py`)."""
    cross_every: int = 4
    """gated_cross has a block ahead of each so many-th layer of the decoder (Flamingo-9B: 4)."""
    template: Literal["paper", "original"] = "paper"
    """The text around questions and answers (`dsvl/template.py`)."""
    projection: Literal["linear", "mlp", "vit", "perceiver", "qformer"] = "linear"
    """How vision features reach the width of the decoder (`dsvl/projection.py`)."""
    projection_layers: int = 1
    """Transformer layers of a vit, perceiver (Flamingo has 6) or qformer (BLIP-2 has 12)."""
    projection_queries: int = 64
    """Vectors that a perceiver or qformer makes of an image, whatever the tower gives."""
    train_embedding: bool = True
    """Train the decoder's input embedding beside the projection, as the paper does."""
    language_lora: LoraConfig = LoraConfig()
    """Adapters of the decoder."""
    vision_lora: LoraConfig = LoraConfig()
    """Adapters of the tower."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """How the decoder's frozen linear layers are held: in `train.precision`, in 8 bits (LLM.int8, which
    rounds what enters a layer too) or in 4 (NF4, as in QLoRA). Embedding, norms and head stay as they are."""

    def __post_init__(self) -> None:
        require(
            self.size in self.languages,
            "size",
            self.size,
            f"must be one of {', '.join(self.languages)}",
        )
        for name in ("projection_layers", "projection_queries", "cross_every"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")
        layers = self.language.num_hidden_layers
        require(
            self.attention != "gated_cross" or self.cross_every <= layers,
            "cross_every",
            self.cross_every,
            f"must be at most the {layers} layers of size {self.size}, or there is no block",
        )
        widths = (self.language.hidden_size, self.language.intermediate_size)
        require(
            self.quantization != "nf4" or all(width % 64 == 0 for width in widths),
            "quantization",
            self.quantization,
            "must be int8 or none, as nf4 rounds 64 numbers of a row at a time, and hidden_size and "
            f"intermediate_size of languages.{self.size}, {widths[0]} and {widths[1]}, are no multiples",
        )

    @property
    def cross_blocks(self) -> int:
        """Blocks of gated cross-attention."""
        gated = self.attention == "gated_cross"
        return self.language.num_hidden_layers // self.cross_every if gated else 0

    @property
    def image_tokens(self) -> int:
        """Positions that an image takes in a sample."""
        resampled = self.projection in ("perceiver", "qformer")
        return self.projection_queries if resampled else self.vision.tokens

    @property
    def language(self) -> LanguageConfig:
        """The decoder of the chosen size."""
        return self.languages[self.size]


@dataclass(frozen=True, kw_only=True)
class FieldsConfig:
    """Where a record of the generic formats has what is read, if not under its usual name."""

    id: str | None = None
    question: str | None = None
    """For `qa`: a field, or a text with fields in it, like `{question} Say why.`; a list is asked in turn."""
    answer: str | None = None
    """For `qa`: the same, like `{choice}, as {why}`."""
    image: str | None = None
    """For `qa`: the same; empty fields are no image, lists are several."""
    messages: str | None = None
    """For `sharegpt` and `hf_messages`. This and all below are what LLaMA-Factory calls them."""
    images: str | None = None
    """For `sharegpt`, `hf_messages` and `alpaca`."""
    system: str | None = None
    """For `sharegpt` and `alpaca`."""
    prompt: str | None = None
    """For `alpaca`; so are `query`, `response` and `history`."""
    query: str | None = None
    response: str | None = None
    history: str | None = None
    role_tag: str | None = None
    """For `sharegpt`; so are the other tags."""
    content_tag: str | None = None
    user_tag: str | None = None
    assistant_tag: str | None = None
    system_tag: str | None = None

    def given(self) -> dict[str, str]:
        """Those that are set."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SetConfig:
    """One raw dataset; relative paths start at `storage.data`."""

    reader: Literal[
        "aokvqa", "coco_caption", "llava", "llava_dial", "llava_otter_blend", "minigpt4", "ocr_vqa",
        "otter_mimicit_cgd", "otter_mimicit_sd", "otter_mimicit_sn", "otter_mimicit_tvc",
        "otter_mimicit_vst", "sparkles_dialogue",
        "llava_json", "sharegpt", "hf_messages", "alpaca", "qa",
    ]  # fmt: skip
    """The format of the annotations: one of the paper's datasets as it is downloaded, or one of five that
    any dataset may have."""
    annotations: tuple[str, ...]
    """Annotation files, read in this order: JSON, or by their endings JSON lines, Parquet, CSV or TSV."""
    images: str
    """The folder or file that holds the images; nothing outside it is opened. Tar, zip, Parquet and JSON
    (of base64) are entered like folders."""
    image_name: str = "{image}"
    """What an image is called in there. `{image}` is what the record calls it, `{file}` the name of the
    annotation file without its ending; `{image:0>12}.jpg` fills up with zeros to twelve characters."""
    image_rewrite: tuple[str, str] | None = None
    """A regular expression, and what takes the place of its matches in what records call an image."""
    fields: FieldsConfig = FieldsConfig()
    split: Literal["auto", "train", "eval"] = "auto"
    """Which side its records are on; auto holds out `data.eval_fraction` of linked groups."""
    max_dropped: float | None = None
    """Share of the set that may be dropped, where it is not `data.max_dropped`."""
    records: int | None = None
    """How many conversations the set is known to give: lets `plan` count steps before `prepare` has run."""

    def __post_init__(self) -> None:
        require(
            len(self.annotations) > 0,
            "annotations",
            self.annotations,
            "must name at least one file",
        )
        require(
            self.max_dropped is None or 0 <= self.max_dropped <= 1,
            "max_dropped",
            self.max_dropped,
            "must lie in [0, 1]",
        )
        try:
            self.image_name.format(image="", file="")
        except (LookupError, ValueError, AttributeError):
            rule = 'must hold no other fields than {image} and {file}, like "{image:0>12}.jpg"'
            require(False, "image_name", self.image_name, rule)
        try:
            re.sub(*(self.image_rewrite or ("", "")), "")
        except (re.error, LookupError) as error:
            rule = f"must be a regular expression and its replacement: {error}"
            require(False, "image_rewrite", self.image_rewrite, rule)


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """How conversations of some sets become samples; drawn anew in every epoch (paper, section 5.1)."""

    sets: tuple[str, ...]
    concat: tuple[int, int] = (1, 1)
    """Fewest and most conversations, drawn at random, that follow one another in a sample."""
    join: bool = False
    """Only conversations over several images make samples, each after some about one of its images alone:
    at least one of each image but the last (LLaVA-Otter)."""
    followups: bool = False
    """With `join`: end with another conversation about each image, its questions saying which."""
    samples: int | None = None
    """Most samples an epoch has of it, drawn at random; all when empty."""
    epochs: float = 1.0
    """How often it passes over its conversations in an epoch, where `samples` is empty."""
    weight: float = 1.0
    """Changes its share of an epoch, which has as many samples as all blends together."""
    records: int | None = None
    """How many samples it is known to make: lets `plan` count steps before `prepare` has run."""

    def __post_init__(self) -> None:
        once = len(set(self.sets)) == len(self.sets) > 0
        require(once, "sets", self.sets, "must name at least one of data.sets, each once")
        fewest, most = self.concat
        require(1 <= fewest <= most, "concat", self.concat, "must be [fewest, most], from 1")
        require(
            not (self.join and self.concat != (1, 1)),
            "concat",
            self.concat,
            "must be [1, 1] with join: true",
        )
        require(
            self.join or not self.followups,
            "followups",
            self.followups,
            "must be false without join: true",
        )
        require(
            self.samples is None or (self.samples > 0 and self.epochs == 1.0),
            "samples",
            self.samples,
            "must be positive, and stand without epochs",
        )
        for name in ("epochs", "weight"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a sample is: the sets, the limits, the split and the blends."""

    sets: dict[str, SetConfig]
    blends: dict[str, BlendConfig] = field(default_factory=dict)
    """What samples are made of; the conversations of a set that no blend names are samples by themselves."""
    temperature: float = 1.0
    """Above 1, small blends have more samples in an epoch than in proportion: size ** (1 / temperature)."""
    max_images: int = 8
    """Images a conversation, more is `too_many_images` (paper, section 5.1); and a sample."""
    max_rounds: int | None = None
    """Rounds a sample; further ones are left out."""
    max_tokens: int = 4096
    """Tokens a sample with its image tokens. Rounds beyond are left out; a conversation whose first round is
    longer is `too_long`."""
    max_image_pixels: int = 50_000_000
    """Larger headers are refused as `image_too_large` before anything is decoded."""
    max_dropped: float = 0.05
    """Share of a set that may be dropped before the preparation fails."""
    eval_fraction: float = 0.1
    """Share of an `auto` set that is held out (paper, section 5.1)."""
    seed: int = 1234
    """Decides what is held out, and what readers draw: the same for all that is to be compared."""

    def __post_init__(self) -> None:
        require(self.seed >= 0, "seed", self.seed, "must not be negative")
        require(len(self.sets) > 0, "sets", self.sets, "must name at least one dataset")
        # Ids are SET/RECORD, and a file is called so: with a slash, two sets could share ids.
        misnamed = [name for name in self.sets if not re.fullmatch(r"\w[\w.-]{0,99}", name)]
        rule = "must be called by up to 100 letters, digits, '_', '-' and '.', none of the last two first"
        require(not misnamed, "sets", tuple(misnamed), rule)
        for name, blend in self.blends.items():
            unknown = [part for part in blend.sets if part not in self.sets]
            rule = f"must be among data.sets: {', '.join(self.sets)}"
            require(not unknown, f"blends.{name}.sets", tuple(unknown), rule)
        clashing = [n for n, b in self.blends.items() if n in self.sets and n not in b.sets]
        rule = "must have another name, or that set among its sets"
        require(not clashing, "blends", tuple(clashing), rule)
        require(self.temperature > 0, "temperature", self.temperature, "must be positive")
        require(
            self.max_rounds is None or self.max_rounds > 0,
            "max_rounds",
            self.max_rounds,
            "must be positive",
        )
        require(
            0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "must lie in (0, 1)"
        )
        require(0 <= self.max_dropped <= 1, "max_dropped", self.max_dropped, "must lie in [0, 1]")
        for name in ("max_images", "max_tokens", "max_image_pixels"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be positive")

    def all_blends(self) -> dict[str, BlendConfig]:
        """Those that are named, and one for every set that none of them has, by their names."""
        named = {name for blend in self.blends.values() for name in blend.sets}
        own = {name: BlendConfig(sets=(name,)) for name in self.sets if name not in named}
        return dict(sorted({**self.blends, **own}.items()))


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning-rate schedule (paper, section 4.2)."""

    lr: float = 1e-3
    """Peak learning rate of all that is trained, where the next two do not say otherwise."""
    projection_lr: float | None = None
    """That of the projection."""
    embedding_lr: float | None = None
    """That of the decoder's embedding."""
    betas: tuple[float, float] = (0.0, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Applied to matrices; biases and norms are never decayed."""
    clip: float = 1.0
    """Largest norm of the gradient over all trainable parameters."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_fraction: float = 0.1
    """Share of all steps in which the rate rises to its peak."""
    warmup_steps: int | None = None
    """Steps in which it rises, in place of that share: however long a training is, it then begins alike."""
    decay_fraction: float = 0.2
    """Share of all steps in which `wsd` (warm-up, stable, decay) falls from its plateau to zero."""

    def __post_init__(self) -> None:
        for name in ("lr", "projection_lr", "embedding_lr"):
            rate = getattr(self, name)
            require(rate is None or rate > 0, name, rate, "must be positive, for instance 1e-3")
        require(all(0 <= b < 1 for b in self.betas), "betas", self.betas, "must lie in [0, 1)")
        require(self.eps > 0, "eps", self.eps, "must be positive")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "must not be negative")
        require(self.clip > 0, "clip", self.clip, "must be positive")
        require(
            0 <= self.warmup_fraction < 1,
            "warmup_fraction",
            self.warmup_fraction,
            "must lie in [0, 1)",
        )
        require(
            self.warmup_steps is None or self.warmup_steps >= 0,
            "warmup_steps",
            self.warmup_steps,
            "must not be negative",
        )
        require(
            0 < self.decay_fraction <= 1,
            "decay_fraction",
            self.decay_fraction,
            "must lie in (0, 1]",
        )

    @property
    def branching(self) -> bool:
        """Whether a longer training begins alike, so that one can branch off the other."""
        return self.schedule in ("wsd", "constant") and self.warmup_steps is not None

    def plateau_end(self, steps: int) -> int:
        """Updates that a longer training makes alike, where `branching`: those before `wsd` decays."""
        return steps - ceil(self.decay_fraction * steps) * (self.schedule == "wsd")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What is trained, whatever it runs on."""

    epochs: int
    batch: int = 128
    """Samples an optimiser update, over all workers (paper, section 4.2)."""
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    seed: int = 1234
    """Decides initial values, and the order and draws of the training samples."""
    spike: float | None = None
    """An update whose gradient's norm is more than so many times the median of the last 32 is undone and its
    batch skipped, as is one that is not finite; when empty, only the latter."""
    max_skipped: int = 5
    """Batches that may be skipped before the training fails as diverged."""

    def __post_init__(self) -> None:
        rule = "must be greater than 1"
        require(self.spike is None or self.spike > 1, "spike", self.spike, rule)
        require(self.max_skipped >= 0, "max_skipped", self.max_skipped, "must not be negative")
        require(self.epochs > 0, "epochs", self.epochs, "must be positive")
        require(self.batch > 0, "batch", self.batch, "must be positive")
        require(self.seed >= 0, "seed", self.seed, "must not be negative")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How DeepSpeed carries the training out; the results do not depend on it beyond rounding."""

    zero_stage: Literal[0, 1, 2, 3] = 2
    micro_batch: int = 1
    """Samples a worker passes through the model at once."""
    gradient_checkpointing: bool | None = None
    """Compute the decoder's layers anew in the backward pass instead of keeping what they gave, which takes a
    third of a step; when empty, only where `cluster.gpu_memory_gib` asks for it."""
    stored_features: bool = False
    """Have `prepare` keep what the frozen tower makes of each image, and train on that instead of running the
    tower in every step: 2 MiB of disk an image with Qwen-VL's."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where master values and moments lie between updates, if not on the GPU."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where weights lie that no layer is using; needs ZeRO stage 3."""
    nvme_path: str | None = None
    """A folder on each node's own fast disk, for nvme."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """More of DeepSpeed's own configuration, as
    `{zero_optimization: {zero_hpz_partition_size: 8, zero_quantized_weights: true}}` for ZeRO++."""

    def __post_init__(self) -> None:
        require(self.micro_batch > 0, "micro_batch", self.micro_batch, "must be positive")
        stage, offloads = self.zero_stage, (self.offload_optimizer, self.offload_parameters)
        rule = "must be none unless zero_stage is 3"
        require(stage == 3 or offloads[1] == "none", "offload_parameters", offloads[1], rule)
        rule = "must be none without zero_stage 1, 2 or 3"
        require(stage > 0 or offloads[0] == "none", "offload_optimizer", offloads[0], rule)
        rule = "must name a folder for nvme, and nothing else"
        on_disk = offloads[1] == "nvme"
        require(on_disk == bool(self.nvme_path), "nvme_path", self.nvme_path, rule)
        ours = sorted(name for name in DEEPSPEED_OURS if _has(self.deepspeed, name.split(".")))
        rule = "must not be set there, but by the fields of this file, if at all"
        require(not ours, "deepspeed", ours, rule)


DEEPSPEED_OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "optimizer", "scheduler", "bf16.enabled", "fp16.enabled",
    "zero_optimization.stage", "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_param.device",
    # A fixed scale counts nothing, and a part that is offloaded has an optimiser of its own.
    "fp16.loss_scale", "zero_optimization.offload_optimizer.ratio",
)  # fmt: skip
"""Fields of DeepSpeed's configuration that follow from ours, or that a checkpoint could not resume."""


def _has(tree: Any, keys: Sequence[str]) -> bool:
    """Whether a nested mapping holds something under these keys."""
    return not keys or (
        isinstance(tree, dict) and keys[0] in tree and _has(tree[keys[0]], keys[1:])
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the training state is saved."""

    every: int = 200
    """Optimiser updates between two checkpoints; the last update is always saved."""
    keep: int = 2
    """How many of the newest checkpoints stay, beside that where a plateau of `warmup_steps` ends."""
    keep_best: int = 0
    """How many with the lowest held-out loss stay beside them; the end of every epoch is saved then."""
    branch_epochs: tuple[int, ...] = ()
    """Lengths, in epochs, of shorter trainings that will branch off this one: a checkpoint is kept where the
    decay of each begins."""
    trunk: str | None = None
    """The folder of a run to branch off: the updates that both have in common are taken from its
    checkpoints."""

    def __post_init__(self) -> None:
        require(self.every > 0, "every", self.every, "must be positive")
        require(self.keep > 0, "keep", self.keep, "must be positive")
        require(self.keep_best >= 0, "keep_best", self.keep_best, "must not be negative")
        rule = "must be positive"
        require(all(n > 0 for n in self.branch_epochs), "branch_epochs", self.branch_epochs, rule)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured: on held-out samples at the end of every epoch, and of some updates."""

    batch: int = 32
    """Held-out samples a worker evaluates at once."""
    samples: int | None = None
    """How many held-out samples are used, from the first; all when empty."""
    chats: int = 4
    """Held-out conversations that the finished model answers, for its report; the first of them it answers
    after every epoch."""
    new_tokens: int = 64
    """Most tokens of an answer when `dsvl evaluate` asks."""
    inspect_every: int = 50
    """Updates between two looks at the norms of each trained part, and at workers that hold the others up."""

    def __post_init__(self) -> None:
        require(self.batch > 0, "batch", self.batch, "must be positive")
        require(
            self.samples is None or self.samples > 0, "samples", self.samples, "must be positive"
        )
        require(self.chats >= 0, "chats", self.chats, "must not be negative")
        require(self.new_tokens > 0, "new_tokens", self.new_tokens, "must be positive")
        require(self.inspect_every > 0, "inspect_every", self.inspect_every, "must be positive")
