"""Talking to a trained model in a terminal."""

import io
import logging
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from PIL import Image as Picture
from rich.console import Console

from dsvl import pretrained
from dsvl.cache import ImageStore
from dsvl.chat import Chat
from dsvl.data.encode import load_tokenizer
from dsvl.data.images import ImageProcessor, load
from dsvl.data.sources import BadImage, Images
from orchestration.problems import harmless
from orchestration.records.journal import write_json
from orchestration.trained import Subject

log = logging.getLogger(__name__)

HELP = """A line is a question. `/image PATH [PATH ...]`, or paths in a line, as dropped files are, show
images with the next question; `/images` lists them. `/undo` takes the last question back, `/clear` begins
anew, `/save FILE` keeps the conversation as JSON. Ctrl-C stops an answer; `/quit` (or Ctrl-D) ends."""
WORD = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s\\'"])+""")
"""A word of a line as shells and file managers write it, in quotes or with escaped blanks."""
CELLS = 32
"""Width of an image in a terminal."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def open_chat(subject: Subject) -> Chat:
    """An empty conversation with a model."""
    log.info("loading %s", subject.folder)
    model = pretrained.load(subject.folder, precision=subject.manner["precision"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Chat(
        model.to(device).eval(),
        load_tokenizer(subject.tokenizer),
        device=device,
        max_tokens=subject.manner["max_tokens"],
        store=ImageStore(limit_bytes=2**30),
    )


def talk(subject: Subject, *, out: TextIO) -> dict:
    """Answer the lines of standard input until it ends, on `out` piece by piece as answers are written.

    Args:
        subject: the model.
        out: where answers are told.

    Returns:
        `answered`, how many questions were; and `rounds`, of every question the `round` of its conversation,
        the `images` that it showed, the `question` and the `answer`, or the `error` in its place.
    """
    show_image = _image_shower(out)
    chat = open_chat(subject)
    processor = ImageProcessor.from_checkpoint(subject.processor)

    def pixels(path: Path) -> np.ndarray:
        limit = subject.manner["max_image_pixels"]
        image = load(Images(path.parent), path.name, processor=processor, max_pixels=limit)
        show_image(image.fitted)
        return processor.normalise(image.fitted)

    images: list[Path] = []
    conversation: list[dict] = []
    asked: list[dict] = []
    print(HELP, file=sys.stderr)
    while (line := _read_line(chat, len(images))) is not None:
        command, _, rest = line.partition(" ")
        match command:
            case "/quit":
                break
            case "/clear":
                chat.clear()
                images, conversation = [], []
            case "/undo":
                if chat.undo():
                    conversation.pop()
                else:
                    print("there is nothing to take back", file=sys.stderr)
            case "/save":
                _save(rest, conversation)
            case "/images":
                shown = [path for said in conversation for path in said["images"]]
                for number, path in enumerate([*shown, *images], start=1):
                    waits = "" if number <= len(shown) else ", shown with the next question"
                    print(f"image {number}: {path}{waits}", file=sys.stderr)
            case "/image":
                try:
                    added = [_path(word) for word in shlex.split(rest)]
                    images += (
                        added  # what is not there has the question refused, not asked without it
                    )
                    for path in added:
                        if not path.is_file():
                            print(f"{path}: no such file", file=sys.stderr)
                except ValueError as error:  # a quotation without its end
                    print(f"{line}: {error}", file=sys.stderr)
            case _:
                try:
                    question, dropped = _taken_apart(line)
                except ValueError as error:
                    print(error, file=sys.stderr)
                    continue
                images += dropped
                if not question:
                    continue
                said = {
                    "round": len(chat.turns) // 2 + 1,
                    "images": list(map(str, images)),
                    "question": question,
                }
                try:
                    pieces = chat.stream(question, images=list(map(pixels, images)))
                    said["answer"] = _show(pieces, out)
                    conversation.append(said)
                except (BadImage, ValueError) as error:
                    print(error, file=sys.stderr)
                    said["error"] = str(error)
                asked.append(said)
                images = []
    return {"answered": sum("answer" in said for said in asked), "rounds": asked}


def _taken_apart(line: str) -> tuple[str, list[Path]]:
    """The question of a line, and the images whose paths were dropped into it.

    Raises ValueError for a command that is none, and for the URL of an image.
    """
    paths = []

    def take(found: re.Match[str]) -> str:
        word = re.sub(r"\\(.)", r"\1", found[0].strip("'\"")).removeprefix("file://")
        if not word.lower().endswith(SUFFIXES):
            return found[0]
        if "://" in word:
            raise ValueError(f"{word}: is not fetched; save the image, and name its file")
        path = _path(word)
        if path.is_file() or word.startswith(("/", "~", "./", "../")):
            paths.append(path)
            return ""
        return found[0]

    question = " ".join(WORD.sub(take, line).split()) if "." in line else line
    if question.startswith("/") and not paths:
        raise ValueError(f"no command {question.split()[0]}. {HELP}")
    return question if paths else line, paths


def _path(word: str) -> Path:
    return Path(word).expanduser().resolve()


def _save(name: str, conversation: list[dict]) -> None:
    """Write a conversation into a file that is not there yet."""
    path = _path(name.strip() or "conversation.json")
    if path.exists():
        print(f"{path}: is there already; name another file", file=sys.stderr)
        return
    try:
        write_json(path, {"rounds": conversation})
        print(f"{path}: {len(conversation)} rounds", file=sys.stderr)
    except OSError as error:
        print(f"{path}: {error.strerror}", file=sys.stderr)


def _image_shower(out: TextIO) -> Callable[[np.ndarray], None]:
    """What shows (3, P, P) uint8, an image as the model sees it, as finely as a terminal can."""
    terminal = all(stream.isatty() for stream in (sys.stdin, sys.stdout, out))
    if not terminal or not os.get_terminal_size().columns:
        return lambda _: None
    # Imported and used for the first time it asks the terminal what it can, and would take lines that
    # are typed meanwhile for the answer.
    from textual_image.renderable import Image

    Console(file=io.StringIO()).print(Image(Picture.new("RGB", (1, 1)), width=1, height=1))

    def show(fitted: np.ndarray) -> None:
        image = Picture.fromarray(fitted.transpose(1, 2, 0))
        Console(file=out).print(Image(image, width=CELLS, height="auto"))

    return show


def _show(pieces: Generator[str, None, None], out: TextIO) -> str:
    """Write the pieces of an answer as they come, and return it. Ctrl-C stops it, twice the program."""
    answer = ""
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        if stopped:
            raise KeyboardInterrupt
        stopped = True

    before = signal.signal(signal.SIGINT, stop)
    try:
        for piece in pieces:
            print(harmless(piece), end="", file=out, flush=True)
            answer += piece
            if stopped:
                pieces.close()
                print("\n(stopped)", end="", file=sys.stderr)
                break
    finally:
        signal.signal(signal.SIGINT, before)
    print(file=out, flush=True)
    if not answer:
        print("(an empty answer)", file=sys.stderr)
    return answer


def _read_line(chat: Chat, waiting: int) -> str | None:
    """The next line, or None at the end; the prompt tells how many images there are, and of the room."""
    room = f"{chat.tokens}/{chat.encoder.max_tokens} tokens" if sys.stdin.isatty() else ""
    try:
        line = input(f"[{chat.images}+{waiting} images, {room}] > " if room else "").strip()
        return line.encode(errors="replace").decode()  # of bytes that are no UTF-8, question marks
    except (EOFError, KeyboardInterrupt):
        return None
