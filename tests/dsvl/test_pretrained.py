"""A saved model is the model again, and nothing else is taken for it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel
from transformers.utils import hub

from dsvl import pretrained
from dsvl.data.folders import sha256
from dsvl.model import VisualChat
from tests.dsvl.test_model import batch_of, example


@pytest.fixture
def trained(model_config):
    """A model whose trained parameters are no longer what the seed gave."""
    model = VisualChat(model_config, precision="fp32", seed=3)
    torch.manual_seed(0)
    for parameter in model.trainable().values():
        parameter.data += torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("projection", ["linear", "perceiver"])
def test_a_loaded_model_is_the_saved_one(model_config, tmp_path, projection):
    config = replace(model_config, projection=projection, projection_queries=4)
    model = VisualChat(config, precision="fp32", seed=3)
    pretrained.save(model, tmp_path)
    again = pretrained.load(tmp_path, precision="fp32")
    assert again.config == model.config
    batch = batch_of(example("tt1ttTT"), example("1t1TTT", seed=1))
    assert torch.equal(again.states(batch), model.states(batch))


def test_what_is_frozen_is_not_written(trained, tmp_path):
    pretrained.save(trained, tmp_path)
    assert load_file(tmp_path / "parameters.safetensors").keys() == trained.trainable().keys()
    assert {path.name for path in tmp_path.iterdir()} == {"parameters.safetensors", "model.json"}


def test_only_the_decoder_of_its_size_is_described(model_config, tmp_path):
    other = replace(model_config.language, checkpoint="no/such/folder", hidden_size=64)
    family = replace(model_config, languages={**model_config.languages, "large": other})
    pretrained.save(VisualChat(family, precision="fp32", seed=0), tmp_path)
    assert pretrained.load(tmp_path, precision="fp32").config == model_config


def test_a_frozen_part_that_has_changed_is_named(trained, checkpoints, tmp_path):
    pretrained.save(trained, tmp_path / "model")
    copy = shutil.copytree(checkpoints / "vision", tmp_path / "other")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    description = tmp_path / "model/model.json"
    described = json.loads(description.read_text())
    described["model"]["vision"]["checkpoint"] = str(copy)
    description.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"trained with the vision part \w+, but \S+other is \w+"):
        pretrained.load(tmp_path / "model", precision="fp32")


def test_a_damaged_or_missing_file_is_named(trained, tmp_path):
    pretrained.save(trained, tmp_path)
    weights = tmp_path / "parameters.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"parameters\.safetensors: is not what its sha256"):
        pretrained.load(tmp_path, precision="fp32")
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds no parameters\.safetensors"):
        pretrained.load(tmp_path, precision="fp32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: text[: len(text) // 2], "JSONDecodeError"),
        (lambda text: text.replace('"frozen"', '"melted"'), "KeyError: 'frozen'"),
        (lambda text: text.replace('"size"', '"sise"'), "TypeError: .*'sise'|KeyError: 'sise'"),
        (lambda text: text.replace('"patch_size": 4', '"patch_size": 3'), "must divide"),
        (lambda _: "[]", "TypeError"),
    ],
)
def test_a_description_that_is_cut_or_of_another_form_is_named(trained, tmp_path, change, said):
    pretrained.save(trained, tmp_path)
    description = tmp_path / "model.json"
    before = description.read_text()
    description.write_text(change(before))
    assert description.read_text() != before
    with pytest.raises(ValueError, match=rf"model\.json: is not the description .*({said})"):
        pretrained.load(tmp_path, precision="fp32")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("projection.bias"), r"projection\.bias missing \(the model: \(32,\)\)"),
        (lambda v: v.update(more=torch.ones(2)), r"more \(2,\) \(the model: has none\)"),
        (
            lambda v: v.update({"projection.bias": torch.ones(3)}),
            r"of 3 parameters held and 3 .*, 1 differ: projection\.bias \(3,\) \(the model: \(32,\)\)",
        ),
    ],
)
def test_parameters_are_loaded_strictly(trained, tmp_path, change, said):
    pretrained.save(trained, tmp_path)
    weights, description = tmp_path / "parameters.safetensors", tmp_path / "model.json"
    values = load_file(weights)
    change(values)
    save_file(values, weights)
    described = json.loads(description.read_text())
    described["parameters.safetensors"] = sha256(weights)
    description.write_text(json.dumps(described))
    with pytest.raises(ValueError, match=said):
        pretrained.load(tmp_path, precision="fp32")


def test_a_frozen_part_is_known_by_the_bytes_of_its_weights(checkpoints, tmp_path):
    copy = shutil.copytree(checkpoints / "vision", tmp_path / "copy")
    digest = pretrained.digest(str(copy))
    assert digest == pretrained.digest(str(checkpoints / "vision"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert pretrained.digest(str(copy)) != digest


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("layer_norm_eps", 0.1, True),
        ("hidden_act", "relu", True),
        ("transformers_version", "4.0.0", False),
        ("_name_or_path", "elsewhere", False),
        ("torch_dtype", "float16", False),
    ],
)
def test_a_frozen_part_is_known_by_all_that_its_config_says_of_its_numbers(
    checkpoints, tmp_path, name, value, told
):
    copy = shutil.copytree(checkpoints / "vision", tmp_path / "copy")
    stated = json.loads((copy / "config.json").read_text())
    reordered = dict(reversed((stated | {name: value}).items()))
    (copy / "config.json").write_text(json.dumps(reordered))
    changed = pretrained.digest(str(copy)) != pretrained.digest(str(checkpoints / "vision"))
    assert changed == told


def sharded(checkpoint: Path, folder: Path) -> Path:
    """The same tower in several files."""
    CLIPVisionModel.from_pretrained(checkpoint).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("several", [False, True])
def test_files_that_are_not_loaded_do_not_change_the_digest(checkpoints, tmp_path, several):
    folder = shutil.copytree(checkpoints / "vision", tmp_path / "whole")
    if several:
        folder = sharded(folder, tmp_path / "sharded")
    digest = pretrained.digest(str(folder))
    shutil.copy(checkpoints / "vision/model.safetensors", folder / "adapter.safetensors")
    assert pretrained.digest(str(folder)) == digest
    loaded = sorted(folder.glob("model*.safetensors"))[-1]
    loaded.write_bytes(loaded.read_bytes()[:-1] + b"\x01")
    assert pretrained.digest(str(folder)) != digest


@pytest.mark.parametrize("several", [False, True])
def test_a_name_on_the_hub_has_the_digest_of_the_folder_that_it_names(
    checkpoints, tmp_path, monkeypatch, several
):
    folder = checkpoints / "vision"
    if several:
        folder = sharded(folder, tmp_path / "sharded")
    hub_of(folder, tmp_path / "cache", monkeypatch)
    assert pretrained.digest("someone/tower") == pretrained.digest(str(folder))


def hub_of(folder: Path, cache: Path, monkeypatch) -> None:
    """A hub that serves a folder as `someone/tower`, file by file as each is asked for, into a new cache."""
    repository = cache / "models--someone--tower"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(snapshot.name)

    def download(_, name, **__):
        if not (folder / name).is_file():
            raise EntryNotFoundError(name)
        shutil.copy(folder / name, snapshot / name)

    def download_several(_, *, allow_patterns, **__):
        for name in allow_patterns:
            download(_, name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "snapshot_download", download_several)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


def test_a_frozen_part_without_weights_that_can_be_told_is_refused(checkpoints, tmp_path):
    copy = shutil.copytree(checkpoints / "vision", tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"copy: has no \*\.safetensors.*save_pretrained"):
        pretrained.digest(str(copy))
