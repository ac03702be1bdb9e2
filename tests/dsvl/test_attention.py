"""The three schemes against golden vectors and against their definition, token by token."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dsvl.attention import SCHEMES, attend, attend_spans
from dsvl.data.layout import lay_out
from dsvl.data.types import Kind

GOLDEN = Path(__file__).parents[1] / "data/attention.npz"


def golden_cases():
    """Every CASE of the golden file."""
    with np.load(GOLDEN) as golden:
        return sorted({name.split("/")[0] for name in golden.files})


@pytest.fixture(scope="module")
def golden():
    """The golden arrays, float64."""
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("case", golden_cases())
def test_outputs_and_gradients_equal_the_golden_vectors(golden, case, scheme):
    query, key, value = (
        torch.from_numpy(golden[f"{case}/{name}"]).requires_grad_()
        for name in ("query", "key", "value")
    )
    kinds = torch.from_numpy(golden[f"{case}/kinds"])
    output = attend(query, key, value, kinds, scheme=scheme)
    output.backward(torch.from_numpy(golden[f"{case}/grad_output"]))
    expected = {
        name: golden[f"{case}/{scheme}/{name}"]
        for name in ("output", "grad_query", "grad_key", "grad_value")
    }
    np.testing.assert_allclose(output.detach().numpy(), expected["output"], rtol=0, atol=1e-10)
    for tensor, name in ((query, "grad_query"), (key, "grad_key"), (value, "grad_value")):
        np.testing.assert_allclose(tensor.grad.numpy(), expected[name], rtol=0, atol=1e-9)


def random_row(kinds: list[int], *, seed: int = 0, heads: int = 2, key_heads: int = 1):
    """float64 query, key, value for one row of these kinds."""
    generator = torch.Generator().manual_seed(seed)
    shape = lambda n: (1, n, len(kinds), 4)  # noqa: E731
    draw = lambda n: torch.randn(shape(n), generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(heads), draw(key_heads), draw(key_heads), torch.tensor([kinds])


T, I, P = Kind.TEXT, Kind.IMAGE, Kind.PAD  # noqa: E741


def test_text_before_the_first_image_sees_no_image():
    query, key, value, kinds = random_row([T, T, I, I, T, I])
    before = attend(query, key, value, kinds, scheme="mmca")
    key[:, :, 2:] += 1.0
    value[:, :, 2:] -= 3.0
    after = attend(query, key, value, kinds, scheme="mmca")
    assert torch.equal(before[:, :, :2], after[:, :, :2])
    assert not torch.allclose(before[:, :, 4], after[:, :, 4])


def test_an_image_row_gives_its_own_value():
    query, key, value, kinds = random_row([T, I, I, T, I], heads=4, key_heads=2)
    output = attend(query, key, value, kinds, scheme="mmca")
    for row in (1, 2, 4):
        assert torch.equal(output[:, :, row], value[:, :, row].repeat_interleave(2, dim=1))


def test_text_adds_two_softmaxes_with_weights_of_their_own():
    query, key, value, kinds = random_row([T, I, T, I, T], key_heads=2)
    scores = query[0] @ key[0].transpose(-1, -2) / 2.0
    row, text, images = 4, [0, 2, 4], [1, 3]
    expected = sum(
        torch.softmax(scores[:, row, seen], -1)[:, None] @ value[0][:, seen]
        for seen in (text, images)
    )
    output = attend(query, key, value, kinds, scheme="mmca")
    torch.testing.assert_close(output[0, :, row], expected[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_padding_rows_are_zero_and_never_seen(scheme):
    query, key, value, kinds = random_row([T, I, T, P, P])
    for tensor in (query, key, value):
        tensor.requires_grad_()
    output = attend(query, key, value, kinds, scheme=scheme)
    assert torch.equal(output[:, :, 3:], torch.zeros_like(output[:, :, 3:]))
    output.sum().backward()
    assert torch.isfinite(query.grad).all()
    assert not key.grad[:, :, 3:].any()
    assert not value.grad[:, :, 3:].any()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_cached_chunk_equals_the_whole(scheme):
    query, key, value, kinds = random_row([T, T, I, I, T, I, T, T])
    whole = attend(query, key, value, kinds, scheme=scheme)
    chunk = attend(query[:, :, 5:], key, value, kinds, scheme=scheme, query_start=5)
    torch.testing.assert_close(chunk, whole[:, :, 5:], rtol=0, atol=1e-12)


def test_an_unknown_scheme_names_the_known_ones():
    with pytest.raises(
        ValueError, match="'cross' is unknown; choose one of causal, causal_cross, mmca"
    ):
        attend(*random_row([T]), scheme="cross")


def in_streams(query, key, value, kinds, scheme):
    """`attend` as the two streams compute it: text queries by spans, image rows their own value."""
    layout = lay_out(kinds.numpy(), (kinds != Kind.PAD).numpy())

    def rows(tensor, which):
        return tensor.transpose(1, 2).flatten(0, 1)[which].transpose(0, 1)[None]

    def keys(which, first):
        stream = rows(key, which), rows(value, which)

        def of(sample):
            start, end = layout.samples[sample][first : first + 2]
            return stream[0][:, :, start:end], stream[1][:, :, start:end]

        return of

    text, images = keys(layout.text, 0), keys(layout.images, 2)
    outputs = attend_spans(
        rows(query, layout.text), layout.spans, text=text, images=images, scheme=scheme
    )
    own = rows(value, layout.images).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    whole = torch.zeros_like(query).transpose(1, 2).flatten(0, 1)
    places = torch.cat([layout.text, layout.images])
    found = torch.cat([*outputs, own], dim=2)[0].transpose(0, 1)
    whole = whole.index_copy(0, places, found)
    return whole.unflatten(0, kinds.shape).transpose(1, 2)


@pytest.mark.parametrize("scheme", ["mmca", "causal_cross"])
@pytest.mark.parametrize("case", golden_cases())
def test_two_streams_equal_the_golden_vectors(golden, case, scheme):
    query, key, value = (
        torch.from_numpy(golden[f"{case}/{name}"]).requires_grad_()
        for name in ("query", "key", "value")
    )
    output = in_streams(query, key, value, torch.from_numpy(golden[f"{case}/kinds"]), scheme)
    output.backward(torch.from_numpy(golden[f"{case}/grad_output"]))
    expected = {name: golden[f"{case}/{scheme}/{name}"] for name in ("output", "grad_query")}
    np.testing.assert_allclose(output.detach().numpy(), expected["output"], rtol=0, atol=1e-10)
    for tensor, name in ((query, "query"), (key, "key"), (value, "value")):
        expected = golden[f"{case}/{scheme}/grad_{name}"]
        np.testing.assert_allclose(tensor.grad.numpy(), expected, rtol=0, atol=1e-9)


def test_no_kernel_is_asked_that_plans_anew_for_every_shape():
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled()
