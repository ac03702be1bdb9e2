"""Choices under an uncertain law."""

import numpy as np
import pytest

from orchestration.scaling import Trunk
from orchestration.searching.laws import fit
from orchestration.searching.regret import chance_to_win, gate, surface
from tests.orchestration.ladders import LADDER, best_rate, fitted, law, observed, trunk

RATES = (1e-6, 1.0)


def test_the_less_is_known_the_further_below_the_best_rate_the_choice_lies():
    below = []
    for wide in (None, "target"):
        known = fit(LADDER, observed(), wide=wide)
        choice = surface(known, "target", RATES).choose(eps=0.001)
        best = np.median(known.best_rate("target", choice.horizon))
        below.append(np.log2(best / choice.lr))
    assert below[1] > below[0] + 0.25
    assert below[1] > 0.5


def test_the_choice_has_the_least_mean_regret():
    on = surface(fitted(), "target", RATES)
    choice = on.choose(eps=0.0)
    for lr, horizon in zip(on.lrs, on.horizons, strict=True):
        losses = on.law.loss("target", horizon, lr)
        assert np.mean(losses / np.exp(on.log_loss.min(axis=1)) - 1) >= choice.regret - 1e-12


def test_epochs_that_gain_next_to_nothing_are_saved():
    on = surface(fitted(), "target", RATES)
    horizons = [on.choose(eps).horizon for eps in (0.0, 0.005, 0.05, 1.0)]
    assert horizons[0] == 20
    assert horizons == sorted(horizons, reverse=True)
    assert horizons[-1] == LADDER.horizons[0]
    for eps, horizon in zip((0.005, 0.05), horizons[1:], strict=False):
        at = {h: on.expected[on.horizons == h].min() for h in LADDER.horizons}
        assert at[horizon] <= on.expected.min() + eps
        assert all(at[h] > on.expected.min() + eps for h in LADDER.horizons if h < horizon)


def test_gains_of_longer_trainings_end_where_overfitting_begins():
    on = surface(fitted(), "target", RATES)
    gains = [np.median(on.gain(horizon)) for horizon in LADDER.horizons]
    assert gains[0] > gains[1] > gains[2] > 0.002
    assert gains[3] < 0
    assert gains[4] == 0


def test_a_run_far_from_the_choice_teaches_more_than_a_repetition():
    on = surface(fitted(), "target", RATES)
    choice = on.choose(0.001)
    same, above = (on.worth(choice.lr * factor, (2, 5)) for factor in (1, 4))
    assert above > same >= 0
    assert on.expected.min() > above


def test_more_branches_teach_no_less():
    on = surface(fitted(), "target", RATES)
    lr = 2 * on.choose(0.001).lr
    assert on.worth(lr, LADDER.horizons) > on.worth(lr, LADDER.horizons[:1]) - 1e-5


def test_a_trunk_beside_a_better_one_cannot_win():
    known = fitted()
    best = best_rate("target", 20)
    good, bad = trunk("target", best), trunk("target", 6 * best)
    begun = [Trunk(seen.run, seen.losses[:2], ended=False) for seen in (good, bad)]
    reached = [(best, 20.0)]
    assert chance_to_win(known, begun[0], [], 0.001) > 0.9
    assert chance_to_win(known, begun[1], reached, 0.001) < 0.05


def test_a_trunk_past_the_best_horizon_cannot_win():
    whole = trunk("target", best_rate("target", 20))
    past = Trunk(whole.run, whole.losses[:4], ended=False)
    assert chance_to_win(fitted(), past, [], 0.001) < 0.05


def test_the_gate_passes_a_ladder_that_obeys_and_fails_one_that_does_not():
    assert gate(LADDER, observed(), "medium").passed
    astray = law()
    astray[LADDER.rates.start + LADDER.place("medium")] = 1.2
    violated = gate(LADDER, observed(true=astray), "medium")
    assert not violated.passed
    assert violated.octaves < -0.5
    assert "is violated" in str(violated)


def test_the_gate_notices_a_loss_that_was_not_foretold():
    astray = law()
    astray[LADDER.offsets.start + LADDER.place("medium")] = 0.04
    violated = gate(LADDER, observed(true=astray), "medium")
    assert violated.loss == pytest.approx(-0.04, abs=0.015)
    assert not violated.passed
