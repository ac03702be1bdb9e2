"""How the standings of runs are told: a table in a terminal, written anew while someone watches."""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import StringIO
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from orchestration.pages.page import duration
from orchestration.pages.plots import short
from orchestration.problems import harmless
from orchestration.status import Standing, Watch

PERIOD_SECONDS = 2.0
WIDTH = 200
"""Of a table that goes to a file."""
LEAST = 20
"""Characters of a name that a narrow terminal leaves in a line."""
BAR = 10
"""Characters of a bar of progress."""
COLOURS = {
    "running": "green",
    "finished": "blue",
    "stopped": "blue",
    "not begun": "cyan",
    "starting": "cyan",
    "restarting": "yellow",
    "silent": "yellow",
    "failed": "red",
    "damaged": "red",
    "killed": "red",
}
HEAD = (
    "run",
    "state",
    "progress",
    "left",
    "tokens/s",
    "loss",
    "restarts",
    "undone",
    "GPU-h",
    "money",
)


def render(standings: Sequence[Standing], *, terminal: bool) -> str:
    """The table as a text, with why runs failed below it; as wide as the terminal that it is meant for."""
    width = shutil.get_terminal_size().columns if terminal else WIDTH
    console = Console(file=StringIO(), width=width, force_terminal=terminal, highlight=False)
    with console.capture() as captured:
        console.print(_view(standings))
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def shipped(synced: Mapping[str, Any]) -> str:
    """What a synchronisation with MLflow came to, as a line."""
    waits = "".join(f"; {folder} is at work and ships by itself" for folder in synced["at_work"])
    return f"\n{synced['store']} has {synced['runs']} runs{waits}"


def watch(source: Watch) -> list[Standing]:
    """Show the table on stderr, anew every few seconds, until Ctrl-C; returns the last standings.

    Raises:
        ValueError: if nobody can watch, stderr being no terminal.
    """
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        raise ValueError("--watch: needs a terminal to write to; leave it out, and ask again later")
    standings = source.look()
    with (
        Live(console=console, screen=True, auto_refresh=False) as live,
        suppress(KeyboardInterrupt),
    ):
        while True:
            live.update(_view(standings), refresh=True)
            time.sleep(PERIOD_SECONDS)
            standings = source.look()
    return standings


def _view(standings: Sequence[Standing]) -> Group:
    table = Table(box=None, pad_edge=False, header_style="bold")
    rows, reasons = [], []
    for standing in standings:
        for indent, one in (("", standing), *(("  ", trial) for trial in standing.trials)):
            rows.append(list(_cells(one, indent)))
            if one.state in ("failed", "damaged"):
                told = harmless(f"{one.name} {one.state}: {one.reason}")
                reasons.append(Text(told, style=COLOURS[one.state]))
    # A column in which nothing has anything to tell takes no room; names are told whole, others are cut.
    columns = {name: [row[place] for row in rows] for place, name in enumerate(HEAD)}
    shown = {name: cells for name, cells in columns.items() if name == "run" or any(cells)}
    for name, cells in shown.items():
        if name == "run":
            widest = max((cell.cell_len for cell in cells), default=0)
            table.add_column(name, overflow="fold", min_width=min(widest, LEAST))
        else:
            left = name in ("state", "progress")
            table.add_column(name, justify="left" if left else "right", no_wrap=True)
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    return Group(table, *reasons)


def _cells(one: Standing, indent: str) -> Iterator[Text]:
    yield Text(indent + harmless(one.name))
    yield Text(one.state, style=COLOURS[one.state])
    yield Text(_progress(one))
    yield Text("" if one.left_s is None else duration(one.left_s))
    yield Text("" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}")
    yield Text("" if one.loss is None else f"{one.loss:.4g}")
    yield Text(str(one.restarts or ""))
    yield Text(str(one.undone or ""))
    yield Text(short(one.gpu_hours))
    yield Text("" if one.money is None else f"{one.money:,.2f}")


def _progress(one: Standing) -> str:
    if not one.steps:
        return f"{one.step:,}"
    done = min(BAR, BAR * one.step // one.steps)
    return f"{'█' * done}{'░' * (BAR - done)} {one.step:,} of {one.steps:,}"
