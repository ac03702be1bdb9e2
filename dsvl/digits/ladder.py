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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
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
VOCABULARY = 512
BATCH = 64
MEAN, STD = 0.3, 0.35  # of the grey values, 15 x 0..16 over 255


@dataclass(frozen=True)
class Size:
    """A language model of the ladder and how long it is pretrained."""

    width: int
    layers: int
    key_value_heads: int
    steps: int
    lr: float


SIZES = {
    "small": Size(width=48, layers=2, key_value_heads=3, steps=1500, lr=6e-3),
    "medium": Size(width=80, layers=2, key_value_heads=5, steps=1500, lr=4e-3),
    "large": Size(width=128, layers=3, key_value_heads=4, steps=1200, lr=3e-3),
}


def told(chat: list[chats.Round]) -> Iterator[Piece]:
    """The pieces of a chat with words in place of its images."""
    words = chats.in_words(chat)
    for piece in render(chats.turns(chat)):
        yield Piece("text", text=words[piece.image]) if piece.type == "image" else piece


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the text of 2,000 chats; a line feed is always a token of its own.

    So a chat has the same tokens whether its pieces are tokenized one by one or together.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    corpus = [
        "".join(piece.text for piece in told(chats.draw("train", number, SEED + 1)))
        for number in range(2000)
    ]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=VOCABULARY,
        clean_up_tokenization_spaces=False,
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, chat: list[chats.Round]
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a chat told in words; only its answers and their ends have labels."""
    ids, labels = [tokenizer.bos_token_id], [IGNORED]
    for piece in told(chat):
        part = [tokenizer.eos_token_id] if piece.type == "end" else _ids(tokenizer, piece.text)
        ids += part
        labels += part if piece.supervise else [IGNORED] * len(part)
    return ids, labels


@cache
def _ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def batches(samples: list, generator: torch.Generator, size: int = BATCH) -> Iterator[tuple]:
    """Endless padded batches (ids, labels), samples of like length together."""
    while True:
        order = torch.randperm(len(samples), generator=generator).tolist()
        order.sort(key=lambda index: len(samples[index][0]))  # stable: ties stay shuffled
        starts = range(0, len(order) - size + 1, size)
        for chosen in torch.randperm(len(starts), generator=generator).tolist():
            yield collate([samples[i] for i in order[starts[chosen] : starts[chosen] + size]])


def collate(samples: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels; padding never matters, as it is causal and has no labels."""
    pad = nn.utils.rnn.pad_sequence
    return (
        pad([torch.tensor(ids) for ids, _ in samples], batch_first=True, padding_value=2),
        pad([torch.tensor(labels) for _, labels in samples], batch_first=True, padding_value=-100),
    )


def make_language(size: Size) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=size.width,
            intermediate_size=2 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.width // 16,
            num_key_value_heads=size.key_value_heads,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def predict(model, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at the positions before a learned token, and those tokens."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    learned = labels[:, 1:] != -100
    return model.lm_head(hidden[:, :-1][learned]), labels[:, 1:][learned]


def train(parameters, loss_of, steps: int, lr: float) -> None:
    """AdamW under a cosine with a tenth of warm-up; `loss_of(step)` gives the loss."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / (0.1 * steps), 0.5 * (1 + math.cos(math.pi * step / steps)) + 1e-3
        ),
    )
    for step in range(steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            logger.info("step %d loss %.3f", step + 1, loss.item())


@torch.no_grad()
def exact_answers(model, samples: list) -> float:
    """Share of answers whose every token, the end included, is the most likely one (teacher-forced)."""
    right = []
    for ids, labels in samples:
        ids, labels = torch.tensor([ids]), torch.tensor([labels])
        logits, targets = predict(model, ids, labels)
        good = (logits.argmax(-1) == targets).tolist()
        ends = (targets == 1).tolist()
        answer = True
        for token, end in zip(good, ends, strict=True):
            answer = answer and token
            if end:
                right.append(answer)
                answer = True
    return sum(right) / len(right)


def pretrain_language(size: Size, samples: list) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    model = make_language(size)
    stream = batches(samples, torch.Generator().manual_seed(SEED))

    def loss_of(step: int) -> torch.Tensor:
        return functional.cross_entropy(*predict(model, *next(stream)))

    train(model.parameters(), loss_of, size.steps, size.lr)
    return model.eval()


def pixels_of(images) -> torch.Tensor:
    grey = torch.tensor(images, dtype=torch.float32) * 15 / 255
    return ((grey - MEAN) / STD)[:, None].repeat(1, 3, 1, 1)


def pretrain_vision(steps: int = 1500, lr: float = 3e-3) -> tuple[CLIPVisionModel, float]:
    """A tower whose every patch token tells the digit, and its accuracy on held-out digits."""
    from sklearn.datasets import load_digits

    torch.manual_seed(SEED)
    digits = load_digits()
    inside = torch.tensor([not chats.held_out(index) for index in range(len(digits.target))])
    pixels, labels = pixels_of(digits.images), torch.tensor(digits.target)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=8,
            patch_size=4,
            projection_dim=48,
        )
    )
    head = nn.Linear(48, 10)
    x, y = pixels[inside], labels[inside]

    def loss_of(step: int) -> torch.Tensor:
        picked = torch.randint(len(x), (128,))
        images = x[picked] + 0.15 * torch.randn(len(picked), 3, 8, 8)
        shift = torch.randint(-1, 2, (2,)).tolist() if step % 2 else [0, 0]
        images = torch.roll(images, shift, (2, 3))
        tokens = model(pixel_values=images).last_hidden_state[:, 1:]
        logits = head(tokens)
        each = functional.cross_entropy(logits.flatten(0, 1), y[picked].repeat_interleave(4))
        return each + functional.cross_entropy(logits.mean(1), y[picked], label_smoothing=0.05)

    train([*model.parameters(), *head.parameters()], loss_of, steps, lr)
    model.eval()
    with torch.no_grad():
        tokens = model(pixel_values=pixels[~inside]).last_hidden_state[:, 1:]
        right = head(tokens.mean(1)).argmax(-1) == labels[~inside]
        logger.info("each patch alone %s", (head(tokens).argmax(-1) == labels[~inside][:, None]).float().mean(0))
    return model, right.float().mean().item()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    folder = arguments.folder
    torch.set_num_threads(1)
    if not arguments.only or arguments.only == "vision":
        start = time.time()
        vision, accuracy = pretrain_vision()
        logger.info("vision accuracy %.4f %.0f s", accuracy, time.time() - start)
        vision.save_pretrained(folder / "vision")
        CLIPImageProcessor(
            size={"shortest_edge": 8},
            crop_size={"height": 8, "width": 8},
            image_mean=[MEAN] * 3,
            image_std=[STD] * 3,
        ).save_pretrained(folder / "vision")
    tokenizer = make_tokenizer()
    logger.info("%d %s", len(tokenizer), tokenizer.tokenize(
        "".join(t for t, _ in pieces(chats.draw("train", 0)))))
    start = time.time()
    samples = [encode(tokenizer, chats.draw("train", n, SEED + 1)) for n in range(30000)]
    held = [encode(tokenizer, chats.draw("eval", n)) for n in range(300)]
    logger.info("%.0f s, mean length %.1f", time.time() - start, sum(len(i) for i, _ in samples) / len(samples))
    for name, size in SIZES.items():
        if arguments.only not in ("", name):
            continue
        start = time.time()
        language = pretrain_language(size, samples)
        logger.info("%s %d parameters accuracy %.4f %.0f s", name, language.num_parameters(),
                    exact_answers(language, held), time.time() - start)
        language.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
