"""What a training tells Prometheus: Ray's agent on each node exports it, tagged with the run.

`jobs/grafana.json` is a board of these; a test holds its queries to the names here.
"""

from collections.abc import Mapping
from pathlib import Path

from ray.util.metrics import Counter, Gauge

from dsvl.train import Step
from orchestration.records.course import Course
from orchestration.records.journal import read

COUNTERS = {
    "dsvl_updates": "Optimiser updates",
    "dsvl_tokens": "Text and image positions that were trained on",
    "dsvl_skipped": "Batches left out, as their updates would have ruined the model",
}
GAUGES = {
    "dsvl_step": "Updates that the model has had",
    "dsvl_steps": "Updates of the whole training",
    "dsvl_workers": "Workers",
    "dsvl_restarts": "How often the training began again: workers were lost, or it was interrupted",
    "dsvl_quarantined": "Records that did not come through the preparation",
    "dsvl_train_loss": "Nats a token",
    "dsvl_eval_loss": "Held-out nats a token",
    "dsvl_eval_accuracy": "Share of held-out answers that are exactly right",
}
PREFIX = "ray_"
"""Ray's, to every name that it exports."""
SUFFIX = "_total"
"""Prometheus', to the names of counters."""
JOURNALED = {
    "train/loss": "dsvl_train_loss",
    "eval/loss": "dsvl_eval_loss",
    "eval/accuracy": "dsvl_eval_accuracy",
}
"""Metric of a journal -> gauge."""


def exported() -> set[str]:
    """The names under which Prometheus finds them all."""
    counters = {f"{PREFIX}{name}{SUFFIX}" for name in COUNTERS}
    return counters | {f"{PREFIX}{name}" for name in GAUGES}


class Meters:
    """Those of one run, in the one process of it that counts."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the run's; its own name and that of the folder around a trial are its tags."""
        trial = (folder / "values.json").is_file()
        tags = {
            "run": folder.parents[1].name if trial else folder.name,
            "trial": folder.name if trial else "",
        }
        self._folder = folder
        self._meters: dict[str, Counter | Gauge] = {}
        for kind, names in ((Counter, COUNTERS), (Gauge, GAUGES)):
            for name, told in names.items():
                self._meters[name] = kind(name, told, tuple(tags))
                self._meters[name].set_default_tags(tags)

    def begin(self, *, quarantined: int) -> None:
        """The run begins or goes on, as its journal says by now."""
        course = Course()
        for entry in read(self._folder)[0]:
            course.add(entry)
        self._set("dsvl_restarts", course.restarts)
        self._set("dsvl_workers", course.workers)
        self._set("dsvl_steps", course.steps or 0)
        self._set("dsvl_quarantined", quarantined)

    def update(self, step: Step, metrics: Mapping[str, float]) -> None:
        """An update was made or its batch skipped; `metrics` are those of the journal."""
        self._set("dsvl_step", step.number)
        if step.skipped:
            self._count("dsvl_skipped", 1)
        else:
            self._count("dsvl_updates", 1)
            self._count("dsvl_tokens", step.tokens)
        for metric, name in JOURNALED.items():
            if metric in metrics:
                self._set(name, metrics[metric])

    def _set(self, name: str, value: float) -> None:
        gauge = self._meters[name]
        assert isinstance(gauge, Gauge)
        gauge.set(value)

    def _count(self, name: str, more: float) -> None:
        counter = self._meters[name]
        assert isinstance(counter, Counter)
        counter.inc(more)
