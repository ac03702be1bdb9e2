"""How conversations are put together to samples, by slow definitions over conversations."""

from collections import Counter
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsvl.config import BlendConfig
from dsvl.data.draw import groups_of, mix, sizes_of
from dsvl.data.encode import Encoder, show
from dsvl.data.types import IGNORED, Conversation, Example, Part, Turn
from tests.dsvl.data.conftest import assert_equal, blended, data, keys, laws, prepared, said

LETTERS = "abcd"


@laws
@given(st.integers(0, 60), st.integers(1, 5), st.integers(0, 3), st.integers(0, 9))
def test_groups_are_as_many_as_their_mean_size_wants_and_hold_every_record_once(
    records, fewest, more, seed
):
    most = fewest + more
    groups = groups_of(records, fewest, most)
    possible = [n for n in range(records + 1) if n * fewest <= records <= n * most]
    if possible:
        wanted = 2 * records / (fewest + most)
        assert abs(groups - wanted) == min(abs(n - wanted) for n in possible)
    else:
        assert groups == -(-records // most), "the last group is too small"
    sizes = sizes_of(records, groups, fewest, most, key=mix(seed))
    assert len(sizes) == groups
    assert sizes.sum() == records
    assert ((sizes <= most) & (sizes > 0)).all()
    assert (sizes[: None if possible else -1] >= fewest).all()


def test_sizes_of_groups_are_even_and_drawn_anew():
    first, second = (sizes_of(6000, 3000, 1, 3, key=mix(seed)) for seed in (0, 1))
    assert np.bincount(first).tolist() == pytest.approx([0, 1000, 1000, 1000], rel=0.1)
    assert (first == second).mean() == pytest.approx(1 / 3, rel=0.1)


def about(chat: Conversation, place: int, *, shows: bool, opening: str = "") -> list[Turn]:
    """The turns of a conversation about one image, which is image `place` here."""
    turns = []
    for turn in chat.turns:
        content = [
            replace(part, image=place) if part.type != "text" else part
            for part in turn.content
            if shows or part.type != "image"
        ]
        if opening and turn.role == "user":
            content.insert(0, Part("text", opening))
        turns.append(Turn(turn.role, tuple(content)))
    return turns


def joined(
    told: list[Conversation],
    pair: Conversation,
    rounds: tuple[int, ...],
    later: list[Conversation],
) -> Conversation:
    """The slow definition: some rounds of `pair`, between conversations about one of its images."""
    places = {ref: place for place, ref in enumerate(pair.images)}
    turns, shown = [], set()
    for chat in told:
        place = places[chat.images[0]]
        turns += about(chat, place, shows=place not in shown)
        shown.add(place)
    missing = tuple(Part("image", image=i) for i in range(len(places)) if i not in shown)
    for number in rounds:
        question, answer = pair.turns[2 * number : 2 * number + 2]
        plain = tuple(part for part in question.content if part.type != "image")
        turns += [Turn("user", missing + plain), answer]
        missing = ()
    for chat in later:
        place = places[chat.images[0]]
        turns += about(chat, place, shows=False, opening=f"In image {place + 1}:\n")
    return replace(pair, turns=tuple(turns))


@st.composite
def singles_and_pairs(draw):
    words = st.sampled_from(["red", "what is $1", "no.", "$1", "</s>"])
    found = []
    for number in range(draw(st.integers(0, 7))):
        rounds = [[draw(words), draw(words)] for _ in range(draw(st.integers(1, 2)))]
        first = draw(st.integers(0, len(rounds) - 1))  # the round that shows the image
        for early in rounds[:first]:
            early[:] = (text.replace("$1", "it") for text in early)
        rounds[first][0] = "@" + rounds[first][0]
        system = draw(st.sampled_from(["", "", "Be brief."]))
        letter = draw(st.sampled_from(LETTERS))
        found.append(said(*rounds, images=letter, name=f"single{number}", system=system))
    for number in range(draw(st.integers(0, 5))):
        letters = draw(st.text(LETTERS, min_size=2, max_size=3))
        rounds = [[f"{number} and $2", draw(words)] for _ in range(draw(st.integers(1, 3)))]
        rounds[0][0] = "@@" + rounds[0][0]
        rounds[-1][0] = "@" * (len(letters) - 2) + rounds[-1][0]
        found.append(said(*rounds, images=letters, name=f"pair{number}"))
    return draw(st.permutations(found))


def assert_joined(sample: Example, found: list[Conversation], encoder: Encoder, *, followups: bool):
    """It is one of those that the definition allows."""
    by_name = {chat.id: chat for chat in found}
    chats = [by_name[name] for name in sample.id.split("+")]
    (place,) = (place for place, chat in enumerate(chats) if len(chat.images) > 1)
    told, pair, later = chats[:place], chats[place], chats[place + 1 :]
    assert len({chat.id for chat in chats}) == len(chats), "none is told twice"
    assert all(about_one(chat) for chat in told + later)
    images = [chat.images[0] for chat in told]
    assert images == sorted(images, key=pair.images.index), "image by image"
    assert set(images) >= set(pair.images[:-1])
    left = Counter(chat.images[0] for chat in found if about_one(chat)) - Counter(images)
    wanted = [image for image in pair.images if followups and left[image]]
    assert [chat.images[0] for chat in later] == wanted

    count = len(pair.turns) // 2
    some = [rounds for n in range(count) for rounds in combinations(range(count), n + 1)]
    wholes = [encoder.encode(joined(told, pair, rounds, later), keys(pair)) for rounds in some]
    texts = [show(whole, encoder.tokenizer) for whole in wholes]
    whole = wholes[texts.index(show(sample, encoder.tokenizer))]
    if not later:  # else a token of the whole may span the two texts of a question
        assert_equal(sample, whole)
    assert sample.images == whole.images
    answers = [example.labels[example.labels != IGNORED].tolist() for example in (sample, whole)]
    assert answers[0] == answers[1]


def about_one(chat: Conversation) -> bool:
    return len(chat.images) == 1 and chat.turns[0].role == "user"


@laws
@given(singles_and_pairs(), st.booleans())
def test_a_join_is_what_encoding_the_whole_gives(encoder, tmp_path_factory, found, followups):
    store = prepared(tmp_path_factory.mktemp("join") / "set", found, encoder)
    blend = BlendConfig(sets=("a",), join=True, followups=followups)
    blender = blended(store, data("a", blends={"a": blend}))
    own = {chat.images[0] for chat in found if about_one(chat)}
    pairs = [
        chat.id
        for chat in found
        if len(set(chat.images)) == len(chat.images) > 1 and own.issuperset(chat.images[:-1])
    ]
    for number in range(4):
        epoch = blender.epoch(number)
        samples = [epoch[index] for index in range(len(epoch))]
        names = [name for sample in samples for name in sample.id.split("+") if "pair" in name]
        assert names == pairs, "each comparison that can makes a sample"
        for index, sample in enumerate(samples):
            assert_joined(sample, found, encoder, followups=followups)
            assert epoch.lengths[index] == len(sample.ids)
            assert epoch.images[index] == len(sample.images)
            assert epoch.targets[index] == (sample.labels != IGNORED).sum()


@pytest.mark.parametrize(
    ("last", "wholes"), [([], 1), ([said(("@b", "1"), images="b", name="b1")], 2)]
)
def test_everything_that_a_join_may_draw_comes_up(encoder, tmp_path, last, wholes):
    found = [
        said(("@a", "1"), images="a", name="a1"),
        said(("@a", "2"), images="a", name="a2"),
        *last,
        said(("@@which", "x"), ("why", "y"), images="ab", name="pair"),
    ]
    store = prepared(tmp_path / "set", found, encoder)
    blender = blended(store, data("a", blends={"a": BlendConfig(sets=("a",), join=True)}))
    drawn = Counter(blender.epoch(number)[0].ids.tobytes() for number in range(400))
    firsts, rounds = 4, 3  # 1, 2, 1 2, 2 1; first, second, both
    assert len(drawn) == firsts * wholes * rounds
    assert min(drawn.values()) > 400 / len(drawn) / 4


def test_every_way_to_concatenate_comes_up(encoder, tmp_path):
    found = [said(("q", name), images="", name=name) for name in "123"]
    store = prepared(tmp_path / "set", found, encoder)
    blender = blended(store, data("a", blends={"a": BlendConfig(sets=("a",), concat=(1, 2))}))
    drawn = set()
    for number in range(200):
        epoch = blender.epoch(number)
        drawn.add(tuple(epoch[index].id for index in range(len(epoch))))
    assert len(drawn) == 12, "six orders, the second or the first alone"


def test_a_conversation_with_a_system_turn_of_its_own_never_shares_a_sample(encoder, tmp_path):
    found = [
        said(("q", "a"), images="", name=str(i), system="Be brief." * (i % 2)) for i in range(9)
    ]
    store = prepared(tmp_path / "set", found, encoder)
    config = data("a", blends={"a": BlendConfig(sets=("a",), concat=(5, 5))})
    epoch = blended(store, config).epoch(0)
    names = sorted((epoch[index].id.split("+") for index in range(len(epoch))), key=len)
    assert [len(parts) for parts in names] == [1, 1, 1, 1, 5]
    assert {parts[0] for parts in names[:4]} == {f"a/{i}" for i in (1, 3, 5, 7)}
