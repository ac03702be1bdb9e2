"""What Prometheus is told: really exported by Ray, and all that the shipped board asks for."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray

from dsvl.train import Step
from orchestration.records.journal import Journal
from orchestration.records.meters import Meters, exported

BOARD = Path(__file__).parents[3] / "jobs/grafana.json"
STEP = Step(number=7, epoch=0, ends_epoch=True, loss=0.5, lr=0.1, grad_norm=1.0, tokens=640,
            targets=64, images=8, seconds=1.0)  # fmt: skip
METRICS = {"train/loss": 0.5, "eval/loss": 0.75, "eval/accuracy": 0.25}


def test_the_board_asks_for_exactly_what_is_exported():
    board = json.loads(BOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in board["templating"]["list"]]
    asked = set(re.findall(r"\bray_\w+", " ".join(queries)))
    assert asked == exported()


def test_panels_of_the_board_lie_beside_each_other():
    places = [panel["gridPos"] for panel in json.loads(BOARD.read_text())["panels"]]
    cells = [
        (x, y)
        for at in places
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


@pytest.mark.ray
def test_ray_exports_them_with_the_name_of_the_run(cluster, tmp_path):
    folder = tmp_path / "metered"
    journal = Journal(folder)
    for step in (0, 5):
        journal.start(identity="i", params={}, step=step, steps=40, workers=2)
    meters = Meters(folder)
    meters.begin(quarantined=3)
    meters.update(STEP, METRICS)
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    found: dict[str, float] = {}
    while len(found) < len(exported()) and time.monotonic() < deadline:
        time.sleep(1)
        meters.update(STEP, METRICS)
        meters.update(replace(STEP, skipped=True), {"train/skipped": 1.0})
        with urlopen(address) as answer:  # the agent is told every ten seconds
            lines = re.findall(
                r'^(ray_dsvl_\w+)\{.*run="metered".*\} (\S+)$', answer.read().decode(), re.M
            )
        found = {name: float(value) for name, value in lines}
    assert set(found) == exported()
    assert found["ray_dsvl_tokens_total"] == 640 * found["ray_dsvl_updates_total"] > 0
    assert (found["ray_dsvl_step"], found["ray_dsvl_steps"], found["ray_dsvl_restarts"]) == (
        7,
        40,
        1,
    )
    assert (found["ray_dsvl_quarantined"], found["ray_dsvl_eval_loss"]) == (3, 0.75)
