"""Operations are those that torch counts in the forward and backward pass of a real model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dsvl.data.types import IGNORED
from dsvl.model import VisualChat
from orchestration.compose import load
from orchestration.plan import plan
from orchestration.planning.flops import Lengths, flop_utilisation, fullest, step_flops
from tests.benchmarks import planning


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.attention": "causal"},
        {"model.attention": "gated_cross", "model.cross_every": 1},
        {"model.projection": "mlp"},
        {"model.language_lora.rank": 8},
        {"model.vision_lora.rank": 8},
        {"engine.micro_batch": 3, "train.batch": 3},
    ],
    ids=lambda overrides: ",".join(map(str, overrides.values())) or "as it is",
)
def test_products_are_as_many_as_torch_counts(overrides, recompute, tmp_path, monkeypatch):
    monkeypatch.setattr(  # a tensor of another class, which torch cannot make while it counts
        "dsvl.attention.causal_lower_right",
        lambda queries, keys: torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries),
    )
    shape = {"data.max_tokens": 80, "model.languages.made.num_key_value_heads": 1}
    experiment = planning.small(planning.experiment(shape | overrides, tmp_path))
    planning.write_checkpoints(experiment)
    batch = planning.batch(experiment, seed=0)
    model = VisualChat(experiment.model, precision="fp32", seed=0)
    model.recompute = recompute
    with FlopCounterMode(display=False) as counter:
        model(batch).backward()
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for op, count in counted.items() if "attention" not in op)
    answers = int((batch.labels != IGNORED).sum()) // experiment.engine.micro_batch
    lengths = Lengths(text=80 - 16, images=1, answers=answers)
    parts = step_flops(experiment, lengths, recompute=recompute)
    # Of scores and sums, which torch counts for all that are masked too, the tower's are told with it.
    vision = experiment.model.vision
    pairs = vision.num_hidden_layers * vision.hidden_size * (vision.patches + 1) ** 2
    trained = experiment.model.vision_lora.rank > 0
    scores = experiment.train.batch * pairs * (4 + trained * (10 + 4 * recompute))
    planned = sum(parts.values()) - parts["attention"] - scores
    if any("lora" in field for field in overrides):  # told for every token, in the last layer too
        assert products <= planned <= 1.1 * products
    else:
        assert planned == pytest.approx(products, rel=0.04)


def test_scores_are_half_of_all_pairs_among_words_and_those_with_images_before():
    experiment = planning.experiment({"data.max_tokens": 1000})
    hidden, layers = 768, 6

    def pairs(lengths, attention):
        other = experiment.with_overrides({"model.attention": attention})
        scores = step_flops(other, lengths, recompute=False)["attention"]
        return scores / (14 * hidden * layers)

    words = Lengths(text=100, images=0, answers=100)
    assert pairs(words, "mmca") == pairs(words, "causal") == 100 * 101 / 2
    one, three = replace(words, images=1), replace(words, images=3)
    assert pairs(one, "mmca") == 100 * 101 / 2 + 100 * 16
    assert pairs(three, "mmca") == pytest.approx(100 * 101 / 2 + 100 * (16 + 32 + 48) / 3)
    assert pairs(three, "causal") == 148 * 149 / 2


def test_a_full_sample_has_no_room_for_another_image():
    experiment = planning.experiment({"data.max_tokens": 100})
    assert fullest(experiment) == Lengths(text=100 - 6 * 16, images=6, answers=4)
    experiment = planning.experiment({"data.max_tokens": 100, "data.max_images": 2})
    assert fullest(experiment) == Lengths(text=68, images=2, answers=68)


def test_stored_features_spare_the_tower():
    experiment = planning.experiment({})
    stored = experiment.with_overrides({"engine.stored_features": True})
    ran, spared = (
        step_flops(each, fullest(each), recompute=False) for each in (experiment, stored)
    )
    assert ran.pop("tower") > spared.pop("tower") == 0
    assert ran == spared


def test_an_update_as_fast_as_planned_reaches_the_utilisation_that_the_plan_states():
    seven_b = load(Path(__file__).parents[3] / "configs/experiment/visualchat_7b.yaml")
    experiment = seven_b.with_overrides({"engine.gradient_checkpointing": False})
    full, batch = fullest(experiment), experiment.train.batch
    reached = flop_utilisation(
        experiment,
        tokens=experiment.data.max_tokens * batch,
        targets=round(full.answers * batch),
        images=round(full.images * batch),
        seconds=plan(experiment).sizes[0].seconds_per_step or 0,
        workers=experiment.cluster.workers,
    )
    assert reached == pytest.approx(experiment.cluster.utilisation)


@pytest.mark.parametrize(("images", "tower"), [(1, 4.2e12), (8, 33.7e12)])
def test_qwens_tower_takes_four_tflop_an_image(images, tower):
    experiment = load(Path(__file__).parents[3] / "configs/experiment/visualchat_7b.yaml")
    lengths = Lengths(text=2048, images=images, answers=1)
    counted = step_flops(experiment, lengths, recompute=True)["tower"] / experiment.train.batch
    assert counted == pytest.approx(tower, rel=0.01)
