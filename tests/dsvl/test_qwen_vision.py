"""The tower of Qwen-VL: its published size, its attention, its positions, and its way out of a checkpoint."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from dsvl.config import VisionConfig
from dsvl.data.images import ImageProcessor
from dsvl.qwen_vision import PREFIX, QwenVisionConfig, QwenVisionModel, extract, resized, sines
from dsvl.vision import VisionTower

QWEN_VL = 9_656_935_168
"""Parameters of Qwen-VL as its checkpoint has them, tower and decoder."""
QWEN_7B = 7_721_324_544
"""Parameters of its decoder as Qwen-7B's checkpoint has them."""
VISUAL = {
    "heads": 3,
    "image_size": 28,
    "image_start_id": 7,
    "layers": 2,
    "mlp_ratio": 1.5,
    "n_queries": 9,
    "output_dim": 256,
    "patch_size": 7,
    "width": 24,
}
"""The tiny tower, as `config.json` of Qwen-VL tells of a tower."""
TINY = {
    "image_size": 28,
    "patch_size": 7,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "queries": 9,
    "output_size": 256,
}
LAST = "transformer.resblocks.1.mlp.c_proj.bias"


@pytest.fixture
def model():
    """A tiny tower with random weights, biases and norms."""
    torch.manual_seed(0)
    model = QwenVisionModel(QwenVisionConfig(num_attention_heads=3, **TINY))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.randn_like(weight)
    return model.eval()


@pytest.fixture
def source(model, tmp_path) -> Path:
    """A checkpoint of Qwen-VL in three shards of safetensors, of which one holds the decoder alone."""
    folder = tmp_path / "Qwen-VL"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "visual": VISUAL}))
    weights = {f"{PREFIX}{name}": weight for name, weight in model.state_dict().items()}
    names = list(weights)
    shards = {
        "1": {"transformer.wte.weight": torch.ones(3, 8)},
        "2": {"lm_head.weight": torch.ones(3, 8)} | {name: weights[name] for name in names[:9]},
        "3": {name: weights[name] for name in names[9:]},
    }
    write(folder, shards, "safetensors")
    return folder


def write(folder: Path, shards: dict[str, dict[str, torch.Tensor]], kind: str) -> None:
    """Shards and their index, as transformers names them."""
    pattern = {"safetensors": "model-{}.safetensors", "bin": "pytorch_model-{}.bin"}[kind]
    index = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind]
    for number, held in shards.items():
        path = folder / pattern.format(number)
        save_file(held, path) if kind == "safetensors" else torch.save(held, path)
    held_by = {name: pattern.format(n) for n, held in shards.items() for name in held}
    (folder / f"{index}.index.json").write_text(json.dumps({"weight_map": held_by}))


def pickled(source: Path) -> Path:
    """The same checkpoint as pickles of torch."""
    folder = source.parent / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    write(folder, {n: load_file(source / f"model-{n}.safetensors") for n in "123"}, "bin")
    return folder


def test_it_has_the_published_number_of_parameters():
    with torch.device("meta"):
        tower = QwenVisionModel(QwenVisionConfig())
    assert sum(weight.numel() for weight in tower.parameters()) == QWEN_VL - QWEN_7B


