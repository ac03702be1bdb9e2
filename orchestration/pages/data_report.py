"""What the page of a run says of its data: what was lost on the way, and what an epoch is made of."""

from pathlib import Path
from typing import Any

from orchestration.pages.page import facts, grid, note, picture, table
from orchestration.pages.plots import COLOURS, Series, bars, chart, legend, outline
from orchestration.preparing.statistics import measure
from orchestration.records.record import Data, Record, read_data, read_images, read_shown

SHOWN = 4
"""Images of a set."""


def data(record: Record) -> str:
    """How many samples there are, and what was lost on the way to them."""
    if record.prepared is None:
        return note("The storage holds no prepared data of this experiment.")
    found = read_data(record.prepared)
    splits = found.splits
    rows = [("samples", f"{splits['train']:,} to train, {splits['eval']:,} held out")]
    rows.append(("images", f"{found.images:,}"))
    for name, source in found.sources.items():
        lost = found.lost[name]
        told = ", ".join(f"{count:,} {reason}" for reason, count in sorted(lost.items()))
        kept = f"{source['raw']:,} records, {source['used']:,} used, {lost.total():,} quarantined"
        rows.append((f"set {name}", f"{kept}: {told}" if told else kept))
    try:
        drawn = _epoch(measure(record.experiment, record.prepared))
    except ValueError as error:  # an earlier version prepared them
        drawn = note(str(error))
    return f"<h2>Data</h2>{facts(rows)}{drawn}{_images(record.prepared)}{_quarantine(found)}"


def _images(prepared: Path) -> str:
    """Some of the images of each set."""
    keys = {key: name for name, some in read_shown(prepared, SHOWN).items() for key in some}
    images = read_images(prepared, set(keys))
    figures = (picture(f"{name}: {images[key]['path']}", images[key]) for key, name in keys.items())
    return (
        f'<h3>Some of the images</h3><div class="images">{"".join(figures)}</div>' if keys else ""
    )


def _quarantine(found: Data) -> str:
    """The first records that were lost, of every set and for every reason."""
    rows = [
        ({}, (f"{one['source']}: {one['reason']}", one["record"], one["detail"] or ""))
        for some in found.examples.values()
        for one in some
    ]
    if not rows:
        return ""
    told = note(
        "The first of each reason; all of them are in quarantine.jsonl of the prepared data."
    )
    return f"<h3>Quarantine</h3>{told}{table(('why', 'record', 'what'), rows)}"


def _epoch(measured: dict[str, Any]) -> str:
    """What a training epoch is made of: its blends, and how long their samples are."""
    blends = {
        name: (f"c{place % COLOURS}" + " dash" * (place >= COLOURS), sides["train"])
        for place, (name, sides) in enumerate(measured["blends"].items())
        if sides["train"]["samples"]
    }
    figures = []
    for length, width in measured["bins"].items():
        lines = [
            Series(outline(of[length]["histogram"], width=width), name, look)
            for name, (look, of) in blends.items()
        ]
        figures.append(chart(lines, title=f"{length} a sample, % of samples", x=length))
    for unit in ("samples", "tokens"):
        shares = [(name, of[f"share_of_{unit}"], look) for name, (look, of) in blends.items()]
        figures.append(bars(f"The mix, by {unit}", shares, caption="of a training epoch"))
    return legend((look, name) for name, (look, _) in blends.items()) + grid(figures)
