"""Faults on demand, for tests of what a run survives; nothing happens unless the variable is set.

`DSVL_FAULTS='[{"action": "kill", "rank": 1, "step": 3}]'` ends rank 1 when it has made 3 updates. Each fault
strikes once in a run, also when the run comes by the same update again; with `"run": "lr=0.01"` in the run
alone whose folder is so called.
"""

import json
import os
import signal
import time
from pathlib import Path

import torch

VARIABLE = "DSVL_FAULTS"


def asked() -> list[dict]:
    """The faults that the driver's environment asks for; it hands them to the workers."""
    return json.loads(os.environ.get(VARIABLE, "[]"))


def inject(
    faults: list[dict], folder: Path, *, rank: int, step: int, model: torch.nn.Module
) -> None:
    """Let the faults of this rank and step strike, unless they have: `folder` is the run's."""
    for number, fault in enumerate(faults):
        here = fault.get("run", folder.name) == folder.name
        if here and (fault["rank"], fault["step"]) == (rank, step):
            try:
                (folder / f".fault-{number}").touch(exist_ok=False)
            except FileExistsError:
                continue
            _strike(fault["action"], model)


def _strike(action: str, model: torch.nn.Module) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise RuntimeError("injected")
        case "exhaust":
            next(model.parameters()).new_empty(1 << 60)
        case "hang":
            time.sleep(1e9)
        case "slow":
            time.sleep(5)
        case "corrupt":
            next(p for p in model.parameters() if p.requires_grad).data.fill_(torch.nan)
        case _:
            raise ValueError(
                f"{VARIABLE}: action {action!r} must be kill, raise, exhaust, hang, slow or corrupt"
            )
