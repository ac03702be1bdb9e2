"""A run is trained again from its record alone, to the same bits."""

import json
from pathlib import Path

import pytest

from orchestration import cli
from orchestration.compose import load
from tests.orchestration.conftest import run_folder
from tests.orchestration.test_trainer import final_checkpoint


def recorded(path: Path) -> str:
    return json.loads((run_folder(path) / "mlflow.json").read_text())["run_id"]


@pytest.mark.ray
def test_a_run_is_trained_again_elsewhere_to_the_same_bits(
    trained_run, tmp_path, monkeypatch, capsys
):
    original, run = load(trained_run), recorded(trained_run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", original.tracking_uri)
    assert cli.main(["train", run, f"storage.path={tmp_path}", "--json"]) == 0
    folder = tmp_path / f"unbroken-{run[:8]}"
    assert json.loads(capsys.readouterr().out)["folder"] == str(folder)
    assert final_checkpoint(folder) == final_checkpoint(original.run_folder)
    # ... and what would be another run, or has other data, is refused
    assert cli.main(["train", run, f"storage.path={tmp_path}", "optim.lr=0.5"]) == 2
    assert "optim.lr (0.01 before, 0.5 now)" in capsys.readouterr().err
    data = json.loads((folder / "data.json").read_text())
    assert data["digest"] == json.loads((original.run_folder / "data.json").read_text())["digest"]


def test_a_run_that_the_store_does_not_know_is_told(tmp_path, capsys):
    assert cli.main(["train", "0" * 32, f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"]) == 2
    assert "has no such run; set tracking.uri" in capsys.readouterr().err
