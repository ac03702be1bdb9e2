"""The parts of a training step under MMCA and the whole of it, forward and backward.

`ORIGINAL` is the dense form of `tests.benchmarks.rivals`. `CAUSAL` is another function, one softmax over all
that came before, as a stock decoder computes it fastest: images cost there what text costs.

`Case.flops` counts the floating-point operations that results need: 2 a weight and token forward, and 2
backward, as only the gradient of the input is wanted of a frozen matrix; 4 D for a query and a key that it
sees forward (score and sum) and 8 D backward. What is computed anew counts once; norms and the like do not.

S positions: M of text and F of images, n of them labelled; D width, N heads of size H.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import grad
from torch.nn.functional import scaled_dot_product_attention

from dsvl.attention import attend_spans
from dsvl.data.layout import Layout, Span
from dsvl.decoder import Streams
from dsvl.head import Head
from dsvl.model import labels
from tests.benchmarks.case import CAUSAL, ORIGINAL, OURS, Case, Target, at_once
from tests.benchmarks.rivals import dense, loss_of_all, masks_of
from tests.benchmarks.setting import Setting, Size, sample, stock_decoder, visual_chat

STACK = 4
"""Layers of the stack."""
KEEPING = "dsvl, layers kept"

Values = tuple[torch.Tensor, ...]


def attention(setting: Setting, shown: tuple[int, int], targets: dict[str, Target]) -> Case:
    """Attention alone, each way being given queries, keys and values in the order it takes them in."""
    size, layout = setting.size, sample(setting, *shown).layout
    length, texts = layout.kinds.numel(), len(layout.text)
    shape = 1, size.heads, length, size.hidden // size.heads
    query, key, value, slope = (setting.draw(*shape) for _ in range(4))
    order = torch.cat([layout.text, layout.images])
    stream_query, stream_key, stream_value, stream_slope = (
        tensor.detach()[:, :, which].requires_grad_()
        for tensor, which in ((query, layout.text), (key, order), (value, order), (slope, order))
    )
    masks = masks_of(layout.kinds[0], setting.dtype)

    def original() -> Values:
        output = dense(query, key, value, masks)
        return output, *grad(output, (query, key, value), slope)

    def causal() -> Values:
        output = scaled_dot_product_attention(query, key, value, is_causal=True)
        return output, *grad(output, (query, key, value), slope)

    def ours() -> Values:
        text_key, image_key = stream_key.split([texts, length - texts], dim=2)
        text_value, image_value = stream_value.split([texts, length - texts], dim=2)
        outputs = attend_spans(
            stream_query,
            layout.spans,
            text=lambda _: (text_key, text_value),
            images=lambda _: (image_key, image_value),
            scheme="mmca",
        )
        output = torch.cat([*outputs, image_value], dim=2)
        return output, *grad(output, (stream_query, stream_key, stream_value), stream_slope)

    def aligned(result: Values) -> Values:
        output, query_slope, *others = (tensor[:, :, order] for tensor in result)
        return output, query_slope[:, :, :texts], *others

    needed = 12.0 * size.hidden * _pairs(layout.spans)
    return Case(
        f"attention-{shown[0]}",
        f"Attention, {_shown(shown)}",
        {ORIGINAL: at_once(original), CAUSAL: at_once(causal), OURS: at_once(ours)},
        targets,
        same=ORIGINAL,
        aligned=aligned,
        rounds=4 if shown == size.many else 10,
        positions=length,
        flops={
            ORIGINAL: needed,
            OURS: needed,
            CAUSAL: 12.0 * size.hidden * length * (length + 1) / 2,
        },
    )


def layers(setting: Setting, targets: dict[str, Target]) -> Case:
    """Frozen decoder layers, of which the states at labelled positions are wanted."""
    shown = setting.size.many
    layout = sample(setting, *shown).layout
    length = layout.kinds.numel()
    decoder = stock_decoder(setting, num_hidden_layers=STACK).model
    streams = Streams(decoder, scheme="mmca")
    embedded = setting.draw(1, length, setting.size.hidden)
    text, images = (
        embedded.detach()[0, which].requires_grad_() for which in (layout.text, layout.images)
    )
    slope = setting.draw(len(layout.wanted), setting.size.hidden)
    masks = masks_of(layout.kinds[0], setting.dtype)

    def stock(attention: str, **settings: Any) -> Values:
        decoder.set_attn_implementation(attention)
        hidden = decoder(inputs_embeds=embedded, use_cache=False, **settings).last_hidden_state
        states = hidden[0, layout.wanted_positions]
        return states, *grad(states, embedded, slope)

    def ours() -> Values:
        states = streams(text, images, layout)
        return states, torch.cat(grad(states, (text, images), slope))

    order = torch.cat([layout.text, layout.images])
    needed = _layer_flops(setting.size, STACK, layout)
    return Case(
        "layers",
        f"{STACK} frozen decoder layers, {_shown(shown)}",
        {
            ORIGINAL: at_once(lambda: stock("dense_mmca", masks=masks)),
            CAUSAL: at_once(lambda: stock("sdpa")),
            OURS: at_once(ours),
        },
        targets,
        same=ORIGINAL,
        aligned=lambda result: (result[0], result[1][0, order]),
        rounds=2,
        positions=length,
        flops={
            ORIGINAL: needed,
            OURS: needed,
            CAUSAL: _causal_flops(setting.size, STACK, length),
        },
    )


def loss(setting: Setting, targets: dict[str, Target]) -> Case:
    """The output head and the cross-entropy, from final states."""
    batch = sample(setting, *setting.size.many)
    stock = stock_decoder(setting, num_hidden_layers=1).lm_head
    head = Head(stock)
    hidden = setting.draw(batch.labels.numel(), setting.size.hidden)
    states = hidden.detach()[batch.layout.wanted_positions].requires_grad_()

    def original() -> Values:
        total = loss_of_all(stock, hidden, batch.labels[0])
        return total, *grad(total, hidden)

    def ours() -> Values:
        total, _ = head(states, labels(batch))
        return total, *grad(total, states)

    return Case(
        "loss",
        f"Loss, {len(states):,} of {len(hidden):,} positions labelled, {len(stock.weight):,} words",
        {ORIGINAL: at_once(original), OURS: at_once(ours)},
        targets,
        same=ORIGINAL,
        aligned=lambda result: (result[0], result[1][batch.layout.wanted_positions]),
        positions=len(hidden),
        flops=dict.fromkeys((ORIGINAL, OURS), 4.0 * stock.weight.numel() * len(states)),
    )


def step(setting: Setting, targets: dict[str, Target]) -> Case:
    """An update of the whole model: forward, backward with layers computed anew, AdamW.

    The original's training script has layers computed anew in the backward pass: their scores would not fit
    otherwise. Ours do the same here, to compare like with like; beside it stands what they take when kept.
    """
    size, shown = setting.size, setting.size.many
    model, batch = visual_chat(setting).train(), sample(setting, *shown)
    with torch.no_grad():
        encoded = replace(batch, pixels=model.vision(batch.pixels))
    trained = list(model.trainable().values())
    optimizer = torch.optim.AdamW(trained, lr=0.0)  # so that every round finds the same weights
    decoder, head = model.language.model, model.language.lm_head
    decoder.activation_checkpointing_enable({"use_reentrant": False})
    decoder.set_attn_implementation("dense_mmca")
    masks = masks_of(batch.kinds[0], setting.dtype)

    def original() -> torch.Tensor:
        text, images = model.embed(batch)
        embedded = text.new_zeros(batch.labels.numel(), size.hidden)
        embedded = embedded.index_copy(0, batch.layout.text, text)
        embedded = embedded.index_copy(0, batch.layout.images, images)
        states = decoder(inputs_embeds=embedded[None], masks=masks, use_cache=False)
        return loss_of_all(head, states.last_hidden_state[0], batch.labels[0])

    def ours(*, recompute: bool) -> torch.Tensor:
        model.recompute = recompute
        return model(encoded)

    def update(total: Callable[[], torch.Tensor]) -> Values:
        optimizer.zero_grad()
        mean = total() / batch.targets
        mean.backward()
        optimizer.step()
        return mean.detach(), *(weight.grad for weight in trained if weight.grad is not None)

    needed = _layer_flops(size, size.layers, batch.layout)
    needed += 4.0 * head.weight.numel() * batch.targets
    parameters = sum(weight.numel() for weight in model.language.parameters())
    update(lambda: ours(recompute=False))  # the optimiser makes its moments
    return Case(
        "step",
        f"Training step, {parameters / 1e6:,.0f} million parameters, {_shown(shown)}",
        {
            ORIGINAL: at_once(lambda: update(original)),
            KEEPING: at_once(lambda: update(lambda: ours(recompute=False))),
            OURS: at_once(lambda: update(lambda: ours(recompute=True))),
        },
        targets,
        same=ORIGINAL,
        rounds=2,
        positions=batch.labels.numel(),
        flops=dict.fromkeys((ORIGINAL, KEEPING, OURS), needed),
    )


def _shown(shown: tuple[int, int]) -> str:
    return f"{shown[0]} images and {shown[1]:,} text tokens"


def _pairs(spans: Sequence[Span]) -> int:
    """Queries and the keys that they see, text and images."""
    pairs = 0
    for span in spans:
        queries = span.end - span.start
        pairs += queries * span.text - queries * (queries - 1) // 2
        pairs += sum((run.end - run.start) * run.images for run in span.runs)
    return pairs


def _layer_flops(size: Size, count: int, layout: Layout) -> float:
    """Of so many decoder layers under MMCA, of which the states at wanted positions are wanted."""
    square, mlp = size.hidden**2, 3 * size.hidden * size.mlp
    texts, images, wanted = len(layout.text), len(layout.images), len(layout.wanted)
    keys_and_values = count * 2 * square * (texts + images)
    queries = square * ((count - 1) * texts + wanted)
    rest = (square + mlp) * ((count - 1) * (texts + images) + wanted)
    pairs = (count - 1) * _pairs(layout.spans) + _pairs(layout.wanted_spans)
    return 4.0 * (keys_and_values + queries + rest) + 12.0 * size.hidden * pairs


def _causal_flops(size: Size, count: int, length: int) -> float:
    """Of so many decoder layers under plain causal attention."""
    weights = 4 * size.hidden**2 + 3 * size.hidden * size.mlp
    return count * (4.0 * weights * length + 6.0 * size.hidden * length * (length + 1))
