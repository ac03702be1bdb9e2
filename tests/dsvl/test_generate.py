"""Decoding with a cache and in batches writes what decoding one row without a cache writes."""

from dataclasses import replace

import numpy as np
import torch

from dsvl.data.types import IGNORED, Kind
from dsvl.generate import greedy
from tests.dsvl.test_model import batch_of, example, wanting

PROMPTS = [
    example("tt1ttt"),
    example("t", seed=3),
    example("t1t1ttttt", seed=4),
    example("ttt", seed=5),
]


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


def test_what_shows_no_image_calls_no_tower(model):
    calls = []
    model.vision.register_forward_hook(lambda *_: calls.append(1))
    greedy(model, batch_of(PROMPTS[3]), end=-1, max_new_tokens=2)
    assert not calls
    greedy(model, batch_of(PROMPTS[0]), end=-1, max_new_tokens=2)
    assert len(calls) == 1
