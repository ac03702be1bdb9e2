"""The law of loss and what is fitted to it."""

import numpy as np
import pytest
from scipy.optimize import least_squares

from orchestration.scaling import Ladder, Points, Run, Size, Trunk
from orchestration.searching.fitting import Whitening
from orchestration.searching.laws import fit, interval
from tests.orchestration.ladders import LADDER, best_rate, fitted, law, observed, trunk


def points(count: int = 60) -> Points:
    random = np.random.default_rng(0)
    place, horizon = random.integers(0, 4, count), random.choice(LADDER.horizons, count)
    return Points(LADDER, place, horizon, np.log(random.uniform(5e-5, 2e-2, count)))


def test_the_law_is_the_formula_it_states():
    true, x = law(size_power=0.2, rate_size_power=0.4), np.log2(8e-4 / 1e-3)
    ratio = 70e9 / np.exp(np.mean(np.log([0.1e9, 1e9, 7e9, 70e9])))
    epochs = 20 / np.exp(np.mean(np.log(LADDER.horizons)))
    worth = 1 + 12 * (1 - np.exp(-19 / 12))
    best = 0.6 + 0.3 * ratio**-0.2 + 0.5 * ratio**0.05 * worth**-0.35 + 0.004 * epochs**2
    x += 0.4 * np.log2(ratio) + 0.2 * np.log2(epochs)
    assert 1 < x < 2.2
    at = Points(LADDER, np.array([3]), np.array([20.0]), np.log([8e-4]))
    assert np.exp(at.log_loss(true)) == pytest.approx(best * (1 + 0.005 * x**2))


def test_slopes_are_the_differences_of_the_law():
    at, true, step = points(), law() + 0.03, 1e-6
    changes = step * np.eye(len(true))
    differences = [(at.log_loss(true + c) - at.log_loss(true - c)) / (2 * step) for c in changes]
    np.testing.assert_allclose(at.slopes(true), np.array(differences).T, atol=1e-7)


def test_many_laws_at_once_are_each_of_them():
    laws = law() + 0.05 * np.random.default_rng(1).standard_normal((3, LADDER.offsets.stop))
    for method in (Points.log_loss, Points.slopes, Points.octaves):
        together = method(points(), laws)
        np.testing.assert_allclose(together, [method(points(), alone) for alone in laws])


def test_a_rate_too_high_costs_more_than_one_too_low():
    best = best_rate("small", 10)
    losses = {o: trunk("small", best * 2.0**o, (10,)).losses[0] for o in (-3, -2, -1, 0, 1, 2, 3)}
    assert losses[0] == min(losses.values())
    assert all(losses[octave] > losses[-octave] for octave in (1, 2, 3))
    assert losses[3] > 1.5 * losses[0]


def test_a_trunk_costs_its_longest_branch_and_the_decay_of_the_others():
    assert LADDER.cost("target", (2, 5, 10)) == pytest.approx(10 + 0.2 * 7)
    assert LADDER.cost("medium", (10,)) == pytest.approx(1)
    stopped = Trunk(Run("target", 1e-3, (2, 5, 10)), (1.0, 0.9))
    assert LADDER.spent([stopped, stopped]) == pytest.approx(2 * (5 + 0.2 * 2))


@pytest.mark.parametrize(
    ("sizes", "horizons"), [((1, 1), (2, 5)), ((2, 1), (2, 5)), ((1,), (2,)), ((1, 2), (5, 2))]
)
def test_a_ladder_ascends(sizes, horizons):
    with pytest.raises(ValueError, match="ascending"):
        Ladder(tuple(Size(str(n), n, n) for n in sizes), horizons)


def test_the_fit_recovers_a_law_from_noisy_runs():
    found = fitted()
    for size in ("tiny", "medium", "target"):
        for horizon in (5, 20):
            best = best_rate(size, horizon)
            assert abs(np.log2(found.probable_rate(size, horizon) / best)) < 0.5
            true = trunk(size, best, (horizon,)).losses[0]
            assert found.probable_loss(size, horizon, best) == pytest.approx(true, rel=0.01)


def test_most_intervals_hold_the_truth_and_not_all():
    held = []
    for seed in range(12):
        found = fitted(seed=seed)
        for size in ("small", "medium"):
            best = best_rate(size, 10)
            low, high = interval(found.best_rate(size, 10))
            least, most = interval(found.loss(size, 10, best))
            held += [low < best < high, least < trunk(size, best, (10,)).losses[0] < most]
    assert 0.75 < np.mean(held) <= 1


