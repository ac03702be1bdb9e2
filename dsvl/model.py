"""VisualChat: embed the text, put the images in their places, run the decoder, score the answers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from dsvl import attention as _attention  # noqa: F401  (registers the schemes with transformers)
from dsvl.config import ModelConfig, require
from dsvl.data.types import Batch
from dsvl.decoder import decoder_for, sum_apart
from dsvl.gated import Gated, blocks
from dsvl.head import Head
from dsvl.lora import adapt
from dsvl.projection import PROJECTIONS
from dsvl.quantization import how_to_load, keep_trainable
from dsvl.vision import VisionTower, check_shape, check_whole

Embedded = tuple[torch.Tensor, torch.Tensor]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class VisualChat(nn.Module):
    """Frozen tower + trained projection + frozen decoder, its input embedding trained (section 3).

    Tower and decoder may have adapters, which are trained too.
    """

    def __init__(self, config: ModelConfig, *, precision: str, seed: int) -> None:
        """Load the frozen parts, and draw the new ones from the seed.

        Raises:
            ValueError: where a checkpoint lacks weights, has another shape than the configured one, or is no
                decoder of a kind that can be run.
        """
        super().__init__()
        self.config = config
        dtype = DTYPES[precision]
        # With blocks of cross-attention the decoder itself reads text alone.
        scheme = "causal" if config.cross_blocks else config.attention
        self.vision = VisionTower(config.vision, dtype=dtype)
        section, named = f"model.languages.{config.size}", config.language.checkpoint
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            named,
            dtype=dtype,
            attn_implementation=scheme,
            quantization_config=how_to_load(config.quantization, dtype=dtype),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, as missing ones are
        )
        self.language, found = loaded
        rule = "its config.json says; copy or download the checkpoint again"
        check_whole(found, named, section=section, rule=rule)
        require(
            hasattr(self.language, "model") and hasattr(self.language, "lm_head"),
            f"{section}.checkpoint",
            named,
            f"is a {type(self.language).__name__}, which has no `model` and `lm_head` as LLaMA has; name a "
            "decoder in the style of LLaMA: LLaMA, Mistral or Qwen2",
        )
        keep_trainable(self.language)
        check_shape(config.language, self.language.config, section=section)
        self._untie()
        self.language.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = PROJECTIONS[config.projection](
                config.vision.width,
                config.language.hidden_size,
                layers=config.projection_layers,
                queries=config.projection_queries,
            ).to(dtype)
            self.cross = blocks(config).to(dtype)
            adapt(self.language.model, config.language_lora, dtype=dtype)
            adapt(self.vision.encoder, config.vision_lora, dtype=dtype)
        self.head = Head(self.language.lm_head)
        stock = self.language.model
        sum_apart(stock)
        self.decoder = (
            Gated(stock, self.cross, every=config.cross_every, image_tokens=config.image_tokens)
            if config.cross_blocks
            else decoder_for(stock, scheme=scheme)
        )
        self.recompute = False
        """Whether the backward pass computes the layers anew instead of keeping what they gave."""
        self.embedding.weight.requires_grad_(config.train_embedding)
        self.train()  # parts that are loaded begin in evaluation, where some compute otherwise

    @property
    def embedding(self) -> nn.Embedding:
        """The one table that prompts and generated tokens are looked up in."""
        table = self.language.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        return table

    def _untie(self) -> None:
        """Give the frozen head its own weights where it shares those of the embedding, which is trained."""
        head = self.language.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        if head.weight is self.embedding.weight:
            head.weight = nn.Parameter(head.weight.detach().clone())
            self.language.config.tie_word_embeddings = False

    def trainable(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def embed(self, batch: Batch, *, fresh: Sequence[int] | None = None) -> Embedded:
        """Embed the text tokens of a batch, and project its images in the order of their positions.

        Args:
            batch: images as pixels, or as features that the tower made of them earlier.
            fresh: while generating, which of the images are to be encoded, as a store may know the others.
                Where there are none, neither tower nor projection is run.

        Returns:
            (M, D) text and (F, D) images.

        Raises:
            ValueError: if images and image positions differ in number; if features have another shape than
                the tower's, or the tower is trained, for they are soon those of another one.
        """
        layout, pixels = batch.layout, batch.pixels
        if fresh is not None:
            pixels = pixels[list(fresh)]
        tokens = self.config.image_tokens
        if len(pixels) * tokens != len(layout.images):
            raise ValueError(
                f"{len(pixels)} images of {tokens} tokens each, but {len(layout.images)} image positions"
            )
        text = self.embedding(batch.ids.flatten()[layout.text])
        if fresh is not None and not len(pixels):
            return text, text[:0]
        # Without an image the path to the projection still runs, at zero weight: every rank takes part in
        # every collective, and a text-only batch is ordinary. (All ranks generate the same.)
        # The same path on all ranks: through the tower, or not where features come ready-made.
        vision = self.config.vision
        size, shape = vision.image_size, (vision.tokens, vision.width)
        blank = (3, size, size) if pixels.ndim == 4 else shape
        seen = pixels if len(pixels) else pixels.new_zeros(1, *blank)
        if seen.ndim == 4:
            features = self.vision(seen, recompute=self.recompute)
        else:
            rank = self.config.vision_lora.rank
            require(
                rank == 0,
                "model.vision_lora.rank",
                rank,
                "trains the tower: pass images on as pixels",
            )
            require(
                seen.shape[1:] == shape,
                "features: shape",
                tuple(seen.shape),
                f"must be (images, {shape[0]}, {shape[1]}), as the tower of model.vision makes them; "
                "prepare the data with this tower",
            )
            features = seen.to(text.dtype)
        images = self.projection(features).flatten(0, 1).to(text.dtype)
        if not len(pixels):
            return text + 0.0 * images.mean(), images[:0]  # a sum may overflow in fp16
        return text, images

    def states(self, batch: Batch) -> torch.Tensor:
        """(n, D) final states of the wanted positions, in the order of the layout."""
        return self.decoder(*self.embed(batch), batch.layout, recompute=self.recompute)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The summed cross-entropy, in nats, over the supervised tokens of a batch; a scalar.

        A sum and not a mean: the caller divides by the supervised tokens of the *global* batch.
        """
        return self.head(self.states(batch), labels(batch))[0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(n, D) final states -> (n, V) float32 scores of the next token, over the vocabulary of V."""
        # By the forward of the stock head: ZeRO 3 has the weights of a module at hand in its forward alone.
        return self.language.lm_head(states).float()


def labels(batch: Batch) -> torch.Tensor:
    """(n,) what each wanted position of a batch has to predict: the token after it."""
    return batch.labels.flatten()[batch.layout.wanted_positions + 1]
