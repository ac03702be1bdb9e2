"""Trainings of several lengths for the price of the longest: what they have in common is trained once."""

import pytest

from orchestration import commands
from orchestration.compose import load
from orchestration.records import journal
from orchestration.records.journal import curve, read
from tests.orchestration.conftest import digits, run_folder

pytestmark = pytest.mark.ray

WSD = {"lr": 1e-2, "schedule": "wsd", "warmup_steps": 4, "decay_fraction": 0.25}
SHORT = {"train": {"batch": 8, "epochs": 2, "precision": "fp32"}, "optim": WSD}
"""24 updates, of which the last six decay."""


def last_checkpoint(path) -> dict[str, bytes]:
    *_, newest = sorted((run_folder(path) / "checkpoints").iterdir())
    return {file.name: file.read_bytes() for file in newest.iterdir()}


@pytest.fixture(scope="module")
def whole(storage, cluster):
    """The file of a short training that branches off nothing."""
    path = digits(storage, "whole", **SHORT)
    commands.train(load(path))
    return path


@pytest.fixture(scope="module")
def trunk(storage, cluster):
    """The file of one that is twice as long, off which others may branch."""
    path = digits(storage, "trunk", optim=WSD)
    commands.train(load(path, ["checkpoint.branch_epochs=[1, 2]", "checkpoint.keep=1"]))
    return path


def test_a_branch_ends_with_the_bits_of_a_training_of_its_own(storage, whole, trunk):
    kept = sorted(path.name for path in (run_folder(trunk) / "checkpoints").iterdir())
    assert kept == ["step-000009", "step-000018", "step-000036", "step-000048"]
    path = digits(storage, "branch", **SHORT)
    commands.train(load(path, [f"checkpoint.trunk={run_folder(trunk)}"]))
    assert [e["step"] for e in read(run_folder(path))[0] if e["kind"] == "start"] == [18]
    assert last_checkpoint(path) == last_checkpoint(whole)
    expected = curve(run_folder(whole), "train/loss")
    assert curve(run_folder(path), "train/loss") == expected[18:]


@pytest.mark.slow
def test_a_finished_training_goes_on_as_if_it_had_been_meant_to_be_longer(storage, whole, trunk):
    path = digits(storage, "longer", optim=WSD)
    commands.train(load(path, [f"checkpoint.trunk={run_folder(whole)}"]))
    assert [e["step"] for e in read(run_folder(path))[0] if e["kind"] == "start"] == [18]
    assert last_checkpoint(path) == last_checkpoint(trunk)


def test_what_trains_something_else_is_no_trunk(storage, trunk):
    path = digits(storage, "another", **SHORT)
    options = [f"checkpoint.trunk={run_folder(trunk)}", "train.seed=1"]
    with pytest.raises(ValueError, match=r"train\.seed \(1234 before, 1 now\)"):
        commands.train(load(path, options))
    assert [file.name for file in run_folder(path).iterdir()] == [journal.LOCK], "nothing has begun"
