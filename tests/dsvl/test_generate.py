"""Decoding with a cache and in batches writes what decoding one row without a cache writes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsvl.cache import ImageStore
from dsvl.data.types import IGNORED, Kind
from dsvl.generate import generate, greedy
from tests.dsvl.test_model import batch_of, example, wanting

PROMPTS = [
    example("tt1ttt"),
    example("t", seed=3),
    example("t1t1ttttt", seed=4),
    example("ttt", seed=5),
]


@pytest.fixture(params=["model", "gated_model"])
def model(request):
    """With MMCA, and with gated cross-attention."""
    return request.getfixturevalue(request.param)


def greedy_without_cache(model, prompt, count):
    """One row at a time, the whole row again for each new token."""
    new: list[int] = []
    for _ in range(count):
        whole = grown(prompt, new)
        last = np.arange(len(whole.ids))[None] == len(whole.ids) - 1
        with torch.no_grad():
            states = model.states(wanting(batch_of(whole), last))
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


def joined(first, second):
    """One prompt after the other."""
    columns = {
        name: np.concatenate([getattr(first, name), getattr(second, name)])
        for name in ("ids", "labels", "kinds")
    }
    return replace(first, **columns, images=first.images + second.images)


def test_rounds_on_one_cache_write_what_the_whole_conversation_would(model):
    cache, store = model.decoder.cache(1), ImageStore(limit_bytes=10**6)
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
