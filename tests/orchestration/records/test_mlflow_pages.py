"""A sweep in MLflow's own pages, in a real browser: what a person finds there."""

import base64
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from orchestration import report
from orchestration.config import Experiment
from orchestration.records.journal import NOTES, Journal
from orchestration.records.results import trials_folder
from orchestration.records.shipping import catch_up
from tests.orchestration.conftest import SETTINGS, run_id
from tests.orchestration.outages import free_port
from tests.orchestration.sweeps import STEPS, make_sweep, searched, trial_name

pytestmark = pytest.mark.slow

BEST = trial_name("large", 0.01, 2)


@pytest.fixture
def sweep(tmp_path, tokenizer) -> Experiment:
    """Twelve trials in MLflow, the best of them exported, the page and its figures kept."""
    experiment = searched(SETTINGS | {"name": "tiny"}, tmp_path / "runs")
    make_sweep(experiment, tokenizer)
    root = trials_folder(experiment)
    about = {"step": 2 * STEPS, "metric": "eval/loss", "value": 0.5, "mode": "min"}
    Journal(root / BEST / NOTES).export("exports/best", **about)
    report.keep(experiment, root)
    assert catch_up(experiment)["runs"] == 13
    return experiment


@pytest.fixture
def address(sweep, tmp_path) -> Iterator[str]:
    """Of `mlflow ui` over its store."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", sweep.tracking_uri]
    alone = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # no more processes
    with (tmp_path / "ui.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env=alone)
    where = f"http://127.0.0.1:{port}"
    try:
        while True:
            assert process.poll() is None, (tmp_path / "ui.log").read_text()[-2000:]
            with suppress(OSError), urllib.request.urlopen(f"{where}/health"):
                break
            time.sleep(0.3)
        yield where
    finally:
        process.terminate()
        process.wait()


def test_a_person_finds_trials_curves_what_was_searched_figures_and_the_model(
    sweep,
    address,
    browser,
    tmp_path,
):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    shots = Path(os.environ.get("DSVL_SCREENSHOTS", tmp_path))
    root = trials_folder(sweep)
    best, parent = run_id(root / BEST), run_id(root)

    def until(what: Callable[[], Any], message: str) -> Any:
        try:
            return WebDriverWait(browser, 60).until(lambda _: what(), message)
        except Exception:
            shoot("failed")
            raise

    def find(selector: str) -> list[Any]:
        return browser.find_elements(By.CSS_SELECTOR, selector)

    def text() -> str:
        return browser.execute_script("return document.body.innerText")

    def says(*words: str) -> None:
        until(lambda: all(word in text() for word in words), f"the page says {words}")

    def shoot(name: str) -> None:
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
        (shots / f"mlflow-{name}.png").write_bytes(base64.b64decode(shot["data"]))

    def visit(path: str) -> None:
        browser.get("about:blank")
        browser.get(f"{address}/#/{path}")

    def open_file(name: str) -> None:
        def there() -> list[Any]:
            nodes = find("[data-testid=artifact-tree-node]")
            return [node for node in nodes if node.text.strip() == name]

        until(there, f"{name} is listed")[0].click()

    visit("experiments/1/runs")
    says("tiny sweep")
    assert BEST not in text()
    for panel in find("[aria-label=Close]"):  # of MLflow's assistant
        panel.click()
    until(lambda: find(".ag-row button"), "a sweep can be unfolded")[0].click()
    says(BEST)
    shoot("runs")

    visit(f"experiments/1/runs/{best}")
    says(BEST, "Parent run", "optim.lr", "0.01", "eval/loss")
    shoot("trial")
    visit(f"experiments/1/runs/{best}/model-metrics")
    until(lambda: len(find(".js-plotly-plot")) >= 3, "curves are drawn")
    shoot("curves")

    visit(f"experiments/1/runs/{parent}/artifacts")
    says("report.html", "figures")
    open_file("figures")
    open_file("searched-values-and-what-they-came-to.png")
    until(lambda: any(image.size["width"] > 500 for image in find("img")), "a figure is shown")
    shoot("artifacts")

    runs = json.dumps([run_id(path.parent) for path in sorted(root.glob("*/result.json"))])
    visit(f'compare-runs?runs={runs}&experiments=["1"]')
    says("optim.lr", "train.epochs", "model.size")
    until(lambda: find(".parcoords .axis-title"), "parallel coordinates are drawn")
    axes = {axis.text for axis in find(".parcoords .axis-title")}
    assert axes >= {"optim.lr", "train.epochs", "model.size"}
    shoot("parallel")

    visit("models/tiny")
    says("champion", "candidate")
    shoot("model")
