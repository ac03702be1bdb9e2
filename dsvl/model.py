"""VisualChat: embed the text, put the images in their places, run the decoder, score the answers."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from dsvl import attention as _attention  # noqa: F401  (registers the schemes with transformers)
from dsvl.config import ModelConfig
from dsvl.data.types import IGNORED, Batch
from dsvl.projection import PROJECTIONS
from dsvl.vision import VisionTower, check_shape

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class VisualChat(nn.Module):
    """Frozen tower + trained projection + frozen decoder, its input embedding trained (section 3)."""

    def __init__(self, config: ModelConfig, *, precision: str, seed: int) -> None:
        """Load the frozen parts and draw the projection from the seed.

        Raises:
            ValueError: where a checkpoint's shape is not the configured one.
        """
        super().__init__()
        self.config = config
        dtype = DTYPES[precision]
        self.vision = VisionTower(config.vision, dtype=dtype)
        self.language = AutoModelForCausalLM.from_pretrained(
            config.language.checkpoint, dtype=dtype, attn_implementation=config.attention
        )
        check_shape(config.language, self.language.config, section=f"model.languages.{config.size}")
        self._untie()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projection = PROJECTIONS[config.projection](
                config.vision.width,
                config.language.hidden_size,
                layers=config.projection_layers,
                queries=config.projection_queries,
            ).to(dtype)
        self.language.requires_grad_(False)
        self.embedding.weight.requires_grad_(config.train_embedding)

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

    def embed(
        self, ids: torch.Tensor, pixels: torch.Tensor, image_positions: torch.Tensor
    ) -> torch.Tensor:
        """(B, S) ids and (I, 3, P, P) pixels -> (B, S, D), the k-th image in the k-th run of image positions.

        Raises:
            ValueError: if images and image positions differ in number.
        """
        tokens = self.config.image_tokens
        if len(pixels) * tokens != len(image_positions):
            raise ValueError(
                f"{len(pixels)} images of {tokens} tokens each, but {len(image_positions)} image positions"
            )
        embedded_BSD = self.embedding(ids)
        # Without an image the path to the projection still runs, at zero weight: every rank takes part in
        # every collective, and a text-only batch is ordinary.
        size = self.config.vision.image_size
        seen = pixels if len(pixels) else pixels.new_zeros(1, 3, size, size)
        features_FD = self.projection(self.vision(seen)).flatten(0, 1).to(embedded_BSD.dtype)
        if not len(pixels):
            return embedded_BSD + 0.0 * features_FD.mean()  # a sum may overflow in fp16
        return (
            embedded_BSD.flatten(0, 1)
            .index_copy(0, image_positions, features_FD)
            .view_as(embedded_BSD)
        )

    def logits(self, batch: Batch, supervised_BS: torch.Tensor) -> torch.Tensor:
        """(B, S) bool -> (n, V) float32 logits at the marked positions, row by row."""
        hidden_BSD = self.language.model(
            inputs_embeds=self.embed(batch.ids, batch.pixels, batch.image_positions),
            kinds=batch.kinds,
            use_cache=False,
        ).last_hidden_state
        return self.language.lm_head(hidden_BSD[supervised_BS]).float()

    def forward(self, batch: Batch) -> torch.Tensor:
        """The summed cross-entropy, in nats, over the supervised tokens of a batch; a scalar.

        A sum and not a mean: the caller divides by the supervised tokens of the *global* batch.
        """
        labels_BS = next_labels(batch.labels)
        supervised_BS = labels_BS != IGNORED
        return cross_entropy(
            self.logits(batch, supervised_BS), labels_BS[supervised_BS], reduction="sum"
        )


def next_labels(labels: torch.Tensor) -> torch.Tensor:
    """(B, S) labels moved one place to the left: what each position has to predict."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
