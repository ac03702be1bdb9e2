"""An exported model is the model again, in a folder that is whole, strict and its own."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from dsvl import export as module
from dsvl import pretrained
from dsvl.config import LanguageConfig, LoraConfig
from dsvl.data.encode import fingerprint, load_tokenizer
from dsvl.data.images import ImageProcessor
from dsvl.data.types import Batch
from dsvl.export import export
from dsvl.model import VisualChat
from tests.dsvl.conftest import SHAPE
from tests.dsvl.test_lora import mixed
from tests.dsvl.test_model import batch_of, example
from tests.dsvl.test_vision import images, towers

__all__ = ["towers"]  # a fixture
LORA = {"language_lora": LoraConfig(rank=3), "vision_lora": LoraConfig(rank=2, alpha=5.0)}
GATED = {"attention": "gated_cross", "cross_every": 1}
MODELS = {
    "linear": {},
    "mlp": {"projection": "mlp", "attention": "causal"},
    "perceiver": {"projection": "perceiver", "projection_queries": 4},
    "qformer": {"projection": "qformer", "projection_queries": 4},
    "frozen embedding": {"train_embedding": False},
    "gated": GATED,
    "lora": LORA,
    "gated lora": GATED | LORA,
}
TEXTS = {"README.md": "What a model says of itself: naïve 東京"}
PROCESSOR = {
    "size": {"shortest_edge": 8},
    "crop_size": {"height": 8, "width": 8},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


@pytest.fixture(scope="module")
def fed(checkpoints, tokenizer_folder, tmp_path_factory):
    """The checkpoints with a tokenizer and an image processor."""
    folder = tmp_path_factory.mktemp("fed") / "checkpoints"
    shutil.copytree(checkpoints, folder)
    for path in tokenizer_folder.iterdir():
        shutil.copy(path, folder / "language")
    (folder / "vision/preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


@pytest.fixture
def config(model_config, fed):
    """The tiny model over them."""
    names = {part: str(fed / part) for part in ("language", "vision")}
    return pretrained.reading(model_config, **names)


def trained(config, folder: Path, *, precision="fp32", **settings) -> VisualChat:
    """A model of which nothing trained is as it began, and its checkpoint in a folder."""
    model = VisualChat(replace(config, **settings), precision=precision, seed=3)
    generator = torch.Generator().manual_seed(5)
    values = {
        name: p.detach().float() + 0.1 * torch.randn(p.shape, generator=generator)
        for name, p in model.trainable().items()
    }
    folder.mkdir()
    frozen = pretrained.digests(model.config)
    pretrained.write(folder, model.config, values, frozen=frozen)
    pretrained.put(model, values, where=folder)
    return model.eval()


def logits(model: VisualChat, batch: Batch | None = None) -> torch.Tensor:
    """What a model says of the answers of a batch, or of one with images and without."""
    with torch.no_grad():
        return model.logits(model.states(batch or mixed()))


def exported(source: Path, target: Path, form, *, precision="fp32") -> VisualChat:
    """The model that an export holds."""
    export(source, target, form=form, precision=precision, texts=TEXTS)
    return pretrained.load(target, precision=precision).eval()


@pytest.mark.parametrize("form", ["adapter", "merged"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_an_exported_model_says_what_the_trained_one_does(
    config, tmp_path, settings, precision, form
):
    model = trained(config, tmp_path / "run", precision=precision, **settings)
    again = exported(tmp_path / "run", tmp_path / "out", form, precision=precision)
    found, expected = logits(again), logits(model)
    if form == "merged" and "language_lora" in settings:
        bound = {"fp32": 1e-5, "bf16": 0.05}[precision]  # a sum is rounded where two were
        assert (found - expected).norm() < bound * expected.norm()
    else:
        assert torch.equal(found, expected)


def test_a_merged_model_needs_nothing_that_it_was_made_of(config, fed, tmp_path):
    origin = shutil.copytree(fed, tmp_path / "origin")
    names = {part: str(origin / part) for part in ("language", "vision")}
    config = pretrained.reading(config, **names)
    model = trained(config, tmp_path / "run", **LORA)
    export(tmp_path / "run", tmp_path / "out", form="merged", precision="fp32", texts=TEXTS)
    shutil.rmtree(origin)
    shutil.rmtree(tmp_path / "run")
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    torch.save(logits(model), tmp_path / "expected.pt")
    code = (
        "import sys, torch; from pathlib import Path\n"
        "from dsvl import pretrained; from tests.dsvl.test_export import logits\n"
        "model = pretrained.load(Path(sys.argv[1]), precision='fp32').eval()\n"
        "torch.testing.assert_close(logits(model), torch.load(sys.argv[2]))"
    )
    arguments = [sys.executable, "-c", code, moved, tmp_path / "expected.pt"]
    subprocess.run(arguments, check=True, timeout=120)
    assert str(tmp_path) not in (moved / "model.json").read_text()


@pytest.mark.parametrize("tied", [False, True])
def test_decoder_and_tower_of_a_merged_model_are_checkpoints_of_transformers(
    config, fed, tmp_path, tied
):
    if tied:
        folder = shutil.copytree(fed / "language", tmp_path / "tied")
        stock = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))
        stock.save_pretrained(folder)
        config = pretrained.reading(config, language=str(folder), vision=config.vision.checkpoint)
    model = trained(config, tmp_path / "run", **LORA)
    export(tmp_path / "run", tmp_path / "out", form="merged", precision="fp32", texts=TEXTS)
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "_, found = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not any(found.values()), found"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "out/language"], check=True, timeout=120)
    language = AutoModelForCausalLM.from_pretrained(tmp_path / "out/language").eval()
    vision = CLIPVisionModel.from_pretrained(tmp_path / "out/vision").eval()
    torch.testing.assert_close(language.get_input_embeddings().weight, model.embedding.weight)
    with torch.no_grad():
        batch = batch_of(example("tttttT"))
        torch.testing.assert_close(language(batch.ids).logits[:, -2], logits(model, batch))
        pixels = torch.randn(2, 3, 8, 8)
        states = vision(pixels).last_hidden_state[:, 1:]
        torch.testing.assert_close(states, model.vision(pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["siglip", "qwen"])
def test_towers_of_every_kind_are_exported_as_they_see(config, towers, tmp_path, kind):
    processor = Path(towers[kind].checkpoint) / "preprocessor_config.json"
    processor.write_text(json.dumps(PROCESSOR))
    tower = {"vision": towers[kind], "vision_lora": LoraConfig(rank=2)}
    model = trained(config, tmp_path / "run", **tower)
    again = exported(tmp_path / "run", tmp_path / "out", "merged")
    pixels = images(towers[kind])
    with torch.no_grad():
        torch.testing.assert_close(again.vision(pixels), model.vision(pixels), rtol=1e-4, atol=1e-5)


def test_no_weight_of_a_merged_model_is_written_twice(config, tmp_path):
    model = trained(config, tmp_path / "run", **LORA)
    out = tmp_path / "out"
    count = export(tmp_path / "run", out, form="merged", precision="fp32", texts=TEXTS)
    kept = load_file(out / "parameters.safetensors")
    assert set(kept) == {"projection.weight", "projection.bias"}
    sizes = []
    for path in out.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            sizes += [file.get_tensor(name).numel() for name in file.keys()]  # noqa: SIM118
    adapters = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert sum(sizes) == count == sum(p.numel() for p in model.parameters()) - adapters


def test_an_adapter_holds_what_was_trained_to_the_last_bit_and_no_more(config, tmp_path):
    model = trained(config, tmp_path / "run", precision="bf16", **LORA)
    run, out = tmp_path / "run", tmp_path / "out"
    count = export(run, out, form="adapter", precision="bf16", texts=TEXTS)
    held, before = (load_file(folder / "parameters.safetensors") for folder in (out, run))
    assert held.keys() == before.keys() == model.trainable().keys()
    assert all(torch.equal(held[name], before[name]) for name in before)
    assert count == sum(value.numel() for value in held.values())
    assert not list(out.glob("*/"))


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_tokenizer_processor_and_texts_come_along(config, tmp_path, form):
    trained(config, tmp_path / "run")
    model = exported(tmp_path / "run", tmp_path / "out", form)
    assert (tmp_path / "out/README.md").read_text() == TEXTS["README.md"]
    expected = fingerprint(load_tokenizer(config.language.checkpoint))
    for folder in (tmp_path / "out", model.config.language.checkpoint):
        assert fingerprint(load_tokenizer(str(folder))) == expected
    for folder in (tmp_path / "out", model.config.vision.checkpoint):
        found = ImageProcessor.from_checkpoint(folder)
        assert found == ImageProcessor.from_checkpoint(config.vision.checkpoint)


@pytest.fixture
def wide(config, fed, tmp_path):
    """The tiny model with a decoder whose rows are whole blocks of nf4."""
    shape = SHAPE | {"hidden_size": 64, "intermediate_size": 128}
    folder = shutil.copytree(fed / "language", tmp_path / "wide")
    LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.2)).save_pretrained(folder)
    return replace(config, languages={"tiny": LanguageConfig(checkpoint=str(folder), **shape)})


def test_a_merged_model_has_the_weights_that_those_in_nf4_stand_for(wide, tmp_path):
    model = trained(wide, tmp_path / "run", quantization="nf4", language_lora=LoraConfig(rank=3))
    again = exported(tmp_path / "run", tmp_path / "out", "merged")
    assert again.config.quantization == "none"
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    found, expected = logits(again), logits(model)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_int8_rounds_as_no_plain_weights_do_and_is_exported_as_an_adapter_alone(wide, tmp_path):
    model = trained(wide, tmp_path / "run", quantization="int8", language_lora=LoraConfig(rank=3))
    with pytest.raises(ValueError, match=r"quantization='int8': rounds what enters .* adapter"):
        export(tmp_path / "run", tmp_path / "out", form="merged", precision="fp32", texts={})
    again = exported(tmp_path / "run", tmp_path / "out", "adapter")
    assert torch.equal(logits(again), logits(model))


def test_large_parts_are_written_in_shards(config, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", "16KB")
    model = trained(config, tmp_path / "run")
    again = exported(tmp_path / "run", tmp_path / "out", "merged")
    assert len(list((tmp_path / "out/language").glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "out/language/model.safetensors.index.json").is_file()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("fault", ["lost", "left over"])
def test_a_part_that_is_not_written_exactly_is_named_and_leaves_no_folder(
    config, tmp_path, monkeypatch, fault
):
    def save(part, folder, **_):
        original(part, folder)
        values = load_file(folder / "model.safetensors")
        if fault == "lost":
            del values["model.norm.weight"]
        else:
            values["model.norm.lora_A"] = torch.ones(2)
        save_file(values, folder / "model.safetensors", metadata={"format": "pt"})

    original = LlamaForCausalLM.save_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", save)
    trained(config, tmp_path / "run")
    with pytest.raises(RuntimeError, match=r"language: .* LlamaForCausalLM: .*model\.norm\."):
        export(tmp_path / "run", tmp_path / "out", form="merged", precision="fp32", texts={})
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_checkpoint_that_is_not_whole_is_not_exported(config, tmp_path, form):
    trained(config, tmp_path / "run")
    weights = tmp_path / "run/parameters.safetensors"
    values = load_file(weights)
    del values["projection.bias"]
    save_file(values, weights)
    with pytest.raises(ValueError, match=r"parameters\.safetensors: is not what its sha256"):
        export(tmp_path / "run", tmp_path / "out", form=form, precision="fp32", texts={})
    assert not (tmp_path / "out").exists()


def test_a_folder_that_exists_is_left_alone(config, tmp_path):
    trained(config, tmp_path / "run")
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"target='.*out': exists; remove it or name another"):
        export(tmp_path / "run", tmp_path / "out", form="adapter", precision="fp32", texts={})
    assert not list((tmp_path / "out").iterdir())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-64])


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        (cut, "language/model.safetensors", "trained with the language part"),
        (cut, "vision/model.safetensors", "trained with the vision part"),
        (cut, "parameters.safetensors", "is not what its sha256"),
        (lose, "language", "out/language: is not there; copy the whole of"),
        (lose, "vision/model.safetensors", r"vision: has no \*\.safetensors"),
        (lose, "parameters.safetensors", "holds no parameters"),
        (lose, "model.json", r"holds no model\.json"),
    ],
)
def test_a_damaged_export_is_not_loaded(config, tmp_path, damage, name, said):
    trained(config, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", form="merged", precision="fp32", texts={})
    damage(tmp_path / "out" / name)
    with pytest.raises(ValueError, match=said):
        pretrained.load(tmp_path / "out", precision="fp32")


def test_exporting_needs_no_deepspeed():
    code = "import sys, dsvl.export; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
