"""Figures of searches, as inline SVG like those of plots.py: maps of loss, parallel coordinates, timelines.

A file of its own because it changes with what a search has to show, and plots.py with how a chart is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from math import isfinite
from typing import Any

from orchestration.pages.page import attributes, note
from orchestration.pages.plots import Mark, Point, Series, drawn, position, shade, short, ticks

WIDE, LEFT, RIGHT = 760, 64, 20
"""Of a figure across the page, in pixels, and what is beside its plot."""
ROW, BAND = 13, 34
"""Height of a row of a timeline, and of a band of a map."""
MOST_ROWS = 100
FEW = 6
"""Values of an axis that are written on it themselves."""


@dataclass(frozen=True)
class Bar:
    """A trial of a timeline."""

    spans: Sequence[tuple[float, float]]
    """When there was work, in seconds since any moment."""
    label: str
    look: str
    mark: Mark
    """How it ended."""


def timeline(bars: Sequence[Bar], *, title: str) -> str:
    """When each trial was at work, a row each in the order given; gaps are interruptions."""
    shown = [bar for bar in bars if bar.spans][:MOST_ROWS]
    if not shown:
        return note(f"{title}: nothing has begun yet.")
    first = min(begin for bar in shown for begin, _ in bar.spans)
    last = max(end for bar in shown for _, end in bar.spans)
    minutes, bottom = max((last - first) / 60, 0.1), 34 + ROW * len(shown)

    def across(moment: float) -> float:
        return 24 + position((moment - first) / 60, 0, minutes, log=False) * (WIDE - 24 - RIGHT)

    parts = []
    for tick in ticks(0, minutes):
        x = f"{across(first + 60 * tick):.1f}"
        parts.append(f'<line class="rule" x1="{x}" x2="{x}" y1="26" y2="{bottom}"/><text x="{x}" '
                     f'y="{bottom + 16}" text-anchor="middle">{short(tick)}</text>')  # fmt: skip
    for row, bar in enumerate(shown):
        y = 28 + ROW * row
        work = "".join(
            f'<rect x="{across(begin):.1f}" y="{y + 2}" height="{ROW - 4}" '
            f'width="{max(across(end) - across(begin), 1):.1f}" fill="currentColor"/>'
            for begin, end in bar.spans
        )
        ending = drawn(Series([], mark=bar.mark), [(across(bar.spans[-1][1]), y + ROW / 2)])
        parts.append(f'<g class="{bar.look}"><title>{escape(bar.label)}</title>{work}{ending}</g>')
    parts.append(_text(WIDE - RIGHT, bottom + 30, "minutes", "end"))
    return _svg(title, bottom + 36, parts)


def parallel(
    trials: Sequence[tuple[Mapping[str, Any], float, str]], *, metric: str, sign: int, title: str
) -> str:
    """Searched values of trials and what they came to, a line each: (values, metric, label), in any order.

    `sign` is 1 where less of the metric is better. Numbers that span an order of magnitude stand on a
    logarithmic axis; what is no number has a place for each of its values. The best is drawn last, apart.
    """
    found = sorted((one for one in trials if isfinite(one[1])), key=lambda one: -sign * one[1])
    paths = dict.fromkeys(path for values, _, _ in found for path in values)
    varied = [p for p in paths if len({repr(values.get(p)) for values, _, _ in found}) > 1]
    if len(found) < 2 or not varied:
        return note(f"{title}: fewer than two trials with a result.")
    columns = [[values.get(path) for values, _, _ in found] for path in varied]
    axes = [_axis(column) for column in [*columns, [value for _, value, _ in found]]]
    height, gap = 260, (WIDE - LEFT - RIGHT - 44) / len(varied)
    parts, names = [], []
    for number, (name, (_, labels)) in enumerate(zip([*varied, metric], axes, strict=True)):
        x = LEFT + gap * number
        parts.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="44" y2="{height}"/>')
        parts.append(_text(x, 34, name.rpartition(".")[2], "middle"))
        for place, label in labels:
            last = number == len(varied)
            away, anchor = (6, "start") if last else (-6, "end")
            names.append(_text(x + away, height - place * (height - 44) + 4, label, anchor))
    for number, (_, value, label) in enumerate(found):
        way = " ".join(
            f"{LEFT + gap * axis:.1f},{height - places[number] * (height - 44):.1f}"
            for axis, (places, _) in enumerate(axes)
        )
        best = number == len(found) - 1
        look = 'class="c1"' if best else f'style="stroke:{shade(number / (len(found) - 1))[0]}"'
        told = escape(f"{label}: {value:.4g}")
        width = ' stroke-width="4"' if best else ""
        parts.append(f'<g><title>{told}</title><polyline {look} points="{way}"{width}/></g>')
    return _svg(title, height + 14, [*parts, *names])


def terrain(
    losses: Mapping[tuple[float, float], float],
    ridge: Sequence[tuple[float, float, float]],
    marks: Sequence[Series],
    *,
    title: str,
) -> str:
    """A map of loss over learning rates and lengths, with its ridge and what was trained.

    `losses` by (rate, epochs) colours the map; `ridge` has the best rate of each length, ascending, with its
    bounds; points of `marks` are (rate, epochs).
    """
    lengths = sorted({epochs for _, epochs in losses})
    rates = sorted({lr for lr, _ in losses} | {x for one in marks for x, _ in one.points})
    ranks = {value: rank for rank, value in enumerate(sorted(set(losses.values()), reverse=True))}
    width, top = 380, 24
    bottom = top + BAND * len(lengths)

    def across(lr: float) -> float:
        return 48 + position(lr, rates[0], rates[-1], log=True) * (width - 48 - 14)

    def up(epochs: float) -> float:
        return bottom - BAND * (lengths.index(epochs) + 0.5)

    parts = []
    for epochs in lengths:
        row = sorted(lr for lr, length in losses if length == epochs)
        edges = [row[0], *((a * b) ** 0.5 for a, b in pairwise(row)), row[-1]]
        for lr, left, right in zip(row, edges[:-1], edges[1:], strict=True):
            colour = shade(ranks[losses[lr, epochs]] / max(len(ranks) - 1, 1))[0]
            told = escape(f"{epochs:g} epochs at {lr:.3g}: {losses[lr, epochs]:.4g} foretold")
            parts.append(f'<rect x="{across(left):.1f}" y="{up(epochs) - BAND / 2:.1f}" '
                         f'width="{across(right) - across(left) + 0.3:.1f}" height="{BAND}" '
                         f'fill="{colour}"><title>{told}</title></rect>')  # fmt: skip
        parts.append(_text(42, up(epochs) + 4, f"{epochs:g}", "end"))
    inside = [
        (min(max(lr, rates[0]), rates[-1]), n) for (lr, _, _), n in zip(ridge, lengths, strict=True)
    ]
    way = " ".join(f"{across(lr):.1f},{up(n):.1f}" for lr, n in inside)
    parts.append(f'<g class="c1"><polyline points="{way}"/></g>')
    for (_, low, high), epochs in zip(ridge, lengths, strict=True):
        left, right = (across(min(max(lr, rates[0]), rates[-1])) for lr in (low, high))
        y = up(epochs)
        parts.append(
            f'<g class="c1"><polyline points="{left:.1f},{y:.1f} {right:.1f},{y:.1f}"/></g>'
        )
    for one in marks:
        places: list[Point] = [(across(lr), up(epochs)) for lr, epochs in one.points]
        told = escape(one.label)
        parts.append(f'<g class="{one.look}"><title>{told}</title>{drawn(one, places)}</g>')
    for tick in ticks(rates[0], rates[-1], log=True):
        parts.append(_text(across(tick), bottom + 16, short(tick), "middle"))
    parts.append(_text(width - 14, bottom + 32, "learning rate", "end"))
    parts.append(_text(4, bottom + 32, "epochs, upwards", "start"))
    return _svg(title, bottom + 38, parts, width=width)


def _axis(column: Sequence[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where each value stands between 0 and 1, and the axis's labels."""
    if all(type(value) in (int, float) for value in column):
        low, high = min(column), max(column)
        far = low > 0 and high / low > 10
        high = high if high > low else low + 1
        marked = ticks(low, high, log=far) if len(set(column)) > FEW else sorted(set(column))
        return (
            [position(value, low, high, log=far) for value in column],
            [(position(tick, low, high, log=far), short(tick)) for tick in marked],
        )
    written = ["—" if value is None else str(value) for value in column]  # not searched there
    names = sorted(set(written))
    places = {name: (i + 0.5) / len(names) for i, name in enumerate(names)}
    return [places[name] for name in written], [(at, n) for n, at in places.items()]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    halo = ' style="paint-order:stroke;stroke:var(--page);stroke-width:4px"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{halo}>{escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str], *, width: int = WIDE) -> str:
    tag = attributes({"viewBox": f"0 0 {width} {height:.0f}", "role": "img", "aria-label": title})
    head = f'<text class="title" x="4" y="14">{escape(title)}</text>'
    inside = f"{head}{''.join(parts)}</svg>"
    if width < WIDE:
        return f'<svg class="chart"{tag}>{inside}'
    # On a phone it is scrolled, as its letters would be too small to read.
    return f'<div class="wide" tabindex="0"><svg class="chart broad"{tag}>{inside}</div>'
