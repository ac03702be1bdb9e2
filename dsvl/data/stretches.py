"""Arrays of stretches of different lengths, laid end to end."""

import numpy as np


def offsets(counts: np.ndarray) -> np.ndarray:
    """Where each of the stretches of so many starts, laid end to end."""
    return np.cumsum(counts) - counts


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of every stretch, end to end."""
    return np.arange(counts.sum()) + np.repeat(starts - offsets(counts), counts)


def running(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Sums within each stretch, up to and with every value."""
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[1:] - np.repeat(sums[offsets(counts)], counts)


def totals(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(len(counts),) int64: the sum of every stretch."""
    sums = np.concatenate([[0], np.cumsum(values)]).astype(np.int64)
    starts = offsets(counts)
    return sums[starts + counts] - sums[starts]
