"""Verdicts on a training, from the journal that it has left."""

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestration.records import record
from orchestration.records.journal import Journal, write_json
from orchestration.searching.diagnosis import diagnose

EPOCHS, UPDATES = 4, 50
HEALTHY = {"accuracy": 0.9, "accuracy_blind": 0.25, "accuracy_shuffled": 0.26}
Told = Callable[..., dict[str, bool]]


@pytest.fixture
def told(tmp_path: Path) -> Told:
    """What holds of a training: its norms, held-out losses and answers may be other than healthy ones."""

    def make(
        *,
        held_out=(1.0, 0.8, 0.7, 0.65),
        norm=lambda step: 1 + 8 / step,
        precision="bf16",
        schedule="cosine",
        plateau=lambda step: 1 / step,
        best=0.6,
        end=("finished", ""),
        **answers: float,
    ) -> dict[str, bool]:
        folder = tmp_path / "run"
        folder.mkdir()
        fields = {"train.precision": precision, "optim.schedule": schedule, "model.size": "small"}
        write_json(folder / "experiment.json", {"fields": fields})
        journal, luck = Journal(folder), random.Random(0)
        for step in range(1, EPOCHS * UPDATES + 1):
            metrics = {
                "train/loss": plateau(step) + 0.01 * luck.random(),
                "train/lr": 0.01,
                "train/grad_norm": norm(step) * luck.uniform(0.8, 1.2),
                "train/update_ratio/embedding": 0.01,
            }
            if step % UPDATES == 0:
                epoch = step // UPDATES
                seen = HEALTHY | {"accuracy_majority": 0.24} | answers
                metrics |= {"eval/loss": held_out[epoch - 1], "train/epoch": epoch}
                metrics |= {f"eval/{name}": value for name, value in seen.items()}
            journal.metrics(step, metrics)
        journal.end(*end)
        verdicts = diagnose(record.read(folder, name="run"), best)
        assert all(any(c.isdigit() for c in one.evidence) and one.experiment for one in verdicts)
        return {one.name: one.holds for one in verdicts}

    return make


def test_nothing_is_wrong_with_a_training_whose_norms_shrink_and_losses_fall(told):
    names = ("diverged", "rate too high", "precision at fault", "overfit", "blind to images")
    assert told() == dict.fromkeys(names, False)


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({"held_out": (0.7, 0.6, 0.65, 0.7)}, {"overfit"}),
        ({"held_out": (1.0, 0.9, 0.8, 3.0)}, {"diverged", "overfit"}),
        ({"end": ("failed", "FloatingPointError: update 9 diverged")}, {"diverged"}),
        ({"norm": lambda step: 50.0 if step % 20 == 0 else 1.0}, {"rate too high"}),
        ({"precision": "fp16", "norm": lambda s: math.inf if s % 10 == 0 else 1.0}, {"precision at fault"}),
        ({"accuracy_blind": 0.9}, {"blind to images"}),
        ({"accuracy_shuffled": 0.89}, {"blind to images"}),
        ({"schedule": "constant", "plateau": lambda step: 2 - step / 400}, {"still falling"}),
        ({"schedule": "constant", "plateau": lambda step: 2.0}, set()),
    ],
)  # fmt: skip
def test_each_fault_is_told_from_the_others(told, changed, holds):
    assert {name for name, held in told(**changed).items() if held} == holds


def test_a_training_that_is_worse_than_others_after_as_long_is_not_held_to_their_ends(told):
    assert not told(held_out=(2.0, 1.5, 1.2, 1.1))["diverged"]


def test_of_a_run_that_has_only_begun_nothing_is_said(tmp_path):
    assert diagnose(record.read(tmp_path, name="run"), math.inf) == []