def test_a_library_finds_no_better_fit():
    """Nor one that foretells other losses, where it goes on from ours with the same sum of squares."""
    found = fitted()
    problem, spreads = found.problem, found.spreads
    sds = problem.deviations(spreads)

    def residuals(law: np.ndarray) -> np.ndarray:
        near = problem.near.log_loss(law) - problem.log_loss
        near = problem.whiten(near[:, None])[:, 0] / spreads.noise
        return np.concatenate([near, (law - problem.means) / sds])

    def loss(squares: np.ndarray) -> np.ndarray:
        """Soft L1 of the data, squares of the priors."""
        root = np.sqrt(1 + squares)
        robust = np.stack([2 * (root - 1), 1 / root, -0.5 / root**3])
        plain = np.stack([squares, np.ones_like(squares), np.zeros_like(squares)])
        return np.where(np.arange(len(squares)) < problem.points, robust, plain)

    theirs = least_squares(residuals, found.most_probable, loss=loss)
    ours = loss(residuals(found.most_probable) ** 2)[0].sum()
    assert ours - 2 * theirs.cost < 0.1
    foretold, theirs = (problem.near.log_loss(law) for law in (found.most_probable, theirs.x))
    np.testing.assert_allclose(foretold, theirs, atol=5e-4)


def test_less_is_known_of_a_size_that_was_not_observed():
    found = fitted()
    widths = [np.std(np.log(found.best_rate(size, 10))) for size in ("medium", "target")]
    assert widths[1] > 1.5 * widths[0]


def test_noise_by_run_is_wider_than_by_point():
    trunks = [trunk("small", best_rate("small", 10) * 2.0**o, noise=0.002) for o in (-1, 0, 1)]
    together, apart = (
        np.std(np.log(fit(LADDER, trunks, correlated=share).best_rate("small", 10)))
        for share in (0.8, 0.0)
    )
    assert together > 1.1 * apart


def test_whitening_is_the_inverse_root_of_the_covariance():
    runs, share = np.array([0, 0, 0, 1, 2, 2]), 0.5
    covariance = share * (runs[:, None] == runs) + (1 - share) * np.eye(6)
    matrix = Whitening(runs, share)(np.eye(6))
    np.testing.assert_allclose(matrix @ covariance @ matrix.T, np.eye(6), atol=1e-12)


def test_one_run_that_went_wrong_moves_little():
    trunks = observed()
    wrong = Trunk(trunks[7].run, tuple(1.02 * loss for loss in trunks[7].losses))
    rates = [
        fit(LADDER, seen).probable_rate("target", 10)
        for seen in (trunks, [*trunks[:7], wrong, *trunks[8:]])
    ]
    assert abs(np.log2(rates[1] / rates[0])) < 0.3


def test_what_diverged_lies_above_the_best_rate():
    failed = best_rate("target", 10) / 2
    trunks = observed()
    diverged = Trunk(Run("target", failed, (2, 5)), (float("nan"),))
    before, after = (fit(LADDER, seen) for seen in (trunks, [*trunks, diverged]))
    assert after.probable_rate("target", 2) < failed / 2 < before.probable_rate("target", 2)


def test_the_order_of_runs_does_not_matter():
    trunks = observed()
    laws = [fit(LADDER, seen, samples=10) for seen in (trunks, trunks[::-1])]
    assert np.array_equal(laws[0].samples, laws[1].samples)


def test_the_scale_of_an_embedding_explains_rates_that_size_does_not():
    rms = (0.2, 0.1, 0.2, 0.1)
    sizes = [
        Size(size.name, size.parameters, size.cost, embedding_rms=scale)
        for size, scale in zip(LADDER.sizes, rms, strict=True)
    ]
    ladder = Ladder(tuple(sizes), LADDER.horizons)
    trunks = [
        trunk(size.name, 1e-3 * size.embedding_rms / 0.14 * 2.0**octave,
              true=law(rate=np.log(1e-3 * size.embedding_rms / 0.14), rate_size_power=0.0))
        for size in sizes[:3]
        for octave in (-2, -1, 0, 1, 2)
    ]  # fmt: skip
    plain, informed = (fit(of, trunks).probable_rate("target", 10) for of in (LADDER, ladder))
    true = 1e-3 * 0.1 / 0.14
    assert abs(np.log2(informed / true)) < 0.5 < abs(np.log2(plain / true))


def test_nothing_is_learnt_from_nothing():
    with pytest.raises(ValueError, match="no run has a loss"):
        fit(LADDER, [Trunk(Run("tiny", 1.0, (2, 5)), (float("inf"),))])
