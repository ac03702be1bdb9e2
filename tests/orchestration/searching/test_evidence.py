"""What a search across sizes leaves: evidence, an experiment to train, and their page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from orchestration.compose import load
from orchestration.config import Experiment
from orchestration.records.journal import Journal, write_json
from orchestration.records.results import begin, trials_folder, write_result
from orchestration.report import write
from orchestration.search import trial_name
from orchestration.searching import evidence
from orchestration.searching.climb import Climb
from orchestration.space import EPOCHS, SEED
from tests.orchestration.searching.test_climb import Cluster, loss, repair


def end(experiment: Experiment, values: dict, ended: float) -> None:
    """Leave what a trial leaves that has ended with a loss."""
    folder, trial = trials_folder(experiment) / trial_name(values), experiment.trial(values)
    begin(trial, folder)
    write_json(folder / "values.json", values)
    journal = Journal(folder)
    journal.start(identity=trial.identity(), params={}, step=0)
    metrics = {"eval/loss": ended, "eval/accuracy": 1 - ended / 3, "eval/accuracy_blind": 0.2}
    journal.metrics(1, metrics | {"eval/accuracy_majority": 0.2, "train/epoch": values[EPOCHS]})
    journal.end("finished")
    write_result(trial, folder, state="finished")


def luck(values: dict) -> float:
    """Of a seed, the same for both of a pair, and a little for each alone."""
    if SEED not in values:
        return 1.0
    return 1 + 0.02 * math.sin(values[SEED]) + 0.001 * math.cos(values[SEED] * values[EPOCHS])


@pytest.fixture
def searched(tmp_path: Path) -> tuple[Experiment, Climb]:
    """A search across sizes, all of whose trials have ended."""
    experiment = repair(f"storage.path={tmp_path}")
    climb, cluster = Climb(experiment), Cluster(0, {})
    cluster.run(climb)
    for values in cluster.trained:
        end(experiment, values, loss(values) * luck(values))
    return experiment, climb


def told(experiment: Experiment) -> dict:
    evidence.write(experiment)
    return json.loads((experiment.run_folder / "evidence.json").read_text())


def test_what_the_trials_left_is_the_search_that_made_them(searched):
    experiment, climb = searched
    seen = evidence.seen(experiment)
    assert {t.run: t.losses for t in seen.trunks} == {t.run: t.losses for t in climb.trunks}
    assert seen.recommended() == climb.recommended()


def test_the_recommended_experiment_can_be_trained_and_is_what_was_recommended(searched):
    experiment, climb = searched
    told(experiment)
    chosen, found = load(experiment.run_folder / "recommended.yaml"), climb.recommended()
    assert found is not None
    assert (chosen.model.size, chosen.optim.lr, chosen.train.epochs) == ("large", found.lr, 4)
    assert chosen.optim.branching
    assert chosen.search is None
    assert chosen.name == "digits-repair-recommended"
    as_it_stood = experiment.with_overrides({"search": None, "name": chosen.name})
    changed = {line.split(" ")[0] for line in chosen.differences(as_it_stood.identity_fields())}
    assert changed == {"optim.lr", "train.epochs", "optim.schedule", "optim.warmup_steps"}


def test_a_recipe_too_short_is_undertrained_and_its_repair_is_confirmed(searched):
    experiment, _ = searched
    found = told(experiment)
    holds = {verdict["name"]: verdict["holds"] for verdict in found["verdicts"]}
    assert holds == {
        "undertrained": True,
        "above the law": True,
        "at the edge": False,
        "law violated": False,
    }
    losses = found["confirmed"]["eval/loss"]
    before, after = np.array(losses["before"]), np.array(losses["after"])
    assert len(before) == len(after) == 5
    exact = stats.ttest_rel(after, before).confidence_interval(0.95)
    np.testing.assert_allclose(
        losses["difference"], [(after - before).mean(), exact.low, exact.high]
    )
    assert losses["difference"][2] < 0 < found["confirmed"]["eval/accuracy"]["difference"][1]
    assert found["cost"]["search"] < found["cost"]["grid"] == 8 * 7


def test_a_search_that_has_not_ended_tells_what_it_has_seen(searched):
    experiment, climb = searched
    for path in trials_folder(experiment).glob("size=large*"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    found = told(experiment)
    assert {trunk["size"] for trunk in found["trunks"]} == {"small", "medium", "large"}
    assert not any(trunk["losses"] for trunk in found["trunks"] if trunk["size"] == "large")
    assert found["confirmed"] is None
    assert found["recommendation"]["regret"] > climb.recommended().regret


def test_nothing_is_written_while_no_trial_has_ended(tmp_path):
    experiment = repair(f"storage.path={tmp_path}")
    evidence.write(experiment)
    assert not experiment.run_folder.exists()


def test_each_size_has_a_map_of_the_law_with_what_was_trained_on_it(searched):
    experiment, _ = searched
    found = told(experiment)
    for size, points in found["maps"].items():
        least = min(points, key=lambda point: point["loss"])
        assert least["epochs"] == 4
        probable, low, high = found["best_rates"][size][-1]
        assert low / 1.2 < least["lr"] < high * 1.2
        assert low < probable < high
    write(experiment)
    page = (experiment.run_folder / "report.html").read_text()
    drawn = [map.split("</svg>")[0] for map in page.split('aria-label="')[1:]]
    maps = {size: next(d for d in drawn if d.startswith(f'{size}"')) for size in found["maps"]}
    for size, one in maps.items():
        trained = sum(len(t["losses"]) for t in found["trunks"] if t["size"] == size)
        assert one.count("<circle") == trained
        assert one.count("m-4.5-4.5") == (size == "large")  # recommended
        assert one.count(" foretold</title>") == len(found["maps"][size])


def test_the_page_tells_what_to_train_and_by_which_numbers(searched):
    experiment, _ = searched
    found = told(experiment)
    write(experiment)
    page = (experiment.run_folder / "report.html").read_text()
    chosen = found["recommendation"]
    assert f"Train large for 4 epochs at a learning rate of {chosen['lr']:.3g}" in page
    for verdict in found["verdicts"]:
        row = page.split(f"{verdict['name']}: {'yes' if verdict['holds'] else 'no'}")[1]
        assert verdict["evidence"] in row.split("</tr>")[0]
    assert page.count("epochs, foretold") == 3
    seen = sum(len(t["losses"]) for t in found["trunks"] if t["size"] == "large")
    assert (
        page.split("foretold (lines) and seen (marks)")[2].split("</svg>")[0].count("<circle")
        == seen
    )
