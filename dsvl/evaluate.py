"""Loss and exact-answer accuracy over held-out samples: with their images, none, or others; by round."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from dsvl.config import logit_rows
from dsvl.data.blend import Epoch, Samples
from dsvl.data.store import Prepared
from dsvl.data.types import Batch
from dsvl.model import VisualChat, labels
from dsvl.train import batch_of


@dataclass(frozen=True, slots=True)
class Tally:
    """Sums over held-out samples; tallies of different ranks add up."""

    loss: float = 0.0
    """Cross-entropy in nats, summed over `targets`."""
    targets: int = 0
    right: int = 0
    """Rounds answered exactly."""
    right_blind: int = 0
    """The same with every image zeroed: what can be answered without looking."""
    right_shuffled: int = 0
    """The same with another image in place of each: a zeroed one is like none that a model was trained on."""
    rounds: int = 0

    def __add__(self, other: "Tally") -> "Tally":
        """The sums of both."""
        return Tally(*(getattr(self, n) + getattr(other, n) for n in Tally.__slots__))

    def metrics(self) -> dict[str, float]:
        """Under their names in every journal and tracker."""
        return {
            "eval/loss": self.loss / max(self.targets, 1),
            "eval/accuracy": self.right / max(self.rounds, 1),
            "eval/accuracy_blind": self.right_blind / max(self.rounds, 1),
            "eval/accuracy_shuffled": self.right_shuffled / max(self.rounds, 1),
        }


@torch.no_grad()
def evaluate(
    model: VisualChat,
    prepared: Prepared,
    samples: Samples,
    *,
    batch: int,
    device: torch.device,
    alive: Callable[[], object] = lambda: None,
) -> Tally:
    """Tally held-out samples, shared among the ranks, calling `alive` after every batch; a collective.

    A round counts as right if every token of its answer, its end included, is the most likely one after the
    true tokens before it. That is what greedy decoding after the true history writes, in one pass a sample.
    """
    model.eval()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    tally = Tally()
    another = exchanged(key for i in range(len(samples)) for key in samples[i].images)
    for first in range(0, len(samples), batch * workers):
        mine = range(len(samples))[first : first + batch * workers][rank::workers]
        # A rank without a sample passes one uncounted, so that every rank takes part in every collective.
        examples = [samples[i] for i in mine or (0,)]
        loaded = batch_of(prepared, examples).to(device)
        others = [prepared.vision_input(another[key]) for key in loaded.images]
        pixels = torch.from_numpy(np.stack(others)).to(device) if others else loaded.pixels
        part = score(model, loaded, others=pixels)
        tally += part if mine else Tally()
        alive()
    model.train()
    if workers == 1:
        return tally
    sums = torch.tensor(
        [float(getattr(tally, n)) for n in Tally.__slots__], dtype=torch.float64, device=device
    )
    dist.all_reduce(sums)
    loss, *counts = sums.tolist()
    return Tally(loss, *(round(count) for count in counts))


def exchanged(images: Iterable[str]) -> dict[str, str]:
    """Another of some images, known by their keys, for each of them, however they are batched."""
    keys = sorted(set(images))
    half = len(keys) // 2
    return dict(zip(keys, keys[half:] + keys[:half], strict=True))


@dataclass(frozen=True, slots=True)
class Told:
    """How a model, after the true history, expects the answer of a round."""

    loss: float
    """Cross-entropy in nats, summed over `targets`."""
    targets: int
    right: bool
    """Whether every token of it is the likeliest one."""


@torch.no_grad()
def score_rounds(model: VisualChat, batch: Batch) -> list[list[Told]]:
    """Every round of each row of a batch, of a sample a row."""
    targets_n, states = labels(batch), model.states(batch)
    losses, missed, chunk = [], [], logit_rows(model.config.language.vocab_size)
    for rows in (slice(first, first + chunk) for first in range(0, len(states), chunk)):
        logits_cV = model.logits(states[rows])
        losses.append(cross_entropy(logits_cV, targets_n[rows], reduction="none"))
        missed.append(logits_cV.argmax(-1) != targets_n[rows])
    position_n, order_n = batch.layout.wanted_positions.sort()
    loss_n, wrong_n = torch.cat(losses)[order_n], torch.cat(missed)[order_n]
    # A round is a run of adjacent positions that have a label to predict.
    lengths = torch.diff(
        (position_n.diff() > 1).nonzero().flatten() + 1,
        prepend=position_n.new_zeros(1),
        append=position_n.new_tensor([len(position_n)]),
    ).tolist()
    rounds: list[list[Told]] = [[] for _ in batch.layout.samples]
    for at, loss, wrong in zip(
        position_n.split(lengths), loss_n.split(lengths), wrong_n.split(lengths), strict=True
    ):
        told = Told(float(loss.sum()), len(loss), not wrong.any())
        rounds[int(at[0]) // batch.kinds.shape[1]].append(told)
    return rounds


@torch.no_grad()
def score(model: VisualChat, batch: Batch, *, others: torch.Tensor) -> Tally:
    """The tally of one batch; `others` has what takes the place of its pixels when they are shuffled."""
    # A round is a run of adjacent positions that have a label to predict.
    position_n, order_n = batch.layout.wanted_positions.sort()
    apart_n = torch.ones_like(position_n, dtype=torch.bool)
    apart_n[1:] = position_n.diff() > 1
    round_n = torch.empty_like(position_n)
    round_n[order_n] = apart_n.cumsum(0) - 1
    targets_n, rounds = labels(batch), int(apart_n.sum())

    def right(likeliest_n: torch.Tensor) -> int:
        missed = torch.zeros(rounds, device=likeliest_n.device)
        missed.index_add_(0, round_n, (likeliest_n != targets_n).float())
        return int((missed == 0).sum())

    loss, likeliest_n = model.head(model.states(batch), targets_n)
    size = model.config.vision.image_size
    blind = replace(batch, pixels=batch.pixels.new_zeros(len(batch.images), 3, size, size))
    _, blind_n = model.head(model.states(blind), targets_n)
    _, shuffled_n = model.head(model.states(replace(batch, pixels=others)), targets_n)
    return Tally(
        loss=float(loss),
        targets=len(targets_n),
        right=right(likeliest_n),
        right_blind=right(blind_n),
        right_shuffled=right(shuffled_n),
        rounds=rounds,
    )


def majority_accuracy(train: Epoch, held_out: Epoch) -> float:
    """Exact accuracy of giving each held-out question its most frequent answer in training.

    A question never seen in training is given the most frequent answer of all.
    """
    by_question: dict[bytes, Counter[bytes]] = defaultdict(Counter)
    for question, answer in train.said():
        by_question[question][answer] += 1
    overall = sum(by_question.values(), Counter())
    asked = list(held_out.said())
    right = sum(
        by_question.get(question, overall).most_common(1)[0][0] == answer
        for question, answer in asked
    )
    return right / len(asked)
