"""The whole system on one machine, in minutes: real images in, a searched and measured model out."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsvl.digits import chats
from orchestration import doctor, report
from orchestration.cluster import connect
from orchestration.commands import sweep, train
from orchestration.config import Experiment
from orchestration.prepare import prepare

log = logging.getLogger(__name__)

COMMAND = "configs/experiment/quickstart.yaml"


def run(experiment: Experiment) -> dict:
    """Carry the phases out in order, a line each; what an earlier command has finished is not repeated.

    Raises:
        ValueError: if this machine lacks something essential.
    """
    began = time.monotonic()
    with phase(1, "doctor", "is this machine fit for it?"):
        examined = doctor.examine(experiment)
        if not examined["ok"]:
            raise ValueError(doctor.render(examined))
    raw = Path(experiment.storage.data) / "digits"
    with phase(2, "digits", f"writing chats about 1,797 handwritten digits into {raw}"):
        if not raw.exists():
            chats.write(raw)
    with connect(experiment):
        with phase(3, "prepare", "Ray Data checks, encodes and splits them"):
            prepared = prepare(experiment)
        with phase(
            4, "train", f"DeepSpeed on {experiment.cluster.workers} workers under Ray Train"
        ):
            trained = train(experiment)
        with phase(5, "sweep", "Ray Tune searches learning rate and epochs at three sizes"):
            swept = sweep(experiment)
    with phase(6, "report", "plots, tables and sample chats on one page"):
        written = report.write(experiment)
    best = swept["best"]
    return {
        "best": best,
        "trials": len(swept["trials"]),
        "training": trained["metrics"],
        "samples": prepared["splits"],
        "minutes": (time.monotonic() - began) / 60,
        "report": written["report"],
        "tracking": experiment.tracking_uri,
    }


@contextmanager
def phase(number: int, name: str, what: str) -> Iterator[None]:
    """Say what begins, and how long it took."""
    log.info("[%d/6] %-8s %s", number, name, what)
    began = time.monotonic()
    yield
    log.info("[%d/6] %-8s done in %.0f s", number, name, time.monotonic() - began)


def render(result: dict) -> str:
    """What was found, and what to try next."""
    best, samples = result["best"], result["samples"]
    return f"""
{result["trials"]} trials and a training on {samples["train"]} chats in {result["minutes"]:.1f} minutes.
Best: {best["trial"]}
  answers right             {best["eval/accuracy"]:6.1%}  of the rounds in {samples["eval"]} held-out chats
  the same, images zeroed   {best["eval/accuracy_blind"]:6.1%}  so it really looks
  most frequent answer      {best["eval/accuracy_majority"]:6.1%}

Next:
  open {result["report"]}
  dsvl chat {COMMAND}
  mlflow ui --backend-store-uri {result["tracking"]}
  dsvl plan configs/experiment/llava_7b.yaml
"""
