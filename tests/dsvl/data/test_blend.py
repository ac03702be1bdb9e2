"""Epochs: pure functions of seed, epoch and ids, always of one size, and within the caps."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl.config import BlendConfig
from dsvl.data.blend import Blender
from dsvl.data.types import IGNORED, Example, Kind
from tests.dsvl.data.conftest import (
    IMAGE_TOKENS,
    assert_equal,
    blended,
    contents,
    data,
    keys,
    laws,
    prepared,
    said,
)

BLENDS = {
    "plain": BlendConfig(sets=("a",)),
    "twice": BlendConfig(sets=("a",), epochs=2),
    "concatenated": BlendConfig(sets=("a",), concat=(1, 3)),
    "some": BlendConfig(sets=("a",), samples=5),
    "joined": BlendConfig(sets=("a",), join=True, followups=True),
    "more": BlendConfig(sets=("a",), concat=(1, 2), epochs=1.5),
}
DRAWS = ("concatenated", "some", "joined", "more")


def set_of(source: str):
    """Twelve conversations about an image, and four about two."""
    singles = [
        said(
            ("hello", "hi"), (f"@what {i}", "$1"), images="abcd"[i % 4], name=str(i), source=source
        )
        for i in range(12)
    ]
    pairs = [
        said((f"@@which {p}", "$2"), ("why", p), images=p, name=p, source=source)
        for p in ("ab", "bc", "cd", "da")
    ]
    return singles + pairs


@pytest.fixture
def store(encoder, tmp_path):
    return prepared(tmp_path / "set", set_of("a"), encoder)


def epoch_of(store, *blends: str, number: int = 2, seed: int = 3, sources=("a",)):
    config = data(*sources, blends={name: BLENDS[name] for name in blends})
    return blended(store, config, seed=seed).epoch(number)


@pytest.mark.parametrize("name", BLENDS)
def test_an_epoch_does_not_depend_on_other_sets_or_the_order_of_records(
    encoder, store, tmp_path, name
):
    others = [said(("@q", "a"), images="e", name="e", source="b"), *set_of("b")]
    more = prepared(tmp_path / "more", [*others, *reversed(set_of("a"))], encoder)
    found = contents(epoch_of(store, name))
    both = contents(epoch_of(more, name, sources=("b", "a")))
    assert found == Counter({key: n for key, n in both.items() if key[0].startswith("a/")})
    assert both.total() == found.total() + len(others)


@pytest.mark.parametrize("name", BLENDS)
def test_only_blends_that_draw_differ_between_epochs_and_seeds(store, name):
    epochs = [
        contents(epoch_of(store, name, number=number, seed=seed))
        for number, seed in ((0, 3), (1, 3), (0, 4), (1, 4), (3, 0), (3, 1))
    ]
    different = {frozenset(epoch.items()) for epoch in epochs}
    assert len(different) == (6 if name in DRAWS else 1)
    assert contents(epoch_of(store, name, number=1)) == epochs[1], "the same again"


def test_samples_do_not_depend_on_the_order_in_which_blends_are_named(store):
    first, second = (epoch_of(store, *names) for names in (BLENDS, reversed(BLENDS)))
    assert len(first) == len(second)
    for index in range(len(first)):
        np.testing.assert_array_equal(first[index].ids, second[index].ids)


def test_a_set_may_be_in_two_blends(store):
    both = contents(epoch_of(store, "concatenated", "joined"))
    assert both == contents(epoch_of(store, "concatenated")) + contents(epoch_of(store, "joined"))


def test_a_set_that_no_blend_names_is_samples_as_it_stands(encoder, tmp_path):
    chats = [*set_of("a"), *set_of("b")]
    store = prepared(tmp_path / "both", chats, encoder)
    epoch = epoch_of(store, "some", sources=("a", "b"))
    samples = [epoch[index] for index in range(len(epoch))]
    plain = [sample for sample in samples if sample.id.startswith("b/")]
    for sample, chat in zip(plain, set_of("b"), strict=True):
        np.testing.assert_array_equal(sample.ids, encoder.encode(chat, keys(chat)).ids)


@pytest.mark.parametrize("name", BLENDS)
def test_some_samples_of_an_epoch_are_those_samples(store, name):
    epoch = epoch_of(store, name, "plain")
    chosen = np.random.default_rng(0).permutation(len(epoch))[:7]
    some = epoch.take(chosen)
    assert len(some) == len(chosen)
    for place, index in enumerate(chosen):
        assert_equal(some[place], epoch[int(index)])
    for column in ("blends", "lengths", "targets", "rounds", "images"):
        np.testing.assert_array_equal(getattr(some, column), getattr(epoch, column)[chosen])


@pytest.mark.parametrize("name", ["plain", "concatenated"])
def test_what_is_said_in_an_epoch_is_every_question_and_answer(encoder, store, name):
    epoch, found, by_name = epoch_of(store, name), [], {chat.id: chat for chat in set_of("a")}
    for index in range(len(epoch)):
        for chat in (by_name[part] for part in epoch[index].id.split("+")):
            alone = encoder.encode(chat, keys(chat))
            for ask, answer, end, _ in alone.rounds:
                found.append((alone.ids[ask:answer].tobytes(), alone.ids[answer:end].tobytes()))
    assert list(epoch.said()) == found


@laws
@given(
    st.integers(0, 12),
    st.lists(
        st.builds(
            lambda fewest, more, epochs, weight: BlendConfig(
                sets=("a",), concat=(fewest, fewest + more), epochs=epochs, weight=weight
            ),
            st.integers(1, 4),
            st.integers(0, 2),
            st.sampled_from([0.4, 1.0, 2.5]),
            st.sampled_from([0.3, 1.0]),
        ),
        min_size=1,
        max_size=3,
    ),
)
def test_every_epoch_has_as_many_samples(encoder, tmp_path_factory, records, blends):
    found = [said(("q", "a"), images="", name=str(i)) for i in range(records)]
    store = prepared(tmp_path_factory.mktemp("size") / "set", found, encoder)
    named = {str(place): blend for place, blend in enumerate(blends)}
    blender = blended(store, data("a", blends=named))
    for number in range(4):
        epoch = blender.epoch(number)
        assert len(epoch) == len(blender) == sum(blender.sizes)
        assert np.bincount(epoch.blends, minlength=len(blends)).tolist() == blender.sizes


@pytest.mark.parametrize(
    ("records", "concat", "samples"),
    [
        (7, (2, 2), 4),
        (8, (2, 2), 4),
        (1, (3, 5), 1),
        (2, (3, 3), 1),
        (7, (1, 3), 4),
        (0, (1, 3), 0),
    ],
)
def test_concatenation_makes_so_many_samples_of_so_many_records(
    encoder, tmp_path, records, concat, samples
):
    found = [said(("q", "a"), images="", name=str(i)) for i in range(records)]
    store = prepared(tmp_path / "set", found, encoder)
    config = data("a", blends={"a": BlendConfig(sets=("a",), concat=concat)})
    epoch = blended(store, config).epoch(0)
    assert len(epoch) == samples
    names = [name for index in range(samples) for name in epoch[index].id.split("+")]
    assert Counter(names) == Counter(chat.id for chat in found)


@pytest.mark.parametrize("name", BLENDS)
def test_an_empty_side_of_the_split_has_no_samples(store, name):
    blender = Blender(store, "eval", data=data("a", blends={name: BLENDS[name]}), seed=3)
    assert len(blender) == len(blender.epoch(0)) == 0


def test_several_passes_take_every_conversation_equally_often(store):
    config = data("a", blends={"a": BlendConfig(sets=("a",), epochs=2.5)})
    seen = [contents(blended(store, config).epoch(number)) for number in range(8)]
    assert all(set(epoch.values()) == {2, 3} for epoch in seen)
    assert all(epoch.total() == 40 for epoch in seen)
    assert all(len(epoch) == 16 for epoch in seen)
    assert set(sum(seen, Counter()).values()) != {20}, "not the same ones in every epoch"


def rounds_of(sample: Example, end: int) -> np.ndarray:
    """Where its rounds end: after every token that closes an answer."""
    return np.flatnonzero((sample.labels == end) & (sample.ids == end)) + 1


def start_of(sample: Example, end: int, images: int) -> Example:
    columns = (column[:end] for column in (sample.ids, sample.labels, sample.kinds))
    return Example(sample.id, *columns, sample.images[:images])


@laws
@given(
    st.sampled_from(list(BLENDS)),
    st.integers(0, 80),
    st.sampled_from([1, 2, 3, None]),
    st.integers(2, 4),
)
def test_caps_leave_out_the_last_rounds_and_no_more_than_they_must(
    encoder, tmp_path_factory, name, room, max_rounds, max_images
):
    chats = set_of("a")
    store = prepared(tmp_path_factory.mktemp("caps") / "set", chats, encoder)
    longest = max(int(encoder.encode(chat, keys(chat)).rounds[0, 2]) for chat in chats)
    caps = {
        "max_tokens": longest + room,
        "max_rounds": max_rounds,
        "max_images": max_images,
    }
    blends = {name: BLENDS[name]}
    full = blended(store, data("a", blends=blends)).epoch(1)
    epoch = blended(store, data("a", blends=blends, **caps)).epoch(1)
    assert len(epoch) == len(full)
    for index in range(len(full)):
        whole, sample = full[index], epoch[index]
        fitting = 0
        for rounds, end in enumerate(rounds_of(whole, encoder.end), 1):
            images = (whole.kinds[:end] == Kind.IMAGE).sum() // IMAGE_TOKENS
            within = end <= longest + room and images <= max_images
            if within and rounds <= (max_rounds or rounds):
                fitting = end
                assert epoch.rounds[index] >= rounds
        assert len(sample.ids) == fitting > 0
        shown = (whole.kinds[:fitting] == Kind.IMAGE).sum() // IMAGE_TOKENS
        assert_equal(sample, start_of(whole, fitting, shown))
        assert epoch.lengths[index] == len(sample.ids)
        assert epoch.rounds[index] == len(rounds_of(sample, encoder.end))
        assert epoch.images[index] == len(sample.images)
        assert epoch.targets[index] == (sample.labels != IGNORED).sum()
