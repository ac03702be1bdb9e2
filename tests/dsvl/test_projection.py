"""Projections: shapes, gradients, and that each is what its paper says."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from dsvl.model import VisualChat
from dsvl.projection import PROJECTIONS, heads

RESAMPLED = ("perceiver", "qformer")


def build(kind: str, *, vision=128, language=24, layers=2, queries=5) -> nn.Module:
    torch.manual_seed(0)
    return PROJECTIONS[kind](vision, language, layers=layers, queries=queries)


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("width", [16, 128])
def test_vectors_come_out_at_the_width_of_the_decoder(kind, tokens, width):
    projection = build(kind, vision=width)
    features = torch.randn(3, tokens, width)
    assert projection(features).shape == (3, 5 if kind in RESAMPLED else tokens, 24)


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_gives_an_image_as_many_vectors_as_it_has_positions(model_config, kind, precision):
    config = replace(model_config, projection=kind, projection_queries=3)
    model = VisualChat(config, precision=precision, seed=0)
    vectors = model.projection(model.vision(torch.randn(2, 3, 8, 8)))
    assert vectors.shape == (2, config.image_tokens, config.language.hidden_size)
    assert config.image_tokens == (3 if kind in RESAMPLED else 4)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_every_weight_learns_and_so_could_the_tower(kind):
    projection = build(kind)
    features = torch.randn(2, 7, 128, requires_grad=True)
    output = projection(features)
    (output * torch.randn(output.shape)).sum().backward()
    for name, weight in projection.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.any() or name.endswith(("key.bias", "k_proj.bias")), name  # cancel out
    assert features.grad is not None
    assert features.grad.any()


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_an_image_is_projected_the_same_in_any_company(kind):
    projection = build(kind)
    features = torch.randn(3, 7, 128)
    alone = torch.cat([projection(image[None]) for image in features])
    torch.testing.assert_close(projection(features), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_training_draws_nothing_at_random(kind):
    projection = build(kind).train()
    features = torch.randn(2, 7, 128)
    assert torch.equal(projection(features), projection(features))


@pytest.mark.parametrize("kind", RESAMPLED)
def test_queries_see_a_set_of_vectors_whatever_their_order(kind):
    projection = build(kind)
    features = torch.randn(2, 7, 128)
    shuffled = features[:, torch.randperm(7)]
    torch.testing.assert_close(projection(features), projection(shuffled), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", RESAMPLED)
def test_queries_differ_and_depend_on_what_they_see(kind):
    projection = build(kind)
    first, second = (projection(torch.randn(1, 7, 128))[0] for _ in range(2))
    assert not torch.allclose(first, second, atol=1e-3)
    assert not torch.allclose(first[0], first[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_vector_is_projected_without_regard_to_the_others(kind):
    projection = build(kind)
    features = torch.randn(1, 7, 128)
    alone = torch.cat([projection(features[:, k : k + 1]) for k in range(7)], dim=1)
    torch.testing.assert_close(projection(features), alone, rtol=1e-5, atol=1e-5)


def test_an_mlp_is_two_linear_layers_around_a_gelu():
    projection = build("mlp")
    features = torch.randn(2, 7, 128)
    first, second = (layer for layer in projection.children() if isinstance(layer, nn.Linear))
    torch.testing.assert_close(projection(features), second(gelu(first(features))))


def test_a_vit_is_the_encoder_layer_of_torch_and_a_linear_one():
    projection = build("vit", layers=1)
    (layer,) = projection.layers
    theirs = nn.TransformerEncoderLayer(
        128, 2, 512, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    attention = layer.self_attn
    with torch.no_grad():
        for name in ("weight", "bias"):
            joined = [getattr(getattr(attention, f"{part}_proj"), name) for part in "qkv"]
            getattr(theirs.self_attn, f"in_proj_{name}").copy_(torch.cat(joined))
    theirs.self_attn.out_proj.load_state_dict(attention.out_proj.state_dict())
    theirs.linear1.load_state_dict(layer.mlp.fc1.state_dict())
    theirs.linear2.load_state_dict(layer.mlp.fc2.state_dict())
    features = torch.randn(2, 7, 128)
    expected = projection.output(theirs(features))
    torch.testing.assert_close(projection(features), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_of_a_perceiver_is_attention_over_features_and_queries():
    layer = build("perceiver").layers[0]
    features, queries = torch.randn(2, 7, 128), torch.randn(2, 5, 128)
    theirs = nn.MultiheadAttention(128, 2, bias=False, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key_value.weight]))
        theirs.out_proj.weight.copy_(layer.output.weight)
    normed = layer.norm_queries(queries)
    seen = torch.cat([layer.norm_features(features), normed], dim=1)
    attended = queries + theirs(normed, seen, seen, need_weights=False)[0]
    expected = attended + layer.feed_forward(attended)
    torch.testing.assert_close(layer(queries, features), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "perceiver", "qformer"])
def test_more_layers_have_more_weights(kind):
    sizes = [sum(w.numel() for w in build(kind, layers=n).parameters()) for n in (1, 2, 3)]
    assert sizes[0] < sizes[1] < sizes[2]


def test_heads_are_those_of_the_published_models():
    published = {768: 12, 1024: 16, 1152: 18, 1408: 22}  # BLIP-2, CLIP-L, ViT of 1152, EVA
    assert {width: heads(width) for width in published} == published
    assert heads(48) == 1
