"""Training samples as the model sees them: where images stand, and which tokens are trained."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from dsvl.data.blend import Blender, order
from dsvl.data.encode import load_tokenizer, passages
from dsvl.data.store import open_store
from dsvl.data.types import IGNORED, Example
from orchestration.config import Experiment
from orchestration.pages.page import document, note, sample
from orchestration.prepare import prepare
from orchestration.problems import did_you_mean, harmless
from orchestration.records.record import read_images

TRAINED, FAINT, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"
"""Styles of a terminal; the first is bold green."""


def preview(experiment: Experiment, *, count: int, blend: str | None, epoch: int) -> dict[str, Any]:
    """`count` training samples of an epoch: the first that are trained on, of all blends in turn or of one.

    The data are prepared first, unless they are.

    Raises:
        ValueError: if there is no such blend, or `count` or `epoch` is out of range.
    """
    blends = list(experiment.data.all_blends())
    if blend is not None and blend not in blends:
        near = did_you_mean(blend, blends) or f"; the blends are {', '.join(blends)}"
        raise ValueError(f"--blend {blend}: no such blend{near}")
    for option, value, least in (("--count", count, 1), ("--epoch", epoch, 0)):
        if value < least:
            raise ValueError(f"{option} {value}: must be at least {least}")
    folder, seed = Path(prepare(experiment)["folder"]), experiment.train.seed
    drawn = Blender(open_store(folder), "train", data=experiment.data, seed=seed).epoch(epoch)
    trained = order(len(drawn), seed=seed, epoch=epoch)
    if blend is not None:
        trained = trained[drawn.blends[trained] == blends.index(blend)]
    tokenizer = load_tokenizer(experiment.model.language.checkpoint)
    chosen = [(index, drawn[index]) for index in _in_turn(trained, drawn.blends)[:count].tolist()]
    images = read_images(folder, {key for _, example in chosen for key in example.images})
    return {
        "folder": str(folder),
        "epoch": epoch,
        "samples": [
            {"blend": blends[drawn.blends[index]]} | _told(example, tokenizer, images)
            for index, example in chosen
        ],
    }


def render(previewed: Mapping[str, Any], *, colour: bool) -> str:
    """The samples for people: trained tokens in colour, or else between ⟦ and ⟧."""
    begin, end, faint, plain = (TRAINED, PLAIN, FAINT, PLAIN) if colour else ("⟦", "⟧", "", "")
    blocks = []
    for told in previewed["samples"]:
        pieces = []
        for piece in told["pieces"]:
            if "image" in piece:
                pieces.append(f"{faint}[image {piece['image']}: {piece['tokens']} tokens]{plain}")
            else:
                text = harmless(piece["text"])
                pieces.append(f"{begin}{text}{end}" if piece["trained"] else text)
        counts = f"{told['tokens']:,} tokens, {told['supervised']:,} trained"
        names = [
            f"image {number}: {image['path']}, {image['width']} × {image['height']}, {image['key']}"
            for number, image in enumerate(told["images"], 1)
        ]
        captions = "".join(f"{faint}{harmless(line)}{plain}\n" for line in names)
        title = harmless(f"{told['blend']}: {told['id']}, {counts}")
        blocks.append(f"--- {title}\n{captions}{''.join(pieces)}")
    return "\n\n".join(blocks)


def page(experiment: Experiment, previewed: Mapping[str, Any]) -> str:
    """The samples as one self-contained page, with their pictures."""
    samples = previewed["samples"]
    keys = {image["key"] for told in samples for image in told["images"]}
    images = read_images(Path(previewed["folder"]), keys)
    lead = (
        f"{len(samples)} training samples of epoch {previewed['epoch']}; what is marked is trained."
    )
    return document(experiment.name, [note(lead), *(sample(told, images) for told in samples)])


def _in_turn(samples: np.ndarray, blends: np.ndarray) -> np.ndarray:
    """The samples in their order, but one of each blend, then another of each, and so on."""
    of = blends[samples]
    by_blend = np.argsort(of, kind="stable")
    turn = np.empty(len(samples), np.int64)
    turn[by_blend] = np.arange(len(samples)) - np.searchsorted(of[by_blend], of[by_blend])
    return samples[np.lexsort([of, turn])]


def _told(
    example: Example,
    tokenizer: PreTrainedTokenizerFast,
    images: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    return {
        "id": example.id,
        "tokens": len(example.ids),
        "supervised": int((example.labels != IGNORED).sum()),
        "images": [
            {name: images[key][name] for name in ("key", "path", "width", "height")}
            for key in example.images
        ],
        "pieces": [
            {"image": image, "tokens": int(tokens)}
            if image
            else {"text": text, "tokens": int(tokens), "trained": trained}
            for text, tokens, trained, image in passages(example, tokenizer)
        ],
    }
