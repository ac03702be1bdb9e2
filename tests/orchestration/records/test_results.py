"""A run's folder says whose it is: what it trains, on which data, and off which other run it may branch."""

import json

import pytest

from orchestration import cli
from orchestration.config import Experiment, validated
from orchestration.records.journal import Journal
from orchestration.records.results import begin, require_same_data, trunk_of
from tests.orchestration.conftest import digits, run_folder

WSD = {"schedule": "wsd", "warmup_steps": 3}


@pytest.fixture
def run(settings, tmp_path):
    """An experiment whose run has begun: name, optim, epochs -> it."""

    def make(name: str, optim: dict, epochs: int, **checkpoint) -> Experiment:
        settings["storage"] = {"path": str(tmp_path)}
        settings["train"] = {"epochs": epochs, "batch": 12}
        own = {"name": name, "optim": optim, "checkpoint": checkpoint}
        experiment = validated(settings | own)
        begin(experiment, experiment.run_folder)
        return experiment

    return make


def test_what_was_refused_before_anything_was_trained_leaves_its_name_to_another(run):
    refused = run("mine", {"lr": 0.5}, 2)
    (refused.run_folder / "data.json").write_text("{}")
    other = run("mine", {"lr": 0.25}, 2)
    stored = json.loads((other.run_folder / "experiment.json").read_text())
    assert stored["identity"] == other.identity() != refused.identity()
    assert not (other.run_folder / "data.json").exists()
    with Journal(other.run_folder) as journal:
        journal.start(identity=other.identity(), params={}, step=0)
    run("mine", {"lr": 0.25}, 2)
    with pytest.raises(ValueError, match=r"optim\.lr \(0\.25 before, 0\.5 now\)"):
        run("mine", {"lr": 0.5}, 2)


def test_a_run_whose_journal_alone_has_come_from_a_store_begins_here(run, tmp_path):
    with Journal(tmp_path / "mine") as journal:
        journal.start(identity="i", params={}, step=0)
    assert (run("mine", {"lr": 0.5}, 2).run_folder / "experiment.json").is_file()


def test_a_trunk_is_shorter_or_longer_and_decays_as_it_likes(run):
    short = run("short", WSD, 2)
    endless = run("endless", WSD | {"schedule": "constant"}, 9, branch_epochs=[4])
    for trunk in (short, endless):
        branch = run("branch", WSD | {"decay_fraction": 0.5}, 6, trunk=str(trunk.run_folder))
        assert trunk_of(branch) == trunk
        branching = run(
            "branching", WSD, 6, trunk=str(trunk.run_folder), branch_epochs=[3, 5]
        )  # though a trunk of two epochs could not have them
        assert trunk_of(branching) == trunk
    assert trunk_of(short) is None


def test_a_run_without_a_plateau_is_no_trunk(run):
    cosine = run("cosine", {"warmup_steps": 3}, 9)
    branch = run("branch", WSD, 6, trunk=str(cosine.run_folder))
    with pytest.raises(ValueError, match=r"cosine: trained with optim\.schedule=cosine and .*=3;"):
        trunk_of(branch)


def test_what_a_trunk_trains_otherwise_is_named(run):
    trunk = run("trunk", WSD | {"warmup_steps": 4, "lr": 0.5}, 9)
    branch = run("branch", WSD, 6, trunk=str(trunk.run_folder))
    said = r"optim\.lr \(0\.5 before, 0\.001 now\); optim\.warmup_steps \(4 before, 3 now\); set"
    with pytest.raises(ValueError, match=said):
        trunk_of(branch)


@pytest.fixture
def prepared(tmp_path):
    """A prepared set of a content: name, digest of its only file -> its folder."""

    def make(name: str, digest: str):
        folder = tmp_path / "prepared" / name
        folder.mkdir(parents=True)
        files = {"samples/0.parquet": {"sha256": digest, "bytes": 1}}
        manifest = {"identity": {}, "sources": {}, "files": files}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return make


def test_a_run_is_held_to_the_content_of_its_data_wherever_they_lie(run, prepared):
    experiment = run("run", WSD, 2)
    folder = experiment.run_folder
    require_same_data(experiment, folder, prepared("chats-1", "aa"))
    require_same_data(experiment, folder, prepared("moved", "aa"))
    with pytest.raises(ValueError, match=r"run: trained on .*moved; the raw data.*chats-2\)"):
        require_same_data(experiment, folder, prepared("chats-2", "bb"))
    branch = run("branch", WSD, 1, trunk=str(folder))
    with pytest.raises(ValueError, match=r"run: trained on .*moved"):
        require_same_data(branch, branch.run_folder, prepared("chats-3", "bb"))
    require_same_data(branch, branch.run_folder, prepared("chats-4", "aa"))


@pytest.mark.ray
def test_changed_raw_data_end_a_resume_with_a_message(storage, cluster, capsys):
    path = digits(storage, "changed")
    folder = run_folder(path)
    folder.mkdir(parents=True)
    (folder / "data.json").write_text(json.dumps({"folder": "before", "digest": "another"}))
    assert cli.main(["train", str(path)]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{folder}: trained on before; the raw data, or what came of them, have")
    assert not (folder / "checkpoints").exists()
