"""Talking to a trained model through the real command: answers on stdout, all else on stderr."""

import io
import json
import os
import pty
import signal
import termios
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from orchestration import cli
from orchestration.compose import load
from orchestration.serving import terminal
from orchestration.trained import Subject, find
from tests.orchestration.hosting import model_folder, picture

pytestmark = pytest.mark.ray


def typed(dsvl: Any, path: Path, *lines: str, options: tuple = ()) -> tuple[int, str, str]:
    """What `dsvl chat` makes of these lines and the end of its input: status, stdout, stderr."""
    chat = dsvl("chat", path, *options, stdin=PIPE, stdout=PIPE, stderr=PIPE)
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
        "/no/such/image.png: no such file",
        "'image.png' is not a file in /no/such",
        "No closing quotation",
        "no command /nonsense",
        "clear it to go on",
        "/quit",
    ):
        assert message in err


def test_with_json_stdout_is_one_document_of_all_that_was_said(storage, trained_run, dsvl):
    one, two = map(str, sorted((storage / "raw/digits/images").iterdir())[:2])
    lines = (
        f"/image {one} {two}",
        "What digit is in image 1?",
        "Which digit is larger, image 1 or image 2?",
        "word " * 1000,
        "/clear",
        "What?",
    )
    _, spoken, _ = typed(dsvl, trained_run, *lines)
    status, out, err = typed(dsvl, trained_run, *lines, options=("--json",))
    assert status == 0, err
    document = json.loads(out)
    rounds = document["rounds"]
    assert document["answered"] == 3
    assert [said["round"] for said in rounds] == [1, 2, 3, 1]
    assert [said["images"] for said in rounds] == [[one, two], [], [], []]
    assert [said["question"] for said in rounds] == [lines[n].strip() for n in (1, 2, 3, 5)]
    assert "clear it to go on" in rounds[2]["error"]
    answers = [said["answer"] for said in rounds if "answer" in said]
    assert answers == spoken.splitlines()[:-1], "the same as without --json"
    assert all(answer in err.splitlines() for answer in answers), "and told meanwhile"


def test_an_answer_appears_piece_by_piece(trained_run, monkeypatch):
    out = io.StringIO()

    class Parrot:
        """A chat that says again what it is asked, and looks at what has been shown of it."""

        turns, images = (), 0

        def stream(self, question, *, images):
            said = ""
            for word in question.split():
                assert out.getvalue().endswith(said)
                said += f"{word} "
                yield f"{word} "

    monkeypatch.setattr(terminal, "open_chat", lambda subject: Parrot())
    monkeypatch.setattr("sys.stdin", io.StringIO("one two three\nfour five\n"))
    assert terminal.talk(find(load(trained_run)), out=out)["answered"] == 2
    assert out.getvalue() == "one two three \nfour five \n"


