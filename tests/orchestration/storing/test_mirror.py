"""A storage and its store, which here is a folder: what is kept, and what another machine has of it."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from dsvl import checkpoint_folder
from dsvl.config import CheckpointConfig
from orchestration.records import journal
from orchestration.storing.mirror import Mirror
from orchestration.storing.remote import Remote


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def machine(place: Path, store: Path) -> Mirror:
    """A machine whose storage is in a folder of its own."""
    place.mkdir(exist_ok=True)
    return Mirror(place, store.as_uri(), tracked_here=True)


def lines(run: Path) -> list[int]:
    return [entry["step"] for entry in journal.read(run)[0]]


def write(run: Path, *steps: int) -> None:
    writer = journal.Journal(run)
    for step in steps:
        writer.metrics(step, {"train/loss": 1.0})


def checkpoint(run: Path, step: int, *, loss: float = 1.0) -> Path:
    """A whole checkpoint as `dsvl.checkpoint` leaves it, of one small file."""
    making = run / "checkpoints" / f".step-{step:06d}"
    making.mkdir(parents=True)
    (making / "parameters.safetensors").write_bytes(bytes([step]) * 100)
    files = {"parameters.safetensors": checkpoint_folder.written(making / "parameters.safetensors")}
    stated = {"step": step, "metrics": {"eval/loss": loss}, "files": files}
    target = run / "checkpoints" / f"step-{step:06d}"
    checkpoint_folder.publish(making, target, stated)
    return target


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_another_machine_has_the_whole_run_after_it_fetched_it(tmp_path, store):
    here, there = tmp_path / "here", tmp_path / "there"
    run = here / "run/trials/lr=0.1,size=a%2Fb c"
    write(run, 1, 2)
    (run / "result.json").write_text("{}")
    (run / "ray").mkdir()
    (run / "ray/state").touch()
    (run / "mlflow.json").touch()
    saved = checkpoint(run, 2)
    machine(here, store).push(here / "run")

    other = machine(there, store)
    other.fetch(there / "run")
    found = there / run.relative_to(here)
    assert sorted(path.name for path in found.iterdir()) == ["journal.jsonl", "result.json"]
    assert (found / journal.NAME).read_bytes() == (run / journal.NAME).read_bytes()
    other.fetch_newest(found)
    assert content(found / "checkpoints/step-000002") == content(saved)


def test_lines_that_two_machines_wrote_after_they_parted_are_all_in_the_journal_by_time(
    tmp_path, store
):
    first, second = tmp_path / "first", tmp_path / "second"
    one, two = machine(first, store), machine(second, store)
    write(first / "run", 1, 2)
    one.push(first / "run")
    write(first / "run", 3)  # and dies before this line is up
    two.fetch(second / "run")
    write(second / "run", 3, 4)
    two.push(second / "run")

    back = machine(first, store)
    back.fetch(first / "run")
    assert lines(first / "run") == [1, 2, 3, 3, 4]
    back.push(first / "run")
    two.fetch(second / "run")
    assert (first / "run" / journal.NAME).read_bytes() == (
        second / "run" / journal.NAME
    ).read_bytes()


def test_many_segments_become_one_and_no_line_is_lost_or_doubled(tmp_path, store):
    here = machine(tmp_path / "here", store)
    run = tmp_path / "here/run"
    for step in range(70):
        write(run, step)
        here.push(run)
    segments = store / "run" / journal.NAME
    assert len(list(segments.iterdir())) == 70
    there = machine(tmp_path / "there", store)
    there.fetch(tmp_path / "there/run", writer=True)
    assert len(list(segments.iterdir())) == 1
    write(run, 70)
    here.push(run)
    there.fetch(tmp_path / "there/run", writer=True)
    assert lines(tmp_path / "there/run") == list(range(71))


def test_a_journal_with_a_writer_is_left_alone(tmp_path, store):
    other = machine(tmp_path / "other", store)
    write(tmp_path / "other/run", 1)
    other.push(tmp_path / "other/run")
    run = tmp_path / "here/run"
    writer = journal.Journal(run)
    writer.metrics(2, {})
    machine(tmp_path / "here", store).fetch(run)
    writer.metrics(3, {})
    assert lines(run) == [2, 3]


def test_the_later_document_counts(tmp_path, store):
    first, second = (machine(tmp_path / name, store) for name in ("first", "second"))
    mine, other = tmp_path / "first/run/evidence.json", tmp_path / "second/run/evidence.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("old")
    first.push(mine.parent)
    second.fetch(other.parent)
    assert other.read_text() == "old"
    other.write_text("newer")
    second.push(other.parent)
    machine(tmp_path / "first", store).fetch(mine.parent)
    assert mine.read_text() == "newer"
    mine.write_text("newest")
    machine(tmp_path / "first", store).fetch(mine.parent)
    assert mine.read_text() == "newest"


def test_a_file_that_goes_while_others_go_up_is_no_failure(tmp_path, store, monkeypatch):
    here = machine(tmp_path / "here", store)
    run = tmp_path / "here/run"
    (run / "logs").mkdir(parents=True)
    for name in ("logs/rank-1.stacks", "result.json"):
        (run / name).write_text("{}")
    put = here.remote.put

    def after_its_end(path: Path, key: str) -> None:
        if path.suffix == ".stacks":
            path.unlink()
        put(path, key)

    monkeypatch.setattr(here.remote, "put", after_its_end)
    here.push(run)
    assert (store / "run/result.json").is_file()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_at_once_and_not_as_a_store_that_is_away(tmp_path, store, code):
    def work() -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(OSError, match=os.strerror(code)):
        machine(tmp_path, store).remote._patiently("fetch a file", work)


@pytest.mark.parametrize("fault", ["no manifest", "another file", "no file"])
def test_a_checkpoint_that_is_not_whole_in_the_store_does_not_count(tmp_path, store, fault):
    run = tmp_path / "here/run"
    whole, broken = checkpoint(run, 1), checkpoint(run, 2)
    machine(tmp_path / "here", store).push(run)
    kept = store / "run/checkpoints/step-000002"
    if fault == "no manifest":
        (kept / "manifest.json").unlink()
    elif fault == "no file":
        (kept / "parameters.safetensors").unlink()
    else:
        (kept / "parameters.safetensors").write_bytes(b"x" * 100)
    there = tmp_path / "there/run"
    other = machine(tmp_path / "there", store)
    other.remote.patience = 0.1
    other.fetch_newest(there)
    assert [path.name for path in (there / "checkpoints").iterdir()] == [whole.name]
    (run / "result.json").touch()
    machine(tmp_path / "here", store).push(run)
    if fault == "no manifest":
        assert content(kept) == content(broken)


def test_where_no_checkpoint_is_whole_nothing_is_trained_anew(tmp_path, store):
    run = tmp_path / "here/run"
    checkpoint(run, 1)
    machine(tmp_path / "here", store).push(run)
    (store / "run/checkpoints/step-000001/parameters.safetensors").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole"):
        machine(tmp_path / "there", store).fetch_newest(tmp_path / "there/run")


def test_the_store_keeps_the_checkpoints_that_are_kept_here(tmp_path, store):
    run, config = tmp_path / "here/run", CheckpointConfig(keep=2, keep_best=1)
    here = machine(tmp_path / "here", store)
    for step, loss in enumerate((1.0, 0.5, 0.9, 0.8, 0.7, 0.6), start=1):
        checkpoint(run, step, loss=loss)
        checkpoint_folder.remove_old(run / "checkpoints", config, step=step, stay={1})
        here.push(run, retention=config, stay={1})
        kept = {path.name for path in (run / "checkpoints").glob("step-*")}
        folders = (store / "run/checkpoints").iterdir()
        assert {path.name for path in folders if any(path.iterdir())} == kept
    # Another machine has the newest alone, and the store keeps the best and those that stay all the same.
    other, there = machine(tmp_path / "there", store), tmp_path / "there/run"
    other.fetch_newest(there)
    checkpoint(there, 7, loss=0.9)
    other.push(there, retention=config, stay={1})
    folders = (store / "run/checkpoints").iterdir()
    assert sorted(path.name for path in folders if any(path.iterdir())) == [
        f"step-{step:06d}" for step in (1, 2, 6, 7)
    ]


def prepared(folder: Path, text: str) -> Path:
    """A prepared set of one file."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "samples/0").write_text(text)
    manifest = {"files": {"samples/0": checkpoint_folder.sha256(folder / "samples/0")}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_prepared_data_are_fetched_whole_and_an_interrupted_fetch_goes_on(tmp_path, store):
    here = prepared(tmp_path / "here/prepared/set-1", "chats")
    machine(tmp_path / "here", store).push_prepared(here)
    there = tmp_path / "there/prepared/set-1"
    other = machine(tmp_path / "there", store)
    left = there.with_name(".fetching-set-1")
    shutil.copytree(here / "samples", left / "samples")
    (store / "prepared/set-1/samples/0").unlink()  # what is here need not be fetched
    assert other.fetch_prepared(there)
    assert (there / "samples/0").read_text() == "chats"
    assert not left.exists()
    assert not other.fetch_prepared(there.with_name("set-2"))


def test_prepared_data_that_were_made_anew_replace_those_in_the_store(tmp_path, store):
    folder = prepared(tmp_path / "here/prepared/set-1", "chats")
    here = machine(tmp_path / "here", store)
    here.push_prepared(folder)
    here.push_prepared(prepared(folder, "other chats"))
    there = tmp_path / "there/prepared/set-1"
    machine(tmp_path / "there", store).fetch_prepared(there)
    assert (there / "samples/0").read_text() == "other chats"


def test_a_store_that_cannot_be_written_to_is_told_with_its_name(tmp_path):
    (tmp_path / "store").write_text("no folder")
    with pytest.raises(RuntimeError, match=r"storage\.remote: cannot write .* in file://.*/store"):
        _ = Remote((tmp_path / "store").as_uri(), patience=0.1).clock
