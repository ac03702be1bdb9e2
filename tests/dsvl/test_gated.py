"""Gated cross-attention is its definition: a text token sees the last image before it; packed, cached too."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2Model, LlamaForCausalLM, MistralConfig, MistralModel

from dsvl.cache import ImageStore, KnownImages
from dsvl.data.layout import lay_out
from dsvl.data.types import Kind
from dsvl.gated import Block, Gated
from dsvl.model import VisualChat
from tests.dsvl.test_decoder import FAMILIES, SHAPE, BrokenOffError, break_off, kinds_of, tokens
from tests.dsvl.test_model import batch_of, example, wanting

TOKENS = 2
EVERY = 2
CASES = {
    "text, image, text": ["tttiit"],
    "image first": ["iitt"],
    "several, adjacent, and one at the end": ["tiiiittiittii"],
    "padding on both sides and a row without images": ["tiittt", "..tttt", "tiiiit", "tt...."],
    "nothing but an image": ["ii", "tt"],
    "no image": ["ttt", "t"],
}


@pytest.fixture(params=FAMILIES)
def decoder(request):
    """A stock decoder at tiny width, float64, random but fixed."""
    make, config = FAMILIES[request.param]
    torch.manual_seed(0)
    return make(config).double().requires_grad_(False)


@pytest.fixture
def gated(decoder):
    """With blocks ahead of its second and fourth layer, gates open and norms of their own."""
    return open_gates(decoder)


def open_gates(decoder, *, every=EVERY, gate=0.7) -> Gated:
    torch.manual_seed(1)
    blocks = nn.ModuleList(Block(32, 4) for _ in range(len(decoder.layers) // every)).double()
    for name, weight in blocks.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(weight, gate)
        elif "norm" in name or name.endswith("bias"):
            nn.init.normal_(weight, 1.0, 0.3)
    return Gated(decoder, blocks, every=every, image_tokens=TOKENS)


def layout_of(rows, *, share=1.1, seed=1):
    """The layout of words as in `kinds_of`, with a share of the text wanted."""
    kinds = kinds_of(rows)
    chosen = np.random.default_rng(seed).random(kinds.shape) < share
    return lay_out(kinds, chosen & (kinds == Kind.TEXT))


def definition(gated: Gated, text, images, layout):
    """The same, a row at a time, with masks and the stock layers: what `Gated` has to equal."""
    decoder = gated.streams.decoder
    decoder.set_attn_implementation("sdpa")
    rows, length = layout.kinds.shape
    states = text.new_zeros(rows, length, text.shape[-1])
    for row in range(rows):
        kinds = layout.kinds[row]
        place = row * length + torch.arange(length)
        own_text = torch.isin(layout.text, place[kinds == Kind.TEXT])
        own_images = images[torch.isin(layout.images, place[kinds == Kind.IMAGE])]
        hidden = text[own_text][None]
        if not hidden.shape[1]:
            continue
        count = (kinds == Kind.IMAGE).cumsum(0)[kinds == Kind.TEXT]  # image tokens before
        of = torch.arange(len(own_images))
        visible = (of < count[:, None]) & (of >= count[:, None] - TOKENS)
        turns = decoder.rotary_emb(hidden, position_ids=torch.arange(hidden.shape[1])[None])
        future = torch.full((hidden.shape[1],) * 2, -math.inf, dtype=hidden.dtype).triu(1)
        for number, layer in enumerate(decoder.layers):
            if (number + 1) % gated.every == 0:
                block = gated.blocks[(number + 1) // gated.every - 1]
                hidden = block_by_definition(block, hidden[0], own_images, visible)[None]
            hidden = layer(hidden, attention_mask=future[None, None], position_embeddings=turns)
        states[row, kinds == Kind.TEXT] = decoder.norm(hidden)[0]
    return states.flatten(0, 1)[layout.wanted_positions]


def block_by_definition(block, text, images, visible):
    """(t, D), (i, D) and (t, i) of bool -> (t, D), head by head."""
    query = block.query(block.norm(text))
    key, value = block.key_value(images).chunk(2, dim=-1)
    found = []
    for q, k, v in zip(
        query.chunk(block.heads, -1), key.chunk(block.heads, -1), value.chunk(block.heads, -1),
        strict=True,
    ):  # fmt: skip
        scores = (q @ k.T / math.sqrt(q.shape[-1])).exp() * visible
        found.append(scores / scores.sum(1, keepdim=True).clamp_min(1e-30) @ v)
    text = text + torch.tanh(block.attention_gate) * block.output(torch.cat(found, -1))
    return text + torch.tanh(block.feed_forward_gate) * block.feed_forward(text)


def run(gated, decode, layout, **settings):
    """Wanted states, and what a fixed gradient of them gives the tokens and every new weight."""
    text, images = (part.requires_grad_() for part in tokens(layout))
    states = decode(text, images, layout, **settings)
    slope = torch.sin(torch.arange(states.numel(), dtype=torch.float64)).view_as(states)
    weights = list(gated.blocks.parameters())
    found = torch.autograd.grad(
        states, (text, images, *weights), slope, allow_unused=True, materialize_grads=True
    )
    return states.detach(), *found


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
@pytest.mark.parametrize("share", [1.1, 0.4])
def test_states_and_gradients_equal_the_definition(gated, rows, share):
    layout = layout_of(rows, share=share)
    expected = run(gated, lambda *inputs: definition(gated, *inputs), layout)
    for recompute in (False, True):
        found = run(gated, gated, layout, recompute=recompute)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_block_stands_ahead_of_every_nth_layer(decoder, every):
    gated = open_gates(decoder, every=every)
    assert len(gated.blocks) == 3 // every
    layout = layout_of(["ttiittiit"])
    text, images = tokens(layout)
    torch.testing.assert_close(
        gated(text, images, layout), definition(gated, text, images, layout), rtol=1e-9, atol=1e-9
    )


def test_with_gates_at_zero_the_model_is_the_decoder_without_images_bit_for_bit(decoder):
    gated = open_gates(decoder.float(), gate=0.0)
    gated.blocks.float()
    decoder.set_attn_implementation("sdpa")
    layout = layout_of(["tttiitiittt"])
    text, images = (part.float() for part in tokens(layout))
    expected = decoder(inputs_embeds=text[None], use_cache=False).last_hidden_state[0]
    assert torch.equal(gated(text, images, layout), expected)


def test_text_before_any_image_is_changed_by_the_feed_forward_net_alone(gated):
    layout = layout_of(["ttt"])
    text, images = tokens(layout)
    for block in gated.blocks:
        nn.init.normal_(block.key_value.weight)
    whole = gated(text, images, layout)
    for block in gated.blocks:
        nn.init.zeros_(block.attention_gate)
    assert torch.equal(gated(text, images, layout), whole)
    for block in gated.blocks:
        nn.init.zeros_(block.feed_forward_gate)
    assert not torch.allclose(gated(text, images, layout), whole)


def test_what_comes_later_never_changes_what_came_before(gated):
    word = "ttiittiiiittt"
    layout = layout_of([word])
    text, images = tokens(layout)
    whole = gated(text, images, layout)
    for end in (1, 2, 4, 5, 6, 8, 10, 11, 12):  # between whole images
        part = layout_of([word[:end]])
        before = len(part.text)
        found = gated(text[:before], images[: len(part.images)], part)
        torch.testing.assert_close(found, whole[:before], rtol=1e-9, atol=1e-9)


def test_text_sees_the_last_image_before_it_and_no_other(gated):
    layout = layout_of(["tiittiiiit"])
    text, images = tokens(layout)
    whole = gated(text, images, layout)
    for picture, changed in enumerate(([1, 2, 3], [], [3])):
        other = images.clone()
        other[2 * picture : 2 * picture + 2] += 1.0
        moved = (gated(text, other, layout) != whole).any(1)
        # The last text token reads the text before it, and with it what that saw of the first image.
        assert moved.nonzero().flatten().tolist() == changed


def test_images_take_no_positions(gated):
    one, two = layout_of(["ttiitt"]), layout_of(["ttiiiitt"])
    text, images = tokens(one)
    found = gated(text, torch.cat([images.flip(0), images]), two)
    torch.testing.assert_close(found, gated(text, images, one), rtol=1e-9, atol=1e-9)


def test_packed_samples_do_not_see_each_other(gated):
    words = ["tiit", "ttiitt", "tt", "iit"]
    kinds = kinds_of([words[0] + words[1], words[2] + words[3]])
    samples = np.array([[0] * 4 + [1] * 6, [0] * 2 + [1] * 3 + [-1] * 5])
    layout = lay_out(kinds, kinds == Kind.TEXT, samples=samples)
    text, images = tokens(layout)
    expected = []
    for word, (a, b, c, d) in zip(words, layout.samples, strict=True):
        expected.append(gated(text[a:b], images[c:d], layout_of([word])))
    torch.testing.assert_close(
        gated(text, images, layout), torch.cat(expected), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("cuts", [(4, 5), (1, 6, 8, 11), (2,), (1, 2, 4, 5, 6, 8, 10, 11, 12)])
def test_a_cache_in_any_pieces_equals_the_whole(gated, cuts):
    kinds = kinds_of(["ttiittiiiittt"])
    layout = lay_out(kinds, kinds == Kind.TEXT)
    text, images = tokens(layout)
    cache, pieces, seen = gated.cache(1), [], [0, 0]
    for part in np.split(kinds, cuts, axis=1):
        piece = lay_out(part, part == Kind.TEXT, past=cache.past)
        new = [len(piece.text), len(piece.images)]
        inputs = [whole[n : n + m] for whole, n, m in zip((text, images), seen, new, strict=True)]
        pieces.append(gated(*inputs, piece, cache=cache))
        seen = [n + m for n, m in zip(seen, new, strict=True)]
    torch.testing.assert_close(torch.cat(pieces), gated(text, images, layout), rtol=1e-9, atol=1e-9)


def test_a_picture_of_a_forward_that_broke_off_is_not_seen(gated):
    def add(cache, word, seed):
        kinds = kinds_of([word])
        layout = lay_out(kinds, kinds == Kind.TEXT, past=cache.past)
        return gated(*tokens(layout, seed=seed), layout, cache=cache)

    for held in ("t", "tiit"):
        caches = gated.cache(1), gated.cache(1)
        _ = [add(cache, held, 0) for cache in caches]
        break_off(gated.streams.decoder.layers[2])
        with pytest.raises(BrokenOffError):
            add(caches[0], "tiit", 1)
        assert caches[0].past == caches[1].past
        for seed, word in enumerate(("tt", "iit", "t"), start=2):
            assert torch.equal(*(add(cache, word, seed) for cache in caches))


def test_a_batch_of_caches_equals_each_sample_alone(gated):
    rounds = [["tiit", "ttt", "iit"], ["t", "iit", "tii"], ["t", "t", "t"], ["iitt", "t", "t"]]
    table = torch.randn(3, 64, 32, dtype=torch.float64)

    def play(rows):
        cache, used, states = gated.cache(len(rows)), [[0, 0] for _ in rows], []
        for words in rounds:
            kinds = kinds_of([words[row] for row in rows])
            layout = lay_out(kinds, kinds == Kind.TEXT, past=cache.past)
            parts = [[], []]
            for row, count, (a, b, c, d) in zip(rows, used, layout.samples, strict=True):
                for which, (start, end) in enumerate(((a, b), (c, d))):
                    first = 32 * which + count[which]
                    parts[which].append(table[row, first : first + end - start])
                    count[which] += end - start
            text, images = (torch.cat(part) for part in parts)
            found = gated(text, images, layout, cache=cache)
            states.append([found[a:b] for a, b, _, _ in layout.samples])
        return [torch.cat(each) for each in zip(*states, strict=True)]

    together = play([0, 1, 2])
    for row in range(3):
        torch.testing.assert_close(together[row], play([row])[0], rtol=1e-9, atol=1e-9)


def test_a_known_image_is_the_same_in_any_conversation_and_place(gated):
    store = ImageStore(limit_bytes=10**6)
    first = layout_of(["ttiit"])
    text, picture = tokens(first)
    shown = KnownImages(["cat"], store, tokens=TOKENS, anew=[False])
    gated(text, picture, first, cache=gated.cache(1), known=shown)
    assert "cat" in store

    kinds = kinds_of(["tttiittiitt"])  # the cat, then another
    whole = lay_out(kinds, kinds == Kind.TEXT)
    text, images = tokens(whole, seed=5)
    expected = gated(text, torch.cat([picture, images[2:]]), whole)
    known = np.isin(np.arange(11), (3, 4))[None]
    layout = lay_out(kinds, kinds == Kind.TEXT, known=known)
    shown = KnownImages(["cat", "dog"], store, tokens=TOKENS, anew=[False, False])
    found = gated(text, images[2:], layout, cache=gated.cache(1), known=shown)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert "dog" in store


@pytest.mark.parametrize("rows", [["tiitt"], ["ttt"]])
def test_gradients_reach_the_gates_at_zero_and_every_weight_once_they_are_open(decoder, rows):
    layout = layout_of(rows)
    for gate in (0.0, 0.5):
        gated = open_gates(decoder, gate=gate)
        gated(*tokens(layout), layout).pow(2).sum().backward()
        for name, weight in gated.blocks.named_parameters():
            assert weight.grad is not None, name  # also without an image: every rank reduces alike
            reached = "feed_forward" in name or "ii" in rows[0]
            assert weight.grad.any() == (reached and (gate > 0 or name.endswith("gate"))), name


def test_the_state_of_an_image_cannot_be_wanted(gated):
    kinds = kinds_of(["tiit"])
    layout = lay_out(kinds, kinds == Kind.IMAGE)
    with pytest.raises(ValueError, match="put text between an image and an answer"):
        gated(*tokens(layout), layout)


def test_decoders_that_it_does_not_know_are_refused():
    with pytest.raises(ValueError, match=r"'gated_cross' runs LlamaModel, .* not GPT2Model"):
        Gated(
            GPT2Model(GPT2Config(n_embd=8, n_head=1, n_layer=1, vocab_size=9)),
            nn.ModuleList(),
            every=1,
            image_tokens=1,
        )


def test_images_take_no_room_in_a_decoders_window():
    config = MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=8)
    gated = open_gates(MistralModel(config).double())
    fits, longer = layout_of(["tiitttiitttt"]), layout_of(["ttttttttt"])
    gated(*tokens(fits), fits)
    with pytest.raises(ValueError, match=r"9 tokens .*sliding_window=8, .*'gated_cross'"):
        gated(*tokens(longer), longer)


def test_a_new_model_is_its_decoder_without_images_bit_for_bit(model_config):
    config = replace(model_config, attention="gated_cross", cross_every=1)
    model = VisualChat(config, precision="fp32", seed=0)
    stock = LlamaForCausalLM.from_pretrained(config.language.checkpoint)
    batch = batch_of(example("t1ttt1tTTT"))
    is_text = batch.kinds.numpy() == Kind.TEXT
    with torch.no_grad():
        expected = stock(batch.ids[:, is_text[0]]).logits[0]
        found = model.logits(model.states(wanting(batch, is_text)))
    assert torch.equal(found, expected)


def test_blocks_are_trained_and_drawn_from_the_seed_after_the_projection(model_config):
    config = replace(model_config, attention="gated_cross", cross_every=2)
    one, same, other = (VisualChat(config, precision="fp32", seed=seed) for seed in (1, 1, 2))
    plain = VisualChat(model_config, precision="fp32", seed=1)
    assert torch.equal(one.projection.weight, plain.projection.weight)
    assert torch.equal(one.cross[0].query.weight, same.cross[0].query.weight)
    assert not torch.equal(one.cross[0].query.weight, other.cross[0].query.weight)
    new = {f"cross.{name}" for name, _ in one.cross.named_parameters()}
    assert len(new) == 11
    assert one.trainable().keys() == plain.trainable().keys() | new


def test_a_question_is_answered_by_looking_once_the_gates_are_open(gated_model):
    batch = batch_of(example("t1tTT"))
    other = replace(batch, pixels=batch.pixels + 1.0)
    assert not torch.allclose(gated_model(batch), gated_model(other))
    gated_model(batch).backward()
    assert all(weight.grad.any() for weight in gated_model.trainable().values())


def test_a_batch_without_images_trains_the_looking_by_zero(gated_model):
    gated_model(batch_of(example("ttTT"))).backward()
    for name, weight in gated_model.trainable().items():
        assert weight.grad is not None, name
        looking = name.startswith(("projection", "cross")) and "feed_forward" not in name
        assert weight.grad.any() == (not looking), name


def test_fewer_layers_than_one_block_needs_are_refused(model_config):
    with pytest.raises(
        ValueError, match=r"cross_every=4: must be at most the 3 layers of size tiny"
    ):
        replace(model_config, attention="gated_cross")
