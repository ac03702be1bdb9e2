"""A model as files: what was trained, beside a description that names the frozen parts by digest.

- `parameters.safetensors`: each trained parameter in float32 under its own name;
- `model.json`: the model's configuration, the digest of each frozen part, and the sha256 of the parameters.

The folder of every training checkpoint is one. So is every folder that `dsvl.export` writes: where the frozen
parts lie in the folder itself, the description says so (`HERE`).
"""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from dsvl.config import ModelConfig
from dsvl.data.folders import sha256
from dsvl.model import VisualChat

PARAMETERS = "parameters.safetensors"
DESCRIPTION = "model.json"
HERE = "{folder}/"
"""Begins the checkpoint of a part that lies in the folder of the description, wherever that is."""
SILENT = {"transformers_version", "_name_or_path", "dtype", "torch_dtype"}
"""What of a `config.json` changes no number: who wrote it, and a precision that loading overrides."""


def save(model: VisualChat, folder: Path) -> None:
    """Write a model into a folder that has none yet."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: p.detach().float().cpu() for name, p in model.trainable().items()}
    write(folder, model.config, values, frozen=digests(model.config))


def write(
    folder: Path,
    config: ModelConfig,
    values: Mapping[str, torch.Tensor],
    *,
    frozen: Mapping[str, str],
) -> None:
    """As `save`, from the float32 values of the trained parameters and the `digests` of the frozen parts."""
    save_file({name: value.contiguous() for name, value in values.items()}, folder / PARAMETERS)
    description = {
        "model": asdict(config) | {"languages": {config.size: asdict(config.language)}},
        "frozen": dict(frozen),
        PARAMETERS: sha256(folder / PARAMETERS),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load(folder: Path, *, precision: str) -> VisualChat:
    """The model of a folder, its frozen parts read from where the description says.

    Raises:
        ValueError: where a file is missing or damaged, a frozen part is not the one it was trained with,
            or parameters are missing, left over or of another shape.
    """
    config, frozen, held = described(folder)
    if sha256(folder / PARAMETERS) != held:
        raise ValueError(f"{folder / PARAMETERS}: is not what its sha256 in {DESCRIPTION} says")
    for part, found in digests(config).items():
        if found != (trained := frozen[part]):
            checkpoint = parts(config)[part]
            raise ValueError(
                f"{folder}: trained with the {part} part {trained[:12]}, but {checkpoint} is {found[:12]}; "
                f"put the former there, or name it in {DESCRIPTION}"
            )
    model = VisualChat(config, precision=precision, seed=0)
    put(model, load_file(folder / PARAMETERS), where=folder)
    return model


def described(folder: Path) -> tuple[ModelConfig, dict[str, str], str]:
    """A model's configuration, the digest of each of its frozen parts, and the sha256 of its parameters.

    Raises:
        ValueError: where a file or a part is missing, or the description is cut or of another form.
    """
    for name in (DESCRIPTION, PARAMETERS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: holds no {name}; name the folder of a checkpoint")
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        config, held = _built(ModelConfig, description["model"]), description[PARAMETERS]
        frozen = {part: description["frozen"][part] for part in parts(config)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: is not the description of a model: {type(error).__name__}: {error}; "
            "name the folder of a whole checkpoint"
        ) from error
    named = parts(config)
    for part, checkpoint in named.items():
        if checkpoint.startswith(HERE):
            named[part] = str(folder / checkpoint.removeprefix(HERE))
            if not Path(named[part]).is_dir():
                raise ValueError(f"{named[part]}: is not there; copy the whole of {folder} again")
    return reading(config, **named), frozen, held


def reading(config: ModelConfig, *, language: str, vision: str) -> ModelConfig:
    """The same configuration, its frozen parts read from other checkpoints."""
    decoder = replace(config.language, checkpoint=language)
    tower = replace(config.vision, checkpoint=vision)
    return replace(config, languages={**config.languages, config.size: decoder}, vision=tower)


def put(model: VisualChat, values: Mapping[str, torch.Tensor], *, where: Path) -> None:
    """Give a model its trained values, strictly by name and shape."""
    trainable = model.trainable()
    require_same(
        {name: tuple(value.shape) for name, value in values.items()},
        {name: tuple(parameter.shape) for name, parameter in trainable.items()},
        where=where,
    )
    for name, parameter in trainable.items():
        parameter.data.copy_(values[name])


def require_same(
    held: Mapping[str, tuple[int, ...]], trained: Mapping[str, tuple[int, ...]], *, where: Path
) -> None:
    """Raise ValueError unless a file holds exactly the parameters, name -> shape, that a model trains."""
    differing = [
        f"{name} {held.get(name, 'missing')} (the model: {trained.get(name, 'has none')})"
        for name in sorted(held.keys() | trained.keys())
        if held.get(name) != trained.get(name)
    ]
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise ValueError(
            f"{where}: of {len(held)} parameters held and {len(trained)} that the model trains, "
            f"{len(differing)} differ: {', '.join(differing[:3])}{more}"
        )


def digests(config: ModelConfig) -> dict[str, str]:
    """The digest of each frozen part."""
    return {part: digest(checkpoint) for part, checkpoint in parts(config).items()}


def parts(config: ModelConfig) -> dict[str, str]:
    """The frozen parts and their checkpoints."""
    return {"language": config.language.checkpoint, "vision": config.vision.checkpoint}


def digest(checkpoint: str) -> str:
    """sha256 over a frozen part: what its `config.json` says, and the names and bytes of its weights' files.

    Raises:
        ValueError: if there are no weights in safetensors.
    """
    stated = cached_file(checkpoint, "config.json")
    assert stated is not None, "a missing file raises"
    config = json.loads(Path(stated).read_text(encoding="utf-8"), object_hook=_telling)
    total = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    paths = _weights(checkpoint)
    with ThreadPoolExecutor() as pool:  # hashing holds no lock of Python's
        for path, hashed in zip(paths, pool.map(sha256, paths), strict=True):
            total.update(path.name.encode())
            total.update(hashed.encode())
    return total.hexdigest()


def embedding_rms(checkpoint: str) -> float:
    """Root mean square of a decoder's token embedding, read alone from its files.

    Raises:
        ValueError: if there is none in them.
        OSError: if the checkpoint cannot be found.
    """
    for path in _weights(checkpoint):
        with safe_open(path, "pt") as opened:
            names: list[str] = opened.keys()
            for name in names:
                if name.endswith("embed_tokens.weight"):
                    return opened.get_tensor(name).float().square().mean().sqrt().item()
    raise ValueError(f"{checkpoint}: has no embed_tokens.weight; name a decoder that has")


def _telling(stated: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stated.items() if name not in SILENT}


def _weights(checkpoint: str) -> list[Path]:
    """The files that transformers loads: one, or the shards that an index names; from the hub if need be."""
    whole, index = (
        cached_file(checkpoint, name, _raise_exceptions_for_missing_entries=False)
        for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    )
    if whole is not None:
        return [Path(whole)]
    if index is None:
        raise ValueError(
            f"{checkpoint}: has no *.safetensors, by which a frozen part is known again; "
            "load it with transformers and write it with save_pretrained"
        )
    shards = get_checkpoint_shard_files(checkpoint, index)[0]
    assert shards is not None, "a missing file raises"
    return sorted(map(Path, shards))


def _built(kind: Any, value: Any) -> Any:
    """What a JSON value stands for, where a value of this kind was written."""
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return kind(**{name: _built(kinds[name], each) for name, each in value.items()})  # pyright: ignore[reportCallIssue]
    if get_origin(kind) is dict:
        return {name: _built(get_args(kind)[1], each) for name, each in value.items()}
    if get_origin(kind) is UnionType and value is not None:
        return _built(get_args(kind)[0], value)
    return value
