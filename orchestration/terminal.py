"""Talking to a trained model in a terminal."""

import logging
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

import numpy as np
import torch

from dsvl import pretrained
from dsvl.cache import ImageStore
from dsvl.chat import Chat
from dsvl.data.encode import load_tokenizer
from dsvl.data.images import ImageProcessor, load
from dsvl.data.sources import BadImage, Images
from orchestration.config import Experiment
from orchestration.trained import Subject, find

log = logging.getLogger(__name__)

HELP = """A line is a question. `/image PATH [PATH ...]` shows images with the next question,
`/clear` begins anew, `/quit` (or Ctrl-D) ends."""


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


def talk(source: Experiment | Path, *, out: TextIO) -> dict:
    """Answer the lines of standard input until it ends, on `out` piece by piece as answers are written.

    Args:
        source: an experiment, or the folder of a run, a trial or an exported model.
        out: where answers are told.

    Returns:
        `answered`, how many questions were; and `rounds`, of every question the `round` of its conversation,
        the `images` that it showed, the `question` and the `answer`, or the `error` in its place.
    """
    subject = find(source)
    chat = open_chat(subject)
    processor = ImageProcessor.from_checkpoint(subject.processor)

    def pixels(path: Path) -> np.ndarray:
        limit = subject.manner["max_image_pixels"]
        image = load(Images(path.parent), path.name, processor=processor, max_pixels=limit)
        return processor.normalise(image.fitted)

    images: list[Path] = []
    rounds: list[dict] = []
    print(HELP, file=sys.stderr)
    while (line := _read_line(chat.images, len(images))) is not None:
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        if command == "/clear":
            chat.clear()
            images = []
        elif command == "/image":
            try:
                images += [Path(path).expanduser().resolve() for path in shlex.split(rest)]
            except ValueError as error:  # a quotation without its end
                print(f"{line}: {error}", file=sys.stderr)
        elif command.startswith("/"):
            print(f"no command {command}. {HELP}", file=sys.stderr)
        elif line:
            said = {
                "round": len(chat.turns) // 2 + 1,
                "images": list(map(str, images)),
                "question": line,
            }
            try:
                pieces = chat.stream(line, images=list(map(pixels, images)))
                said["answer"] = _show(pieces, out)
            except (BadImage, ValueError) as error:
                print(error, file=sys.stderr)
                said["error"] = str(error)
            rounds.append(said)
            images = []
    return {"answered": sum("answer" in said for said in rounds), "rounds": rounds}


def _show(pieces: Iterable[str], out: TextIO) -> str:
    """Write the pieces of an answer as they come, and return it."""
    answer = ""
    for piece in pieces:
        print(piece, end="", file=out, flush=True)
        answer += piece
    print(file=out, flush=True)
    return answer


def _read_line(shown: int, waiting: int) -> str | None:
    """The next line, or None at the end; the prompt tells how many images there are."""
    try:
        return input(f"[{shown}+{waiting} images] > " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None
