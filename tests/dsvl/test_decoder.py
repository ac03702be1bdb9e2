"""Two streams are the definition, in stock decoders of several families, packed and cached too."""

from itertools import count

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    Qwen2Config,
    Qwen2Model,
)

from dsvl.cache import ImageStore, KnownImages
from dsvl.data.layout import lay_out
from dsvl.data.types import Kind
from dsvl.decoder import Interleaved, Streams, decoder_for

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
FAMILIES = {
    "llama": (LlamaModel, LlamaConfig(**SHAPE, num_key_value_heads=4)),
    "llama-grouped": (LlamaModel, LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "mistral": (MistralModel, MistralConfig(**SHAPE, num_key_value_heads=1)),
    "qwen2": (Qwen2Model, Qwen2Config(**SHAPE, num_key_value_heads=2)),
}
CASES = {
    "text, image, text": ["tttiit"],
    "image first": ["iitt"],
    "several, adjacent, and one at the end": ["tiiiittiittii"],
    "padding on both sides and a row without images": ["tiittt", "..tttt", "tiiiit", "tt...."],
    "nothing but an image": ["ii", "tt"],
}


@pytest.fixture(params=FAMILIES)
def decoder(request):
    """A stock decoder at tiny width, float64, random but fixed."""
    make, config = FAMILIES[request.param]
    torch.manual_seed(0)
    return make(config).double().requires_grad_(False)


def kinds_of(rows: list[str]) -> np.ndarray:
    """(B, S) kinds from words of t, i and . (padding), padded on the right."""
    length = max(map(len, rows))
    values = {"t": Kind.TEXT, "i": Kind.IMAGE, ".": Kind.PAD}
    return np.array([[values[c] for c in row.ljust(length, ".")] for row in rows], np.int8)


def tokens(layout, *, seed=0):
    """Random embedded text and images, (M, 32) and (F, 32): what a position holds depends on it alone."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = layout.kinds.shape
    table = torch.randn(rows, 40, 32, generator=generator, dtype=torch.float64)
    whole = table[:, :length].reshape(-1, 32)
    return whole[layout.text].clone(), whole[layout.images].clone()


def run(decode, layout, **settings):
    """States of the wanted positions, and what a fixed gradient of them gives the tokens."""
    text, images = (part.requires_grad_() for part in tokens(layout))
    states = decode(text, images, layout, **settings)
    slope = torch.sin(torch.arange(states.numel(), dtype=torch.float64)).view_as(states)
    return states.detach(), *torch.autograd.grad(states, (text, images), slope)


def interleaved(decoder, scheme):
    decoder.set_attn_implementation(scheme)
    return Interleaved(decoder)


def wanted_of(kinds, share, seed=1):
    chosen = np.random.default_rng(seed).random(kinds.shape) < share
    chosen[-1, 0] |= not chosen.any()
    return chosen & (kinds != Kind.PAD)


@pytest.mark.parametrize("scheme", ["mmca", "causal_cross"])
@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
@pytest.mark.parametrize("share", [1.1, 0.4])
def test_streams_equal_the_definition_in_the_stock_model(decoder, scheme, rows, share):
    kinds = kinds_of(rows)
    layout = lay_out(kinds, wanted_of(kinds, share))
    expected = run(interleaved(decoder, scheme), layout)
    for recompute in (False, True):
        found = run(Streams(decoder, scheme=scheme), layout, recompute=recompute)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scheme", ["mmca", "causal_cross", "causal"])
def test_packed_samples_do_not_see_each_other(decoder, scheme):
    alone = ["tiit", "ttiitt", "tt", "iit"]
    packed = kinds_of(["tiitttiitt", "ttiit"])
    samples = np.array([[0] * 4 + [1] * 6, [0] * 2 + [1] * 3 + [-1] * 5])
    decode = decoder_for(decoder, scheme=scheme)
    decoder.set_attn_implementation(scheme)
    layout = lay_out(packed, packed != Kind.PAD, samples=samples)
    text, images = tokens(layout)
    together = decode(text, images, layout)
    place = dict(zip(layout.wanted_positions.tolist(), together, strict=True))
    for word, first in zip(alone, (0, 4, 10, 12), strict=True):
        kinds = kinds_of([word])
        single = lay_out(kinds, kinds != Kind.PAD)
        at = {int(p): t for p, t in zip(layout.text, text, strict=True)}
        at |= {int(p): i for p, i in zip(layout.images, images, strict=True)}
        parts = [
            torch.stack([at[first + int(p)] for p in which]) if len(which) else images[:0]
            for which in (single.text, single.images)
        ]
        expected = decode(*parts, single)
        for position, state in zip(single.wanted_positions.tolist(), expected, strict=True):
            torch.testing.assert_close(place[first + position], state, rtol=1e-9, atol=1e-9)


def test_text_alone_is_the_stock_model_bit_for_bit(decoder):
    decoder.float().set_attn_implementation("sdpa")
    kinds = kinds_of(["tttttttt", "tttttttt"])
    layout = lay_out(kinds, kinds == Kind.TEXT)
    text = tokens(layout)[0].float()
    expected = decoder(inputs_embeds=text.view(2, 8, 32), use_cache=False).last_hidden_state
    for scheme in ("mmca", "causal_cross"):
        found = Streams(decoder, scheme=scheme)(text, text[:0], layout)
        assert torch.equal(found.view(2, 8, 32), expected)


@pytest.mark.parametrize("scheme", ["mmca", "causal_cross", "causal"])
@pytest.mark.parametrize("cuts", [(4, 5), (1, 7, 8, 9), (2,), tuple(range(1, 13))])
def test_a_cache_in_any_pieces_equals_the_whole(decoder, scheme, cuts):
    kinds = kinds_of(["ttiitttiiiitt"])
    decoder.set_attn_implementation(scheme)
    decode = decoder_for(decoder, scheme=scheme)
    layout = lay_out(kinds, kinds != Kind.PAD)
    text, images = tokens(layout)
    whole = decode(text, images, layout)[layout.wanted_positions.argsort()]
    cache, pieces, seen = decode.cache(1), [], [0, 0]
    for part in np.split(kinds, cuts, axis=1):
        piece = lay_out(part, part != Kind.PAD, past=cache.past)
        new = [len(piece.text), len(piece.images)]
        inputs = [
            whole_part[n : n + m]
            for whole_part, n, m in zip((text, images), seen, new, strict=True)
        ]
        states = decode(*inputs, piece, cache=cache)
        pieces.append(states[piece.wanted_positions.argsort()])
        seen = [n + m for n, m in zip(seen, new, strict=True)]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-9, atol=1e-9)


class BrokenOffError(Exception):
    """What a layer raises here."""


def break_off(layer, *, at: int = 1):
    """Have a layer of a decoder raise in its `at`-th forward from now on, once."""
    passes = count(1)

    def forward(*_):
        if next(passes) == at:
            hook.remove()
            raise BrokenOffError

    hook = layer.input_layernorm.register_forward_pre_hook(forward)


@pytest.mark.parametrize("scheme", ["mmca", "causal_cross", "causal"])
@pytest.mark.parametrize("held", ["", "tiit"])
def test_a_forward_that_breaks_off_leaves_the_cache_as_it_was(decoder, scheme, held):
    decoder.set_attn_implementation(scheme)
    decode = decoder_for(decoder, scheme=scheme)

    def add(cache, word, seed):
        kinds = kinds_of([word])
        layout = lay_out(kinds, kinds == Kind.TEXT, past=cache.past)
        return decode(*tokens(layout, seed=seed), layout, cache=cache)

    caches = decode.cache(1), decode.cache(1)
    if held:
        _ = [add(cache, held, 0) for cache in caches]
    break_off(decoder.layers[1])
    with pytest.raises(BrokenOffError):
        add(caches[0], "tiiiit", 1)
    assert caches[0].past == caches[1].past
    for seed, word in enumerate(("tt", "iit", "t"), start=2):
        assert torch.equal(*(add(cache, word, seed) for cache in caches))


@pytest.mark.parametrize("scheme", ["mmca", "causal_cross"])
def test_a_known_image_is_the_same_in_any_conversation_and_place(decoder, scheme):
    decode, store = Streams(decoder, scheme=scheme), ImageStore(limit_bytes=10**6)
    kinds = kinds_of(["ttiit"])
    first = lay_out(kinds, np.arange(5)[None] == 4)
    picture = tokens(first)[1]
    shown = KnownImages(["cat"], store, tokens=2, anew=[False])
    decode(tokens(first)[0], picture, first, cache=decode.cache(1), known=shown)
    assert "cat" in store

    kinds = kinds_of(["tttiitiittt"])  # the cat, then another
    last = np.arange(11)[None] == 10
    whole = lay_out(kinds, last)
    text, images = tokens(whole, seed=5)
    images = torch.cat([picture, images[2:]])
    expected = decode(text, images, whole)
    known = np.isin(np.arange(11), (3, 4))[None]
    layout = lay_out(kinds, last, known=known)
    shown = KnownImages(["cat", "dog"], store, tokens=2, anew=[False, False])
    found = decode(text, images[2:], layout, cache=decode.cache(1), known=shown)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert "dog" in store


def test_a_store_lets_go_of_what_was_not_used_for_longest():
    def image():
        return ((torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8)),)

    store = ImageStore(limit_bytes=2 * 2 * 2 * 4 * 8 * 4)
    store.put("a", image())
    store.put("b", image())
    store.get("a")
    store.put("c", image())
    assert [key in store for key in "abc"] == [True, False, True]


@pytest.mark.parametrize("scheme", ["mmca", "causal"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_window_changes_nothing_until_a_sample_is_longer(scheme, cached):
    config = MistralConfig(**SHAPE, num_key_value_heads=1, sliding_window=8)
    decoder = MistralModel(config).double().requires_grad_(False)
    decode = decoder_for(decoder, scheme=scheme)

    def states(word):
        """Of a row's text, its last token apart where there is a cache."""
        cache, seen, found = decode.cache(1) if cached else None, 0, []
        for piece in np.split(kinds_of([word]), [len(word) - 1] if cached else [], axis=1):
            layout = lay_out(piece, piece == Kind.TEXT, past=cache.past if cached else None)
            new = text[seen : seen + len(layout.text)]
            found.append(decode(new, tokens(layout)[1], layout, cache=cache))
            seen += len(new)
        return torch.cat(found)

    text = torch.randn(9, 32, dtype=torch.float64)
    expected = decoder(inputs_embeds=text[None, :8]).last_hidden_state[0]
    decoder.set_attn_implementation(scheme)
    torch.testing.assert_close(states("tttttttt"), expected, rtol=1e-9, atol=1e-9)
    states("tiittiit")
    for word in ("ttttttttt", "tiittiitt"):
        with pytest.raises(ValueError, match=r"of 9 tokens .* sliding_window=8"):
            states(word)


def test_a_window_that_no_layer_has_refuses_nothing():
    config = Qwen2Config(
        **SHAPE,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=3,
    )
    decoder = Qwen2Model(config).double().requires_grad_(False)
    windowless = Qwen2Model(Qwen2Config(**SHAPE, num_key_value_heads=2)).double()
    windowless.requires_grad_(False).load_state_dict(decoder.state_dict())
    kinds = kinds_of(["tttiittt"])
    layout = lay_out(kinds, kinds == Kind.TEXT)
    embedded = tokens(layout)
    for scheme in ("mmca", "causal"):
        states = []
        for model in (decoder, windowless):
            model.set_attn_implementation(scheme)
            states.append(decoder_for(model, scheme=scheme)(*embedded, layout))
        torch.testing.assert_close(*states, rtol=0, atol=0)


def test_dropout_is_refused():
    config = LlamaConfig(**SHAPE, attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout=0\.1: attention scheme 'mmca'"):
        Streams(LlamaModel(config), scheme="mmca")


def test_plain_causal_attention_runs_interleaved(decoder):
    assert isinstance(decoder_for(decoder, scheme="causal"), Interleaved)
    assert isinstance(decoder_for(decoder, scheme="mmca"), Streams)
