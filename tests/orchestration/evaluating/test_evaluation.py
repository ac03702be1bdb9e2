"""A trained model measured through the real command: every sample is asked once, whatever happens."""

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from PIL import Image

from orchestration import cli
from orchestration.compose import load
from orchestration.evaluating.evaluation import read_suite
from orchestration.trained import choose
from tests.orchestration.conftest import run_folder, run_id

pytestmark = pytest.mark.ray


def suite_of(storage: Path, name: str) -> Path:
    """Questions over two pictures of digits: rewordings, rounds, one about an image that is not there."""
    one, two = sorted((storage / "raw/digits/images").iterdir())[:2]
    lines = [
        {
            "question": "What digit is in image 1?",
            "image": one.name,
            "answer": "x",
            "group": "read",
        },
        {
            "question": "Read the digit in image 1.",
            "image": one.name,
            "answer": "x",
            "group": "read",
        },
        {
            "rounds": [
                {"question": "Hello?", "image": one.name},
                {"question": "And?", "image": two.name},
            ]
        },
        {"question": "What is this?", "image": "missing.png", "answer": "x"},
    ]
    questions = storage / f"{name}.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = storage / f"{name}.yaml"
    path.write_text(f"format: jsonl\nfiles: [{questions.name}]\nimages: raw/digits/images\n")
    return path


def evaluated(*arguments: object, capsys) -> dict:
    assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def folder(trained_run) -> Path:
    return run_folder(trained_run)


def test_a_run_is_measured_once_and_asked_no_question_twice(
    storage, trained_run, folder, capsys, tmp_path
):
    suite = suite_of(storage, "reworded")
    result = evaluated(trained_run, "--suite", suite, capsys=capsys)
    held = result["sets"]["held out"]
    result_metrics = json.loads((folder / "result.json").read_text())["metrics"]
    assert held["samples"] == 8
    for figure, metric in (
        ("loss", "eval/loss"),
        ("accuracy", "eval/accuracy"),
        ("accuracy_blind", "eval/accuracy_blind"),
    ):
        told = held["figures"][figure]
        assert told["value"] == pytest.approx(result_metrics[metric], rel=1e-4)
        assert told["low"] <= told["value"] <= told["high"]
    assert {"exact", "soft", "rouge_l", "cider_d", "loss_shuffled"} <= held["figures"].keys()
    assert sum(of["rounds"] for of in held["by"]["images"].values()) == held["rounds"]

    asked = result["sets"]["reworded"]
    assert asked["rounds"] == 4
    assert "missing.png" in asked["left_out"]["3"]
    assert {"consistency", "exact_blind", "exact_shuffled"} <= asked["figures"].keys()

    client, found = MlflowClient(load(trained_run).tracking_uri), run_id(folder)
    names = {file.path for file in client.list_artifacts(found)}
    (table,) = (name for name in names if name.startswith("pictured-"))
    told = json.loads(Path(client.download_artifacts(found, table, str(tmp_path))).read_text())
    assert told["columns"][0] == "images"
    (first, *_), *_ = told["data"]
    drawn = client.download_artifacts(found, first["filepath"], str(tmp_path))
    assert Image.open(drawn).height == 128

    kept = {path: path.stat().st_mtime_ns for path in Path(result["folder"]).glob("answers/*")}
    rounds = (Path(result["folder"]) / "rounds.jsonl").read_text()
    again = evaluated(folder, "--suite", suite, capsys=capsys)
    assert again == result
    assert (Path(result["folder"]) / "rounds.jsonl").read_text() == rounds
    assert kept == {
        path: path.stat().st_mtime_ns for path in Path(result["folder"]).glob("answers/*")
    }

    compared = evaluated(folder, "--against", folder, capsys=capsys)["against"]["held out"]
    assert compared["rounds"] == held["rounds"]
    assert compared["exact"] == {"value": 0, "low": 0, "high": 0, "above": 0}


def test_killed_and_typed_again_it_goes_on_from_the_answers_it_has(trained_run, dsvl):
    one_by_one = ("evaluate", trained_run, "evaluation.batch=1", "evaluation.new_tokens=9")
    command = dsvl(*one_by_one)
    answers = run_folder(trained_run) / "evaluations"

    def kept() -> dict[str, float]:
        found = answers.glob("step-*/answers/*.json")
        return {str(file): file.stat().st_mtime_ns for file in found if len(load_json(file)) == 1}

    before = kept()
    while len(kept()) < len(before) + 2 and command.poll() is None:
        time.sleep(0.05)
    command.kill()
    command.wait()
    there = kept()
    assert len(there) < len(before) + 8, "it was killed before its end"
    again = dsvl(*one_by_one)
    assert again.wait() == 0
    assert len(kept()) == len(before) + 8
    assert there.items() <= kept().items(), "no file was written a second time"
    samples = [key for file in kept() for key in load_json(Path(file)) if file not in before]
    assert len(samples) == len(set(samples)) == 8


def load_json(path: Path) -> dict:
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--checkpoint", "3"], "must be one of those in"),
        (
            ["cluster.gpus_per_worker=1", "cluster.gpu_memory_gib=1e-4"],
            "a GPU that answers holds the whole",
        ),
        (["--against", "nowhere"], "holds no evaluation; run dsvl evaluate nowhere first"),
    ],
)
def test_a_wrong_request_is_refused_with_its_remedy(trained_run, capsys, arguments, told):
    assert cli.main(["evaluate", str(trained_run), *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "format: jsonl\nfiles: 3\nimage: here\n",
            ["files: ", "image: no such field; did you mean"],
        ),
        ("format: vqa\nfiles: [a.json]\n", ["must be one of visualchat, jsonl, vqav2"]),
        ("- format\n", ["must describe a suite by format, files"]),
        ("format: [\n", ["is no YAML"]),
    ],
)
def test_a_suite_that_describes_nothing_is_refused_with_all_that_is_wrong(tmp_path, text, told):
    (tmp_path / "suite.yaml").write_text(text)
    with pytest.raises(ValueError, match="--suite") as refused:
        read_suite(tmp_path / "suite.yaml")
    assert all(each in str(refused.value) for each in told)


def test_a_suite_that_is_not_there_is_refused_before_any_work(trained_run, capsys):
    assert cli.main(["evaluate", str(trained_run), "--suite", "nowhere.yaml"]) == 2
    assert "--suite nowhere.yaml: no such file" in capsys.readouterr().err


def test_the_checkpoint_that_is_meant_is_the_one_measured(trained_run, folder, capsys):
    newest = choose(load(trained_run)).checkpoint.step
    step = min(int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*"))
    assert step < newest
    earlier = evaluated(folder, "--checkpoint", step, capsys=capsys)
    assert earlier["checkpoint"]["step"] == step
    assert (folder / "evaluations").is_dir()
