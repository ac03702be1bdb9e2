"""What a report says of a search across sizes: what to train, how sure that is, and what it is known by.

All of it comes from the file that `evidence` writes.
"""

from html import escape
from typing import Any

from orchestration.pages.figures import terrain
from orchestration.pages.page import facts, grid, note, number, percent, table
from orchestration.pages.plots import COLOURS, Mark, Series, chart, figure, legend
from orchestration.records.record import Record

TOLD = {"eval/loss": ("held-out loss", number), "eval/accuracy": ("held-out accuracy", percent)}
"""How a measured quantity is named and written."""


def found(record: Record) -> str:
    """What to train, what it is expected to come to, and what finding out has cost."""
    told, cost = record.evidence["recommendation"], record.evidence["cost"]
    low, high = told["loss_interval"]
    lead = (
        f"Train {told['size']} for {told['horizon']:g} epochs at a learning rate of {told['lr']:.3g}: a "
        f"held-out loss of {told['loss']:.4g} is expected ({low:.4g} to {high:.4g}, 90 %)."
    )
    spent = (
        f"Finding that out took {cost['search']:.1f} epochs of {told['size']}, of which "
        f"a grid of as many lengths takes {cost['grid']:.0f}: {cost['search'] / cost['grid']:.0%}."
    )
    listed = "".join(f"<li>{escape(reason)}</li>" for reason in told["reasons"])
    ready = note("recommended.yaml, beside this page, is that training: give it to dsvl train.")
    return (
        f"<h2>Search across sizes</h2><p class='lead'>{escape(lead)}</p><p>{escape(spent)}</p>"
        f"<ul>{listed}</ul>{ready}"
    )


def verdicts(record: Record) -> str:
    """What holds of the experiment as it stands and of the search, by which numbers."""
    rows = [
        (
            f"{one['name']}: {'yes' if one['holds'] else 'no'}",
            f"{one['evidence']}. What would settle it: {one['experiment']}.",
        )
        for one in record.evidence["verdicts"]
    ]
    recipe = record.evidence["recipe"]
    title = f"The experiment as it stands: {recipe['epochs']} epochs at {recipe['lr']:.3g}"
    return f"<h3>{escape(title)}</h3>{facts(rows)}"


def confirmed(record: Record) -> str:
    """Trainings of both with the same seeds, pair by pair."""
    pairs = record.evidence["confirmed"]
    if not pairs:
        return note("No pair of trainings has been run to confirm it: see search.confirm.")
    search = record.experiment.search
    rows, asked = [], search.confirm if search else 0
    for metric, (name, written) in TOLD.items():
        measured = pairs[metric]
        means = [sum(measured[side]) / len(measured[side]) for side in ("before", "after")]
        difference = "of two pairs at least"
        if measured["difference"]:
            middle, low, high = (f"{value:+.4f}" for value in measured["difference"])
            difference = f"{middle} ({low} to {high}, 95 %)"
        count = f"{len(measured['before'])} of {asked}"
        cells = (name, *map(written, means), difference, count)
        rows.append(({"data-metric": metric}, cells))
    head = (
        "mean over seeds",
        "as it stands",
        "as recommended",
        "difference of pairs",
        "pairs finished",
    )
    return f"<h3>Held to one another, with the same seeds</h3>{table(head, rows)}"


def laws(record: Record) -> str:
    """What is foretold of the target and was seen there, and how the best rate moves with size."""
    return (
        f"<h3>What it is known by</h3>{grid([_target(record.evidence), _rates(record.evidence)])}"
    )


def maps(record: Record) -> str:
    """What the law says of each size over rates and epochs, its ridge, and what was trained there."""
    evidence = record.evidence
    told, target = evidence["recommendation"], evidence["sizes"][-1]["name"]
    figures = []
    for size in evidence["sizes"]:
        name = size["name"]
        losses = {(p["lr"], p["epochs"]): p["loss"] for p in evidence["maps"][name]}
        marks = []
        for trunk in evidence["trunks"]:
            for epochs, loss in zip(evidence["horizons"], trunk["losses"], strict=False):
                if trunk["size"] == name:
                    seen = f"{loss:.4f}" if loss else "diverged"
                    label = f"{epochs:g} epochs at {trunk['lr']:.3g}: {seen}"
                    mark: Mark = "circle" if loss else "cross"
                    look = "c2" if name == target else "c4"
                    marks.append(Series([(trunk["lr"], epochs)], label, look, mark))
        if name == target:
            label = f"recommended: {told['horizon']:g} epochs at {told['lr']:.3g}"
            marks.append(Series([(told["lr"], told["horizon"])], label, "c1", "square"))
        figures.append(terrain(losses, evidence["best_rates"][name], marks, title=name))
    names = [
        ("c1", "best rate by the law, 90 %"),
        ("c4 mark", "trained"),
        ("c2 mark", "trained at the target, to verify"),
    ]
    explained = note(
        "Darker is a lower loss by the law, each size by itself. ■ recommended, ✕ diverged."
    )
    return f"<h3>Loss by rate and epochs</h3>{legend(names)}{explained}{grid(figures)}"


def _target(evidence: dict[str, Any]) -> str:
    """Loss by rate, a line for each number of epochs; marks are trials."""
    target, horizons = evidence["sizes"][-1]["name"], evidence["horizons"][-COLOURS:]
    series, names = [], []
    for place, epochs in enumerate(horizons):
        points = [(p["lr"], p["loss"]) for p in evidence["surface"] if p["epochs"] == epochs]
        series.append(Series(sorted(points), f"{epochs:g} epochs, foretold", f"c{place}"))
        names.append((f"c{place}", f"{epochs:g} epochs"))
        at = evidence["horizons"].index(epochs)
        for trunk in evidence["trunks"]:
            if trunk["size"] == target and len(trunk["losses"]) > at and trunk["losses"][at]:
                seen = [(trunk["lr"], trunk["losses"][at])]
                label = f"{epochs:g} epochs at {trunk['lr']:.3g}: {trunk['losses'][at]:.4f}"
                series.append(Series(seen, label, f"c{place}", "circle"))
    title = f"{target}: loss, foretold (lines) and seen (marks)"
    return figure(chart(series, title=title, x="learning rate", log_x=True), names)


def _rates(evidence: dict[str, Any]) -> str:
    """The best rate of each size for the middle number of epochs, with its interval, and what was tried."""
    middle = len(evidence["horizons"]) // 2
    best, series = [], []
    for size in evidence["sizes"]:
        count = size["parameters"]
        probable, low, high = evidence["best_rates"][size["name"]][middle]
        best.append((count, probable))
        label = f"{size['name']}: {probable:.3g} ({low:.3g} to {high:.3g}, 90 %)"
        series.append(Series([(count, low), (count, high)], label, "c0"))
        for trunk in evidence["trunks"]:
            if trunk["size"] == size["name"]:
                mark: Mark = "circle" if all(trunk["losses"]) else "cross"
                tried = f"{size['name']} at {trunk['lr']:.3g}"
                series.append(Series([(count, trunk["lr"])], tried, "c1", mark))
    series.append(Series(best, "best rate", "c0 dash"))
    title = f"best learning rate for {evidence['horizons'][middle]:g} epochs, by size"
    names = [("c0", "best rate, 90 %"), ("c1 mark", "tried")]
    return figure(chart(series, title=title, x="parameters", log_x=True), names)


SECTIONS = (found, verdicts, confirmed, laws, maps)
"""In the order of the page."""
