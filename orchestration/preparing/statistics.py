"""What an epoch of prepared data is made of: samples, their lengths, blends and sets, in numbers and text.

Arithmetic on a few arrays: no sample is put together and no image is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import floor, log10
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dsvl.config import DataConfig
from dsvl.data.blend import Blender, Epoch
from dsvl.data.store import open_store
from orchestration.config import Experiment

SIDES: tuple[Literal["train", "eval"], ...] = ("train", "eval")
LENGTHS = ("tokens", "images", "rounds")
"""Of a sample, what a histogram is drawn of."""
BINS = 16
"""Bars of a histogram, at most, and one for the largest."""
BAR = 40
"""Characters of the longest bar."""
BLOCKS = " ▏▎▍▌▋▊▉█"
UNLIMITED = 1 << 31


def measure(experiment: Experiment, folder: Path) -> dict[str, Any]:
    """What epoch 0 has of every blend on both sides of the split, and what became of every set's records.

    Histograms count samples of 0 to width - 1, width to 2 * width - 1, ..., with the widths in `bins`.
    """
    prepared, data = open_store(folder), experiment.data

    def epoch(side: Literal["train", "eval"], data: DataConfig) -> Epoch:
        return Blender(prepared, side, data=data, seed=experiment.seed_of(side)).epoch(0)

    # Draws do not depend on the caps, so the same samples without them tell which are shortened.
    free = replace(data, max_tokens=UNLIMITED, max_images=UNLIMITED, max_rounds=None)
    epochs = {side: epoch(side, data) for side in SIDES}
    shortened = {side: epochs[side].rounds < epoch(side, free).rounds for side in SIDES}
    bins = {
        name: _width(max(int(_lengths(epochs[side])[name].max(initial=0)) for side in SIDES))
        for name in LENGTHS
    }
    return {
        "folder": str(folder),
        "bins": bins,
        "blends": {
            name: {side: _blend(epochs[side], shortened[side], place, bins) for side in SIDES}
            for place, name in enumerate(data.all_blends())
        },
        "sets": prepared.manifest["sources"],
    }


def render(measured: Mapping[str, Any]) -> str:
    """The same for people: tables, then a histogram of each length for each blend's training side."""
    blends, sets = measured["blends"], measured["sets"]
    lines = [measured["folder"], "", *_table(_rows(blends)), "", *_table(_fates(sets))]
    for name, of in sets.items():
        if of["dropped"]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in of["dropped"].items())
            lines.append(f"dropped of {name}: {reasons}")
    for length, width in measured["bins"].items():
        for name, sides in blends.items():
            counts = sides["train"][length]["histogram"]
            if sum(counts):
                lines += ["", f"{length} a sample: {name}, train", *_bars(counts, width)]
    return "\n".join(lines)


def _lengths(epoch: Epoch) -> dict[str, np.ndarray]:
    return {"tokens": epoch.lengths, "images": epoch.images, "rounds": epoch.rounds}


def _blend(
    epoch: Epoch, shortened: np.ndarray, place: int, bins: Mapping[str, int]
) -> dict[str, Any]:
    own = epoch.blends == place
    tokens = epoch.lengths[own].sum()
    return {
        "samples": int(own.sum()),
        "share_of_samples": float(own.sum() / max(len(epoch), 1)),
        "share_of_tokens": float(tokens / max(epoch.lengths.sum(), 1)),
        "shortened": int(shortened[own].sum()),
        "supervised": int(epoch.targets[own].sum()),
        **{
            name: _distribution(values[own], width=bins[name])
            for name, values in _lengths(epoch).items()
        },
    }


def _distribution(values: np.ndarray, *, width: int) -> dict[str, Any]:
    """The sum, the histogram and, unless there are no values, what they are like."""
    found: dict[str, Any] = {"sum": int(values.sum())}
    if len(values):
        median, p95 = np.quantile(values, [0.5, 0.95], method="inverted_cdf").tolist()
        found |= {"mean": float(values.mean()), "median": median, "p95": p95}
        found["max"] = int(values.max())
    return {**found, "histogram": np.bincount(values // width).tolist()}


def _width(largest: int) -> int:
    """The least round number by which `largest` makes at most BINS bins."""
    least = max(largest / BINS, 1)
    unit = 10 ** floor(log10(least))
    return next(unit * digit for digit in (1, 2, 5, 10) if unit * digit >= least)


def _rows(blends: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    yield ("blend", "side", "samples", "%", "shortened", "images", "rounds", "tokens", "%",
           "supervised", "mean length", "median", "p95", "max")  # fmt: skip
    for side in SIDES:
        for name, sides in blends.items():
            of = sides[side]
            like = [of["tokens"].get(key) for key in ("mean", "median", "p95", "max")]
            yield (
                name,
                side,
                f"{of['samples']:,}",
                f"{of['share_of_samples']:.1%}",
                f"{of['shortened']:,}",
                f"{of['images']['sum']:,}",
                f"{of['rounds']['sum']:,}",
                f"{of['tokens']['sum']:,}",
                f"{of['share_of_tokens']:.1%}",
                f"{of['supervised']:,}",
                *("—" if value is None else f"{value:,.0f}" for value in like),
            )


def _fates(sets: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    yield "set", "", "raw", "= used", "+ merged", "+ dropped", "+ benchmark"
    for name, of in sets.items():
        counts = (of["raw"], of["used"], of["merged"], sum(of["dropped"].values()), of["held_out"])
        yield name, "", *(f"{count:,}" for count in counts)


def _table(rows: Iterator[Sequence[str]]) -> list[str]:
    """Rows in columns, the first two of names, numbers to the right."""
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            f"{cell:{'<' if place < 2 else '>'}{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ).rstrip()
        for row in cells
    ]


def _bars(counts: Sequence[int], width: int) -> list[str]:
    names = [
        str(place) if width == 1 else f"{place * width}..{(place + 1) * width - 1}"
        for place in range(len(counts))
    ]
    first = next(place for place, count in enumerate(counts) if count)
    room, most = max(map(len, names)), max(counts)
    lines = []
    for name, count in list(zip(names, counts, strict=True))[first:]:
        eighths = -(-8 * BAR * count // most)  # rounded up: what is there is seen
        bar = (BLOCKS[-1] * (eighths // 8) + BLOCKS[eighths % 8]).rstrip()
        lines.append(f"  {name:>{room}}  {bar:<{BAR}}  {count:,}".rstrip())
    return lines
