"""A search as it lies in a run folder, made up: its trials with their losses, its data and chats."""

import hashlib
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerFast

from dsvl.data.encode import Encoder
from dsvl.data.images import StoredImage
from dsvl.data.types import Conversation, ImageRef, Part, Rejected, Turn
from orchestration.config import Experiment, validated
from orchestration.records.journal import Journal, write_json
from orchestration.records.results import begin
from tests.dsvl.data import prepared
from tests.dsvl.data.prepared import Sample

RATES = (0.003, 0.01, 0.03)
EPOCHS = (1, 2)
STEPS = 20
"""Updates of an epoch."""
HOSTILE = "<script>alert('what?')</script> & <img src=https://example.com/x.png>"
STOPPED, FAILED = ("small", 0.003, 2), ("large", 0.03, 2)


def loss_of(size: str, lr: float, epoch: int) -> float:
    """A loss that is least at the larger size, the middle rate and the later epoch."""
    return round({"small": 0.5, "large": 0.3}[size] + abs(lr - 0.01) * 10 + 0.4 / epoch, 3)


def run(
    folder: Path, experiment: Experiment, *, epochs: int, size: str, lr: float, end: str | None
) -> None:
    """A run folder as a worker leaves it after so many epochs, with its result if it has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    begin(experiment, folder)
    journal = Journal(folder)
    total = experiment.train.epochs * STEPS
    journal.start(
        identity=experiment.identity(), params=experiment.params(), step=0, steps=total, workers=2
    )
    metrics: dict[str, float] = {}
    for step in range(1, epochs * STEPS + 1):
        metrics = {"train/loss": 3 / step + loss_of(size, lr, 2), "train/lr": lr * step / STEPS}
        if step % STEPS == 0:
            loss = loss_of(size, lr, step // STEPS)
            metrics |= {"eval/loss": loss, "eval/accuracy": 1 - loss / 3}
            metrics |= {"eval/accuracy_blind": 0.24, "eval/accuracy_majority": 0.23}
            metrics |= {"eval/accuracy_shuffled": 0.25, "train/epoch": step // STEPS}
        journal.metrics(step, metrics)
    if end:
        journal.end(end, {"failed": "RuntimeError: <b>worker died</b>"}.get(end, ""))
    if end in ("finished", "stopped"):
        result = {"identity": experiment.identity(), "fields": experiment.identity_fields()}
        write_json(folder / "result.json", {"state": end, "metrics": metrics} | result)


def trial_name(size: str, lr: float, epochs: int) -> str:
    return f"size={size},lr={lr:.4g},epochs={epochs}"


def shaded(shade: int) -> bytes:
    """A PNG of 8 x 8 pixels."""
    image = Image.new("L", (8, 8))
    image.putdata([(shade * (i + 3) * (i % 7)) % 256 for i in range(64)])
    image.save(file := BytesIO(), "PNG")
    return file.getvalue()


def searched(settings: dict[str, Any], storage: Path) -> Experiment:
    """The experiment of the search, from the settings of a small one."""
    search = {
        "space": {
            "model.size": {"kind": "grid", "values": ["small", "large"]},
            "optim.lr": {"kind": "grid", "values": list(RATES)},
            "train.epochs": {"kind": "grid", "values": list(EPOCHS)},
        },
        "scheduler": {"kind": "asha"},
    }
    data = settings["data"] | {"max_tokens": 512}
    here = {"storage": {"path": str(storage)}, "data": data, "search": search}
    return validated(settings | here)


def make_sweep(experiment: Experiment, tokenizer: PreTrainedTokenizerFast) -> None:
    """2 sizes x 3 rates x 2 epochs, one stopped, one failed; those that have finished have chats."""
    root = experiment.run_folder / "trials"
    keys = make_prepared(experiment, tokenizer)
    begin(experiment, root)
    sweep = Journal(root)
    sweep.start(identity=experiment.identity(), params={}, step=0, steps=12)
    for size, lr, epochs in product(("small", "large"), RATES, EPOCHS):
        values = {"model.size": size, "optim.lr": lr, "train.epochs": epochs}
        folder = root / trial_name(size, lr, epochs)
        end = {STOPPED: "stopped", FAILED: "failed"}.get((size, lr, epochs), "finished")
        done = epochs if end == "finished" else 1
        run(folder, experiment.trial(values), epochs=done, size=size, lr=lr, end=end)
        write_json(folder / "values.json", values)
        if end == "finished":
            write_json(folder / "chats.json", make_chats(keys))
    sweep.metrics(12, {"best/eval/loss": loss_of("large", 0.01, 2)})
    sweep.end("finished")


def make_chats(keys: list[str]) -> list[dict]:
    first = {"question": "Which digit is in image 1?", "answer": "seven", "model": "seven"}
    second = {"question": HOSTILE, "answer": "three", "model": "<em>five</em>"}
    return [
        {
            "id": "digits/1",
            "images": keys[:2],
            "rounds": [{"images": [0, 1]} | first, {"images": []} | second],
        },
        {"id": "digits/2", "images": [keys[2], "absent"], "rounds": [{"images": [0, 1]} | first]},
    ]


def make_prepared(experiment: Experiment, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Prepared data of 35 chats over three images, and the keys of those."""
    pictures = {hashlib.sha256(data).hexdigest(): data for data in map(shaded, (3, 5, 11))}
    stored = {
        key: StoredImage(key, data, f"{key}.png", 8, 8, "image/png", np.zeros((3, 8, 8), np.uint8))
        for key, data in pictures.items()
    }
    keys = list(pictures)
    kept = []
    for number in range(35):
        shown = tuple(keys[: number % 3 + 1])
        asked = [Part("image", image=i) for i in range(len(shown))] + [Part("text", "Which?")]
        turns = [Turn("user", tuple(asked)), Turn("assistant", (Part("text", "seven"),))]
        refs = tuple(ImageRef(f"{key}.png") for key in shown)
        name, place = f"chats/{number}", f"chats.json:{number}"
        chat = Conversation(name, "chats", place, refs, tuple(turns), {"key": name})
        kept.append(Sample(chat, shown, "train" if number < 30 else "eval", ()))
    tokens, folder = experiment.model.image_tokens, experiment.storage.path + "/prepared/tiny-0123"
    manifest = prepared.write(
        Path(folder),
        kept,
        encoder=Encoder(tokenizer, image_tokens=tokens, max_tokens=512),
        images=stored,
        quarantine=[Rejected("chats", "chats.json:35", "bad_roles", HOSTILE)],
    )
    identity = experiment.preparation()
    write_json(Path(folder, "manifest.json"), manifest | {"identity": identity})
    return keys
