"""A small model as a folder to serve, and requests to it, good and bad."""

import base64
import io
import json
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image

from dsvl import pretrained
from dsvl.digits import chats
from dsvl.model import VisualChat
from orchestration.compose import load
from orchestration.serving.gate import Gate, Limits, Model
from orchestration.trained import CHAT, manner
from tests.conftest import png_header

ROOT = Path(__file__).parents[2]
TOKEN = "the-token-of-these-tests"
HOST = "127.0.0.1"


def model_folder(folder: Path, *, seed: int = 0) -> Path:
    """An untrained model, the projection of `seed`, as `export` would write it."""
    experiment = load(ROOT / "configs/experiment/quickstart.yaml")
    pretrained.save(VisualChat(experiment.model, precision="fp32", seed=seed), folder)
    language, vision = experiment.model.language.checkpoint, experiment.model.vision.checkpoint
    for file in (*Path(language).glob("tokenizer*"), Path(vision) / "preprocessor_config.json"):
        shutil.copy(file, folder)
    (folder / CHAT).write_text(json.dumps(manner(experiment)))
    return folder


@contextmanager
def hosted(models: Mapping[str, Model], *, limits: Limits) -> Iterator[str]:
    """The address of a gate to these models, in a thread of its own."""
    token = sha256(TOKEN.encode()).hexdigest()
    config = uvicorn.Config(
        lambda: Gate(models, token=token, limits=limits, hosts=[HOST]).app(),
        factory=True,
        port=0,
        log_level="critical",
        timeout_graceful_shutdown=2,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


def picture(shade: int, *, size: int = 8, format: str = "PNG") -> bytes:
    """An image file whose content is its shade's own."""
    noise = np.random.default_rng(shade).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format)
    return file.getvalue()


def url(data: bytes, kind: str = "image/png") -> str:
    """A data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def asked(text: str, *images: bytes | str) -> dict[str, Any]:
    """A message of the user: images, or their URLs, and a text."""
    urls = [image if isinstance(image, str) else url(image) for image in images]
    shown = [{"type": "image_url", "image_url": {"url": each}} for each in urls]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def bad_requests(model: str) -> list[tuple[str, Any, int]]:
    """What it is, a document or the bytes of a body, and the status that it deserves."""
    good = {"model": model, "messages": [asked("What?", picture(1))]}

    def showing(*images: bytes | str) -> dict[str, Any]:
        return good | {"messages": [asked("What?", *images)]}

    def saying(*roles: str) -> dict[str, Any]:
        return good | {"messages": [{"role": role, "content": "So."} for role in roles]}

    jpeg = picture(2, size=64, format="JPEG")
    look = asked("Look.", picture(1))
    seen = [asked("What?"), look | {"role": "assistant"}, asked("And?")]
    full = asked("word " * 400, *[picture(1)] * 32)
    return [
        ("no JSON", b"{", 400),
        ("nothing", b"", 400),
        ("a list", b"[]", 400),
        ("no Unicode", b'{"model": "\xff"}', 400),
        ("half a letter", b'{"model": "\\ud800"}', 400),
        ("nested without end", b"[" * 100_000, 400),
        ("very many parts", json.dumps(good | {"stop": [""] * 300_000}).encode(), 400),
        ("no messages", {"model": model}, 400),
        ("empty messages", good | {"messages": []}, 400),
        ("another model", good | {"model": "gpt"}, 404),
        ("an unknown field", good | {"tools": []}, 400),
        ("several answers", good | {"n": 2}, 400),
        ("no temperature", good | {"temperature": -1}, 400),
        ("no number", json.dumps(good | {"temperature": float("nan")}).encode(), 400),
        ("no tokens", good | {"max_tokens": 0}, 400),
        ("an empty stop", good | {"stop": ""}, 400),
        ("many stops", good | {"stop": list("abcde")}, 400),
        ("an answer last", saying("user", "assistant"), 400),
        ("two questions", saying("user", "user"), 400),
        ("two systems", saying("system", "system", "user"), 400),
        ("a tool", saying("tool", "user"), 400),
        ("a system that shows", good | {"messages": [look | {"role": "system"}, asked("What?")]}, 400),
        ("an answer that shows", good | {"messages": seen}, 400),
        ("a URL", showing("http://127.0.0.1:1/cat.png"), 400),
        ("a file", showing("file:///etc/passwd"), 400),
        ("a path", showing("/etc/passwd"), 400),
        ("no URL", showing(""), 400),
        ("an empty image", showing(url(b"")), 400),
        ("no base64", showing("data:image/png;base64,====="), 400),
        ("no image", showing(url(b"hello")), 400),
        ("a page", showing(url(b"<html></html>")), 400),
        ("another format", showing(url(picture(1, format="GIF"))), 400),
        ("a bomb", showing(png_header(9_000, 9_000)), 400),
        ("a huge bomb", showing(png_header(60_000, 60_000)), 400),
        ("half an image", showing(jpeg[: len(jpeg) // 2]), 400),
        ("a good and a bad image", showing(picture(1), b"\x89PNG\r\n\x1a\n"), 400),
        ("too many images", showing(*[picture(1)] * 33), 400),
        ("more images than positions", good | {"messages": [full]}, 400),
        ("a long text", good | {"messages": [asked("word " * 100_000)]}, 400),
    ]  # fmt: skip


def digits(folder: Path) -> list[bytes]:
    """Image files of three digits."""
    chats.write(folder, train=3, evaluation=1)
    return [path.read_bytes() for path in sorted((folder / "images").iterdir())[:3]]
