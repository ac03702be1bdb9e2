"""Greedy decoding, batched, with a cache that knows which of its positions are images."""

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from dsvl.data.types import Batch, Kind
from dsvl.model import VisualChat


@torch.no_grad()
def greedy(model: VisualChat, batch: Batch, *, end: int, max_new_tokens: int) -> list[list[int]]:
    """Continue each prompt of a batch (padded on the right) with its most likely tokens.

    Returns:
        For each row the new ids, without the closing `end` id, at most `max_new_tokens`.
    """
    kinds_BS = batch.kinds
    lengths_B = (kinds_BS != Kind.PAD).sum(1)
    embedded_BTD = model.embed(batch.ids, batch.pixels, batch.image_positions)
    positions_BT = torch.arange(kinds_BS.shape[1], device=kinds_BS.device).expand_as(kinds_BS)
    last_B1 = lengths_B[:, None] - 1
    cache = DynamicCache()
    finished_B = torch.zeros_like(lengths_B, dtype=torch.bool)
    new: list[list[int]] = [[] for _ in lengths_B]
    for count in range(max_new_tokens):
        hidden_BTD = model.language.model(
            inputs_embeds=embedded_BTD,
            position_ids=positions_BT,
            kinds=kinds_BS,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        hidden_BD = hidden_BTD.gather(1, last_B1[..., None].expand(-1, -1, hidden_BTD.shape[-1]))[
            :, 0
        ]
        next_B = model.language.lm_head(hidden_BD).argmax(-1)
        finished_B = finished_B | (next_B == end)
        if finished_B.all():
            break
        for row, token in enumerate(next_B.tolist()):
            if not finished_B[row]:
                new[row].append(token)
        # A finished row goes on as padding: it is neither seen nor scored.
        kinds_BS = pad(kinds_BS, (0, 1), value=Kind.TEXT)
        kinds_BS[finished_B, -1] = Kind.PAD
        embedded_BTD = model.embedding(next_B)[:, None]
        positions_BT = (lengths_B + count)[:, None]
        last_B1 = torch.zeros_like(last_B1)
    return new
