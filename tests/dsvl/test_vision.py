"""Towers of three kinds behind one: features of ordinary checkpoints at their own resolution."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from dsvl.config import VisionConfig
from dsvl.qwen_vision import QwenVisionConfig, QwenVisionModel
from dsvl.vision import VisionTower

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
GRIDS = {"clip": (8, 4), "siglip": (14, 4), "qwen": (16, 4)}  # siglip leaves two pixels out
RESAMPLED = {"queries": 9, "output_size": 128}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Kind -> configuration of a tiny, random tower, saved as a checkpoint of transformers."""
    folder, configs = tmp_path_factory.mktemp("towers"), {}
    torch.manual_seed(0)
    for kind, settings, model, extra in (
        ("clip", CLIPVisionConfig, CLIPVisionModel, {}),
        ("siglip", SiglipVisionConfig, SiglipVisionModel, {}),
        ("qwen", QwenVisionConfig, QwenVisionModel, RESAMPLED),
    ):
        shape = {**SHAPE, **extra} | dict(
            zip(("image_size", "patch_size"), GRIDS[kind], strict=True)
        )
        model(settings(num_attention_heads=2, **shape)).save_pretrained(folder / kind)
        configs[kind] = VisionConfig(checkpoint=str(folder / kind), kind=kind, **shape)
    return configs


def images(config: VisionConfig, number: int = 2) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, config.image_size, config.image_size, generator=random)


@pytest.mark.parametrize(
    ("kind", "tokens", "width"), [("clip", 4, 16), ("siglip", 9, 16), ("qwen", 9, 128)]
)
def test_an_image_becomes_as_many_vectors_as_the_configuration_says(towers, kind, tokens, width):
    config = towers[kind]
    features = VisionTower(config, dtype=torch.float32)(images(config))
    assert features.shape == (2, config.tokens, config.width) == (2, tokens, width)
    assert features.isfinite().all()


@pytest.mark.parametrize("kind", GRIDS)
def test_an_image_has_the_same_features_in_any_company(towers, kind):
    tower = VisionTower(towers[kind], dtype=torch.float32)
    three = images(towers[kind], 3)
    together = tower(three)
    alone = torch.cat([tower(image[None]) for image in three])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "stock"), [("clip", CLIPVisionModel), ("siglip", SiglipVisionModel)]
)
def test_the_features_are_the_last_hidden_states_of_transformers(towers, kind, stock):
    config = towers[kind]
    with torch.no_grad():
        expected = stock.from_pretrained(config.checkpoint)(images(config)).last_hidden_state
    features = VisionTower(config, dtype=torch.float32)(images(config))
    torch.testing.assert_close(features, expected[:, -config.tokens :])


def test_the_class_token_of_clip_stands_before_the_patches(towers):
    config = towers["clip"]
    with_class = replace(config, class_token=True)
    patches, both = (VisionTower(c, dtype=torch.float32)(images(c)) for c in (config, with_class))
    assert with_class.tokens == config.tokens + 1 == both.shape[1]
    torch.testing.assert_close(both[:, 1:], patches)


@pytest.mark.parametrize(
    ("kind", "whole", "settings"),
    [("clip", CLIPModel, CLIPConfig), ("siglip", SiglipModel, SiglipConfig)],
)
def test_the_tower_of_a_checkpoint_that_also_reads_text_is_the_same(
    towers, kind, whole, settings, tmp_path
):
    config = towers[kind]
    vision = VisionTower(config, dtype=torch.float32).encoder
    text = {**SHAPE, "num_attention_heads": 2, "vocab_size": 11}
    model = whole(settings(text_config=text, vision_config=vision.config.to_dict()))
    model.vision_model.load_state_dict(vision.state_dict(), strict=False)
    model.save_pretrained(tmp_path)
    other = replace(config, checkpoint=str(tmp_path))
    features = [VisionTower(c, dtype=torch.float32)(images(c)) for c in (config, other)]
    torch.testing.assert_close(*features)


@pytest.mark.parametrize("kind", GRIDS)
def test_images_of_another_size_are_refused_with_both_sizes(towers, kind):
    size = towers[kind].image_size
    tower = VisionTower(towers[kind], dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"\(20, 20\) pixels.* asks for \({size}, {size}\)"):
        tower(torch.zeros(1, 3, 20, 20))


@pytest.mark.parametrize(("kind", "stored"), [("clip", "siglip"), ("siglip", "clip")])
def test_a_tower_of_another_kind_is_refused_and_never_drawn_at_random(towers, kind, stored):
    config = replace(towers[stored], kind=kind, image_size=16)
    with pytest.raises(ValueError, match=rf"has no embeddings.* a tower of kind={kind} has"):
        VisionTower(config, dtype=torch.float32)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_shape_that_is_not_the_checkpoints_is_refused(towers, kind):
    wrong = replace(towers[kind], num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"model.vision.num_hidden_layers=3: .* has 2"):
        VisionTower(wrong, dtype=torch.float32)


@pytest.mark.parametrize("kind", GRIDS)
def test_a_frozen_tower_records_no_gradient_and_a_part_that_is_trained_gets_one(towers, kind):
    tower = VisionTower(towers[kind], dtype=torch.float32)
    assert not tower(images(towers[kind])).requires_grad
    trained = [weight for weight in tower.encoder.parameters() if weight.ndim == 2][-1]
    trained.requires_grad_(True)
    features = tower(images(towers[kind]))
    (features * torch.randn(features.shape)).sum().backward()
    assert trained.grad is not None
    with torch.no_grad():
        assert not tower(images(towers[kind])).requires_grad


@pytest.mark.parametrize("kind", GRIDS)
def test_half_precision_is_the_precision_of_the_features(towers, kind):
    tower = VisionTower(towers[kind], dtype=torch.bfloat16)
    assert tower(images(towers[kind])).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("siglip", {"class_token": True}, "class_token=True: must be false"),
        ("clip", {"queries": 9}, "queries=9: must be a square for kind=qwen"),
        ("qwen", {"queries": 0}, "queries=0: must be a square for kind=qwen"),
        ("qwen", {"queries": -9}, "queries=-9: must be a square for kind=qwen"),
        ("qwen", {"queries": 10}, "queries=10: must be a square for kind=qwen"),
        ("qwen", {"output_size": 100}, "output_size=100: must be a multiple of 128"),
        ("siglip", {"output_size": 128}, "output_size=128: .* 0 for the others"),
        ("qwen", {"image_size": 18}, "patch_size=4: must divide image_size=18"),
    ],
)
def test_a_shape_that_no_tower_of_its_kind_has_is_refused(towers, kind, change, message):
    with pytest.raises(ValueError, match=message):
        replace(towers[kind], **change)
