"""How a report looks: its style, and its figures as inline SVG and HTML.

They load nothing from elsewhere, follow the reader's light or dark theme, and escape every text.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Point = tuple[float, float]
Attributes = Mapping[str, object]
Mark = Literal["", "circle", "square", "cross"]

COLOURS = 6
"""Colours that stay apart for colour-blind readers, as classes c0, c1, ..."""
WIDTH, HEIGHT = 380, 230
"""Of a chart, in pixels; small enough to be read unscaled on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 34, 38

STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f7f9;--ink:#1c2024;--soft:#5a626b;
--line:#d9dde2;--c0:#0063a6;--c1:#c04a00;--c2:#007a5a;--c3:#a23c7c;--c4:#7a6400;--c5:#4b4f9f;
--good:#006b4f;--bad:#b02a00}
@media (prefers-color-scheme:dark){:root{--page:#14171a;--card:#1d2125;--ink:#e8eaec;
--soft:#a5adb5;--line:#363c42;--c0:#5bb0ea;--c1:#ff9a4d;--c2:#3ccba0;--c3:#ea94c4;--c4:#dcc34a;
--c5:#a9acf5;--good:#4fd3a8;--bad:#ff9472}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:75rem;padding:1.5rem 1.25rem 4rem;background:var(--page);
color:var(--ink);font:1rem/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 .5rem}h2{font-size:1.25rem;margin:2.6rem 0 .6rem}
h3{font-size:1rem;margin:1.8rem 0 .4rem}p{max-width:46rem;margin:.4rem 0}.lead{font-size:1.13rem}
.soft,figcaption,caption{color:var(--soft);font-size:.875rem}
code,pre{font:.875rem/1.5 ui-monospace,monospace}
pre{background:var(--card);padding:.8rem 1rem;border-radius:.4rem;white-space:pre-wrap;
overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.75rem;
margin:1.2rem 0}.cards div{background:var(--card);border-radius:.4rem;padding:.7rem .9rem}
.cards b{display:block;font-size:1.45rem;line-height:1.3}
.cards span{color:var(--soft);font-size:.875rem}
.grid,.chats{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr));
gap:1rem 1.5rem}figure{margin:0}
.chart{display:block;width:100%;max-width:30rem;height:auto;font:12px system-ui,sans-serif}
.chart text{fill:var(--soft)}.chart .title{fill:var(--ink);font-weight:600;font-size:13px}
.chart .rule{stroke:var(--line);stroke-width:1}
.chart polyline{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}
.chart polyline.thin{stroke-width:1.2}.chart polyline.faint{opacity:.3;stroke-width:1}
.chart polyline.dash{stroke-dasharray:5 3}
.chart .mark{fill:currentColor;stroke:var(--page);stroke-width:1}
.chart .cross{fill:none;stroke:currentColor;stroke-width:2.2}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.3rem;margin:.4rem 0 .8rem;font-size:.875rem}
.legend span{display:flex;align-items:center;gap:.45rem}.legend svg{width:26px;height:10px}
table{border-collapse:collapse;font-size:.925rem}
th,td{text-align:left;padding:.3rem .9rem .3rem 0;vertical-align:top}
thead th{color:var(--soft);font-weight:500;border-bottom:1px solid var(--line)}
.facts th{color:var(--soft);font-weight:400;padding-right:1.5rem}
.trials{width:100%}.trials td{border-bottom:1px solid var(--line)}.trials .best{font-weight:600}
.number,.number td{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.heat{width:100%;max-width:30rem;table-layout:fixed}
.heat caption{text-align:left;padding:0 0 .3rem;color:var(--ink);font-weight:600}
.heat th{color:var(--soft);font-weight:500;text-align:center;padding:.2rem;border:0;width:5rem;
vertical-align:middle}.heat thead th{width:auto}.heat thead th:first-child{width:5rem}
.heat td{text-align:center;padding:.5rem .1rem;border:2px solid var(--page);height:3.6rem;
font-variant-numeric:tabular-nums;vertical-align:middle;line-height:1.25}
.heat small{display:block}.heat .blank{color:var(--soft);box-shadow:inset 0 0 0 1px var(--line)}
.heat .best{outline:3px solid var(--c1);outline-offset:-3px;font-weight:700}
.bars{display:grid;grid-template-columns:auto 1fr;gap:.25rem .7rem;align-items:center;
font-size:.9rem;max-width:30rem;margin-top:.4rem}
.bars div{display:flex;align-items:center;gap:.5rem}
.bars i{height:1.05rem;background:currentColor;border-radius:2px;min-width:2px}
.bars b{color:var(--ink);font-weight:500;white-space:nowrap}
.chat{background:var(--card);border-radius:.4rem;padding:.8rem 1rem}
.chat dl{margin:.3rem 0 .9rem;display:grid;grid-template-columns:auto 1fr;gap:.1rem .8rem}
.chat dt{color:var(--soft)}.chat dd{margin:0;min-width:0}
.images{display:flex;flex-wrap:wrap;gap:.6rem}
.images img{display:block;max-width:100%;max-height:18rem;border:1px solid var(--line)}
.images .small{image-rendering:pixelated;width:6rem;height:auto}
.right{color:var(--good);font-weight:600}
.wrong{color:var(--bad);font-weight:600;text-decoration:underline dotted;
text-underline-offset:3px}
@media (min-width:60.01rem){.trials td:first-child{white-space:nowrap}}
@media (max-width:60rem){.trials thead{display:none}
.trials tr{display:grid;grid-template-columns:repeat(auto-fill,minmax(6rem,1fr));
padding:.5rem 0;border-bottom:1px solid var(--line)}
.trials td{border:0;padding:.1rem .5rem .1rem 0;text-align:left;white-space:normal;min-width:0}
.trials td:nth-child(-n+2){grid-column:1/-1}
.trials td:nth-child(n+3)::before{content:attr(data-label);display:block;color:var(--soft);
font-size:.78rem;font-weight:400}}
@media (max-width:40rem){body{padding:1rem .9rem 3rem}
.facts th,.facts td{display:block;padding:0}.facts td{padding-bottom:.5rem}}
"""


@dataclass(frozen=True)
class Series:
    """A line of a chart, or a set of marks."""

    points: Sequence[Point]
    label: str = ""
    """Shown when the reader points at it."""
    look: str = "c0"
    """Classes: a colour, and `dash` or `faint`."""
    mark: Mark = ""
    """A mark at each point instead of a line through them."""


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map."""

    value: float | None
    """What colours the cell and is written in it; without one the cell is blank."""
    note: str = ""
    """Written below the value."""
    best: bool = False


def attributes(values: Attributes) -> str:
    """Attributes of an HTML tag, escaped."""
    return "".join(f' {name}="{escape(str(value))}"' for name, value in values.items())


def short(value: float) -> str:
    """A number in as few characters as its first three digits need."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}".replace("e-0", "e-")


def percent(value: float) -> str:
    """A share for an axis."""
    return f"{value:.0%}"


def chart(
    series: Sequence[Series],
    *,
    title: str,
    x: str,
    shares: bool = False,
    zero: bool = False,
    frame: Sequence[Point] = (),
) -> str:
    """A chart as inline SVG; its y axis is logarithmic where the values span an order of magnitude.

    `shares` runs the y axis over 0..1 in percent; `zero` starts it at zero; `frame` holds points
    that the axes cover as well. Values that are not finite are left out.
    """
    drawn = [[p for p in one.points if math.isfinite(p[1])] for one in series]
    flat = [point for points in drawn for point in points]
    if flat:
        flat += [point for point in frame if math.isfinite(point[1])]
    else:
        return f'<p class="soft">{escape(title)}: nothing measured yet.</p>'
    xs, ys = [p[0] for p in flat], [p[1] for p in flat]
    low, high = (0.0, 1.0) if shares else (0.0 if zero else min(ys), max(ys))
    log = low > 0 and high / low > 10
    if high == low:
        low, high = low - 0.5, high + 0.5
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def across(value: float) -> float:
        return LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        position = (
            math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        )
        return HEIGHT - BOTTOM - position * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text class="title" x="4" y="14">{escape(title)}</text>']
    written = percent if shares else short
    for tick in _ticks(low, high, log=log):
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" '
                     f'y2="{up(tick):.1f}"/><text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" '
                     f'text-anchor="end">{written(tick)}</text>')  # fmt: skip
    for tick in _ticks(left, right, least=1):
        parts.append(f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                     f'text-anchor="middle">{short(tick)}</text>')  # fmt: skip
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{escape(x)}</text>')
    for one, points in zip(series, drawn, strict=True):
        places = [(across(a), up(b)) for a, b in points]
        parts.append(
            f'<g class="{one.look}"><title>{escape(one.label)}</title>{_drawn(one, places)}</g>'
        )
    where = attributes({"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "aria-label": title})
    return f'<svg class="chart"{where}>{"".join(parts)}</svg>'


def legend(names: Sequence[tuple[str, str]]) -> str:
    """(look, name) pairs, above charts that share them."""
    items = []
    for look, name in names:
        one = Series([(13, 5)] if "mark" in look else [], look=look, mark="circle")
        shape = _drawn(one, one.points) or f'<polyline class="{look}" points="0,5 26,5"/>'
        drawing = f'<svg class="chart {look}" viewBox="0 0 26 10">{shape}</svg>'
        items.append(f"<span>{drawing}{escape(name)}</span>")
    return f'<div class="legend">{"".join(items)}</div>' if items else ""


def heat(
    cells: Mapping[tuple[float, float], Cell],
    *,
    caption: str,
    names: tuple[str, str],
    scale: Sequence[float],
    data: Attributes,
) -> str:
    """A heat map as a table; the (row, column) of a cell are numbers, `names` says of what.

    `scale` holds all values from the lightest to the darkest: one that is far off leaves the others
    apart. Each cell carries its row and column as data attributes, beside those in `data`.
    """
    rows, columns = (sorted({key[axis] for key in cells}) for axis in (0, 1))
    head = "".join(f'<th scope="col">{short(column)}</th>' for column in columns)
    lines = []
    for row in rows:
        line = [f'<th scope="row">{escape(names[0])} {short(row) if names[0] else ""}</th>']
        for column in columns:
            cell = cells.get((row, column), Cell(None))
            where = attributes({**data, "data-row": row, "data-column": column})
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


def thin(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points, each the mean of its neighbourhood."""
    size = math.ceil(len(points) / most) or 1
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def _drawn(one: Series, places: Sequence[Point]) -> str:
    if not one.mark:
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        return f'<polyline class="{one.look}" points="{way}"/>'
    shapes = {
        "circle": '<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        "square": '<path class="mark" d="M{x:.1f} {y:.1f}m-4.5-4.5h9v9h-9z"/>',
        "cross": '<path class="cross" d="M{x:.1f} {y:.1f}m-4-4l8 8m0-8l-8 8"/>',
    }
    return "".join(shapes[one.mark].format(x=x, y=y) for x, y in places)


def _ticks(low: float, high: float, *, log: bool = False, least: float = 0) -> list[float]:
    """Three to six round numbers between two bounds."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for digits in ((1,), (1, 3), (1, 2, 5)):
            ticks = [d * 10.0**k for k in decades for d in digits if low <= d * 10.0**k <= high]
            if len(ticks) >= 3:
                return ticks[:: math.ceil(len(ticks) / 6)]
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
    colour = [round(a + (b - a) * far) for a, b in zip((226, 238, 249), (8, 48, 107), strict=True)]
    ink = "#fff" if far > 0.62 else "#111"
    style = f' style="background:rgb{tuple(colour)};color:{ink}"'
    best = ' class="best"' if cell.best else ""
    return f"<td{best}{where}{style}>{cell.value:.3f}{note}</td>"
