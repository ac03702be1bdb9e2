"""A trained model as a folder to hand on, in one of two forms that `dsvl.pretrained` loads strictly.

- `adapter`: what was trained, in float32, and which frozen parts it belongs to: small, nothing is rounded;
- `merged`: the whole model. `language/` and `vision/` are plain checkpoints of transformers in the precision
  of the training, with the trained embedding and what adapters add in their weights. Beside them lies what no
  checkpoint has a place for: the projection, and blocks of cross-attention, in float32.

Both hold the files of tokenizer and image processor.
"""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from transformers.utils.hub import cached_file

from dsvl import pretrained
from dsvl.config import require
from dsvl.data.encode import load_tokenizer
from dsvl.data.folders import complete
from dsvl.data.images import ImageProcessor
from dsvl.lora import merge
from dsvl.model import VisualChat

Form = Literal["merged", "adapter"]
SHARD = "5GB"
"""Most that a file of weights holds, unless a tensor alone is larger."""
PROCESSORS = {
    "language": (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
        "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja",
    ),
    "vision": ("preprocessor_config.json",),
}  # fmt: skip
"""By what a part is fed: those of these files that its checkpoint has."""


def export(
    source: Path, target: Path, *, form: Form, precision: str, texts: Mapping[str, str]
) -> int:
    """Write the model of a checkpoint's folder as a new folder, which appears whole or not at all.

    There is never more than one copy of the decoder in memory, beside files that are mapped into it.

    Args:
        source: a folder that `dsvl.pretrained` loads.
        target: the folder to write.
        form: of the folder.
        precision: of the training, and of a merged model's weights.
        texts: what else the folder says of itself: the names of files, and what they hold.

    Returns:
        How many numbers its weights are.

    Raises:
        ValueError: if the target exists, if the source is not whole or its frozen parts are others, or if
            plain weights cannot say what the model computes.
        RuntimeError: if a part as it was written lacks a weight, or has one too many.
    """
    require(not target.exists(), "target", str(target), "exists; remove it or name another folder")
    stated, frozen, _ = pretrained.described(source)
    require(
        form == "adapter" or stated.quantization != "int8",
        "model.quantization",
        stated.quantization,
        "rounds what enters a layer too, as no plain weights do; export the form adapter, which keeps it",
    )
    load_tokenizer(stated.language.checkpoint)  # or what is written could not be fed
    ImageProcessor.from_checkpoint(stated.vision.checkpoint)
    model = pretrained.load(source, precision=precision)
    trained = load_file(source / pretrained.PARAMETERS)
    count = sum(value.numel() for value in trained.values())
    with complete(target) as making:
        if form == "merged":
            _write_parts(model, making)
            trained = {name: trained[name] for name in model.trainable()}
            frozen = {part: pretrained.digest(str(making / part)) for part in frozen}
            count = sum(parameter.numel() for parameter in model.parameters())
        for part, checkpoint in pretrained.parts(stated).items():
            for file in _processor(part, checkpoint):
                shutil.copy(file, making)
                if form == "merged":
                    shutil.copy(file, making / part)
        pretrained.write(making, model.config, trained, frozen=frozen)
        for name, text in texts.items():
            (making / name).write_text(text, encoding="utf-8")
    return count


def _write_parts(model: VisualChat, folder: Path) -> None:
    """Merge a model, write its decoder and tower, and have its configuration name these."""
    merge(model)
    model.embedding.weight.requires_grad_(False)  # trained, it would be written twice
    part: Any
    for name, part in (("language", model.language), ("vision", model.vision.encoder)):
        part.save_pretrained(folder / name, max_shard_size=SHARD)
        _require_exact(type(part), folder / name)
    here = pretrained.reading(
        model.config,
        language=f"{pretrained.HERE}language",
        vision=f"{pretrained.HERE}vision",
    )
    model.config = replace(here, train_embedding=False)


def _require_exact(kind: Any, folder: Path) -> None:
    """Raise RuntimeError unless transformers finds all weights of a part in a folder, and no others.

    It is asked to put them nowhere, so that this takes no memory.
    """
    _, found = kind.from_pretrained(folder, device_map="meta", output_loading_info=True)
    misfits = {how: sorted(map(str, names)) for how, names in found.items() if names}
    if misfits:
        told = "; ".join(f"{how} {', '.join(names[:3])}" for how, names in misfits.items())
        raise RuntimeError(f"{folder.name}: its weights are not those of a {kind.__name__}: {told}")


def _processor(part: str, checkpoint: str) -> Iterator[Path]:
    """The files of a frozen part's tokenizer or image processor."""
    for name in PROCESSORS[part]:
        found = cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            yield Path(found)
