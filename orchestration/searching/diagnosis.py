"""What is wrong with one training, by what it has written down itself."""

import statistics
from collections.abc import Sequence
from math import isfinite, nan

from orchestration.records.record import Run
from orchestration.searching.verdicts import (
    BLOCKS,
    Verdict,
    blind,
    diverged,
    overfit,
    precision_at_fault,
    rate_too_high,
    still_falling,
)
from orchestration.space import SCHEDULE

NOISE = 0.01
"""Relative standard deviation of a held-out loss, from seed to seed, on the shipped ladder."""
WINDOW = 32
"""Gradient norms before one that say what is usual then."""
TINY = 1e-30
PLATEAUS = ("wsd", "constant")
"""Schedules on which a slope says something: cosine and linear fall as they anneal."""
MOVED = "train/update_ratio/embedding"


def diagnose(run: Run, best: float) -> list[Verdict]:
    """The verdicts that a run's curves allow; `best` is the least loss of its size after as many epochs."""
    return [
        *_diverged(run, best),
        *_updates(run),
        *_overfit(run),
        *_still_falling(run),
        *_blind(run),
    ]


def _diverged(run: Run, best: float) -> list[Verdict]:
    losses = list(run.losses.values())
    if run.state == "failed" and run.reason.startswith(FloatingPointError.__name__):
        losses.append(nan)
    if not losses:
        return []
    least = min((loss for loss in (*losses, best) if isfinite(loss)), default=nan)
    return [diverged(losses, least)]


def _updates(run: Run) -> list[Verdict]:
    """Of those that were left out, and of the norms of those that were made."""
    norms = [value for _, value in run.curve("train/grad_norm")]
    usual = _over_usual([norm for norm in norms if isfinite(norm)])
    overflowed = sum(not isfinite(norm) for norm in norms)
    skipped = len(run.curve("train/skipped"))
    if not (made := len(norms) + skipped):
        return []
    moved = [value for _, value in run.curve(MOVED)]
    return [
        rate_too_high(
            skipped=(skipped + overflowed) / made,
            gradient_norms=usual,
            moved=max(moved) if moved else None,
        ),
        precision_at_fault(
            run.fields["train.precision"], overflowed=overflowed / made, gradient_norms=usual
        ),
    ]


def _over_usual(norms: Sequence[float]) -> list[float]:
    """Each norm over the median of those before it: they are large at first in any training, and shrink."""
    return [
        norm / max(statistics.median(norms[at - WINDOW : at]), TINY)
        for at, norm in enumerate(norms)
        if at >= WINDOW
    ]


def _overfit(run: Run) -> list[Verdict]:
    held_out = run.curve("eval/loss")
    means, first = [], 0
    for last, _ in held_out:
        losses = [value for step, value in run.curve("train/loss") if first < step <= last]
        means.append(sum(losses) / len(losses) if losses else nan)
        first = last
    known = [
        (mean, loss) for mean, (_, loss) in zip(means, held_out, strict=True) if isfinite(mean)
    ]
    if len(known) < 2 or not all(isfinite(loss) for _, loss in known):
        return []
    return [overfit([mean for mean, _ in known], [loss for _, loss in known], NOISE)]


def _still_falling(run: Run) -> list[Verdict]:
    """Of the plateau alone, where there is one."""
    rates = run.curve("train/lr")
    top = max((rate for _, rate in rates), default=nan)
    plateau = {step for step, rate in rates if rate == top}
    losses = [(step, loss) for step, loss in run.curve("train/loss") if step in plateau]
    ends = run.curve("train/epoch")
    if not ends or len(losses) < BLOCKS or run.fields[SCHEDULE] not in PLATEAUS:
        return []
    updates = ends[0][0] / ends[0][1]
    return [still_falling([loss for _, loss in losses], [step / updates for step, _ in losses])]


def _blind(run: Run) -> list[Verdict]:
    seen = {
        name: run.last(f"eval/accuracy{suffix}")
        for name, suffix in (
            ("accuracy", ""),
            ("zeroed", "_blind"),
            ("shuffled", "_shuffled"),
            ("majority", "_majority"),
        )
    }
    if not all(isfinite(value) for value in seen.values()):
        return []
    return [blind(seen.pop("accuracy"), **seen)]
