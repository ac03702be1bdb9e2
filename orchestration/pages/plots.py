"""The figures of a report, as inline SVG and HTML: charts, heat maps, bars.

They load nothing from elsewhere, follow the reader's light or dark theme, and escape every text.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from orchestration.pages.page import attributes, note

Point = tuple[float, float]
Mark = Literal["", "circle", "square", "cross", "band"]

COLOURS = 6
"""Colours that stay apart for colour-blind readers, as classes c0, c1, ..."""
SHARES = (
    ("eval/accuracy", "as trained", "c0"),
    ("eval/accuracy_blind", "images zeroed", "c1"),
    ("eval/accuracy_majority", "most frequent answer", "c2"),
)
"""The shares of held-out questions that a report compares: metric, name and colour."""
WIDTH, HEIGHT = 380, 230
"""Of a chart, in pixels; small enough to be read unscaled on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 34, 38


@dataclass(frozen=True)
class Series:
    """A line of a chart, or a set of marks."""

    points: Sequence[Point]
    label: str = ""
    """Shown when the reader points at it."""
    look: str = "c0"
    """Classes: a colour, and `dash` or `faint`."""
    mark: Mark = ""
    """A mark at each point instead of a line through them, or a `band`, of which they are the outline."""


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map."""

    value: float | None
    """What colours the cell and is written in it; without one the cell is blank."""
    note: str = ""
    """Written below the value."""
    best: bool = False


def short(value: float) -> str:
    """A number in as few characters as its first three digits need; a dash where there is none."""
    if not math.isfinite(value):
        return "—"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}".replace("e-0", "e-")


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    log_x: bool = False,
    shares: bool = False,
    frame: Sequence[Point] = (),
) -> str:
    """A chart as inline SVG; its y axis is logarithmic where the values span an order of magnitude.

    `log_x` makes the x axis so too, whatever it spans; `shares` runs the y axis over 0..1 in percent; `frame`
    holds points that the axes cover as well. Values that are not finite are left out.
    """
    known = [[p for p in one.points if math.isfinite(p[1])] for one in series]
    flat = [point for points in known for point in points]
    if not flat:
        return note(f"{title}: nothing measured yet.")
    flat += [point for point in frame if math.isfinite(point[1])]
    xs, ys = [p[0] for p in flat], [p[1] for p in flat]
    low, high = (0.0, 1.0) if shares else (min(ys), max(ys))
    log = low > 0 and high / low > 10
    if high == low:
        low, high = low - 0.5, high + 0.5
    left, right = min(xs), max(max(xs), 2 * min(xs) if log_x else min(xs) + 1)

    def across(value: float) -> float:
        return LEFT + position(value, left, right, log=log_x) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - position(value, low, high, log=log) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="4" y="14">{escape(title)}</text>']
    written = "{:.0%}".format if shares else short
    for tick in ticks(low, high, log=log):
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" '
                     f'y2="{up(tick):.1f}"/><text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" '
                     f'text-anchor="end">{written(tick)}</text>')  # fmt: skip
    for tick in ticks(left, right, log=True) if log_x else ticks(left, right, least=1):
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                     f'text-anchor="middle">{short(tick)}</text>')  # fmt: skip
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x)}</text>')
    for one, points in zip(series, known, strict=True):
        places = [(across(a), up(b)) for a, b in points]
        parts.append(
            f'<g class="{one.look}"><title>{escape(one.label)}</title>{drawn(one, places)}</g>'
        )
    where = attributes({"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title})
    return f'<svg class="chart"{where}>{"".join(parts)}</svg>'


def figure(drawing: str, names: Iterable[tuple[str, str]] = ()) -> str:
    """A chart with a legend of its own."""
    return f"<figure>{drawing}{legend(names)}</figure>"


def legend(names: Iterable[tuple[str, str]]) -> str:
    """(look, name) pairs, above charts that share them."""
    items = []
    for look, name in names:
        one = Series([(13, 5)] if "mark" in look else [], look=look, mark="circle")
        shape = drawn(one, one.points) or f'<polyline class="{look}" points="0,5 26,5"/>'
        drawing = f'<svg class="chart {look}" viewBox="0 0 26 10">{shape}</svg>'
        items.append(f"<span>{drawing}{escape(name)}</span>")
    return f'<div class="legend">{"".join(items)}</div>' if items else ""


def heat(
    cells: Mapping[tuple[float, float], Cell],
    *,
    caption: str,
    names: tuple[str, str],
    scale: Sequence[float],
) -> str:
    """A heat map as a table; the (row, column) of a cell are numbers, `names` says of what.

    `scale` holds all values from the lightest to the darkest: one that is far off leaves the others
    apart. Each cell carries its row, its column and the caption as data attributes.
    """
    rows, columns = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    head = "".join(f'<th scope="col">{short(column)}</th>' for column in columns)
    lines = []
    for row in rows:
        line = [f'<th scope="row">{escape(names[0])} {short(row) if names[0] else ""}</th>']
        for column in columns:
            cell = cells.get((row, column), Cell(None))
            where = attributes({"data-size": caption, "data-row": row, "data-column": column})
            line.append(_heat_cell(cell, where, scale))
        lines.append(f"<tr>{''.join(line)}</tr>")
    return (
        f'<figure><table class="heat"><caption>{escape(caption)}</caption><thead><tr><th>'
        f"{escape(names[1])}</th>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></figure>"
    )


def bars(title: str, shares: Sequence[tuple[str, float, str]], *, caption: str) -> str:
    """(name, share, look) as horizontal bars over 0..1, each with its number."""
    lines = []
    for name, share, look in shares:
        bar = "<b>—</b>"
        if math.isfinite(share):
            bar = f'<i style="width:{78 * share:.1f}%"></i><b>{share:.1%}</b>'
        lines.append(f'<span>{escape(name)}</span><div class="{look}">{bar}</div>')
    return (
        f"<figure><b>{escape(title)}</b><figcaption>{escape(caption)}</figcaption>"
        f'<div class="bars">{"".join(lines)}</div></figure>'
    )


def outline(counts: Sequence[int], *, width: int) -> list[Point]:
    """The outline of a histogram in percent; bin i counts whole numbers from i * width."""
    total = sum(counts) or 1
    tops = [(i * width - 0.5, 100 * count / total) for i, count in enumerate(counts)]
    steps = [point for x, y in tops for point in ((x, y), (x + width, y))]
    return [(steps[0][0], 0.0), *steps, (steps[-1][0], 0.0)]


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points, each the mean of its neighbourhood."""
    size = math.ceil(len(points) / most) or 1
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def drawn(one: Series, places: Sequence[Point]) -> str:
    """A line through places of a figure, or a mark at each."""
    way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    if one.mark == "band":
        return f'<polygon class="band" points="{way}"/>'
    if not one.mark:
        return f'<polyline class="{one.look}" points="{way}"/>'
    shapes = {
        "circle": '<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        "square": '<path class="mark" d="M{x:.1f} {y:.1f}m-4.5-4.5h9v9h-9z"/>',
        "cross": '<path class="cross" d="M{x:.1f} {y:.1f}m-4-4l8 8m0-8l-8 8"/>',
    }
    return "".join(shapes[one.mark].format(x=x, y=y) for x, y in places)


