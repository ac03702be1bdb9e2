"""Verdicts on runs and sizes."""

import numpy as np
import pytest

from orchestration.searching import verdicts
from orchestration.searching.regret import Gate, surface
from tests.orchestration.ladders import best_rate, fitted, law, trunk

RATES = (1e-6, 1.0)


@pytest.fixture(scope="module")
def known():
    return fitted()


def test_short_trainings_are_undertrained_and_those_past_the_best_horizon_are_not(known):
    on = surface(known, "target", RATES)
    short, enough, past = (verdicts.undertrained(on, horizon) for horizon in (2, 20, 40))
    assert [verdict.holds for verdict in (short, enough, past)] == [True, False, False]
    assert short.score > 0.95
    assert "20 epochs" in short.experiment
    assert enough.score < 0.2
    assert past.score == 0


def test_nothing_is_undertrained_where_epochs_cannot_help():
    still = fitted(true=law(data=np.log(1e-4), overfit=np.log(1e-3)))
    on = surface(still, "target", RATES)
    assert not any(verdicts.undertrained(on, horizon).holds for horizon in (2, 5, 10, 20, 40))


def test_a_rate_too_low_is_no_lack_of_epochs(known):
    """The loss of 20 epochs at a sixteenth of the best rate is above the law, and yet not undertrained."""
    loss = trunk("target", best_rate("target", 20) / 16, (20,)).losses[0]
    above = verdicts.above_the_law(known, "medium", 20, 1.03 * loss)
    assert above.holds
    assert not verdicts.undertrained(surface(known, "medium", RATES), 20).holds


def test_what_the_law_foretells_is_not_above_it(known):
    loss = trunk("medium", best_rate("medium", 20), (20,), noise=0.002, seed=5).losses[0]
    assert not verdicts.above_the_law(known, "medium", 20, loss).holds


def curve(slope: float, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    epochs = np.linspace(0, 10, 500)
    random = np.random.default_rng(seed)
    return 1 + 0.5 * np.exp(-2 * epochs) + slope * epochs + noise * random.standard_normal(
        500
    ), epochs


def test_a_curve_that_falls_is_told_from_one_that_is_flat():
    falls = [verdicts.still_falling(*curve(-0.01, 0.02, seed)).holds for seed in range(10)]
    flat = [verdicts.still_falling(*curve(0.0, 0.02, seed)).holds for seed in range(10)]
    assert sum(falls) >= 9
    assert sum(flat) <= 1


def test_one_spike_is_no_slope():
    losses, epochs = curve(-0.01, 0.005)
    losses[-3] = 30.0
    assert verdicts.still_falling(losses, epochs).holds


def test_a_slope_needs_enough_losses():
    with pytest.raises(ValueError, match="10 at least"):
        verdicts.still_falling([1.0] * 9, list(range(9)))


def test_overfitting_is_held_out_loss_that_rises_while_training_loss_falls():
    rising, flat, falling = [1.2, 1.0, 1.05], [1.2, 1.0, 1.003], [1.2, 1.0, 0.9]
    train, worse = [1.2, 1.0, 0.7], [1.2, 1.0, 1.1]
    assert verdicts.overfit(train, rising, noise=0.002).holds
    assert not verdicts.overfit(train, flat, noise=0.002).holds
    assert not verdicts.overfit(train, falling, noise=0.002).holds
    assert not verdicts.overfit(worse, rising, noise=0.002).holds


def test_skipped_updates_alone_speak_of_precision():
    calm, wild = [1.0] * 100, [1.0] * 90 + [50.0] * 10
    healthy = verdicts.rate_too_high(skipped=0.001, gradient_norms=calm, moved=0.001)
    skipping = verdicts.rate_too_high(skipped=0.1, gradient_norms=calm, moved=0.001)
    spiking = verdicts.rate_too_high(skipped=0.1, gradient_norms=wild, moved=0.001)
    moving = verdicts.rate_too_high(skipped=0.0, gradient_norms=calm, moved=0.2)
    assert [v.holds for v in (healthy, skipping, spiking, moving)] == [False, False, True, True]
    assert "bf16" in skipping.experiment
    assert "rate" in spiking.experiment


def test_precision_is_at_fault_where_calm_updates_overflow_and_float16_is_used():
    calm, wild = [1.0] * 100, [1.0] * 90 + [50.0] * 10
    given = (("fp16", 0.1, calm), ("fp16", 0.01, calm), ("fp16", 0.1, wild), ("bf16", 0.1, calm))
    found = [
        verdicts.precision_at_fault(name, overflowed=share, gradient_norms=norms)
        for name, share, norms in given
    ]
    assert [one.holds for one in found] == [True, False, False, False]
    assert "10.0% of updates overflowed in fp16" in found[0].evidence
    assert "bf16" in found[0].experiment
    assert "the same in fp32" in found[3].experiment, "another than it has"


@pytest.mark.parametrize(
    ("zeroed", "shuffled", "holds"), [(0.3, 0.3, False), (0.79, 0.3, True), (0.3, 0.795, True)]
)
def test_a_model_is_blind_that_does_without_its_images_zeroed_or_exchanged(zeroed, shuffled, holds):
    found = verdicts.blind(0.8, zeroed=zeroed, shuffled=shuffled, majority=0.25)
    assert found.holds == holds
    assert f"{shuffled:.1%} with those of others" in found.evidence


@pytest.mark.parametrize(
    ("losses", "holds"),
    [
        ([3.0, float("nan")], True), ([2.0, 2.5], True), ([2.5], True), ([9.0, 1.5], False),
        ([3.0, 2.5], False),
    ],
)  # fmt: skip
def test_divergence_is_no_loss_or_twice_the_best_unless_it_falls(losses, holds):
    assert verdicts.diverged(losses, best=1.2).holds == holds


def test_an_edge_asks_for_rates_beyond_it():
    inside, low, high = (
        verdicts.at_the_edge([1e-4, 1e-3, 1e-2], best) for best in (9e-4, 1e-4, 2e-2)
    )
    assert [v.holds for v in (inside, low, high)] == [False, True, True]
    assert low.experiment == "5e-05 and 2.5e-05"
    assert high.experiment == "0.02 and 0.04"


def test_a_violated_law_asks_for_the_target_itself():
    assert not verdicts.violated(Gate("7b", 0.2, 0.001)).holds
    found = verdicts.violated(Gate("7b", -0.9, 0.001))
    assert found.holds
    assert "sweep" in found.experiment
    assert verdicts.violated(Gate("7b", 0.0, 0.02)).holds


def test_every_verdict_has_its_numbers_and_its_experiment(known):
    on = surface(known, "target", RATES)
    for found in (
        verdicts.undertrained(on, 2),
        verdicts.overfit([1, 2], [1, 2], noise=0.1),
        verdicts.diverged([float("nan")], 1.0),
        verdicts.at_the_edge([1.0], 1.0),
        verdicts.above_the_law(known, "medium", 5, 2.0),
    ):
        assert any(character.isdigit() for character in found.evidence), found.name
        assert found.experiment
