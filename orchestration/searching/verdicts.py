"""What is wrong with a run or a size, with the numbers that say so and the experiment that would settle it.

Epochs, rates and precision are told apart: a loss that would fall with more epochs is not one above the law
of its size, and only updates that failed speak of precision or of a rate too high.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from orchestration.searching.laws import Law, interval
from orchestration.searching.regret import GATE_LOSS, GATE_OCTAVES, Gate, Surface

EPS = 0.005
"""Share of the loss that further epochs have to promise."""
SKIPPED, NORMS, MOVED = 0.02, 10.0, 0.05
"""Of a rate too high: updates skipped, 99th percentile of gradient norms over their median, and how far an
update moves the embedding, as a share of it."""
DECIDED = 0.5
"""Probability from which a verdict holds."""
LAST = 0.2
"""Share of a curve that tells whether it still falls."""
BLOCKS = 10
"""Means that this share is reduced to, as neighbouring updates are alike."""
FALLS = 0.001
"""Share of the loss an epoch, below which a slope is none."""
LOOKS = 0.02
"""Share of held-out answers that images have to add for a model to count as looking at them."""


@dataclass(frozen=True)
class Verdict:
    """A finding."""

    name: str
    holds: bool
    score: float
    """The larger, the surer; comparable among verdicts of the same name only."""
    evidence: str
    experiment: str
    """What to run next."""


def undertrained(surface: Surface, horizon: float, eps: float = EPS) -> Verdict:
    """Whether more epochs, at their best rate, would lower the loss of a size by more than `eps`.

    A law's verdict: it holds for the size, whatever the rate of the run was.
    """
    gain = surface.gain(horizon)
    chance, (low, high) = float((gain > eps).mean()), interval(gain)
    longer = surface.choose(eps)
    return Verdict(
        "undertrained",
        chance > DECIDED,
        chance,
        f"{surface.size} after {horizon:g} epochs: longer trainings lower the loss by {np.median(gain):.2%} "
        f"({low:.2%} to {high:.2%}), by more than {eps:.2%} with probability {chance:.0%}",
        f"train {surface.size} for {longer.horizon:g} epochs at {longer.lr:.2g}",
    )


def still_falling(losses: Sequence[float], epochs: Sequence[float]) -> Verdict:
    """Whether a trunk's loss falls over its last fifth: the median slope of all pairs of block means.

    `losses` at a constant rate; `epochs` when each was seen. Weaker than `undertrained`, but needs no law.
    """
    count = max(int(LAST * len(losses)), BLOCKS)
    if len(losses) < count:
        raise ValueError(f"{len(losses)} losses: {BLOCKS} at least tell a slope")
    blocks = np.array_split(np.arange(len(losses) - count, len(losses)), BLOCKS)
    x, y = (np.array([np.mean(np.take(of, block)) for block in blocks]) for of in (epochs, losses))
    slopes = _slopes(x, y) / y.mean()
    slope = float(np.median(slopes))
    # Residual blocks are exchangeable: drawn anew about the line, they tell how sure its slope is.
    rest = y - y.mean() * slope * (x - x.mean())
    random = np.random.default_rng(0)
    drawn = [np.median(_slopes(x, random.permutation(rest))) / y.mean() + slope for _ in range(200)]
    bound = float(np.quantile(drawn, 0.95))
    return Verdict(
        "still falling",
        bound < 0 and slope < -FALLS,
        -slope,
        f"the loss changes by {slope:+.2%} an epoch over the last {count} values "
        f"(at most {bound:+.2%}, 95 %)",
        "anneal now and at twice the epochs, from the same trunk, and compare",
    )


def overfit(train: Sequence[float], held_out: Sequence[float], noise: float) -> Verdict:
    """Whether the held-out loss has risen by over two standard deviations while that of training fell.

    Both at the same moments; `noise` is the relative standard deviation of a held-out loss.
    """
    least = int(np.argmin(held_out))
    rise = held_out[-1] / held_out[least] - 1
    falls = train[-1] < train[least]
    return Verdict(
        "overfit",
        bool(rise > 2 * noise and falls),
        rise / noise,
        f"held-out loss {held_out[least]:.4g} at {least + 1} of {len(held_out)}, {held_out[-1]:.4g} at "
        f"the end ({rise:+.2%}, {rise / noise:.1f} standard deviations), training loss {train[least]:.4g}, "
        f"then {train[-1]:.4g}",
        f"train for {least + 1} of {len(held_out)} as long, and compare answers as well as losses: "
        "the paper's best models look overfitted (section 4.3)"
        if rise > 0
        else "more epochs: the held-out loss is least at the end",
    )


def rate_too_high(
    *, skipped: float, gradient_norms: Sequence[float], moved: float | None
) -> Verdict:
    """Whether updates fail or are wild.

    `skipped` is the share of updates without effect, `moved` the size of an update of the embedding as a
    share of it, where that was measured. Skipped updates alone speak of the precision first.
    """
    wild, told = _wildness(gradient_norms)
    ratios = {
        f"{skipped:.1%} of updates skipped (at most {SKIPPED:.0%})": skipped / SKIPPED,
        told: wild,
    }
    if moved is not None:
        ratios[f"an update moves the embedding by {moved:.1%} (at most {MOVED:.0%})"] = (
            moved / MOVED
        )
    score = float(max(ratios.values()))
    alone = skipped > SKIPPED and max(list(ratios.values())[1:]) <= 1
    return Verdict(
        "rate too high",
        score > 1 and not alone,
        score,
        "; ".join(ratios),
        "the same in bf16" if alone else "half the rate, and that of the embedding alone",
    )


def precision_at_fault(
    precision: str, *, overflowed: float, gradient_norms: Sequence[float]
) -> Verdict:
    """Whether updates are lost to the range of float16 while those that are made are calm.

    `overflowed` is the share of updates that the loss scaler left out. A rate too high makes norms wild in
    any precision.
    """
    wild, told = _wildness(gradient_norms)
    other = "fp32" if precision == "bf16" else "bf16"
    return Verdict(
        "precision at fault",
        precision == "fp16" and overflowed > SKIPPED and wild <= 1,
        overflowed / SKIPPED,
        f"{overflowed:.1%} of updates overflowed in {precision} (at most {SKIPPED:.0%}); {told}",
        f"the same in {other}, with the same seed: only the precision then differs",
    )


def blind(accuracy: float, *, zeroed: float, shuffled: float, majority: float) -> Verdict:
    """Whether a model answers as well without its images, zeroed, or with those of others in their place."""
    adds = accuracy - max(zeroed, shuffled)
    return Verdict(
        "blind to images",
        adds < LOOKS,
        LOOKS - adds,
        f"{accuracy:.1%} of held-out answers right, {zeroed:.1%} with images zeroed, {shuffled:.1%} with "
        f"those of others, {majority:.1%} by the most frequent answer: images add {adds:+.1%} (at least "
        f"{LOOKS:.0%})",
        "ten times the projection's rate (optim.projection_lr); dsvl preview shows whether images are there",
    )


def _wildness(gradient_norms: Sequence[float]) -> tuple[float, str]:
    """The 99th percentile of norms over their median, as a share of what it may be, and in words."""
    norms = [norm for norm in gradient_norms if isfinite(norm)]
    middle, high = np.quantile(norms, [0.5, 0.99]) if norms else (1.0, 1.0)
    times = high / middle if middle else 1.0  # a model without gradients is dead, not wild
    told = f"gradient norms {times:.3g} times the usual at the 99th percentile (at most {NORMS:g})"
    return float(times / NORMS), told


def diverged(losses: Sequence[float], best: float) -> Verdict:
    """Whether a loss is none, or the last is twice the best that other runs of its size have at that time.

    Not while it falls: such a run is behind the others, and perhaps its rate is too low.
    """
    last = losses[-1]
    falls = len(losses) > 1 and last <= min(losses[:-1])
    failed = not isfinite(last) or (last > 2 * best and not falls)
    return Verdict(
        "diverged",
        failed,
        last / best if isfinite(last) else float("inf"),
        f"loss {last:.4g}, where the best run has {best:.4g}",
        "a quarter of the rate",
    )


def at_the_edge(tried: Sequence[float], best: float) -> Verdict:
    """Whether a best rate lies at or beyond the least or greatest that were tried."""
    low, high = min(tried), max(tried)
    beyond = max(low / best, best / high)
    lower = best <= low
    return Verdict(
        "at the edge",
        beyond >= 1,
        beyond,
        f"the best rate, {best:.2g}, where {low:.2g} to {high:.2g} were tried",
        f"{low / 2:.2g} and {low / 4:.2g}" if lower else f"{high * 2:.2g} and {high * 4:.2g}",
    )


def above_the_law(law: Law, size: str, horizon: float, loss: float) -> Verdict:
    """Whether a loss is above what its size and horizon reach at their best rate.

    Where more epochs would not help such a run, its rate or its precision is at fault.
    """
    rates = law.best_rate(size, horizon)
    reached = law.loss(size, horizon, float(np.median(rates)))
    bound = float(np.quantile(reached, 0.95)) * (1 + 2 * law.spreads.noise)
    low, high = interval(rates)
    return Verdict(
        "above the law",
        loss > bound,
        loss / bound - 1,
        f"loss {loss:.4g}, where {horizon:g} epochs reach {np.median(reached):.4g} "
        f"(at most {bound:.4g}, 95 %)",
        f"the best rate, {low:.2g} to {high:.2g}; and if it is there already, bf16 and a rate of its own "
        "for the embedding",
    )


def violated(gate: Gate) -> Verdict:
    """Whether the smaller sizes foretell the largest one below the target too badly."""
    score = max(abs(gate.octaves) / GATE_OCTAVES, abs(gate.loss or 0.0) / GATE_LOSS)
    return Verdict(
        "law violated",
        not gate.passed,
        score,
        str(gate),
        "sweep the target itself"
        if not gate.passed
        else "a trunk at the target where the law chooses",
    )


def _slopes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    first, second = np.triu_indices(len(x), 1)
    return (y[second] - y[first]) / (x[second] - x[first])
