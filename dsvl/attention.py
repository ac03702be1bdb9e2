"""Multi-modal causal attention (MMCA) and its rivals, by definition and as a transformers attention.

The paper (section 4.1, Figure 2) names three schemes that need no new parameters:

- `causal` (CA): a token attends to itself and all earlier tokens, whatever their kind;
- `causal_cross` (CA + CrA): the same for text; an image token sees only itself;
- `mmca`: an image token sees only itself. A text token attends to the text up to itself and, in a second
  softmax with weights of its own, to the images before it; the two results are added.

`dsvl.gated` has the fourth, which needs them.

Shapes: B batch, T query positions, S key positions, N query heads, K key heads (dividing N), H head size.
"""

from collections.abc import Callable, Sequence

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from dsvl.data.layout import Run, Span
from dsvl.data.types import Kind

# On Hopper and later torch asks cuDNN first, which plans anew for each shape that it has not met; here nearly
# every sample brings some. Flash attention is next in line.
torch.backends.cuda.enable_cudnn_sdp(False)

KeyValues = tuple[torch.Tensor, torch.Tensor]
SCHEMES = ("causal", "causal_cross", "mmca")


def check_window(window: int | None, length: int, *, scheme: str) -> None:
    """The schemes have no sliding window: refuse a length in tokens for which a decoder's would hide any.

    Raises:
        ValueError: naming both.
    """
    if window is not None and length > window:
        raise ValueError(
            f"a sample or row of {length} tokens is longer than the decoder's sliding_window={window}, and "
            f"attention scheme {scheme!r} supports none; keep data.max_tokens within the window"
        )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kinds: torch.Tensor,
    *,
    scheme: str,
    query_start: int = 0,
    samples: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from positions query_start .. query_start + T - 1 to the S positions of a row.

    Args:
        query: (B, N, T, H).
        key: (B, K, S, H), with K dividing N (grouped-query heads).
        value: (B, K, S, H).
        kinds: (B, S) of `Kind`.
        scheme: one of `SCHEMES`.
        query_start: position of the first query; greater than 0 where a cache holds earlier keys.
        samples: (B, S), which sample of its row a position belongs to, where several are packed into a row;
            none sees another.

    Returns:
        (B, N, T, H). Padding rows are zero, and so is the image term of a text row before the first image.

    Raises:
        ValueError: on an unknown scheme, or shapes that do not fit together.
    """
    if scheme not in SCHEMES:
        raise ValueError(
            f"attention scheme {scheme!r} is unknown; choose one of {', '.join(SCHEMES)}"
        )
    rows, positions, groups = query.shape[2], key.shape[2], key.shape[1]
    if kinds.shape != (key.shape[0], positions) or query.shape[1] % groups:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and kinds {tuple(kinds.shape)} do not fit: "
            "kinds must be (B, S), and the key heads must divide the query heads"
        )
    key_BNSH = key.repeat_interleave(query.shape[1] // groups, dim=1)
    value_BNSH = value.repeat_interleave(query.shape[1] // groups, dim=1)

    position_S = torch.arange(positions, device=key.device)
    position_T = position_S[query_start : query_start + rows]
    earlier_BTS = (position_S <= position_T[:, None])[None]
    if samples is not None:
        asking_BT1 = samples[:, query_start : query_start + rows, None]
        earlier_BTS = earlier_BTS & (samples[:, None, :] == asking_BT1)
    kind_B1S = kinds[:, None, :]
    kind_BT1 = kinds[:, query_start : query_start + rows, None]

    def softmax_over(visible_BTS: torch.Tensor) -> torch.Tensor:
        """Softmax attention over the visible keys; zero, not NaN, where a row sees none."""
        # A row without a key to see is given the first one, and its result is then thrown away.
        empty_BT1 = ~visible_BTS.any(-1, keepdim=True)
        mask_B1TS = (visible_BTS | (empty_BT1 & (position_S == 0)))[:, None]
        output_BNTH = scaled_dot_product_attention(query, key_BNSH, value_BNSH, attn_mask=mask_B1TS)
        return output_BNTH.masked_fill(empty_BT1[:, None], 0.0)

    text_row, image_row = kind_BT1 == Kind.TEXT, kind_BT1 == Kind.IMAGE
    if scheme == "causal":
        return softmax_over(earlier_BTS & (kind_B1S != Kind.PAD) & (kind_BT1 != Kind.PAD))
    if scheme == "causal_cross":
        output_BNTH = softmax_over(earlier_BTS & (kind_B1S != Kind.PAD) & text_row)
    else:
        output_BNTH = softmax_over(earlier_BTS & (kind_B1S == Kind.TEXT) & text_row)
        output_BNTH = output_BNTH + softmax_over(earlier_BTS & (kind_B1S == Kind.IMAGE) & text_row)
    own_value_BNTH = value_BNSH[:, :, query_start : query_start + rows]
    return torch.where(image_row[:, None], own_value_BNTH, output_BNTH)


def attend_spans(
    query: torch.Tensor,
    spans: Sequence[Span],
    *,
    text: Callable[[int], KeyValues],
    images: Callable[[int], KeyValues],
    scheme: str,
) -> list[torch.Tensor]:
    """`attend` for text queries alone, as dense calls on slices: nothing is masked but the future.

    Image tokens need no call, as they see only themselves: their output is their own value.

    Args:
        query: (1, N, n, H), the text tokens of a batch in order.
        spans: which queries see what.
        text: sample -> keys and values (1, K, t, H) of its text tokens.
        images: the same of its image tokens.
        scheme: `mmca` or `causal_cross`.

    Returns:
        The outputs (1, N, ?, H) of the queries in order, to be concatenated along the queries.
    """
    outputs: list[torch.Tensor] = []
    parts = query.split([span.end - span.start for span in spans], dim=2)
    for span, asking in zip(spans, parts, strict=True):
        attended = _attend_runs if scheme == "mmca" else _attend_runs_jointly
        words = _first(text(span.sample), span.text)
        outputs += attended(asking, span, words, images(span.sample))
    return outputs


def _attend_runs(
    query: torch.Tensor, span: Span, words: KeyValues, pictures: KeyValues
) -> list[torch.Tensor]:
    """The outputs of a span's runs under `mmca`: all text at once, then in another softmax the images."""
    sizes = [run.end - run.start for run in span.runs]
    outputs = list(_causal(query, *words).split(sizes, dim=2))
    pieces = query.split(sizes, dim=2)
    for number, run in _last_first(span.runs):
        if run.images:
            pictures = _first(pictures, run.images)
            outputs[number] = outputs[number] + whole(pieces[number], *pictures)
    return outputs


