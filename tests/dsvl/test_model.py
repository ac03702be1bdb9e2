"""The whole model: what reaches the decoder, what it may not see, and what the loss is over."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

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
        actual = model.head.logits(model.states(wanting(batch, True)))
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
    logits = model.head.logits(hidden(model, batch).flatten(0, 1)).unflatten(0, batch.ids.shape)
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


def test_a_tied_head_stays_frozen_when_the_embedding_is_trained(model_config, tmp_path):
    stock = LlamaForCausalLM.from_pretrained(model_config.language.checkpoint)
    stock.config.tie_word_embeddings = True
    stock.tie_weights()
    stock.save_pretrained(tmp_path)
    language = replace(model_config.language, checkpoint=str(tmp_path))
    model = VisualChat(
        replace(model_config, languages={"tiny": language}), precision="fp32", seed=0
    )
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