def test_its_parameters_have_the_names_of_the_checkpoint(model):
    block = {
        f"{part}.{kind}"
        for part in ("ln_1", "ln_2", "attn.in_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    }
    pool = {"query", "pos_embed", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias"} | {
        f"{part}.{kind}"
        for part in ("attn.out_proj", "ln_q", "ln_kv")
        for kind in ("weight", "bias")
    }
    assert set(model.state_dict()) == {
        *("conv1.weight", "positional_embedding", "proj"),
        *(f"{norm}.{kind}" for norm in ("ln_pre", "ln_post") for kind in ("weight", "bias")),
        *(f"transformer.resblocks.{n}.{name}" for n in (0, 1) for name in block),
        *(f"attn_pool.{name}" for name in pool),
    }


def test_self_attention_is_torchs_with_rows_ordered_by_head(model):
    ours = model.transformer.resblocks[0].attn
    theirs = nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        for name in ("weight", "bias"):
            by_head = getattr(ours.in_proj, name).unflatten(0, (3, 3, 8))  # head, q k v, row
            getattr(theirs, f"in_proj_{name}").copy_(by_head.transpose(0, 1).flatten(0, 2))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    patches = torch.randn(2, 5, 24)
    expected = theirs(patches, patches, patches, need_weights=False)[0]
    torch.testing.assert_close(ours(patches), expected, rtol=1e-5, atol=1e-5)


def test_a_block_is_the_layer_of_a_vision_transformer(model):
    block = model.transformer.resblocks[1]
    patches = torch.randn(2, 5, 24)
    attended = patches + block.attn(block.ln_1(patches))
    wide = nn.functional.gelu(block.mlp.c_fc(block.ln_2(attended)))
    torch.testing.assert_close(block(patches), attended + block.mlp.c_proj(wide))


def test_the_resampler_attends_as_torch_does(model):
    pool = model.attn_pool
    theirs = nn.MultiheadAttention(256, 2, batch_first=True)
    theirs.load_state_dict(pool.attn.state_dict())
    patches = torch.randn(2, 9, 24)  # as many as queries: positions are taken as they are
    seen = pool.ln_kv(pool.kv_proj(patches))
    queries = (pool.ln_q(pool.query) + pool.pos_embed).expand(2, -1, -1)
    expected = theirs(queries, seen + pool.pos_embed, seen, need_weights=False)[0]
    torch.testing.assert_close(pool(patches), expected, rtol=1e-5, atol=1e-5)


def test_positions_are_themselves_on_their_own_grid():
    positions = torch.randn(16, 6)
    assert resized(positions, 16) is positions


def test_positions_keep_what_is_constant_and_grow_where_they_grow():
    flat = torch.ones(16, 1) * 3
    torch.testing.assert_close(resized(flat, 64), torch.ones(64, 1) * 3)
    row, column = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    grown = resized(torch.stack([row, column], -1).flatten(0, 1), 64).unflatten(0, (8, 8))
    assert (grown[1:, :, 0] > grown[:-1, :, 0]).all()
    assert (grown[:, 1:, 1] > grown[:, :-1, 1]).all()
    torch.testing.assert_close(grown[..., 0], grown[..., 1].T)


def test_positions_are_interpolated_in_float32_and_keep_their_precision():
    positions = torch.randn(16, 6).bfloat16()
    torch.testing.assert_close(resized(positions, 64), resized(positions.float(), 64).bfloat16())


def test_sines_tell_the_column_first_and_then_the_row():
    places = sines(3, 8).unflatten(0, (3, 3))
    rates = torch.tensor([1.0, 0.01])  # 10000 ** -(0 and 1 of 2)
    for row in range(3):
        for column in range(3):
            angles = [column * rates, row * rates]
            expected = torch.cat([wave for a in angles for wave in (a.sin(), a.cos())])
            torch.testing.assert_close(places[row, column], expected)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_extracted_tower_sees_what_the_whole_checkpoint_saw(model, source, tmp_path, kind):
    target = tmp_path / "deep/tower"
    extract(source if kind == "safetensors" else pickled(source), target)
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    }
    assert list(target.parent.iterdir()) == [target]
    config = VisionConfig(checkpoint=str(target), kind="qwen", **TINY)
    pixels = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
    tower = VisionTower(config, dtype=torch.float32)
    assert torch.equal(tower(pixels), expected)


def test_shards_without_a_weight_of_the_tower_are_not_opened(source, tmp_path):
    (source / "model-1.safetensors").unlink()
    extract(source, tmp_path / "tower")
    (source / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-2"):
        extract(source, tmp_path / "other")


def test_a_checkpoint_in_one_file_is_read_too(source, model, tmp_path):
    (source / "model.safetensors.index.json").unlink()
    weights = {f"{PREFIX}{name}": weight for name, weight in model.state_dict().items()}
    save_file(weights | {"lm_head.weight": torch.ones(3, 8)}, source / "model.safetensors")
    extract(source, tmp_path / "tower")
    assert load_file(tmp_path / "tower/model.safetensors").keys() == model.state_dict().keys()


def test_missing_unknown_and_misshapen_weights_are_named_together(source, tmp_path):
    path = source / "model-3.safetensors"
    weights = load_file(path)
    del weights[f"{PREFIX}{LAST}"], weights[f"{PREFIX}ln_post.bias"]
    weights[f"{PREFIX}extra"] = torch.ones(1)
    weights[f"{PREFIX}ln_post.weight"] = torch.ones(5)
    save_file(weights, path)
    message = f"lacks ln_post.bias, {LAST}; has unknown extra; has another shape of ln_post.weight;"
    with pytest.raises(ValueError, match=message):
        extract(source, tmp_path / "tower")
    assert not list(tmp_path.glob("*tower*"))


@pytest.mark.parametrize("lost", ["visual", "layers"])
def test_a_folder_that_is_no_qwen_vl_is_named(source, tmp_path, lost):
    path = source / "config.json"
    stated = json.loads(path.read_text())
    del (stated if lost in stated else stated["visual"])[lost]
    path.write_text(json.dumps(stated))
    with pytest.raises(ValueError, match=rf"config\.json: has no '{lost}', .* whole Qwen-VL"):
        extract(source, tmp_path / "tower")


def test_a_pickle_that_would_run_code_is_not_run(source, tmp_path):
    folder = pickled(source)
    torch.save({f"{PREFIX}proj": Trap(tmp_path / "sprung")}, folder / "pytorch_model-3.bin")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        extract(folder, tmp_path / "tower")
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_folder_that_exists_is_left_alone(source, tmp_path):
    (tmp_path / "tower").mkdir()
    with pytest.raises(ValueError, match="exists; remove it or name another"):
        extract(source, tmp_path / "tower")


def test_a_lost_weight_is_named_when_the_tower_is_loaded(source, tmp_path):
    extract(source, tmp_path / "tower")
    path = tmp_path / "tower/model.safetensors"
    weights = load_file(path)
    del weights["attn_pool.query"]
    save_file(weights, path, metadata={"format": "pt"})
    config = VisionConfig(checkpoint=str(tmp_path / "tower"), kind="qwen", **TINY)
    with pytest.raises(ValueError, match=r"has no attn_pool.query \(1 in all\)"):
        VisionTower(config, dtype=torch.float32)


def test_an_image_is_squeezed_into_the_square_that_the_tower_takes(source, tmp_path):
    extract(source, tmp_path / "tower")
    processor = ImageProcessor.from_checkpoint(tmp_path / "tower")
    image = Image.new("RGB", (50, 20), (255, 128, 0))
    assert processor.fit(image).shape == (3, 28, 28)
    mean, std = np.array(processor.mean), np.array(processor.std)
    white = processor.normalise(np.full((3, 28, 28), 255, np.uint8))
    np.testing.assert_allclose(white[:, 0, 0], (1 - mean) / std, rtol=1e-6)
