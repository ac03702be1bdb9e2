"""A rehearsal of the preparation of the paper's Set2 at full scale, on made-up data of the true sizes.

    python -m tests.benchmarks.rehearsal FOLDER [--scale 1.0] [--write tests/benchmarks/results]

FOLDER gets the raw files (`raw`, 1.8 GB at scale 1) and the prepared set; give it again to go on. What comes
out is held against what the raw data were made to come to and against table 1 of the paper; time and the
largest memory of each process are measured. Pictures are small: what real ones cost, as measured by
`tests.benchmarks.loading`, is added in `real_images`.
"""

import argparse
import json
import os
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from orchestration.compose import load
from orchestration.config import Experiment
from orchestration.prepare import prepare
from tests.benchmarks import raw
from tests.benchmarks.mmca import machine
from tests.benchmarks.nine_sets import NineSets

ROOT = Path(__file__).parents[2]
TABLE_1 = {
    "llava": 49_924,
    "llava_dial": 37_818,
    "otter_mimicit_cgd": 70_940,
    "otter_mimicit_sd": 8_006,
    "otter_mimicit_sn": 487,
    "otter_mimicit_tvc": 2,
    "otter_mimicit_vst": 115,
    "llava_otter_blend": 48_869,
    "sparkles_dialogue": 6_520,
}
"""Samples of each dataset in the paper, whose grouping lost the first group of each."""
LOADING = Path(__file__).parent / "results/loading.json"
MINUTES, GIB = 30, 4
"""Targets: time in all, and memory of any process."""


class Memory(threading.Thread):
    """Watches the memory of this process and of all that it starts, until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most: dict[str, int] = defaultdict(int)
        """Kind of process -> the largest resident memory of one, bytes."""
        self._end = threading.Event()

    def run(self) -> None:
        """Look once a second."""
        own = psutil.Process()
        while not self._end.wait(1.0):
            for process in (own, *own.children(recursive=True)):
                try:
                    kind = (
                        "driver"
                        if process == own
                        else Path((process.cmdline() or ["?"])[0].split()[0]).name
                    )
                    held = process.memory_full_info().uss
                except psutil.Error:
                    continue  # it has ended
                self.most[kind] = max(self.most[kind], held)

    def stop(self) -> None:
        """End watching."""
        self._end.set()
        self.join()


def experiment(folder: Path) -> Experiment:
    """Set2 with a tokenizer and a tower that are at hand; the blends are the paper's."""
    digits = yaml.safe_load((ROOT / "configs/model/digits.yaml").read_text(encoding="utf-8"))
    path = folder / "experiment.yaml"
    settings = {
        "extends": os.path.relpath(ROOT / "configs/experiment/visualchat_13b_set2.yaml", folder),
        "name": "rehearsal",
        "model": digits["model"] | {"vision": {"kind": "clip", **digits["model"]["vision"]}},
        "storage": {"path": str(folder / "runs"), "data": str(folder / "raw")},
        "cluster": {"address": "local", "preparers": 2},
        "data": {"max_tokens": 100_000},  # a tokenizer of few words makes many tokens
    }
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return load(path)


def rehearse(folder: Path, *, scale: float) -> dict[str, Any]:
    """Make the raw data unless they are there, prepare them, and hold the counts against both tables."""
    sets = NineSets(scale)
    expected = sets.expected()
    if not (folder / "raw").is_dir():
        raw.write(folder / "raw", sets, edge=48)
    memory = Memory()
    memory.start()
    began = time.monotonic()
    result = prepare(experiment(folder), progress=lambda line: print(line, flush=True))
    seconds = time.monotonic() - began
    memory.stop()
    found = {
        name: {key: value for key, value in source.items() if key != "held_out"}
        for name, source in result["sources"].items()
    }
    straddling = {
        name: source["dropped"].pop("straddles_split", 0) for name, source in found.items()
    }
    wrong = {
        name: (source, expected[name])
        for name, source in found.items()
        if source | {"used": source["used"] + straddling[name]}
        != {key: expected[name][key] for key in source}
    }
    samples = {name: sum(sides.values()) for name, sides in result["blends"].items()}
    records = sum(source["raw"] for source in found.values())
    return {
        "command": f"python -m tests.benchmarks.rehearsal FOLDER --scale {scale:g}",
        "scale": scale,
        "seconds": round(seconds, 1),
        "reused": result["reused"],
        "records": records,
        "records_per_s": round(records / seconds),
        "images": result["images"],
        "memory_mib": {kind: held >> 20 for kind, held in memory.most.items()},
        "straddling": straddling,
        "unexpected": wrong,
        "samples": {
            name: {"samples": count, "table_1": round(TABLE_1[name] * scale)}
            for name, count in samples.items()
        },
        "real_images": real_images(result["images"], seconds=seconds),
        "met": {
            "minutes": seconds < 60 * MINUTES,
            "memory": max(memory.most.values()) < GIB << 30,
            "counts": not wrong,
        },
        "machine": machine(torch.device("cpu")),
    }


def real_images(images: int, *, seconds: float) -> dict[str, Any]:
    """What as many photographs of 640 x 480 pixels, resized to 448, would take instead.

    As if all work divided among the cores. Images of records that are dropped are left out.
    """
    opening = json.loads(LOADING.read_text(encoding="utf-8"))["images"]
    a_core_ms = opening["ways"]["dsvl"]["processor_ms_an_image"][0]
    of_a_core = images * a_core_ms / 1000
    return {
        "processor_ms_an_image": round(a_core_ms, 2),
        "core_minutes": round(of_a_core / 60, 1),
        "minutes": {
            f"{cores} cores": round((seconds * 2 + of_a_core) / cores / 60, 1)
            for cores in (2, 16, 64)
        },
        "pixels_gib": round(images * 3 * 448**2 / 2**30, 1),
    }


def main() -> None:
    """Rehearse and print the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=lambda name: Path(name).absolute())
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    document = rehearse(options.folder, scale=options.scale)
    text = json.dumps(document, indent=1)
    print(text)
    if options.write:
        (options.write / "rehearsal.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