def _attend_runs_jointly(
    query: torch.Tensor, span: Span, words: KeyValues, pictures: KeyValues
) -> list[torch.Tensor]:
    """The same under `causal_cross`: one softmax, the images before the text, where nothing is masked."""
    outputs = list(query.split([run.end - run.start for run in span.runs], dim=2))
    for number, run in _last_first(span.runs):
        pictures = _first(pictures, run.images)
        words = _first(words, span.text - (span.end - run.end))
        both = words
        if run.images:
            both = (torch.cat(pair, dim=2) for pair in zip(pictures, words, strict=True))
        outputs[number] = _causal(outputs[number], *both)
    return outputs


def _last_first(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    """Runs with their numbers, from the last, which sees most, to the first.

    What a run sees is cut from what the one after it sees, so that its gradient is no larger than that.
    """
    return list(enumerate(runs))[::-1]


def _first(keys: KeyValues, count: int) -> KeyValues:
    return keys[0][:, :, :count], keys[1][:, :, :count]


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The last query sees every key, the one before it all but the last, and so on."""
    queries, keys = query.shape[2], key.shape[2]
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=causal_lower_right(queries, keys) if 1 < queries < keys else None,
        is_causal=1 < queries == keys,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def whole(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Every query sees every key. Heads that share keys are laid end to end, so that none is copied."""
    batch, heads, queries, size = query.shape
    folded = query.reshape(batch, key.shape[1], -1, size)
    return scaled_dot_product_attention(folded, key, value).reshape(batch, heads, queries, size)


def _hook(scheme: str):
    """The attention function that transformers calls in every layer, for one scheme."""

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        kinds: torch.Tensor | None = None,
        samples: torch.Tensor | None = None,
        **others: object,
    ) -> tuple[torch.Tensor, None]:
        # Keywords that would change the mathematics are refused rather than ignored.
        unknown = [
            name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None
        ]
        unknown += ["dropout"] if dropout else []
        if unknown:
            raise ValueError(
                f"attention scheme {scheme!r} does not support {', '.join(unknown)}; "
                "use a decoder without it"
            )
        check_window(sliding_window, key.shape[2], scheme=scheme)
        plain = kinds is None and scheme == "causal"  # nothing but the future is hidden
        if (kinds is None and not plain) or attention_mask is not None:
            raise ValueError(
                "pass kinds=(B, S) of PAD, TEXT and IMAGE to the decoder and no attention_mask"
            )
        if abs(scaling - query.shape[-1] ** -0.5) > 1e-6:
            raise ValueError(f"scaling={scaling}: the schemes are defined for 1/sqrt(head size)")
        if kinds is None:
            output_BNTH = _causal(query, key, value)
        else:
            start = kinds.shape[1] - query.shape[2]
            output_BNTH = attend(
                query, key, value, kinds, scheme=scheme, query_start=start, samples=samples
            )
        return output_BNTH.transpose(1, 2), None

    return forward


# A decoder is given a scheme by its name: from_pretrained(..., attn_implementation="mmca").
for _scheme in SCHEMES:
    AttentionInterface.register(_scheme, _hook(_scheme))