@pytest.fixture
def chatting(tmp_path_factory, monkeypatch, capsys):
    """Talk to an untrained model in this process: lines -> the document, and what stderr says."""
    folder = model_folder(tmp_path_factory.mktemp("chat") / "digits")

    def chatting(*lines: str) -> tuple[dict, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        document = terminal.talk(find(folder), out=io.StringIO())
        return document, capsys.readouterr().err

    return chatting


def test_paths_in_a_line_are_shown_and_urls_are_not_fetched(chatting, tmp_path):
    plain, odd = tmp_path / "a.png", tmp_path / "it's a digit.png"
    for number, path in enumerate((plain, odd)):
        path.write_bytes(picture(number))
    escaped = str(odd).replace(" ", "\\ ").replace("'", "\\'")
    document, err = chatting(
        f"{plain} What is it?",
        f'"{odd}" {escaped} file://{plain}',
        "And what are these?",
        "https://127.0.0.1/cat.png What is it?",
        f"{tmp_path}/none.png What?",
        "Is a.png a name?",
        *[f"/image {plain}"] * 11,
        "And all of these?",
        "/images",
    )
    asked = [(said["images"], said["question"], "answer" in said) for said in document["rounds"]]
    assert asked == [
        ([str(plain)], "What is it?", True),
        ([str(odd), str(odd), str(plain)], "And what are these?", True),
        ([str(tmp_path / "none.png")], "What?", False),
        ([], "Is a.png a name?", True),
        ([str(plain)] * 11, "And all of these?", True),
    ]
    assert "https://127.0.0.1/cat.png: is not fetched" in err
    assert "'none.png' is not a file" in err
    assert f"image 15: {plain}\n" in err


def test_a_terminal_shows_images_and_a_file_holds_none(tmp_path, dsvl):
    model = model_folder(tmp_path / "digits")
    Image.new("RGB", (40, 40), (255, 0, 0)).save(tmp_path / "red.png")
    line = f"{tmp_path}/red.png What is it?"
    _, out, err = typed(dsvl, model, line)
    assert "\x1b" not in out + err

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    environment = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    chat = dsvl("chat", model, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    while b"> " not in shown:
        shown += os.read(ours, 2**16)
    os.write(ours, f"{line}\n/quit\n".encode())
    while part := _read(ours):
        shown += part
    assert chat.wait() == 0
    assert b"38;2;255;0;0;48;2;255;0;0" in shown


def _read(terminal: int) -> bytes:
    """What a terminal still has to show; nothing when its program has ended."""
    try:
        return os.read(terminal, 2**16)
    except OSError:  # how Linux tells that the other end is closed
        return b""


def test_a_question_taken_back_is_forgotten_and_the_rest_saved(chatting, tmp_path):
    document, err = chatting(
        "/undo",
        "Who are you?",
        "What digit is it?",
        "/undo",
        "What digit is it?",
        f"/save {tmp_path}/said.json",
        f"/save {tmp_path}/said.json",
        f"/save {tmp_path}/none/said.json",
    )
    first, second, again = document["rounds"]
    assert again == second
    assert json.loads((tmp_path / "said.json").read_text()) == {"rounds": [first, second]}
    for message in ("nothing to take back", "is there already", "none/said.json: No such file"):
        assert message in err


def test_ctrl_c_stops_the_answer_and_not_the_conversation(monkeypatch, capsys):
    left = []

    class Endless:
        """A chat that never ends by itself, but for an answer of no words."""

        turns, images = (), 0

        def stream(self, question, *, images):
            try:
                for number in range(0 if question == "nothing" else 10**6):
                    if number == 2:
                        os.kill(os.getpid(), signal.SIGINT)
                    yield f"{question} "
            finally:
                left.append(question)

    monkeypatch.setattr(terminal, "open_chat", lambda subject: Endless())
    processor = SimpleNamespace(from_checkpoint=lambda _: None)
    monkeypatch.setattr(terminal, "ImageProcessor", processor)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\nnothing\n\ntwo\n"))
    document = terminal.talk(Subject("", Path(), "", "", {}), out=io.StringIO())
    assert [said["answer"] for said in document["rounds"]] == ["one " * 3, "", "two " * 3]
    assert left == ["one", "nothing", "two"]
    err = capsys.readouterr().err
    assert err.count("(stopped)") == 2
    assert err.count("(an empty answer)") == 1


def test_quit_ends_a_conversation_before_its_input_does(trained_run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("/quit\nWhat digit is in image 1?\n"))
    out = io.StringIO()
    assert terminal.talk(find(load(trained_run)), out=out) == {"answered": 0, "rounds": []}
    assert out.getvalue() == ""


def test_without_a_checkpoint_the_command_says_what_to_do_first(trained_run, tmp_path, capsys):
    assert cli.main(["chat", str(trained_run), f"storage.path={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"{tmp_path}/unbroken/checkpoints" in said.err
    assert "train or sweep first" in said.err
