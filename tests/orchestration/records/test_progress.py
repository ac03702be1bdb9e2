"""A command tells how far it is on a terminal, in a line of its own, and nothing anywhere else."""

import logging
import os
import pty
import re
import sys
import threading

import pytest

from orchestration.config import Experiment, validated
from orchestration.records import progress
from orchestration.records.journal import Journal, sole
from tests.orchestration.conftest import SETTINGS


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    return validated(SETTINGS | {"storage": {"path": str(tmp_path)}})


def trained(experiment: Experiment) -> None:
    """Half of a training goes on, and says something, while its progress is shown."""
    log = logging.getLogger("orchestration.test")
    with sole(experiment.run_folder), progress.shown(experiment, "tiny"):
        journal = Journal(experiment.run_folder)
        journal.start(identity="i", params={}, step=0, steps=2000, workers=1)
        for step in range(1, 1001):
            journal.metrics(step, {"train/loss": 1.0, "throughput/tokens_per_s": 4321.0})
        log.warning("a word in between")


def test_on_a_terminal_it_is_one_line_and_what_is_logged_stays_whole(experiment, monkeypatch):
    ours, theirs = pty.openpty()
    seen: list[bytes] = []

    def read() -> None:
        while piece := os.read(ours, 65536):
            seen.append(piece)
            if b"the end" in piece:
                return

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        logging.basicConfig(stream=terminal, format="%(message)s", force=True)
        trained(experiment)
        print("the end", file=terminal, flush=True)
        reader.join()
    logging.basicConfig(force=True)
    told = b"".join(seen).decode()
    lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).strip() for line in told.splitlines()]
    assert lines.count("a word in between") == 1
    last = [line for line in lines if line.startswith("tiny")][-1]
    assert "1,000 of 2,000, 4,321 tokens/s" in last
    assert lines[-1] == "the end"


def test_elsewhere_nothing_is_said(experiment, capfd):
    logging.basicConfig(force=True, level=logging.ERROR)
    trained(experiment)
    said = capfd.readouterr()
    assert said.out + said.err == ""
