"""A trained run handed on through the real command, by name or by folder, and talked to elsewhere."""

import io
import json
import shutil
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
from safetensors.torch import load_file

from orchestration import cli
from orchestration.compose import load
from orchestration.config import validated
from orchestration.records.results import begin, experiment_of
from tests.orchestration.conftest import run_folder

pytestmark = pytest.mark.ray
QUESTIONS = ("What digit is in image 1?", "Which digit is larger, image 1 or image 2?")


def dsvl_export(dsvl: Any, *arguments: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of `dsvl export`."""
    process = dsvl("export", *arguments, stdout=PIPE, stderr=PIPE)
    out, err = process.communicate()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def run(trained_run, tmp_path_factory) -> Path:
    """The folder of a finished run, at another place than where it was trained."""
    return shutil.copytree(
        run_folder(trained_run), tmp_path_factory.mktemp("moved") / "some, run=1"
    )


def test_a_run_becomes_a_model_to_chat_with_anywhere(
    storage, trained_run, run, dsvl, tmp_path, monkeypatch, capsys
):
    status, out, err = dsvl_export(dsvl, trained_run, "--to", tmp_path / "model", "--json")
    assert status == 0, err
    result = json.loads(out)
    folder = tmp_path / "model"
    assert (result["folder"], result["form"], result["step"]) == (str(folder), "merged", 48)
    held = {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    assert result["files"] == held
    assert result["bytes"] == sum(held.values()) > 4 * result["parameters"]
    one, two = sorted((storage / "raw/digits/images").iterdir())[:2]
    lines = "\n".join([f"/image {one} {two}", *QUESTIONS])
    said = []
    for source in (trained_run, folder, run):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert cli.main(["chat", str(source)]) == 0
        said.append(capsys.readouterr().out)
    assert len(said[0].splitlines()) == 3, "two answers and their count"
    assert said[0] == said[1] == said[2]


def test_without_a_name_it_lies_with_its_run_and_is_never_written_over(run, capsys):
    assert cli.main(["export", str(run), "--form", "adapter", "--checkpoint", "45"]) == 0
    folder = run / "exports/step-000045-adapter"
    told = capsys.readouterr()
    first, *files, total = told.out.splitlines()
    assert first.startswith(f"{folder}: adapter, ")
    assert {line.split()[0] for line in files} == {path.name for path in folder.iterdir()}
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert total.split()[-2].replace(",", "") == str(size)
    found, kept = (
        load_file(f / "parameters.safetensors") for f in (folder, run / "checkpoints/step-000045")
    )
    assert all((found[name] == kept[name]).all() for name in found.keys() | kept.keys())
    assert cli.main(["export", str(run), "--form", "adapter", "--checkpoint", "45"]) == 2
    assert "exists; remove it or name another folder" in capsys.readouterr().err


def test_the_card_tells_what_was_trained_on_what_and_how_well(run, trained_run, capsys, tmp_path):
    target = tmp_path / "model"
    assert cli.main(["export", str(run), "--to", str(target), "--json"]) == 0
    metrics = json.loads((run / "result.json").read_text())["metrics"]
    manifest = json.loads((run / "checkpoints/step-000048/manifest.json").read_text())
    model = load(trained_run).model
    card = (target / "README.md").read_text(encoding="utf-8")
    for told in (
        *manifest["frozen"].values(),
        model.language.checkpoint,
        model.vision.checkpoint,
        "digits_train (llava_json); an epoch has 1 of it",
        "digits_eval (llava_json); held out",
        "48 updates",
        "optim.lr: 0.01\noptim.",
        "train.batch: 8",
        f"{metrics['eval/loss']:.3f}",
        f"{100 * metrics['eval/accuracy']:.1f} %",
        'precision="fp32"',
        "The licences of both base models",
    ):
        assert told in card, told


def test_a_folder_is_the_run_that_lies_in_it_and_no_better_one(settings, search, tmp_path):
    sweep = validated(settings | {"search": search})
    trial = sweep.trial({"model.size": "large", "optim.lr": 0.004})
    folder = tmp_path / "moved" / "size=large,lr=0.004"
    begin(trial, folder)
    found = experiment_of(folder)
    assert (found.run_folder, found.search) == (folder, None)
    assert found.identity() == trial.identity() != sweep.identity()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--checkpoint", "7"), "checkpoint=7: must be one of those in"),
        (("--form", "gguf"), "invalid choice: 'gguf'"),
        (("optim.lr=1",), "leave out optim.lr=1"),
    ],
)
def test_what_cannot_be_exported_is_a_wrong_request(run, capsys, arguments, said):
    assert cli.main(["export", str(run), *arguments]) == 2
    told = capsys.readouterr()
    assert (told.out, said in told.err) == ("", True)


def test_a_damaged_checkpoint_is_named_and_by_itself_passed_over(run, capsys, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("exports"))
    (copy / "checkpoints/step-000048/exp_avg.safetensors").unlink()
    assert cli.main(["export", str(copy), "--checkpoint", "48"]) == 2
    assert "is damaged: exp_avg.safetensors is missing" in capsys.readouterr().err
    assert cli.main(["export", str(copy), "--form", "adapter", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 45


def test_without_a_checkpoint_the_command_says_what_to_do_first(trained_run, run, tmp_path, capsys):
    assert cli.main(["export", str(trained_run), f"storage.path={tmp_path}"]) == 2
    assert "train or sweep first" in capsys.readouterr().err
    for verb in ("export", "chat"):
        assert cli.main([verb, str(tmp_path)]) == 2
        assert "holds no experiment.json; name the folder of a run" in capsys.readouterr().err
