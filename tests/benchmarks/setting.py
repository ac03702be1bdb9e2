"""Shapes, samples and models that the benchmarks run on, made on the fly from a fixed seed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dsvl.config import LanguageConfig, ModelConfig, VisionConfig
from dsvl.data.collate import collate
from dsvl.data.types import IGNORED, Batch, Example, Kind
from dsvl.model import DTYPES, VisualChat

ANSWERS = 0.3
"""Share of a sample's text that is trained; with as many image tokens as text, 15 % of all positions."""
PATCH = 14


@dataclass(frozen=True)
class Size:
    """The shape of the models, and how much text and how many images pass through them."""

    hidden: int
    heads: int
    mlp: int
    vocabulary: int
    layers: int
    """Of the whole model."""
    image_tokens: int
    vision_hidden: int
    vision_layers: int
    few: tuple[int, int]
    """Images and text tokens of the smaller sample."""
    many: tuple[int, int]
    turn: int
    """Words of a question in a chat, and of an answer."""

    @property
    def language(self) -> dict[str, Any]:
        """The decoder's shape under the names of its configuration."""
        return {
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
        }

    @property
    def vision(self) -> dict[str, Any]:
        """The same of the tower."""
        return {
            "image_size": PATCH * round(self.image_tokens**0.5),
            "patch_size": PATCH,
            "hidden_size": self.vision_hidden,
            "intermediate_size": 4 * self.vision_hidden,
            "num_hidden_layers": self.vision_layers,
        }


SIZES = {
    "100m": Size(1024, 16, 2752, 32_000, 4, 256, 384, 12, (3, 768), (8, 2048), 64),
    "7b": Size(4096, 32, 11_008, 32_000, 8, 256, 1024, 24, (3, 768), (8, 2048), 64),
    "tiny": Size(32, 4, 48, 120, 2, 4, 16, 2, (2, 30), (3, 50), 5),
}
"""100m: a small LLaMA. 7b: layers of LLaMA-2-7B, but eight of its 32. tiny: for tests."""


@dataclass(frozen=True)
class Setting:
    """At which size and where."""

    size: Size
    device: torch.device
    precision: str
    """As in `dsvl.config.TrainConfig`."""
    folder: Path
    """For checkpoints made on the fly."""

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and tokens."""
        return DTYPES[self.precision]

    def draw(self, *shape: int) -> torch.Tensor:
        """Random numbers whose gradient is wanted."""
        return torch.randn(shape, device=self.device, dtype=self.dtype).requires_grad_()


def pixels(setting: Setting, key: str) -> np.ndarray:
    """An image as the tower wants it, noise that depends on its key."""
    side = setting.size.vision["image_size"]
    return np.random.default_rng(int(key)).normal(size=(3, side, side)).astype(np.float32)


def sample(setting: Setting, images: int, texts: int) -> Batch:
    """A batch of one sample: text before, between and after images, each stretch ending with an answer."""
    random = np.random.default_rng(0)
    ids, kinds, labels = [], [], []
    for number, stretch in enumerate(np.array_split(np.arange(texts), images + 1)):
        if number:
            ids.append(np.zeros(setting.size.image_tokens, np.int32))
            kinds.append(np.full(setting.size.image_tokens, Kind.IMAGE, np.int8))
            labels.append(np.full(setting.size.image_tokens, IGNORED, np.int32))
        words = random.integers(setting.size.vocabulary, size=len(stretch)).astype(np.int32)
        answer = np.arange(len(words)) >= round(len(words) * (1 - ANSWERS))
        ids.append(words)
        kinds.append(np.full(len(words), Kind.TEXT, np.int8))
        labels.append(np.where(answer, words, IGNORED))
    columns = (np.concatenate(column) for column in (ids, labels, kinds))
    example = Example("sample", *columns, tuple(map(str, range(images))))
    batch = collate(
        [example],
        pixels=lambda key: pixels(setting, key),
        image_tokens=setting.size.image_tokens,
        pad_id=0,
    )
    return batch.to(setting.device)


def stock_decoder(setting: Setting, **shape: int) -> LlamaForCausalLM:
    """A frozen LLaMA with random weights."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        decoder = LlamaForCausalLM(LlamaConfig(**setting.size.language | shape))
    return decoder.to(setting.dtype).requires_grad_(False)


def visual_chat(setting: Setting) -> VisualChat:
    """The whole model, from checkpoints with random weights."""
    size, folder = setting.size, setting.folder
    if not (folder / "language").exists():
        stock_decoder(setting).save_pretrained(folder / "language")
        vision = CLIPVisionConfig(
            **size.vision, num_attention_heads=max(1, size.vision_hidden // 64)
        )
        CLIPVisionModel(vision).save_pretrained(folder / "vision")
    config = ModelConfig(
        size="random",
        languages={"random": LanguageConfig(checkpoint=str(folder / "language"), **size.language)},
        vision=VisionConfig(checkpoint=str(folder / "vision"), **size.vision),
    )
    return VisualChat(config, precision=setting.precision, seed=0).to(setting.device)


def words(setting: Setting) -> PreTrainedTokenizerFast:
    """A tokenizer to which every id of the vocabulary is a word, and all of the template unknown ones."""
    names: dict[str, Any] = {f"w{number}": number for number in range(setting.size.vocabulary)}
    names |= {"</s>": names.pop("w0"), "<unk>": names.pop("w1")}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")
