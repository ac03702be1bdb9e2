"""Pretrain the small models of the quickstart: `python -m dsvl.digits.ladder [--folder FOLDER]`.

One byte-level BPE tokenizer, three LLaMA-architecture decoders that stand in for 7B, 13B and 70B,
and one CLIP vision tower. The decoders read chats told in words, under plain causal attention, as
any language model is pretrained; they never see an image. The tower learns to read digits and
nothing of language. Held-out digits are kept from both. Everything follows from `SEED`.
"""

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from dsvl.data.types import IGNORED
from dsvl.digits import chats
from dsvl.template import Piece, render

logger = logging.getLogger(__name__)

SEED = 0
CHATS = 30_000
"""Chats told in words that the decoders are pretrained on; none is one of the quickstart's."""
VOCABULARY = 512
BOS, EOS, PAD = 0, 1, 2
MEAN, STD = 0.3, 0.35  # of the grey values, from 0 to 1
WIDTH = 48  # of the vision tower

Sample = tuple[list[int], list[int]]
"""Token ids and labels; `IGNORED` where nothing is learned."""


@dataclass(frozen=True)
class Size:
    """A decoder of the ladder, and how it is pretrained."""

    width: int
    heads: int
    key_value_heads: int
    steps: int


SIZES = {
    "small": Size(width=48, heads=3, key_value_heads=3, steps=2400),
    "medium": Size(width=64, heads=4, key_value_heads=4, steps=2400),
    "large": Size(width=96, heads=6, key_value_heads=3, steps=2600),
}
ACCURACY = 0.95
"""What every model must reach on held-out digits or chats."""


def told(chat: list[chats.Round]) -> Iterator[Piece]:
    """The pieces of a chat with words in place of its images."""
    words = chats.in_words(chat)
    for piece in render(chats.turns(chat)):
        yield Piece("text", text=words[piece.image]) if piece.type == "image" else piece


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the text of 2,000 chats; a line feed is always a token of its own.

    So a chat has the same tokens whether its pieces are tokenised one by one or together.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = (40, 15, 15, 30)
    corpus = [chats.draw("train", number, SEED + 1, kinds=kinds) for number in range(2000)]
    tokenizer.train_from_iterator(
        (piece.text for chat in corpus for piece in told(chat)),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, chat: list[chats.Round]) -> Sample:
    """A chat told in words; only its answers and their ends are learned."""
    ids, labels = [BOS], [IGNORED]
    for piece in told(chat):
        part = [EOS] if piece.type == "end" else _ids(tokenizer, piece.text)
        ids += part
        labels += part if piece.supervise else [IGNORED] * len(part)
    return ids, labels


