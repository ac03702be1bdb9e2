"""What a cluster runs of a submitted command, `python -m jobs.work VERB FILE`; the run keeps what it says."""

import subprocess
import sys

from orchestration.compose import load
from orchestration.records.results import logs


def main(arguments: list[str]) -> int:
    """The exit status of the command; 128 + N where signal N ended it."""
    folder = logs(load(arguments[1]).run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "orchestration.cli", *arguments]
    with (folder / "driver.log").open("ab") as log:
        work = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for line in work.stdout or ():
            for sink in (log, sys.stdout.buffer):
                sink.write(line)
                sink.flush()
    return code if (code := work.wait()) >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