def shade(share: float) -> tuple[str, str]:
    """The colour of a place of a map between the worst (0) and the best (1), and one to write on it with."""
    colour = [
        round(a + (b - a) * share) for a, b in zip((226, 238, 249), (8, 48, 107), strict=True)
    ]
    return f"rgb{tuple(colour)}", "#fff" if share > 0.62 else "#111"


def position(value: float, low: float, high: float, *, log: bool) -> float:
    """Where a value is on an axis, of which `low` is 0 and `high` is 1."""
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def ticks(low: float, high: float, *, log: bool = False, least: float = 0) -> list[float]:
    """Three to six round numbers between two bounds."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            found = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
            if len(found) >= 3:
                return found[:: math.ceil(len(found) / 6)]
    unit = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(least, next(unit * m for m in (1, 2, 5, 10) if (high - low) / (unit * m) <= 5))
    return [
        step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def _heat_cell(cell: Cell, where: str, scale: Sequence[float]) -> str:
    note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
    if cell.value is None or not math.isfinite(cell.value):
        return f'<td class="blank"{where}>{note}</td>'
    far = scale.index(cell.value) / (len(scale) - 1) if len(scale) > 1 else 1.0
    colour, ink = shade(far)
    style = f' style="background:{colour};color:{ink}"'
    best = ' class="best"' if cell.best else ""
    return f"<td{best}{where}{style}>{cell.value:.3f}{note}</td>"
