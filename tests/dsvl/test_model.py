"""The whole model: what reaches the decoder, what it may not see, and what the loss is over."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dsvl.data.collate import collate
from dsvl.data.layout import lay_out
from dsvl.data.types import IGNORED, Example, Kind
from dsvl.model import VisualChat

TOKENS = 4
PIXELS = {
    str(k): np.random.default_rng(k).normal(size=(3, 8, 8)).astype(np.float32) for k in range(6)
}


def example(layout: str, *, images: str = "0123", seed: int = 0) -> Example:
    """An example from a layout such as `tt1tT`: t is text, T a trained token, 1 an image."""
    random = np.random.default_rng(seed)
    ids, labels, kinds = [], [], []
    for symbol in layout:
        if symbol == "1":
            ids += [0] * TOKENS
            labels += [IGNORED] * TOKENS
            kinds += [Kind.IMAGE] * TOKENS
        else:
            token = int(random.integers(1, 61))
            ids.append(token)
            labels.append(token if symbol == "T" else IGNORED)
            kinds.append(Kind.TEXT)
    return Example(
        layout, np.array(ids, np.int32), np.array(labels, np.int32), np.array(kinds, np.int8),
        tuple(images[: layout.count("1")]),
    )  # fmt: skip


def batch_of(*examples: Example, rows=None):
    return collate(
        list(examples), pixels=PIXELS.__getitem__, image_tokens=TOKENS, pad_id=0, rows=rows
    )


def named(config, folder: Path, **settings) -> VisualChat:
    """The tiny model with the decoder of another folder."""
    languages = {"tiny": replace(config.language, checkpoint=str(folder))}
    return VisualChat(replace(config, languages=languages, **settings), precision="fp32", seed=0)


def wanting(batch, wanted):
    """The batch with other positions wanted, (B, S) bool: all that are no padding for True."""
    kinds = batch.kinds.numpy()
    samples = None if batch.layout.packing is None else batch.layout.packing.numpy()
    layout = lay_out(kinds, (kinds != Kind.PAD) & np.asarray(wanted), samples=samples)
    return replace(batch, layout=layout)


def by_position(layout, states):
    """(n, D) wanted states -> (B, S, D), zero where none is wanted."""
    rows, length = layout.kinds.shape
    whole = states.new_zeros(rows * length, states.shape[-1])
    return whole.index_copy(0, layout.wanted_positions, states).view(rows, length, -1)


def hidden(model, batch):
    """(B, S, D) last hidden states."""
    batch = wanting(batch, True)
    with torch.no_grad():
        return by_position(batch.layout, model.states(batch))


def test_two_images_land_in_their_own_slots(model):
    batch = batch_of(example("t1tt1T", images="25"))
    _, images = model.embed(batch)
    places = batch.layout.images.tolist()
    for start, key in ((1, "2"), (7, "5")):
        feature = model.projection(model.vision(torch.from_numpy(PIXELS[key])[None]))[0]
        first = places.index(start)
        assert places[first : first + TOKENS] == list(range(start, start + TOKENS))
        torch.testing.assert_close(images[first : first + TOKENS], feature)


def test_images_of_a_batch_stay_in_their_rows(model):
    alone = [
        hidden(model, batch_of(e))
        for e in (example("t1T", images="3"), example("ttt1tT", images="1"))
    ]
    both = hidden(model, batch_of(example("t1T", images="3"), example("ttt1tT", images="1")))
    for row, expected in enumerate(alone):
        torch.testing.assert_close(
            both[row, : expected.shape[1]], expected[0], rtol=1e-5, atol=1e-5
        )


def test_placeholders_and_images_that_disagree_are_refused_with_both_counts(model):
    batch = batch_of(example("t1t1T"))
    with pytest.raises(ValueError, match="1 images of 4 tokens each, but 8 image positions"):
        model.embed(replace(batch, pixels=batch.pixels[:1]))


def test_text_alone_equals_the_stock_decoder(model, model_config):
    batch = batch_of(example("tttTtT"))
    stock = LlamaForCausalLM.from_pretrained(model_config.language.checkpoint)
    with torch.no_grad():
        expected = stock(batch.ids).logits[0]
        actual = model.logits(model.states(wanting(batch, True)))
    assert torch.equal(actual, expected)


def test_what_comes_later_never_changes_what_came_before(model):
    layout = "tt1tt1tTT1t"
    whole = hidden(model, batch_of(example(layout)))
    for end in range(1, len(layout)):
        part = batch_of(example(layout[:end]))
        torch.testing.assert_close(
            hidden(model, part)[0], whole[0, : part.ids.shape[1]], rtol=1e-5, atol=1e-5
        )


def test_image_states_do_not_depend_on_text_or_on_other_images(model):
    first = hidden(model, batch_of(example("tt1T", images="4")))[0, 2:6]
    other = hidden(model, batch_of(example("t1ttt1tT", images="14", seed=9)))[0, 8:12]
    torch.testing.assert_close(first, other, rtol=1e-5, atol=1e-5)


def test_a_batch_without_images_trains_the_projection_by_zero(model):
    model(batch_of(example("ttTT"))).backward()
    assert model.projection.weight.grad is not None
    assert not model.projection.weight.grad.any()
    assert model.embedding.weight.grad.any()


def test_only_projection_and_embedding_are_trained(model):
    assert set(model.trainable()) == {
        "projection.weight",
        "projection.bias",
        "language.model.embed_tokens.weight",
    }


def test_the_loss_is_the_sum_over_answers_alone(model):
    batch = batch_of(example("t1tTTtT"), example("tTTt1T", seed=1))
    logits = model.logits(hidden(model, batch).flatten(0, 1)).unflatten(0, batch.ids.shape)
    expected = torch.zeros(())
    for row in range(2):
        for s in range(batch.ids.shape[1] - 1):
            label = int(batch.labels[row, s + 1])
            if label != IGNORED:
                expected = expected - torch.log_softmax(logits[row, s], -1)[label]
    torch.testing.assert_close(model(batch), expected)


def test_the_loss_of_a_batch_is_the_sum_over_its_rows(model):
    rows = [example("t1tTT"), example("tT"), example("tt1t1TTT", seed=2)]
    torch.testing.assert_close(model(batch_of(*rows)), sum(model(batch_of(row)) for row in rows))


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_tied_head_stays_frozen_when_the_embedding_is_trained(
    model_config, tmp_path, quantization
):
    stock = LlamaForCausalLM.from_pretrained(model_config.language.checkpoint)
    stock.config.tie_word_embeddings = True
    stock.tie_weights()
    stock.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = named(model_config, tmp_path, quantization=quantization)
    head = model.language.lm_head.weight.detach().clone()
    assert torch.equal(head, model.embedding.weight)
    with torch.no_grad():
        model.embedding.weight += 1.0
    assert torch.equal(model.language.lm_head.weight, head)


def test_the_projection_is_drawn_from_the_seed(model_config):
    a, b, c = (VisualChat(model_config, precision="fp32", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.projection.weight, b.projection.weight)
    assert not torch.equal(a.projection.weight, c.projection.weight)


def test_a_shape_that_is_not_the_checkpoints_is_refused(model_config):
    language = replace(model_config.language, intermediate_size=64)
    with pytest.raises(ValueError, match=r"model.languages.tiny.intermediate_size=64: .* has 48"):
        VisualChat(replace(model_config, languages={"tiny": language}), precision="fp32", seed=0)


@pytest.mark.parametrize("quantization", ["none", "int8"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("lm_head.weight"), r"has no lm_head\.weight \(1 in all\)"),
        (
            lambda v: v.update({"model.norm.weight": torch.ones(3)}),
            r"has no model\.norm\.weight \(1 in all\) as its config\.json says; copy or download",
        ),
        (
            lambda v: [v.pop(f"model.layers.2.mlp.{part}_proj.weight") for part in ("up", "down")],
            r"model\.languages\.tiny\.checkpoint='\S+': has no model\.layers\.2\.mlp\.down_proj\.weight "
            r"and no model\.layers\.2\.mlp\.up_proj\.weight \(2 in all\)",
        ),
    ],
)
def test_a_decoder_that_lacks_weights_is_refused(
    model_config, tmp_path, change, said, quantization
):
    copy = shutil.copytree(model_config.language.checkpoint, tmp_path / "copy")
    values = load_file(copy / "model.safetensors")
    change(values)
    save_file(values, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=said):
        named(model_config, copy, quantization=quantization)


def test_a_decoder_of_another_build_is_refused_with_those_that_are_not(model_config, tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=3, n_head=4)).save_pretrained(
        tmp_path
    )
    with pytest.raises(
        ValueError, match=r"is a GPT2LMHeadModel, .*; name .* LLaMA, Mistral or Qwen2"
    ):
        named(model_config, tmp_path)


@pytest.mark.parametrize("shape", [(1, 5, 16), (1, 4, 15)])
def test_features_of_another_tower_are_refused_with_both_shapes(model, shape):
    batch = replace(batch_of(example("t1tT")), pixels=torch.ones(shape))
    said = rf"features: shape=\({shape[0]}, {shape[1]}, {shape[2]}\): must be \(images, 4, 16\)"
    with pytest.raises(ValueError, match=said):
        model(batch)
