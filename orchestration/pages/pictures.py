"""The charts and heat maps of a page as PNGs, for MLflow: the same drawings, on white."""

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import resvg_py

from orchestration.pages.page import STYLE

FOUND = re.compile(
    r'<h[23]>|<div class="legend">(?P<shared>.*?)</div>|<table class="heat"><caption>(?P<map>.*?)</caption>'
    r'(?P<cells>.*?)</table>|<svg class="chart\b[^"]*" viewBox="0 0 (?P<width>\d+) (?P<height>\d+)" '
    r'role="img" aria-label="(?P<title>[^"]*)">(?P<chart>.*?)</svg>'
    r'(?:<div class="legend">(?P<own>.*?)</div>)?',
    re.DOTALL,
)
NAME = re.compile(r"<span><svg (?P<shape>.*?)</svg>(?P<name>.*?)</span>", re.DOTALL)
CELL = re.compile(
    r"<t[hd](?P<about>[^>]*)>(?P<value>[^<]*)(?:<small>(?P<note>.*?)</small>)?</t[hd]>", re.DOTALL
)
COLOURS = re.compile(r"background:(?P<ground>[^;]+);color:(?P<ink>[^\"]+)")
MAP_WIDTH, ROW, TALL = 480, 18, 52
"""Of a heat map; the heights of a line of a legend and of a row of a map."""
ZOOM = 2


def write(page: str, folder: Path) -> list[Path]:
    """Draw every figure of a page, a chart with its own legend or that of its section; named by titles."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, str] = {}
    seen, shared = Counter[str](), ""
    for found in FOUND.finditer(page):
        if found["chart"]:
            drawing, title = _chart(found, found["own"] or shared), found["title"]
        elif found["map"]:
            drawing, title = _map(found), f"map {found['map']}"
        else:
            shared = found["shared"] or ""  # none, where a section begins
            continue
        title = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        seen[title] += 1
        files[f"{title}-{seen[title]}.png" if seen[title] > 1 else f"{title}.png"] = drawing
    for name, drawing in files.items():
        (folder / name).write_bytes(_png(drawing))
    return [folder / name for name in files]


def _chart(found: re.Match[str], legend: str) -> str:
    """A chart, and what its lines mean a row each below it."""
    width, height = int(found["width"]), int(found["height"])
    rows = []
    for item in NAME.finditer(legend):
        rows.append(
            f'<svg x="48" y="{height + 4}" width="26" height="10" {item["shape"]}</svg>'
            f'<text x="82" y="{height + 13}">{item["name"]}</text>'
        )
        height += ROW
    return _svg(width, height + 4, found["chart"] + "".join(rows))


def _map(found: re.Match[str]) -> str:
    """A heat map, whose first row and column name the others."""
    lines = [list(CELL.finditer(line)) for line in found["cells"].split("</tr>")[:-1]]
    wide = MAP_WIDTH / len(lines[0])
    parts = [f'<text class="title" x="4" y="14">{found["map"]}</text>']
    for row, line in enumerate(lines):
        for column, cell in enumerate(line):
            x, y = wide * column, 24 + TALL * row - (row > 0) * TALL / 2
            colours = COLOURS.search(cell["about"])
            ink = f' style="fill:{colours["ink"]}"' if colours else ""
            edge = ' stroke="#c04a00" stroke-width="3"' if "best" in cell["about"] else ""
            if colours:
                parts.append(f'<rect x="{x + 2:.1f}" y="{y + 2}" width="{wide - 4:.1f}" '
                             f'height="{TALL - 4}" fill="{colours["ground"]}"{edge}/>')  # fmt: skip
            for place, text in enumerate(filter(None, (cell["value"], cell["note"]))):
                down = TALL / (2 if row else 4) + 4 + ROW * place - 8 * bool(cell["note"])
                parts.append(f'<text x="{x + wide / 2:.1f}" y="{y + down}" '
                             f'text-anchor="middle"{ink}>{text}</text>')  # fmt: skip
    return _svg(MAP_WIDTH, 30 + TALL * len(lines) - TALL // 2, "".join(parts))


def _svg(width: int, height: int, inside: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" font-family="DejaVu Sans" font-size="12" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}">{inside}</svg>'
    )


def _png(drawing: str) -> bytes:
    """A drawing in the light version of the page's style, with fonts that are there everywhere."""
    values = dict(re.findall(r"(--\w+):([^;}]+)", STYLE.partition("@media")[0]))
    rules = "\n".join(re.findall(r"^\.(?:chart |c\d).*$", STYLE, re.MULTILINE))
    drawing, rules = (
        re.sub(r"var\((--\w+)\)", lambda found: values[found[1]], text) for text in (drawing, rules)
    )
    matplotlib = find_spec("matplotlib")  # MLflow requires it
    assert matplotlib is not None
    assert matplotlib.origin is not None
    fonts = Path(matplotlib.origin).parent / "mpl-data/fonts/ttf"
    return resvg_py.svg_to_bytes(
        svg_string=drawing, style_sheet=rules, background="#fff", zoom=ZOOM, skip_system_fonts=True,
        font_files=[str(fonts / name) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf")],
    )  # fmt: skip
