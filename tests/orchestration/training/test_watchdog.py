"""A process that hangs is ended with its stacks; one that works is not."""

import subprocess
import sys
from pathlib import Path

WORKER = """
import sys, time
from pathlib import Path
from orchestration.training.watchdog import Watchdog

def stuck():
    time.sleep(60)

watchdog = Watchdog(Path(sys.argv[1]), rank=3, seconds=float(sys.argv[2]))
for update in range(4):
    watchdog.wind(f"update {update}")
    time.sleep(0.1)
if sys.argv[3] == "hang":
    stuck()
watchdog.stop()
"""


def run(folder: Path, *, seconds: float, then: str) -> int:
    """The exit status of a worker."""
    command = [sys.executable, "-c", WORKER, str(folder), str(seconds), then]
    return subprocess.run(command, check=False, timeout=60).returncode


def test_who_hangs_is_ended_and_what_it_was_doing_is_left(tmp_path):
    assert run(tmp_path, seconds=1, then="hang") == 1
    (left,) = tmp_path.glob("rank-3.*.stacks")
    told = left.read_text()
    assert told.splitlines()[0].endswith(" update 3")
    assert "in stuck" in told


def test_who_works_is_left_alone_for_longer_than_the_clock_runs(tmp_path):
    assert run(tmp_path, seconds=0.35, then="end") == 0
    assert not list(tmp_path.iterdir())
