"""Secrets are in the environment alone: nothing that is written or said repeats them."""

import pytest

from orchestration import cli, report
from orchestration.compose import load
from orchestration.config import Experiment
from orchestration.problems import ConfigError
from tests.orchestration.conftest import SECRETS, digits

SECRET = "canary-in-a-config-3e9d"


@pytest.mark.ray
def test_secrets_of_the_environment_are_in_no_file_of_a_training(trained_run, storage):
    """Journal, MLflow's database and artifacts, logs, manifests, prepared data, and the page."""
    report.write(load(trained_run))
    files = [path for path in storage.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"journal.jsonl", "mlflow.db", "manifest.json", "report.html"}
    for path in files:
        content = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} in {path}"


@pytest.mark.parametrize(
    "override",
    [
        f"tracking.uri=http://me:{SECRET}@host",
        f"tracking.uri=postgresql://me@host/name?password={SECRET}",
        f"engine.deepspeed.wandb.api_key={SECRET}",
        f"engine.deepspeed.comet.auth_token={SECRET}",
    ],
)
def test_a_secret_in_a_config_is_refused_before_anything_is_written_and_not_repeated(
    tmp_path, capfd, override
):
    path = digits(tmp_path, "secretive")
    assert cli.main(["train", str(path), override]) == 2
    said = capfd.readouterr()
    assert "must not hold a" in said.err
    assert SECRET not in said.out + said.err
    assert not (tmp_path / "runs").exists()


def test_lengths_in_tokens_are_no_secrets(tmp_path):
    assert isinstance(load(digits(tmp_path, "lengthy"), ["data.max_tokens=64"]), Experiment)
    with pytest.raises(ConfigError, match="max_tokens=0"):
        load(digits(tmp_path, "short"), ["data.max_tokens=0"])