def make_language(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaForCausalLM:
    """A decoder, pretrained on chats with more rounds than the quickstart's: denser in answers."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=size.width,
            intermediate_size=2 * size.width,
            num_hidden_layers=2,
            num_attention_heads=size.heads,
            num_key_value_heads=size.key_value_heads,
            max_position_embeddings=512,
            initializer_range=0.1,  # the usual 0.02 leaves attention flat for long
            tie_word_embeddings=False,
            bos_token_id=BOS,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )
    # A fresh projection makes features of about 1: rows of 0.02 would drown beside them.
    nn.init.normal_(model.model.embed_tokens.weight, std=0.3)
    samples = [
        encode(tokenizer, chats.draw("train", n, SEED + 1, rounds=(3, 6), kinds=(30, 10, 40, 30)))
        for n in range(CHATS)
    ]
    batches = _batches(samples, size=32)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = set(matrices)
    optimizers = [
        torch.optim.Muon(matrices, lr=5e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [p for p in model.parameters() if p not in inside],
            lr=1e-2,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        ),
    ]
    _train(model, lambda: cross_entropy(*_predict(model, *next(batches))), optimizers, size.steps)
    return model.eval()


@torch.no_grad()
def exact_answers(model: LlamaForCausalLM, samples: list[Sample]) -> float:
    """Share of answers whose every token, the end included, is the likeliest (teacher-forced)."""
    exact = []
    for sample in samples:
        logits, targets = _predict(model, *_collate([sample]))
        ends = ((targets == EOS).nonzero() + 1).flatten().tolist()
        right = (logits.argmax(-1) == targets).tensor_split(ends[:-1])
        exact += [bool(answer.all()) for answer in right]
    return sum(exact) / len(exact)


def make_vision() -> tuple[CLIPVisionModel, float]:
    """A tower whose every patch tells the digit, and its accuracy on held-out digits.

    A throw-away linear head reads each patch token; their mean is the answer.
    """
    torch.manual_seed(SEED)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
            projection_dim=WIDTH,
        )
    )
    head = nn.Linear(WIDTH, 10)
    pixels, digits = pixels_of_digits(), torch.tensor(chats.labels())
    kept = torch.tensor([chats.held_out(index) for index in range(len(digits))])

    def read(images: torch.Tensor) -> torch.Tensor:
        return head(model(pixel_values=images).last_hidden_state[:, 1:])  # without the class token

    def loss() -> torch.Tensor:
        chosen = torch.randint(len(digits) - int(kept.sum()), (128,))
        images, answers = pixels[~kept][chosen], digits[~kept][chosen]
        if torch.rand(()) < 0.5:  # by at most a pixel
            images = images.roll(torch.randint(-1, 2, (2,)).tolist(), (2, 3))
        logits = read(images + 0.15 * torch.randn_like(images))
        each = cross_entropy(logits.flatten(0, 1), answers.repeat_interleave(logits.shape[1]))
        return each + cross_entropy(logits.mean(1), answers, label_smoothing=0.05)

    both = nn.ModuleList([model, head])
    _train(both, loss, [torch.optim.AdamW(both.parameters(), lr=3e-3)], steps=1500)
    with torch.no_grad():
        right = read(pixels[kept]).mean(1).argmax(-1) == digits[kept]
    return model.eval(), right.float().mean().item()


def pixels_of_digits() -> torch.Tensor:
    """(1797, 3, 8, 8) float32: the images as the tower's preprocessing makes them of their PNGs."""
    grey = torch.tensor(load_digits().images, dtype=torch.float32) * 15 / 255  # pyright: ignore
    return ((grey - MEAN) / STD)[:, None].repeat(1, 3, 1, 1)


def make(folder: Path) -> None:
    """Pretrain everything and save it under `folder`: small/ medium/ large/ vision/.

    Raises:
        RuntimeError: if a model stays under `ACCURACY`.
    """
    vision, accuracy = make_vision()
    _accept("vision", accuracy, "held-out digits")
    vision.save_pretrained(folder / "vision")
    CLIPImageProcessor(
        size={"shortest_edge": 8},
        crop_size={"height": 8, "width": 8},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    ).save_pretrained(folder / "vision")
    tokenizer = make_tokenizer()
    held_out = [encode(tokenizer, chats.draw("eval", number)) for number in range(300)]
    for name, size in SIZES.items():
        language = make_language(tokenizer, size)
        _accept(name, exact_answers(language, held_out), "answers of held-out chats in words")
        language.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _accept(name: str, accuracy: float, of: str) -> None:
    logger.info("%s: %.1f %% of the %s", name, 100 * accuracy, of)
    if accuracy < ACCURACY:
        raise RuntimeError(
            f"{name} gets {accuracy:.3f} of the {of}; it must get {ACCURACY}: pretrain it longer"
        )


@cache
def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _batches(samples: list[Sample], size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded batches without end, samples of like length together."""
    generator = torch.Generator().manual_seed(SEED)
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        order.sort(key=lambda index: len(samples[index][0]))  # stable: ties stay shuffled
        starts = range(0, len(order) - size + 1, size)
        for chosen in torch.randperm(len(starts), generator=generator).tolist():
            yield _collate([samples[i] for i in order[starts[chosen] : starts[chosen] + size]])


def _collate(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S) ids and labels, padded on the right, where causal attention never looks."""
    ids, labels = zip(*samples, strict=True)
    pad = nn.utils.rnn.pad_sequence
    return (
        pad([torch.tensor(row) for row in ids], True, PAD),
        pad([torch.tensor(row) for row in labels], True, IGNORED),
    )


def _predict(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, V) logits where the next token is learned, and those tokens (n)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    learned = labels[:, 1:] != IGNORED
    return model.lm_head(hidden[:, :-1][learned]), labels[:, 1:][learned]


def _train(
    model: nn.Module,
    loss_of_batch: Callable[[], torch.Tensor],
    optimizers: list[torch.optim.Optimizer],
    steps: int,
) -> None:
    """Each optimiser under a warm-up of a twentieth and a cosine; gradients clipped at 1."""
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min(
                (step + 1) / (0.05 * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps)
            ),
        )
        for optimizer in optimizers
    ]
    started, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        model.zero_grad()
        loss = loss_of_batch()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            mean, elapsed = sum(losses[-100:]) / 100, time.monotonic() - started
            logger.info("step %d of %d: loss %.3f, %.0f s", step, steps, mean, elapsed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "checkpoints")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make(parser.parse_args().folder)
