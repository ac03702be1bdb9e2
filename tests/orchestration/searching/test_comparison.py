"""Ways of training are compared seed by seed, and an evaluation stands on the page with its figures."""

import json

import pytest

from orchestration.config import Experiment, validated
from orchestration.pages import evaluation_report
from orchestration.records.journal import Journal, write_json
from orchestration.records.record import Record
from orchestration.searching.comparison import compare, section

SEEDS = (1, 2, 3)
ACCURACY = {"mmca": 0.90, "causal": 0.85}


@pytest.fixture
def experiment(tmp_path, settings) -> Experiment:
    """A sweep of two schemes over three seeds that has ended; a third scheme has one seed alone."""
    settings["storage"] = {"path": str(tmp_path / "runs")}
    settings["search"] = {
        "space": {
            "model.attention": {"kind": "grid", "values": [*ACCURACY, "causal_cross"]},
            "train.seed": {"kind": "grid", "values": list(SEEDS)},
        }
    }
    made = validated(settings)
    tried = [(scheme, seed) for scheme in ACCURACY for seed in SEEDS] + [("causal_cross", 1)]
    for scheme, seed in tried:
        values = {"model.attention": scheme, "train.seed": seed}
        folder = made.run_folder / f"trials/attention={scheme},seed={seed}"
        folder.mkdir(parents=True)
        write_json(folder / "values.json", values)
        trial = made.trial(values)
        about = {"identity": trial.identity(), "fields": trial.identity_fields()}
        write_json(folder / "experiment.json", about)
        journal = Journal(folder)
        for epoch in (1, 2):
            # Seeds differ by more than schemes do, but alike for both.
            accuracy = ACCURACY.get(scheme, 0.5) * epoch / 2 + 0.04 * (seed - 2) * epoch
            told = {"eval/loss": 1 - accuracy, "eval/accuracy": accuracy}
            journal.metrics(10 * epoch, told | {"eval/accuracy_blind": 0.2})
        journal.end("finished")
        write_json(folder / "result.json", {"state": "finished", "metrics": told, **about})
    return made


def test_ways_are_compared_seed_by_seed(experiment):
    first, second = compare(Record(experiment))
    assert (first["way"], first["seeds"]) == ("attention=mmca", 3)
    assert first["accuracy"][0] == pytest.approx(0.9)
    assert first["accuracy"][1] < 0.85 < first["accuracy"][2], "seeds alone would hide it"
    assert first["difference"] is None
    assert second["difference"] == pytest.approx([-0.05, -0.05, -0.05]), "pairs show it"
    samples = [point[0] for point in first["curve"]]
    assert samples == [10 * experiment.train.batch, 20 * experiment.train.batch]
    assert [point[1] for point in first["curve"]] == pytest.approx([0.45, 0.9])


def test_the_page_has_the_table_and_the_curves(experiment):
    told = section(Record(experiment))
    assert "attention=mmca" in told
    assert "90.0 %" in told
    assert "-5.0 % (-5.0 % to -5.0 %)" in told
    assert "samples seen" in told
    assert "causal_cross" not in told, "a single seed is no comparison"


def test_an_evaluation_stands_on_the_page_with_what_a_set_calls_itself_as_text(experiment):
    record = Record(experiment)
    assert evaluation_report.evaluations(record) == ""
    folder = record.best.folder / "evaluations/step-000020-0123"
    folder.mkdir(parents=True)
    figure = {"value": 0.5, "low": 0.25, "high": None}
    told = {"rounds": 1234, "figures": {"exact": figure}}
    by = {"blend": {"b": {"rounds": 7, "exact": figure}}}
    write_json(
        folder / "evaluation.json",
        {"checkpoint": {"step": 20}, "sets": {"<b>": told, "held out": told | {"by": by}}},
    )
    row = {"sample": "s", "kind": "said", "shows": ["0" * 64], "blend": "b", "question": "What?"}
    rows = [row | {"answer": answer, "expected": ["seven"]} for answer in ("seven", "<b>nine")]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    page = evaluation_report.evaluations(record)
    assert "&lt;b&gt;nine" in page
    assert "✗ wrong" in page
    assert "&lt;b&gt;" in page
    assert "1,234 rounds" in page
    assert page.count("0.500") == 3
    assert "—" in page
