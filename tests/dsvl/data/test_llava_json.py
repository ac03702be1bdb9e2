"""LLaVA JSON -> conversations."""

import copy
import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl.config import SetConfig
from dsvl.data.readers import read
from dsvl.data.types import Conversation, ImageRef, Part, Rejected
from tests.conftest import raw_records

IMAGE_FAULTS = {"undecodable_image", "forbidden_path", "image_too_large", "too_long"}
"""Reasons that only opening or encoding can find."""


def read_file(folder, name="train.json", max_images=8):
    config = SetConfig(reader="llava_json", annotations=(name,), images="images")
    return list(read("set", config=config, root=folder, max_images=max_images, seed=0))


@pytest.fixture
def write(tmp_path):
    """Write records to a file and read them back as conversations."""

    def write_and_read(*records, max_images=8):
        (tmp_path / "train.json").write_text(json.dumps(records))
        return read_file(tmp_path, max_images=max_images)

    return write_and_read


def record(*texts, image=None, **more):
    names = ("human", "gpt")
    chat = [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"image": image, "conversations": chat, **more}


def parts(conversation, turn=0):
    return [part.text or part.image for part in conversation.turns[turn].content]


def texts(conversation):
    return ["".join(part.text for part in turn.content) for turn in conversation.turns]


def test_every_record_becomes_a_conversation_with_all_its_rounds(llava_set):
    read_back = read_file(llava_set, "good.json")
    assert all(isinstance(chat, Conversation) for chat in read_back)
    assert [len(chat.turns) for chat in read_back] == [4, 2, 4, 2, 2, 2, 2, 2]
    assert read_back[2].images == (ImageRef("blue.jpg"), ImageRef("sub/white.webp"))
    assert [turn.role for turn in read_back[2].turns] == ["user", "assistant"] * 2


def test_answers_are_verbatim_and_questions_are_one_line(llava_set):
    for chat, raw in zip(read_file(llava_set, "good.json"), raw_records("good.json"), strict=True):
        values = [message["value"] for message in raw["conversations"]]
        assert texts(chat)[1::2] == values[1::2]
        assert not any("\n" in text or "<image>" in text for text in texts(chat)[::2])


@pytest.mark.parametrize(
    ("question", "kept"),
    [
        ("<image>\nWhat?", [0, "What?"]),
        ("What? \n<image>", ["What?", 0]),
        (" <image> \n What?  ", [0, "What?  "]),
        ("Is <image> red?", ["Is ", 0, " red?"]),
        ("line\none\r\ntwo<image>", ["line one two", 0]),
        ("<image>", [0]),
    ],
)
def test_only_the_blanks_that_a_marker_leaves_at_the_ends_are_stripped(write, question, kept):
    (chat,) = write(record(question, "a", image="x.png"))
    assert parts(chat) == kept


def test_the_kth_marker_is_the_kth_image_in_whichever_round(write):
    (chat,) = write(record("<image>A<image>", "a", "B <image>", "b", image=["x", "y", "z"]))
    assert parts(chat, 0) == [0, "A", 1]
    assert parts(chat, 2) == ["B", 2]
    assert [image.path for image in chat.images] == ["x", "y", "z"]


def test_images_without_a_marker_open_the_first_question_verbatim(write):
    (chat,) = write(record("  Compare. ", "a", "Why?", "b", image=["x", "y"]))
    assert parts(chat) == [0, 1, "  Compare. "]
    assert parts(chat, 2) == ["Why?"]


def test_a_record_is_named_by_file_position_and_own_id(write):
    first, second = write(record("q", "a", id="0042"), record("q", "", id=7))
    assert (first.record, first.id) == ("train.json:0 (0042)", "set/0042")
    assert second == Rejected("set", "train.json:1 (7)", "empty_answer", "message 1 is blank")


def test_repeated_ids_get_suffixes_and_remember_their_record(write):
    chats = write(*[record("q", "a", id=name) for name in ("x", "x", "x#2", "x")], record("q", "a"))
    ids = [chat.id for chat in chats]
    assert ids == ["set/x", "set/x#2", "set/x#2#2", "set/x#3", "set/train.json:4"]
    assert [chat.meta["key"] for chat in chats[:2]] == ["set/x", "set/x"]


def test_broken_records_are_rejected_with_their_reason(llava_set):
    for found, raw in zip(
        read_file(llava_set, "broken.json"), raw_records("broken.json"), strict=True
    ):
        if isinstance(found, Rejected) or raw["expect"] not in IMAGE_FAULTS | {"missing_image"}:
            assert isinstance(found, Rejected), raw["id"]
            assert (found.reason, found.detail != "") == (raw["expect"], True), raw["id"]
            assert raw["id"] in found.record


def test_a_mismatch_of_markers_gives_both_counts(write):
    (rejected,) = write(record("<image><image>", "a", image=["x", "y", "z"]))
    assert rejected.detail == "2 <image> markers for 3 images"


def test_the_limit_on_images_is_the_callers(write):
    chat = record("<image><image>", "a", image=["x", "y"])
    assert isinstance(write(chat, max_images=2)[0], Conversation)
    assert write(chat, max_images=1)[0].reason == "too_many_images"


@pytest.mark.parametrize("value", [None, 7, "text", [], True])
def test_a_record_that_is_no_object_is_rejected(write, value):
    assert [found.reason for found in write(value, record("q", "a"))[:1]] == ["bad_roles"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[\n{"id": 1},\n oops]', r"train\.json:3: is not JSON"),
        (b'{"a": []}', r"train\.json:1: must hold a list of records, but holds a dict"),
        (b"\xff\xfe", r"train\.json:1: is not JSON"),
        (b"[" * 100_000, r"train\.json:1: is not JSON"),
    ],
)
def test_an_unreadable_file_is_named_with_its_line(tmp_path, content, message):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.json: no such annotation file"):
        read_file(tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("<image>"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def mutated(draw):
    """A good or broken record with a few values replaced, removed or repeated."""
    found = copy.deepcopy(
        draw(st.sampled_from(raw_records("good.json") + raw_records("broken.json")))
    )
    for _ in range(draw(st.integers(0, 3))):
        places = [(found, key) for key in found]
        chat = found.get("conversations")
        for message in chat if isinstance(chat, list) else []:
            places += [(message, key) for key in message] if isinstance(message, dict) else []
        if isinstance(chat, list):
            places += [(chat, index) for index in range(len(chat))]
        if not places:
            break
        holder, key = draw(st.sampled_from(places))
        action = draw(st.sampled_from(["replace", "remove", "repeat"]))
        if action == "replace":
            holder[key] = draw(JSON)
        elif action == "remove" or not isinstance(holder, list):
            del holder[key]
        else:
            holder.insert(key, copy.deepcopy(holder[key]))
    return found


@settings(
    max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(mutated() | JSON, min_size=1, max_size=20))
def test_no_mutation_of_records_raises_or_loses_one(write, records):
    found = write(*records)
    assert len(found) == len(records)
    chats = [chat for chat in found if isinstance(chat, Conversation)]
    assert max(Counter(chat.id for chat in chats).values(), default=1) == 1
    for chat in chats:
        shown = [p.image for turn in chat.turns for p in turn.content if p.type == "image"]
        assert shown == list(range(len(chat.images)))
        assert all(isinstance(part, Part) for turn in chat.turns for part in turn.content)
        assert all(text.strip() for text in texts(chat)[1::2])
        "".join(texts(chat)).encode()
        chat.id.encode()
