"""Talking to a trained model through the real command: answers on stdout, all else on stderr."""

import io
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest

from orchestration import cli
from orchestration.compose import load

pytestmark = pytest.mark.ray


def typed(dsvl: Any, path: Path, *lines: str) -> tuple[int, str, str]:
    """What `dsvl chat` makes of these lines and the end of its input: status, stdout, stderr."""
    chat = dsvl("chat", path, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    out, err = chat.communicate("".join(f"{line}\n" for line in lines))
    return chat.returncode, out, err


def test_a_conversation_answers_questions_and_survives_everything_else(storage, trained_run, dsvl):
    one, two = sorted((storage / "raw/digits/images").iterdir())[:2]
    status, out, err = typed(
        dsvl,
        trained_run,
        f"/image {one}",
        "What digit is in image 1?",
        "",
        "   ",
        "/image /no/such/image.png",
        "What digit is in image 2?",  # not answered, and the conversation is as it was
        f"/image {two} {storage}",
        "What digit is in image 2?",  # a folder is no image
        "/image 'unclosed",
        "/nonsense",
        f"/image {two}",
        "Which digit is larger, image 1 or image 2?",
        "/clear",
        f"/image '{one}'",
        "What digit is in image 1?",
        "word " * 1000,  # too long for the model
        "What digit is in image 1?",
    )
    assert status == 0, err
    *answers, count = out.splitlines()
    assert count.split() == ["answered:", "4"]
    assert len(answers) == 4
    assert all(answer.strip() for answer in answers)
    assert answers[0] == answers[2] == answers[3], "the same chat begins again, or stands still"
    assert "Traceback" not in err
    for message in (
        "'image.png' is not a file in /no/such",
        "No closing quotation",
        "no command /nonsense",
        "clear it to go on",
        "/quit",
    ):
        assert message in err


def test_quit_ends_a_conversation_before_its_input_does(trained_run, monkeypatch):
    from orchestration.terminal import talk

    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\nWhat digit is in image 1?\n"))
    out = io.StringIO()
    assert talk(load(trained_run), out=out) == {"answered": 0}
    assert out.getvalue() == ""


def test_without_a_checkpoint_the_command_says_what_to_do_first(trained_run, tmp_path, capsys):
    assert cli.main(["chat", str(trained_run), f"storage.path={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{tmp_path}/unbroken/checkpoints" in said.err
    assert "train or sweep first" in said.err
