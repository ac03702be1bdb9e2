"""What MLflow says of a run beside its points: what went in, what came out, and which is the best."""

import json
import math
from pathlib import Path

import pytest
from mlflow import MlflowClient

from orchestration.config import Experiment, validated
from orchestration.records.journal import NOTES, Journal
from orchestration.records.registry import NOTED
from orchestration.records.results import begin
from orchestration.records.shipping import Follower
from tests.orchestration.buckets import BUCKET, Store
from tests.orchestration.conftest import SETTINGS, histories, run_id

DATA = {
    "folder": "/prepared/chats",
    "digest": "0123456789abcdef",
    "sources": {"chats": {"used": 110, "dropped": {"too_long": 3}}},
    "blends": {"chats": {"train": 75, "eval": 10}, "pairs": {"train": 25, "eval": 0}},
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    storage = tmp_path_factory.mktemp("storage")
    return validated(SETTINGS | {"name": "tiny", "storage": {"path": str(storage)}})


@pytest.fixture(scope="module")
def run(experiment) -> tuple[MlflowClient, str]:
    """A run of twelve updates, evaluated and saved after each sixth, whose journal is shipped in parts."""
    folder = experiment.run_folder
    begin(experiment, folder)
    (folder / "data.json").write_text(json.dumps(DATA))
    journal = Journal(folder)
    journal.start(identity=experiment.identity(), params=experiment.identity_fields(), step=0)
    follower = Follower(experiment, folder)
    for step in range(1, 13):
        measured = {"eval/loss": 2 / step, "eval/accuracy": step / 12} if step % 6 == 0 else {}
        journal.metrics(step, {"train/loss": 1 / step} | measured)
        if step == 6:
            follower.ship(over=False)  # before the checkpoint is saved
        if measured:
            journal.checkpoint(step, measured)
    Journal(folder / "nodes/host").metrics(0, {"system/host/cpu_utilization_percentage": 40.0})
    journal.end("finished")
    for _ in range(2):
        Follower(experiment, folder).ship(over=True)
    return MlflowClient(experiment.tracking_uri), run_id(folder)


def test_data_are_inputs_of_the_run_by_digest_with_the_share_that_each_blend_has(run):
    client, found = run
    inputs = {one.dataset.name: one for one in client.get_run(found).inputs.dataset_inputs}
    assert {one.dataset.digest for one in inputs.values()} == {DATA["digest"]}
    shares = {name: {tag.key: tag.value for tag in one.tags} for name, one in inputs.items()}
    context = "mlflow.data.context"
    assert shares == {
        "chats": {context: "training", "samples": "75", "share": "0.7500"},
        "pairs": {context: "training", "samples": "25", "share": "0.2500"},
        "chats held out": {context: "validation", "samples": "10", "share": "1.0000"},
    }
    assert json.loads(inputs["chats"].dataset.profile)["sets"] == DATA["sources"]


def test_what_was_run_and_with_what_is_kept_with_it(run, experiment, tmp_path):
    client, found = run
    kept = {file.path for file in client.list_artifacts(found)}
    assert kept == {"experiment.json", "environment.json", "data.json"}
    stored = json.loads(
        Path(client.download_artifacts(found, "experiment.json", tmp_path)).read_text()
    )
    assert validated(stored["experiment"]) == experiment
    made = json.loads(
        Path(client.download_artifacts(found, "environment.json", tmp_path)).read_text()
    )
    assert made["packages"].keys() >= {"ray", "torch", "deepspeed", "mlflow"}
    tags = client.get_run(found).data.tags
    assert tags["mlflow.source.git.commit"] == made["commit"]
    assert tags["dsvl.identity"] == experiment.identity()
    assert tags["dsvl.data"] == DATA["digest"]


def test_a_checkpoint_that_was_evaluated_is_a_model_with_what_was_measured_of_it(run, experiment):
    client, found = run
    models = client.search_logged_models(
        [client.get_run(found).info.experiment_id], f"source_run_id = '{found}'"
    )
    assert {model.name for model in models} == {"step-000006", "step-000012"}
    for model in models:
        step = int(model.name[-6:])
        whole = client.get_logged_model(model.model_id)
        measured = {(metric.key, metric.step): metric.value for metric in whole.metrics}
        assert measured == {("eval/loss", step): 2 / step, ("eval/accuracy", step): step / 12}
        assert whole.tags["dsvl.folder"] == str(experiment.run_folder / "checkpoints" / model.name)
    # and none of the run's own points is there twice
    assert histories(client, found)["eval/loss"] == [(6, 2 / 6), (12, 2 / 12)]


def test_the_load_of_a_machine_is_among_the_metrics_of_its_run(run):
    client, found = run
    assert histories(client, found)["system/host/cpu_utilization_percentage"] == [(0, 40.0)]


def test_the_newest_export_is_the_candidate_and_the_best_the_champion(run, experiment):
    client, found = run
    folder, seen = experiment.run_folder, []
    for step, value in ((6, math.nan), (6, 0.5), (12, 0.25), (6, 0.5)):
        about = {"step": step, "metric": "eval/loss", "value": value, "mode": "min"}
        Journal(folder / NOTES).export(f"exports/{step}", **about)
        Follower(experiment, folder).ship(over=True)
        aliases = client.get_registered_model("tiny").aliases
        seen.append({alias: str(version) for alias, version in aliases.items()})
    assert seen == [
        {"candidate": "1"},
        {"candidate": "2", "champion": "2"},
        {"candidate": "3", "champion": "3"},
        {"candidate": "4", "champion": "3"},
    ]
    champion = client.get_model_version_by_alias("tiny", "champion")
    assert champion.run_id == found
    assert champion.tags["folder"] == str(folder / "exports/12")


def test_files_are_kept_in_an_object_store_where_one_is_named(tmp_path, monkeypatch):
    store = Store()
    try:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{store.way.port}")
        place = f"s3://{BUCKET}/artifacts"
        settings = {"name": "far", "storage": {"path": str(tmp_path)}}
        made = validated(SETTINGS | settings | {"tracking": {"artifacts": place}})
        begin(made, made.run_folder)
        journal = Journal(made.run_folder)
        journal.start(identity=made.identity(), params={}, step=0)
        journal.end("finished")
        Follower(made, made.run_folder).ship(over=True)
        client, found = MlflowClient(made.tracking_uri), run_id(made.run_folder)
        assert client.get_run(found).info.artifact_uri.startswith(place)
        kept = client.download_artifacts(found, "experiment.json", str(tmp_path))
        assert Path(kept).read_bytes() == (made.run_folder / "experiment.json").read_bytes()
    finally:
        store.end()


def test_an_evaluation_is_kept_once_with_its_figures_and_its_answers(run, experiment, tmp_path):
    client, found = run
    folder = experiment.run_folder
    made = folder / "evaluations/step-12"
    made.mkdir(parents=True)
    (made / "evaluation.json").write_text("{}")
    row = {"set": "held out", "sample": "a", "round": 1, "question": "?", "expected": "x"}
    rows = [row | {"answer": answer, "seconds": 1} for answer in ("x", "y")]
    (made / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"evaluation/held_out/exact": 0.5}
    Journal(folder / NOTES).evaluation("evaluations/step-12", step=12, metrics=metrics)
    Follower(experiment, folder).ship(over=True)
    client.delete_tag(found, NOTED)  # as if a shipper had been killed before it wrote this down
    Follower(experiment, folder).ship(over=True)
    (point,) = client.get_metric_history(found, "evaluation/held_out/exact")
    assert (point.step, point.value) == (12, 0.5)
    names = {file.path for file in client.list_artifacts(found)}
    (table,) = (name for name in names if name.startswith("rounds-"))
    told = json.loads(Path(client.download_artifacts(found, table, str(tmp_path))).read_text())
    assert told["columns"] == ["set", "sample", "round", "question", "expected", "answer"]
    assert [row[-1] for row in told["data"]] == ["x", "y"]
    assert "evaluation.json" in names


def test_a_file_that_was_made_of_a_run_is_kept_anew_whenever_it_is_noted(run, experiment, tmp_path):
    client, found = run
    folder = experiment.run_folder
    for text in ("first", "second"):
        (folder / "page.html").write_text(text)
        Journal(folder / NOTES).file("page.html")
        Follower(experiment, folder).ship(over=True)
        kept = client.download_artifacts(found, "page.html", str(tmp_path))
        assert Path(kept).read_text() == text
    (folder / "figures").mkdir()
    (folder / "figures/loss.png").write_bytes(b"PNG")
    Journal(folder / NOTES).file("figures/loss.png")
    Follower(experiment, folder).ship(over=True)
    assert [file.path for file in client.list_artifacts(found, "figures")] == ["figures/loss.png"]
