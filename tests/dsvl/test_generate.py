"""Decoding with a cache and in batches writes what decoding one row without a cache writes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsvl.attention import SCHEMES
from dsvl.cache import ImageStore
from dsvl.data.types import IGNORED, Kind
from dsvl.decoder import Interleaved
from dsvl.generate import Sampling, generate, greedy
from dsvl.model import VisualChat
from tests.dsvl.test_model import batch_of, example, wanting

PROMPTS = [
    example("tt1ttt"),
    example("t", seed=3),
    example("t1t1ttttt", seed=4),
    example("ttt", seed=5),
]


@pytest.fixture(params=[*SCHEMES, "gated_cross"])
def model(request, model_config):
    """The tiny model in float64, where no two tokens are as good as tied."""
    if request.param == "gated_cross":
        return request.getfixturevalue("gated_model").double().eval()
    config = replace(model_config, attention=request.param)
    return VisualChat(config, precision="fp32", seed=0).double().eval()


def greedy_without_cache(model, prompt, count):
    """One row at a time, the whole row again for each new token."""
    gated = model.config.attention == "gated_cross"
    decoder = model.decoder if gated else Interleaved(model.language.model)  # by definition
    new: list[int] = []
    for _ in range(count):
        whole = grown(prompt, new)
        last = np.arange(len(whole.ids))[None] == len(whole.ids) - 1
        with torch.no_grad():
            batch = wanting(batch_of(whole), last)
            states = decoder(*model.embed(batch), batch.layout)
        new.append(int(model.language.lm_head(states[0]).argmax()))
    return new


def grown(prompt, ids):
    """A prompt with more text."""
    more = np.array(ids, np.int32)
    return replace(
        prompt,
        ids=np.concatenate([prompt.ids, more]),
        labels=np.concatenate([prompt.labels, np.full(len(more), IGNORED, np.int32)]),
        kinds=np.concatenate([prompt.kinds, np.full(len(more), Kind.TEXT, np.int8)]),
    )


def test_cached_batched_decoding_equals_single_uncached_decoding(model):
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert greedy(model, batch_of(*PROMPTS), end=-1, max_new_tokens=12) == expected


def test_a_row_stops_at_its_end_and_the_others_go_on(model):
    free = greedy(model, batch_of(*PROMPTS), end=-1, max_new_tokens=12)
    end = free[0][3]
    stopped = greedy(model, batch_of(*PROMPTS), end=end, max_new_tokens=12)
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]


def test_a_row_that_has_written_its_most_takes_no_room_of_the_others(model):
    free = greedy(model, batch_of(*PROMPTS), end=-1, max_new_tokens=12)
    limits = [2, 12, 1, 5]
    written: list[list[int | None]] = [[], [], [], []]
    for tokens in generate(model, batch_of(*PROMPTS), end=-1, max_new_tokens=limits):
        for ids, token in zip(written, tokens, strict=True):
            ids.append(token)
    expected = zip(free, limits, strict=True)
    assert written == [ids[:most] + [None] * (12 - most) for ids, most in expected]


@pytest.mark.parametrize("model", ["mmca"], indirect=True)
def test_a_window_counts_what_a_row_itself_writes(model):
    model.decoder.window = len(PROMPTS[0].ids) + 4
    limits = [4, 8]  # the second prompt is shorter than the first
    list(generate(model, batch_of(*PROMPTS[:2]), end=-1, max_new_tokens=limits))
    with pytest.raises(ValueError, match=f"sliding_window={model.decoder.window}"):
        list(generate(model, batch_of(*PROMPTS[:2]), end=-1, max_new_tokens=8))


def joined(first, second):
    """One prompt after the other."""
    columns = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("ids", "labels", "kinds")
    }
    return replace(first, **columns, images=first.images + second.images)


def test_rounds_on_one_cache_write_what_the_whole_conversation_would(model):
    cache = model.decoder.cache(1)
    store = None if isinstance(model.decoder, Interleaved) else ImageStore(limit_bytes=10**6)
    whole = unread = example("")
    for seed, (layout, images) in enumerate([("t1tt", "3"), ("tt", ""), ("1tt1t", "30")]):
        question = example(layout, images=images, seed=seed)
        whole = joined(whole, question)
        new = [
            token
            for (token,) in generate(
                model,
                batch_of(joined(unread, question)),
                end=-1,
                max_new_tokens=5,
                cache=cache,
                store=store,
            )
        ]
        assert new == greedy_without_cache(model, whole, 5)
        whole, unread = grown(whole, new), grown(example(""), new[-1:])


@pytest.mark.parametrize("model", SCHEMES, indirect=True)
def test_an_image_alone_is_a_prompt(model):
    expected = [greedy_without_cache(model, prompt, 5) for prompt in (example("1"), PROMPTS[0])]
    assert greedy(model, batch_of(example("1")), end=-1, max_new_tokens=5) == expected[:1]
    assert greedy(model, batch_of(example("1"), PROMPTS[0]), end=-1, max_new_tokens=5) == expected


def test_packed_prompts_are_continued_as_each_alone(model):
    expected = [greedy_without_cache(model, prompt, 5) for prompt in PROMPTS]
    packed = batch_of(*PROMPTS, rows=[0, 0, 1, 1])
    if isinstance(model.decoder, Interleaved):
        with pytest.raises(ValueError, match="4 samples in 2 rows"):
            greedy(model, packed, end=-1, max_new_tokens=5)
    else:
        assert greedy(model, packed, end=-1, max_new_tokens=5) == expected


def drawn(model, *prompts, **settings):
    """The ids drawn for each prompt of a batch."""
    sampling = Sampling(**{"seed": 3, **settings})
    pieces = generate(model, batch_of(*prompts), end=-1, max_new_tokens=9, sampling=sampling)
    return list(zip(*pieces, strict=True))


def test_what_is_drawn_depends_on_seed_number_and_prompt_and_not_on_the_rest_of_the_batch(model):
    together = drawn(model, *PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        others = [example("tt1t", seed=9)] * number
        assert drawn(model, *others, prompt)[number] == together[number]


def test_equal_prompts_of_a_batch_are_continued_by_draws_of_their_own(model):
    assert len(set(drawn(model, *[PROMPTS[0]] * 4))) == 4


def test_a_temperature_may_be_a_whole_number(model):
    assert drawn(model, PROMPTS[0], temperature=2) == drawn(model, PROMPTS[0], temperature=2.0)


@pytest.mark.parametrize("model", ["causal"], indirect=True)
def test_a_store_for_an_interleaved_decoder_is_refused(model):
    store = ImageStore(limit_bytes=10**6)
    with pytest.raises(ValueError, match=r"model\.attention='causal': .*leave `store` out"):
        next(generate(model, batch_of(PROMPTS[0]), end=-1, max_new_tokens=1, store=store))


@pytest.mark.parametrize("model", ["mmca"], indirect=True)
def test_draws_fall_on_the_likeliest_as_often_as_their_shares_say(model):
    prompt, count = PROMPTS[0], 200
    last = np.arange(len(prompt.ids))[None] == len(prompt.ids) - 1
    batch = wanting(batch_of(prompt), last)
    with torch.no_grad():
        shares = (model.logits(model.states(batch))[0] / 0.3).softmax(-1)
    drawn = [
        next(generate(model, batch_of(prompt), end=-1, max_new_tokens=1, sampling=sampling))[0]
        for seed in range(count)
        for sampling in [Sampling(seed=seed, temperature=0.3, top_k=3)]
    ]
    best, places = shares.topk(3)
    assert set(drawn) == set(places.tolist())
    for place, share in zip(places.tolist(), best / best.sum(), strict=True):
        spread = (share * (1 - share) / count) ** 0.5
        assert abs(drawn.count(place) / count - share) < 3 * spread


def test_what_shows_no_image_calls_no_tower(model):
    calls = []
    hook = model.vision.register_forward_hook(lambda *_: calls.append(1))
    greedy(model, batch_of(PROMPTS[3]), end=-1, max_new_tokens=2)
    assert not calls
    greedy(model, batch_of(PROMPTS[0]), end=-1, max_new_tokens=2)
    assert len(calls) == 1
    hook.remove()
