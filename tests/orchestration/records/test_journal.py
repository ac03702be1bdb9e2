"""The journal of a run: whole lines only, one writer at a time, nothing counted twice."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestration.records import journal
from orchestration.records.journal import (
    NAME,
    Journal,
    curve,
    points,
    read,
    read_json,
    sole,
    write_whole,
)

WRITER = """
import sys
from pathlib import Path
from orchestration.records.journal import Journal
print("ready", flush=True)
sys.stdin.read(1)
writer = Journal(Path(sys.argv[1]))
writer.start(identity=sys.argv[2], params={}, step=0)
for step in range(int(sys.argv[3])):
    writer.metrics(step, {"train/loss": 1 / (step + 1), "writer": int(sys.argv[2])})
writer.end("finished")
"""


def writer(folder: Path, name: int, steps: int) -> subprocess.Popen[bytes]:
    """A process, ready to write `steps` lines of metrics as soon as its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder), str(name), str(steps)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    return process


def losses(folder: Path) -> list[tuple[int, float]]:
    return curve(folder, "train/loss")


@pytest.fixture
def torn(tmp_path) -> Path:
    """The folder of a journal whose last line a killed writer left half done."""
    first = Journal(tmp_path)
    first.metrics(1, {"train/loss": 3.0})
    first.metrics(2, {"train/loss": 2.0})
    path = tmp_path / NAME
    os.truncate(path, path.stat().st_size - 9)
    return tmp_path


def test_a_torn_last_line_is_left_for_later(torn):
    entries, offset = read(torn)
    assert [entry["step"] for entry in entries] == [1]
    with (torn / NAME).open("ab") as file:
        file.write(b'oss": 2.0}}\n')
    rest, end = read(torn, offset)
    assert [entry["step"] for entry in rest] == [2]
    assert end == (torn / NAME).stat().st_size
    assert read(torn, end) == ([], end)


def test_the_next_writer_removes_a_torn_last_line(torn):
    Journal(torn).metrics(2, {"train/loss": 1.5})
    assert losses(torn) == [(1, 3.0), (2, 1.5)]
    assert (torn / NAME).read_bytes().count(b"\n") == 2


def test_a_line_that_is_torn_while_the_next_writer_waits_is_removed_too(tmp_path, monkeypatch):
    Journal(tmp_path).metrics(1, {"train/loss": 3.0})
    wait = journal.fcntl.flock

    def dying_writer(file, operation):
        with (tmp_path / NAME).open("ab") as other:
            other.write(
                b'{"time": 0, "kind": "metrics", "step": 2, "metrics": {"train/loss": 2.5}}\n'
            )
            other.write(b'{"time": 0, "kind": "met')
        wait(file, operation)

    monkeypatch.setattr(journal.fcntl, "flock", dying_writer)
    Journal(tmp_path).metrics(3, {"train/loss": 2.0})
    assert losses(tmp_path) == [(1, 3.0), (2, 2.5), (3, 2.0)]


def test_two_writers_never_interleave(tmp_path):
    writers = [writer(tmp_path, name, steps=2000) for name in range(3)]
    for process in writers:
        process.stdin.close()  # begin, all at once
    assert [process.wait() for process in writers] == [0, 0, 0]
    entries, _ = read(tmp_path)
    kinds = [entry["kind"] for entry in entries]
    assert kinds == ["start", *["metrics"] * 2000, "end"] * 3
    for first in range(0, len(entries), 2002):
        block = entries[first : first + 2002]
        names = {entry["metrics"]["writer"] for entry in block[1:-1]}
        assert names == {int(block[0]["identity"])}


def test_a_writer_that_will_not_wait_is_told_that_another_one_writes(tmp_path):
    first = Journal(tmp_path)
    with pytest.raises(BlockingIOError):
        Journal(tmp_path, wait=False)
    first.end("finished")
    Journal(tmp_path, wait=False).start(identity="i", params={}, step=0)
    assert [entry["kind"] for entry in read(tmp_path)[0]] == ["end", "start"]


def test_a_killed_writer_leaves_a_journal_that_reads_to_its_last_whole_line(tmp_path):
    process = writer(tmp_path, 0, steps=10**9)
    process.stdin.close()
    while len(read(tmp_path)[0]) < 50:
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    text = (tmp_path / NAME).read_bytes()
    entries, offset = read(tmp_path)
    steps = [entry["step"] for entry in entries[1:]]
    assert steps == list(range(len(steps)))
    assert offset == text.rindex(b"\n") + 1
    Journal(tmp_path).metrics(len(steps), {"train/loss": 0.0})
    assert losses(tmp_path)[-1] == (len(steps), 0.0)


def test_a_repeated_step_counts_once_and_its_later_line_is_the_one(tmp_path):
    first = Journal(tmp_path)
    for step, loss in ((1, 3.0), (2, 2.0), (3, 1.0)):
        first.metrics(step, {"train/loss": loss})
    first.metrics(3, {"eval/loss": 5.0})
    first.end("failed", reason="killed")
    resumed = Journal(tmp_path)
    resumed.start(identity="i", params={}, step=1)
    resumed.metrics(2, {"train/loss": 2.5})
    found = [(key, step, value) for key, step, value, _ in points(read(tmp_path)[0])]
    assert found == [
        ("eval/loss", 3, 5.0),
        ("train/loss", 1, 3.0),
        ("train/loss", 2, 2.5),
        ("train/loss", 3, 1.0),
    ]
    moments = [moment for *_, moment in points(read(tmp_path)[0])]
    assert moments[2] == max(moments)


def test_a_folder_without_a_journal_has_no_entries(tmp_path):
    assert read(tmp_path) == ([], 0)
    assert losses(tmp_path) == []


def test_a_document_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    journal.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        journal.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}


def test_a_damaged_document_is_named(tmp_path):
    (tmp_path / "result.json").write_text('{"state": "fin')
    with pytest.raises(ValueError, match=r"result\.json is damaged .*: restore it"):
        read_json(tmp_path / "result.json")


def test_only_one_is_at_work_in_a_folder(tmp_path):
    with (
        sole(tmp_path),
        pytest.raises(RuntimeError, match="another process is at work here"),
        sole(tmp_path),
    ):
        pass
    with sole(tmp_path):  # its end gives the folder free
        pass


def test_what_is_no_file_is_not_replaced_by_one_and_a_link_leads_to_it(tmp_path):
    (tmp_path / "page").mkdir()
    with pytest.raises(ValueError, match="must be a file, if it is there"):
        write_whole(tmp_path / "page", "text")
    (tmp_path / "link").symlink_to(tmp_path / "page/there.html")
    write_whole(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "page/there.html").read_text() == "text"
