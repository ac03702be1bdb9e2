"""The command line as people and programs meet it: results, errors and exit statuses."""

import errno
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dsvl.config import require
from orchestration import cli
from orchestration.verbs import described

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, settings) -> Path:
    """A folder with a legal `tiny.yaml` to work in."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def dsvl(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "orchestration.cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=60,
        check=False,
    )


def test_a_reader_that_has_seen_enough_is_no_failure():
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "orchestration.cli", "plan", "tiny.yaml"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("file", ["tiny.yaml", "nowhere.yaml"])
def test_a_result_that_cannot_be_written_is_told_and_no_success(file):
    command = [sys.executable, "-m", "orchestration.cli", "plan", file, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False
        )
    assert done.returncode == (1 if file == "tiny.yaml" else 2)
    assert "the result could not be written: " in done.stderr
    assert "Traceback" not in done.stderr


BROKEN = {
    "unknown key": "zzz: 1",
    "near-miss key": "optim: {lrr: 1}",
    "duplicate key": "name: x\nname: y",
    "wrong type": "train: {epochs: soon}",
    "impossible batch": "cluster: {workers: 5}",
    "missing file": "extends: [tiny.yaml, lost.yaml]",
    "circle": "extends: [tiny.yaml, x.yaml]",
    "bad choice": "model: {attention: full}",
    "several": "optim: {lr: -1}\ntrain: {epochs: 0}\nnaem: x",
    "bad YAML": "optim: [",
    "unknown search field": "search: {space: {optim.lrr: {kind: grid, values: [1]}}}",
    "illegal search value": "search: {space: {optim.lr: {kind: grid, values: [0]}}}",
    "list for a section": "optim: [1]",
    "broken rule": "optim: {clip: 0}",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_configuration_is_told_with_its_line_and_exit_status_2(text, capsys):
    extends = "" if "extends" in text else "extends: tiny.yaml\n"
    Path("x.yaml").write_text(extends + text)
    assert cli.main(["plan", "x.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    for line in err.splitlines():
        assert line.startswith(("x.yaml:", "tiny.yaml:")), line


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "x.yaml"],
        ["plan", "lost.yaml"],
        ["plan", "tiny.yaml", "optim.lr"],
        ["plan", "tiny.yaml", "optim.lr=x", "optim.lrr=1"],
        ["pln", "tiny.yaml"],
        ["plan"],
        [],
        ["plan", "tiny.yaml", "--jsn"],
    ],
)
def test_a_wrong_request_ends_the_real_command_with_2_and_no_traceback(arguments):
    Path("x.yaml").write_text("extends: tiny.yaml\noptim: {lr: -1}\nname: a/b\n")
    done = dsvl(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_with_json_errors_are_a_document_too(capsys):
    assert cli.main(["plan", "tiny.yaml", "optim.lr=-1", "--json", "train.epochs=0"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "error": [
            "override 'optim.lr=-1': optim.lr: -1.0 must be positive, for instance 1e-3",
            "override 'train.epochs=0': train.epochs: 0 must be positive",
        ]
    }
    assert err.splitlines() == json.loads(out)["error"]


def test_an_unknown_verb_names_the_nearest(capsys):
    assert cli.main(["trian", "tiny.yaml"]) == 2
    assert capsys.readouterr().err == "no verb 'trian'; did you mean 'train'?\n"
    assert cli.main(["zzz", "tiny.yaml"]) == 2
    assert "the verbs are quickstart, check, plan" in capsys.readouterr().err


def test_a_plan_that_does_not_fit_is_a_wrong_request(capsys):
    assert cli.main(["plan", "tiny.yaml", "cluster.gpu_memory_gib=1e-6"]) == 2
    assert "a worker of this run needs" in capsys.readouterr().err


def test_a_plan_is_a_text_for_people_and_a_document_for_programs(capsys):
    assert cli.main(["plan", "tiny.yaml"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["plan", "tiny.yaml", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["name"] == "tiny"
    assert document["identity"] in text


def test_the_real_command_prints_its_result_on_stdout_alone():
    done = dsvl("plan", "tiny.yaml", "--json", "train.epochs=7")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["epochs"] == 7


def test_what_libraries_print_and_log_is_no_result(capsys, monkeypatch):
    def work(experiment):
        print("noise")
        logging.info("progress")
        return described({"loss": 0.5, "best": {"lr": 0.1}, "trials": [{"size": "small"}]})

    monkeypatch.setitem(cli.VERBS, "train", work)
    assert cli.main(["train", "tiny.yaml", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"loss": 0.5, "best": {"lr": 0.1}, "trials": [{"size": "small"}]}
    assert "noise" in err
    assert "INFO progress" in err
    assert cli.main(["train", "tiny.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[:3] == ["loss:   0.5", "best:", "  lr: 0.1"]


def test_failed_work_ends_with_1_a_line_and_a_log(capsys, monkeypatch):
    def work(experiment):
        raise RuntimeError("worker 3 was lost\nand more")

    monkeypatch.setitem(cli.VERBS, "train", work)
    assert cli.main(["train", "tiny.yaml", "--json"]) == 1
    out, err = capsys.readouterr()
    log = Path("runs/tiny/train.error.log")
    assert err == f"train failed: RuntimeError: worker 3 was lost; see {log}\n"
    assert json.loads(out) == {"error": err.splitlines()}
    assert log.read_text().startswith("train failed: RuntimeError: worker 3 was lost\n\nTraceback")


@pytest.mark.parametrize("nowhere", [False, True])
def test_work_that_fails_on_a_full_disk_is_told_all_the_same(capsys, monkeypatch, nowhere):
    def work(experiment):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(cli.VERBS, "prepare", work)
    Path("runs").write_text("where the folder of runs would be")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "runs" if nowhere else "elsewhere")
    assert cli.main(["prepare", "tiny.yaml"]) == 1
    told = "prepare failed: OSError: [Errno 28] No space left on device"
    where = "" if nowhere else "; see elsewhere/prepare.error.log"
    assert capsys.readouterr().err == f"{told}{where}\n"


def test_data_give_no_orders_to_a_terminal(capsys, monkeypatch):
    hostile = "a\x1b[31mb\x07\x9bc\ud800"

    def refuse(experiment):
        raise FileNotFoundError(hostile)

    monkeypatch.setitem(cli.VERBS, "check", lambda experiment: described({"errors": [hostile]}))
    monkeypatch.setitem(cli.VERBS, "train", refuse)
    assert cli.main(["check", "tiny.yaml"]) == 0
    assert cli.main(["train", "tiny.yaml"]) == 2
    told = r"a\x1b[31mb\x07\x9bc\ud800"
    assert capsys.readouterr() == (f"errors: {told}\n", f"{told}\n")
    assert cli.main(["check", "tiny.yaml", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"errors": [hostile]}
    assert out.isascii()


def test_interrupted_work_ends_with_1_and_a_line(capsys, monkeypatch):
    def work(experiment):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "train", work)
    assert cli.main(["train", "tiny.yaml"]) == 1
    assert capsys.readouterr().err == "train was interrupted\n"


@pytest.mark.parametrize(
    ("work", "says"),
    [
        (lambda experiment: require(False, "room", 0, "must be positive"), "room=0: must be"),
        (lambda experiment: Path("room").read_text(), "No such file or directory: 'room'"),
    ],
)
def test_what_the_user_can_mend_ends_with_2_and_no_log(capsys, monkeypatch, work, says):
    monkeypatch.setitem(cli.VERBS, "train", work)
    assert cli.main(["train", "tiny.yaml"]) == 2
    assert says in capsys.readouterr().err
    assert not Path("runs").exists()


def test_what_a_library_refuses_is_failed_work(capsys, monkeypatch):
    monkeypatch.setitem(cli.VERBS, "train", lambda experiment: np.zeros(3).reshape(2, 2))
    assert cli.main(["train", "tiny.yaml"]) == 1
    assert "train failed: ValueError: cannot reshape" in capsys.readouterr().err


@pytest.mark.parametrize("mistake", ["max([])", "list(zip('a', 'bc', strict=True))", "int('x')"])
def test_a_mistake_of_ours_is_failed_work_and_no_wrong_request(capsys, monkeypatch, mistake):
    ours = {"__package__": "orchestration"}
    exec(f"def work(experiment): {mistake}", ours)
    monkeypatch.setitem(cli.VERBS, "train", ours["work"])
    assert cli.main(["train", "tiny.yaml"]) == 1
    assert "train failed: ValueError" in capsys.readouterr().err


def test_quickstart_needs_no_experiment(monkeypatch, capsys):
    seen = []
    monkeypatch.setitem(
        cli.VERBS, "quickstart", lambda experiment: (seen.append(experiment), ({}, ""))[1]
    )
    assert cli.main(["quickstart"]) == 0
    assert cli.main(["quickstart", "optim.lr=0.5"]) == 0
    assert cli.main(["quickstart", "tiny.yaml"]) == 0
    assert [(experiment.name, experiment.optim.lr) for experiment in seen[1:]] == [
        ("quickstart", 0.5),
        ("tiny", 0.001),
    ]


def test_help_names_every_verb(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in cli.VERBS)
