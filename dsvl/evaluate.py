"""Loss and exact-answer accuracy over held-out samples, with images and without."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy

from dsvl.data.store import Prepared
from dsvl.data.types import IGNORED, Batch
from dsvl.model import VisualChat, next_labels
from dsvl.template import text
from dsvl.train import batch_of, to_device


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
        }


@torch.no_grad()
def evaluate(
    model: VisualChat, prepared: Prepared, *, batch: int, samples: int | None, device: torch.device
) -> Tally:
    """Tally the first `samples` held-out samples, shared among the ranks; a collective.

    A round counts as right if every token of its answer, its end included, is the most likely one after the
    true tokens before it. That is what greedy decoding after the true history writes, in one pass a sample.
    """
    model.eval()
    rank, workers = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    chosen = range(min(samples or len(prepared.eval), len(prepared.eval)))
    tally = Tally()
    for first in range(0, len(chosen), batch * workers):
        mine = chosen[first : first + batch * workers][rank::workers]
        # A rank without a sample passes one uncounted, so that every rank takes part in every collective.
        examples = [prepared.eval[i] for i in mine or chosen[:1]]
        part = score(model, to_device(batch_of(prepared, examples), device))
        tally += part if mine else Tally()
    model.train()
    if workers == 1:
        return tally
    sums = torch.tensor(
        [float(getattr(tally, n)) for n in Tally.__slots__], dtype=torch.float64, device=device
    )
    dist.all_reduce(sums)
    loss, *counts = sums.tolist()
    return Tally(loss, *(round(count) for count in counts))


@torch.no_grad()
def score(model: VisualChat, batch: Batch) -> Tally:
    """The tally of one batch."""
    labels_BS = next_labels(batch.labels)
    supervised_BS = labels_BS != IGNORED
    starts_BS = supervised_BS & ~torch.nn.functional.pad(supervised_BS[:, :-1], (1, 0))
    round_n = starts_BS.flatten().cumsum(0)[supervised_BS.flatten()] - 1
    targets_n = labels_BS[supervised_BS]
    rounds = int(starts_BS.sum())

    def right(logits_nV: torch.Tensor) -> int:
        missed = torch.zeros(rounds, device=logits_nV.device)
        missed.index_add_(0, round_n, (logits_nV.argmax(-1) != targets_n).float())
        return int((missed == 0).sum())

    logits_nV = model.logits(batch, supervised_BS)
    blind = replace(batch, pixels=torch.zeros_like(batch.pixels))
    return Tally(
        loss=float(cross_entropy(logits_nV, targets_n, reduction="sum")),
        targets=len(targets_n),
        right=right(logits_nV),
        right_blind=right(model.logits(blind, supervised_BS)),
        rounds=rounds,
    )


def majority_accuracy(prepared: Prepared, *, samples: int | None = None) -> float:
    """Exact accuracy of giving each question its most frequent training answer.

    Measured on the rounds of the first `samples` held-out conversations. A question never seen in
    training is given the most frequent answer of all.
    """
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in rounds(prepared, "train"):
        by_question[question][answer] += 1
    overall = sum(by_question.values(), Counter())
    held_out = list(rounds(prepared, "eval", samples))
    right = sum(
        by_question.get(question, overall).most_common(1)[0][0] == answer
        for question, answer in held_out
    )
    return right / len(held_out)


def rounds(prepared: Prepared, split: str, samples: int | None = None) -> Iterator[tuple[str, str]]:
    """(question, answer) of every round of the first `samples` of a split, as texts."""
    for _, _, turns in prepared.conversations(split, samples):
        for turn, following in pairwise(turns):
            if following.role == "assistant":
                yield text(turn.content), text(following.content)
