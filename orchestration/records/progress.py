"""How far a command is: a line on its terminal, written anew in place; nothing where stderr is none."""

import logging
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from orchestration.config import Experiment
from orchestration.pages.page import duration
from orchestration.pages.plots import short
from orchestration.status import Standing, Watch

PERIOD_SECONDS = 1.0


@contextmanager
def shown(experiment: Experiment, name: str) -> Iterator[None]:
    """Show the standing of this name, the experiment's own or that of its sweep, while the block runs."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield
        return
    watch, over = Watch(experiment), threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))

    def tell() -> None:
        for one in watch.look():
            if one.name == name:
                bars.update(task, total=one.steps, completed=one.step, told=_told(one))

    def follow() -> None:
        while not over.wait(PERIOD_SECONDS):
            tell()

    with Progress(*columns, console=console) as bars, _logs_above():
        task = bars.add_task(name, total=None, told="starting")
        follower = threading.Thread(target=follow, name="progress", daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()
            tell()


@contextmanager
def _logs_above() -> Iterator[None]:
    """Write what is logged through the stderr of this moment, which keeps it off the line."""
    handlers = [one for one in logging.root.handlers if type(one) is logging.StreamHandler]
    before = [one.stream for one in handlers]
    for one in handlers:
        one.setStream(sys.stderr)
    try:
        yield
    finally:
        for one, stream in zip(handlers, before, strict=True):
            one.setStream(stream)


def _told(one: Standing) -> str:
    of_all = f" of {one.steps:,}" if one.steps else ""
    parts = [f"{one.step:,}{of_all}"]
    parts += [f"loss {one.loss:.4g}"] if one.loss is not None else []
    parts += [f"{short(one.tokens_per_s)} tokens/s"] if one.tokens_per_s else []
    parts += [f"{duration(one.left_s)} left"] if one.left_s else []
    parts += [one.state] if one.state != "running" else []
    return ", ".join(parts)
