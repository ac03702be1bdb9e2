"""A small tokenizer, a small raw dataset with faulty records, and a Ray session."""

import json
import shutil
import signal
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")
torch.set_num_threads(1)  # models are tiny, and tests run side by side
# What a shell starts in the background ignores interrupts, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

RECORDS = Path(__file__).parent / "data/llava_json"
COLOURS = {
    "red.png": (255, 0, 0),
    "green.png": (0, 255, 0),
    "blue.jpg": (0, 0, 255),
    "sub/white.webp": (255, 255, 255),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch finds none"))


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer that merges across every boundary of the template if it can."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    merged = [
        "### Answer:\nRed.",
        "### Answer:\nYes,",
        ":\n\n### Question:\nWhat",
        "Red.### Question:",
    ]
    tokenizer.train_from_iterator(merged * 20, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> PreTrainedTokenizerFast:
    """The same, loaded."""
    return PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)


@pytest.fixture
def llava_set(tmp_path: Path) -> Path:
    """A folder of raw data: `good.json`, `broken.json` (each says what to `expect`), `images/`."""
    root = tmp_path / "raw"
    images = root / "images"
    (images / "sub").mkdir(parents=True)
    for name, colour in COLOURS.items():
        Image.new("RGB", (24, 16), colour).save(images / name, quality=95)
    shutil.copy(images / "red.png", images / "copy-of-red.png")
    for outside in (root / "secret.png", root / "images-evil/secret.png"):
        outside.parent.mkdir(exist_ok=True)
        shutil.copy(images / "red.png", outside)
    (images / "link.png").symlink_to(root / "secret.png")
    (images / "evil-link.png").symlink_to(root / "images-evil/secret.png")
    jpeg = (images / "blue.jpg").read_bytes()
    (images / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (images / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    (images / "empty.png").touch()
    Image.new("RGB", (8, 8)).save(images / "drawing.png", format="GIF")
    (images / "bomb.png").write_bytes(png_header(9_000, 9_000))
    (images / "huge-bomb.png").write_bytes(png_header(60_000, 60_000))
    for name in ("good.json", "broken.json"):
        shutil.copy(RECORDS / name, root / name)
    return root


@pytest.fixture(scope="session")
def cluster():
    """Ray on this machine with two CPUs, ended afterwards."""
    import ray

    folder = tempfile.mkdtemp(prefix="dsvl-", dir="/tmp")  # sockets allow short paths only
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def raw_records(name: str) -> list[dict]:
    """The records of a file of `tests/data/llava_json`."""
    return json.loads((RECORDS / name).read_text(encoding="utf-8"))
