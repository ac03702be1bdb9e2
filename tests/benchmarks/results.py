"""What was measured, as a document, a table and a chart."""

import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tests.benchmarks.case import OURS, Case
from tests.benchmarks.measure import Figures, ratios, spread

WIDTH, ROW, LABELS = 860, 22, 400
"""Of the chart, its bars and what stands before them, in pixels."""
COLOURS = {"as the original": "#8c6d9e"}
OTHERS = "#2f7f79"


def summary(name: str, case: Case, figures: dict[str, Figures], peak_tflops: float | None) -> dict:
    """A case as plain data: every way, and how ours compares with each rival."""
    ours = figures[OURS]
    ways, rivals = {}, {}
    for way, found in figures.items():
        median, *_ = spread(found.seconds)
        rate = case.flops[way] / median if way in case.flops else None
        ways[way] = {
            "seconds": spread(found.seconds),
            "wall": spread(found.wall),
            "peak_mib": found.peak_mib,
            "tokens_per_s": case.positions / median if case.positions else None,
            "tflops": rate / 1e12 if rate else None,
            "utilisation": rate / 1e12 / peak_tflops if rate and peak_tflops else None,
        }
        if way in case.targets:
            target, faster = case.targets[way], spread(ratios(found, ours))
            smaller = found.peak_mib / ours.peak_mib if found.peak_mib and ours.peak_mib else None
            rivals[way] = {
                "faster": faster,
                "faster_target": target.faster,
                "smaller": smaller,
                "smaller_target": target.smaller,
                "met": faster[0] >= target.faster
                and (target.smaller is None or (smaller or 0) >= target.smaller),
            }
    rounds = len(ours.seconds)
    return {"name": name, "title": case.title, "rounds": rounds, "note": case.note,
            "ways": ways, "rivals": rivals}  # fmt: skip


def table(document: dict[str, Any]) -> str:
    """All cases as Markdown."""
    machine = document["machine"]
    lines = [
        f"`{document['command']}`, {document['seconds']} s in all.",
        f"{machine['device']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['precision']}. Seconds are of the processor; medians, least and most in brackets.",
    ]
    for case in document["cases"]:
        lines += ["", f"### {case['title']}", ""]
        if case["note"]:
            lines += [case["note"], ""]
        lines += [
            f"| {case['rounds']} rounds | seconds | wall | tokens/s | TFLOP/s | peak MiB | dsvl is faster | "
            "and smaller |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [_row(way, found, case["rivals"].get(way)) for way, found in case["ways"].items()]
    return "\n".join(lines)


def _row(way: str, found: dict[str, Any], rival: dict[str, Any] | None) -> str:
    share = found["utilisation"]
    cells = [
        way,
        _spread(found["seconds"]),
        _short(found["wall"][0]),
        _short(found["tokens_per_s"]),
        _short(found["tflops"]) + (f" ({share:.0%})" if share else ""),
        _short(found["peak_mib"]),
    ]
    if rival:
        cells.append(_times(rival["faster"][0], rival["faster_target"], rival["faster"]))
        cells.append(_times(rival["smaller"], rival["smaller_target"]))
    else:
        cells += ["", ""]
    return f"| {' | '.join(cells)} |"


def _times(value: float | None, target: float | None, spread: Sequence[float] = ()) -> str:
    """How many times, and whether that reaches the target."""
    if value is None:
        return ""
    found = (_spread(spread) if spread else _short(value)) + "×"
    if target is None:
        return found
    return f"{found}, {'met' if value >= target else 'MISSED'}: {target:g}×"


def _spread(values: Sequence[float]) -> str:
    median, least, most = map(_short, values)
    return f"{median} [{least}..{most}]"


def _short(value: float | None) -> str:
    """Three digits of a number."""
    if value is None:
        return ""
    return (
        f"{value:,.0f}"
        if value >= 100
        else f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
    )


def chart(document: dict[str, Any]) -> str:
    """How many times faster ours is, as SVG: a bar a rival, its spread, and a tick at the target."""
    bars = [
        (case["title"], way, rival["faster"], rival["faster_target"])
        for case in document["cases"]
        for way, rival in case["rivals"].items()
    ]
    most = max(faster[2] for *_, faster, _ in bars)
    scale = (WIDTH - LABELS - 60) / math.log10(most)
    height = ROW * (1 + len(bars) + len(document["cases"])) + 30

    def at(times: float) -> float:
        return LABELS + scale * math.log10(max(1.0, times))

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" '
        'font-size="12" fill="#222">',
        "<title>How many times faster dsvl is</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
        '<text x="8" y="18">So many times faster is dsvl (line: least to most; red: target)</text>',
    ]
    for times in (1, 2, 5, 10, 20, 50, 100):
        if times <= most:
            x = f"{at(times):.1f}"
            parts.append(f'<path d="M{x} {ROW}V{height - 22}" stroke="#ddd"/>')
            parts.append(f'<text x="{x}" y="{height - 8}" text-anchor="middle">{times}×</text>')
    y, before = 4.0 + ROW, ""
    for title, way, (median, low, high), target in bars:
        if title != before:
            parts.append(f'<text x="8" y="{y + 15}" font-weight="bold">{escape(title)}</text>')
            y, before = y + ROW, title
        middle, end = y + ROW / 2, at(median)
        parts += [
            f'<text x="{LABELS - 8}" y="{middle + 4}" text-anchor="end">{escape(way)}</text>',
            f'<rect x="{LABELS}" y="{y + 4}" width="{end - LABELS:.1f}" height="{ROW - 8}" '
            f'fill="{COLOURS.get(way, OTHERS)}"/>',
            f'<path d="M{at(low):.1f} {middle}H{at(high):.1f}" stroke="#222"/>',
            f'<path d="M{at(target):.1f} {y + 1}V{y + ROW - 1}" stroke="#d33" stroke-width="2"/>',
            f'<text x="{at(high) + 6:.1f}" y="{middle + 4}">{median:.3g}×</text>',
        ]
        y += ROW
    return "\n".join([*parts, "</svg>\n"])


def write(document: dict[str, Any], folder: Path) -> None:
    """Leave the document, its table and its chart in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "mmca.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (folder / "mmca.md").write_text(table(document) + "\n", encoding="utf-8")
    (folder / "mmca.svg").write_text(chart(document), encoding="utf-8")
