"""Decoding with a cache and in batches writes what decoding one row without a cache writes."""

import torch

from dsvl.data.types import Kind
from dsvl.generate import greedy
from tests.dsvl.test_model import batch_of, example

PROMPTS = [
    example("tt1ttt"),
    example("t", seed=3),
    example("t1t1ttttt", seed=4),
    example("ttt", seed=5),
]


def greedy_without_cache(model, prompt, count):
    """One row at a time, the whole row again for each new token."""
    batch = batch_of(prompt)
    ids, kinds, new = batch.ids, batch.kinds, []
    for _ in range(count):
        with torch.no_grad():
            states = model.language.model(
                inputs_embeds=model.embed(ids, batch.pixels, batch.image_positions),
                kinds=kinds,
                use_cache=False,
            ).last_hidden_state
            new.append(int(model.language.lm_head(states[0, -1]).argmax()))
        ids = torch.cat([ids, torch.tensor([[new[-1]]])], 1)
        kinds = torch.cat([kinds, torch.tensor([[Kind.TEXT]], dtype=kinds.dtype)], 1)
    return new


def test_cached_batched_decoding_equals_single_uncached_decoding(model):
    expected = [greedy_without_cache(model, prompt, 12) for prompt in PROMPTS]
    assert greedy(model, batch_of(*PROMPTS), end=-1, max_new_tokens=12) == expected


def test_a_row_stops_at_its_end_and_the_others_go_on(model):
    free = greedy(model, batch_of(*PROMPTS), end=-1, max_new_tokens=12)
    end = free[0][3]
    stopped = greedy(model, batch_of(*PROMPTS), end=end, max_new_tokens=12)
    assert stopped == [row[: row.index(end)] if end in row else row for row in free]
