"""How fast the two streams are against MMCA as the original computes it, and against plain causal attention.

    python -m tests.benchmarks.mmca [--write tests/benchmarks/results] [--json] [--only CASE ...]
    python -m tests.benchmarks.mmca --device cuda --precision bf16 --size 7b [--peak-tflops 989]

Prints a table of every case with its targets, or one JSON document; `--write` also leaves both in a folder,
and a chart. About ten minutes on a core and 20 GiB of memory. Progress goes to stderr. On a GPU the last
columns tell the operations that a result needs (`tests.benchmarks.training`) a second, and as a share of
`--peak-tflops`, the device's own peak at that precision: the model FLOP utilisation.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks import chatting, results, training
from tests.benchmarks.case import CAUSAL, ORIGINAL, Case, Target
from tests.benchmarks.measure import MALLOC, in_turns, peak_mib
from tests.benchmarks.setting import SIZES, Setting

CASES: dict[str, Callable[[Setting], Case]] = {
    "attention-few": lambda setting: training.attention(
        setting, setting.size.few, {ORIGINAL: Target(6), CAUSAL: Target(1.4)}
    ),
    "attention-many": lambda setting: training.attention(
        setting, setting.size.many, {ORIGINAL: Target(12, 25), CAUSAL: Target(1.5)}
    ),
    "layers": lambda setting: training.layers(setting, {ORIGINAL: Target(5), CAUSAL: Target(1.25)}),
    "loss": lambda setting: training.loss(setting, {ORIGINAL: Target(6, 10)}),
    "step": lambda setting: training.step(setting, {ORIGINAL: Target(3)}),
    "second-round": lambda setting: chatting.second_round(setting, {chatting.ANEW: Target(5)}),
    "known-images": lambda setting: chatting.known_images(setting, {chatting.ANEW: Target(1)}),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for its utilisation")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device(options.device)
        setting = Setting(SIZES[options.size], device, options.precision, Path(folder))
        if options.memory:
            print(
                json.dumps(peaks(*(CASES[name](setting) for name in options.only), device=device))
            )
            return
        began, measured = time.monotonic(), []
        for name in options.only:
            print(f"{time.monotonic() - began:4.0f} s  {name}", file=sys.stderr)
            measured.append(measure(name, setting, options))
    document = {
        "machine": machine(device) | {"precision": options.precision, "size": options.size},
        "command": f"python -m tests.benchmarks.mmca {' '.join(sys.argv[1:])}".strip(),
        "seconds": round(time.monotonic() - began),
        "cases": measured,
    }
    print(json.dumps(document, indent=1) if options.json else results.table(document))
    if options.write:
        results.write(document, options.write)


def measure(name: str, setting: Setting, options: argparse.Namespace) -> dict:
    """What there is to tell of a case."""
    case = CASES[name](setting)
    figures = in_turns(case.ways, rounds=case.rounds, device=setting.device)
    if setting.device.type == "cuda":
        found = peaks(case, device=setting.device)
    elif any(target.smaller for target in case.targets.values()):
        found = _peaks_in_a_process(name, options)
    else:
        found = {}
    for way, peak in found.items():
        figures[way].peak_mib = peak
    return results.summary(name, case, figures, options.peak_tflops)


def peaks(case: Case, *, device: torch.device) -> dict[str, float]:
    """MiB that each way adds at its peak."""
    return {way: peak_mib(ready(), device) for way, ready in case.ways.items()}


def _peaks_in_a_process(name: str, options: argparse.Namespace) -> dict[str, float]:
    """The same, from a process that does nothing else."""
    command = [sys.executable, "-m", "tests.benchmarks.mmca", "--only", name, "--memory"]
    command += ["--size", options.size, "--precision", options.precision]
    done = subprocess.run(
        command, env=os.environ | MALLOC, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: torch.device) -> dict[str, str | int]:
    """What figures depend on beside the code."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif (info := Path("/proc/cpuinfo")).exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        name = models[0].split(": ")[1] if models else name
    threads = torch.get_num_threads()
    return {
        "device": name,
        "cores": os.cpu_count() or 0,
        "threads": threads,
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
