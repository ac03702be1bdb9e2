"""Runs beside each other: in what they differ, and what came of it."""

import json
import re
from pathlib import Path

import pytest

from orchestration.cli import main
from orchestration.config import Experiment, validated
from orchestration.pages.side_by_side import write
from orchestration.records.journal import Journal, write_json
from orchestration.records.results import begin, trials_folder
from orchestration.search import trial_name
from tests.orchestration.conftest import SEARCH
from tests.orchestration.test_report import STEPS, Tree, run, tables


@pytest.fixture
def experiment(tmp_path, settings) -> Experiment:
    """Of a price that is known, in a storage of its own."""
    settings["storage"] = {"path": str(tmp_path / "runs")}
    settings["cluster"] = {"workers": 2, "gpu_hour_price": 3.0}
    return validated(settings)


@pytest.fixture
def runs(experiment) -> list[Path]:
    """Two rates with two seeds each, and one of another size; the rate nearer to 0.01 is better."""
    made = []
    for lr, seed, size in ((0.01, 0, "small"), (0.01, 1, "small"), (0.03, 0, "small"),
                           (0.03, 1, "small"), (0.01, 0, "large")):  # fmt: skip
        values = {"optim.lr": lr, "train.seed": seed, "model.size": size}
        one = experiment.with_overrides(values | {"name": f"run-{len(made)}"})
        run(one.run_folder, one, epochs=2, size=size, lr=lr + seed / 1000, end="finished")
        made.append(one.run_folder)
    return made


def page_of(result: dict) -> Tree:
    return Tree(Path(result["report"]).read_text(encoding="utf-8"))


def test_runs_that_differ_in_the_seed_alone_are_one_group(runs, tmp_path):
    result = write(runs[:4], tmp_path / "page.html")
    assert result["differ in"] == ["optim.lr", "train.seed"]
    assert [(group["fields"], group["seeds"]) for group in result["groups"]] == [
        ({"optim.lr": 0.01}, 2),
        ({"optim.lr": 0.03}, 2),
    ]
    page = page_of(result)
    (table, *_) = tables(page)
    assert table == [["", "A", "B"], ["optim.lr", "0.01", "0.03"], ["train.seed", "0, 1", "0, 1"]]
    assert "0.705 ± 0.007" in page.text  # of losses 0.7 and 0.71
    assert "Every run of it is better than all of the second." in page.text
    bands = [text for attributes, text in page.all("polygon") if attributes["class"] == "band"]
    assert len(bands) == 2 * 2  # the losses and the accuracies of two groups


def test_what_follows_from_the_size_is_no_difference_of_its_own(runs, tmp_path):
    result = write([runs[0], runs[4]], tmp_path / "page.html")
    assert result["differ in"] == ["model.size"]
    text = page_of(result).text
    assert "Best is size=large" in text
    assert "it is not known what is luck" in text


def test_equal_runs_are_told_to_be_equal(experiment, tmp_path):
    folders = []
    for name in ("one", "two"):
        same = experiment.with_overrides({"name": name})
        run(same.run_folder, same, epochs=1, size="small", lr=0.01, end="finished")
        folders.append(same.run_folder)
    result = write(folders, tmp_path / "page.html")
    assert result["differ in"] == []
    assert "the same was trained each time" in page_of(result).text


def test_every_run_is_listed_with_its_folder_whatever_its_state(runs, experiment, tmp_path):
    broken = experiment.with_overrides({"name": "broken", "optim.lr": 0.1})
    run(broken.run_folder, broken, epochs=0, size="small", lr=0.1, end="failed")
    page = page_of(write([*runs, broken.run_folder], tmp_path / "page.html"))
    listed = {attributes["data-run"]: text for attributes, text in page.all("tr", "data-run")}
    assert set(listed) == {str(folder) for folder in [*runs, broken.run_folder]}
    assert "failed: RuntimeError" in listed[str(broken.run_folder)]


def test_the_command_compares_folders_and_files_and_takes_no_settings_beside(
    runs, tmp_path, capsys
):
    page = tmp_path / "page.html"
    both = ["report", str(runs[0]), str(runs[2])]
    assert main([*both, "--html", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 2
    assert page.is_file()
    assert main([*both, "optim.lr=1"]) == 2
    assert "leave out optim.lr=1" in capsys.readouterr().err
    assert main(["report", str(runs[0]), str(runs[0])]) == 2
    assert "needs another run beside it" in capsys.readouterr().err
    assert main(["report", str(runs[0]), str(tmp_path)]) == 2
    assert "name the folder of a run" in capsys.readouterr().err


def test_the_page_asks_no_other_host_for_anything(runs, tmp_path):
    page = page_of(write(runs, tmp_path / "page.html"))
    assert not {"script", "link", "iframe", "object", "img"} & {tag for tag, _, _ in page.tags}
    assert not re.search(r"https?://", page.text)


def test_curves_are_drawn_over_the_updates_that_all_seeds_have(runs, tmp_path):
    page = page_of(write(runs[:2], tmp_path / "page.html"))
    losses = next(
        text for a, text in page.all("svg", "aria-label") if "held-out" in a["aria-label"]
    )
    assert f"{2 * STEPS}" in losses


def test_sweeps_without_a_result_are_nothing_to_compare(tmp_path, settings):
    settings |= {"search": SEARCH, "storage": {"path": str(tmp_path)}}
    sweeps = [validated(settings | {"name": name}) for name in ("one", "two")]
    values = {"model.size": "small", "optim.lr": 1e-3}
    for sweep in sweeps:
        root = trials_folder(sweep)
        begin(sweep, root)
        begin(sweep.trial(values), root / trial_name(values))
        write_json(root / trial_name(values) / "values.json", values)
        with Journal(root / trial_name(values)) as journal:
            journal.end("failed", reason="lost")
    with pytest.raises(ValueError, match="one: holds no trial with a result; a comparison needs"):
        write(sweeps, tmp_path / "page.html")
