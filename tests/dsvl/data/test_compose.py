"""What is put together in tokens is what encoding the whole would give."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dsvl.config import BlendConfig
from dsvl.data.types import IGNORED
from tests.dsvl.data.conftest import (
    assert_equal,
    blended,
    cut,
    data,
    follows,
    keys,
    laws,
    prepared,
    said,
)

CAP = 5
WORDS = st.sampled_from(["red", "blue $1", "$1", "$1 is", "no.", "</s>", " ", "### Answer:\n", "é"])


@st.composite
def chats(draw):
    found = []
    for number in range(draw(st.integers(1, 7))):
        rounds, letters = [], ""
        for _ in range(draw(st.integers(1, 3))):
            images, question, answer = draw(st.integers(0, 2)), draw(WORDS), draw(WORDS)
            images = min(images, CAP - len(letters))
            letters += draw(st.text("abcdefgh", min_size=images, max_size=images))
            if not letters:  # nothing to refer to yet
                question, answer = question.replace("$1", "it"), answer.replace("$1", "it")
            rounds.append(("@" * images + question, answer))
        found.append(said(*rounds, images=letters, name=str(number)))
    return found


@laws
@given(chats(), st.integers(1, 3), st.integers(0, 2), st.integers(0, 5))
def test_what_is_put_together_in_tokens_is_what_encoding_the_whole_gives(
    encoder, tmp_path_factory, found, fewest, more, number
):
    store = prepared(tmp_path_factory.mktemp("blend") / "set", found, encoder)
    blend = BlendConfig(sets=("a",), concat=(fewest, fewest + more))
    epoch = blended(store, data("a", blends={"a": blend}, max_images=CAP)).epoch(number)
    by_name = {chat.id: chat for chat in found}
    seen = Counter()
    for index in range(len(epoch)):
        sample = epoch[index]
        parts = [by_name[name] for name in sample.id.split("+")]
        seen.update(part.id for part in parts)
        expected = encoder.encode(follows(parts), keys(follows(parts)))
        fit = expected.rounds[expected.rounds[:, 3] <= CAP]
        assert_equal(sample, cut(expected, len(fit)))
        assert epoch.lengths[index] == len(sample.ids)
        assert epoch.targets[index] == (sample.labels != IGNORED).sum()
    if sum(len(chat.images) for chat in found) <= CAP:
        assert seen == Counter(by_name.keys()), "every conversation is in one sample"


def test_references_of_more_digits_are_counted_as_long_as_they_are(encoder, tmp_path):
    found = [said(("@$1?", "$1"), images=letter, name=letter) for letter in "abcdefghijkl"]
    store = prepared(tmp_path / "set", found, encoder)
    blend = BlendConfig(sets=("a",), concat=(12, 12))
    epoch = blended(store, data("a", blends={"a": blend}, max_images=12)).epoch(0)
    by_name = {chat.id: chat for chat in found}
    whole = follows([by_name[name] for name in epoch[0].id.split("+")])
    expected = encoder.encode(whole, keys(whole))
    assert_equal(epoch[0], expected)
    assert epoch.lengths[0] == len(expected.ids)
    assert epoch.targets[0] == (expected.labels != IGNORED).sum()
