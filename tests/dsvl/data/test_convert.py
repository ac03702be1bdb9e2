"""LLaVA JSON, ShareGPT and chat messages: there and back, and in files."""

import json
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl.config import SetConfig
from dsvl.data.convert import FORMATS, from_record, to_record, write
from dsvl.data.readers import read
from dsvl.data.readers.exact import KEY
from dsvl.data.types import Conversation, ImageRef, Part, Turn

EVERY = pytest.mark.parametrize("format", FORMATS)
WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(
    ["<image>", "<image>\n", " ", "\n", "image 1", "What? "]
)


@st.composite
def chats(draw):
    """Any conversation that satisfies the invariants, with references and texts that spell markers."""
    turns, shown = [], 0
    if draw(st.booleans()):
        turns.append(Turn("system", (Part("text", draw(WORDS)),)))
    for _ in range(draw(st.integers(1, 3))):
        for role in ("user", "assistant"):
            parts = []
            for kind in draw(st.lists(st.sampled_from(["text", "image", "ref"]), max_size=4)):
                if kind == "text":
                    parts.append(Part("text", draw(WORDS)))
                elif kind == "image" and role == "user":
                    parts.append(Part("image", image=shown))
                    shown += 1
                elif kind == "ref" and shown:
                    parts.append(Part("ref", image=draw(st.integers(0, shown - 1))))
            if role == "assistant":
                parts.append(Part("text", draw(WORDS.filter(str.strip))))
            turns.append(Turn(role, tuple(parts)))
    images = tuple(ImageRef(f"{i}.jpg") for i in range(shown))
    return Conversation(
        "set/one", "set", "record:0 (one)", images, tuple(turns), {"key": "set/one"}
    )


@EVERY
@settings(max_examples=400, deadline=None)
@given(chat=chats())
def test_a_conversation_comes_back_as_it_was(format, chat):
    record = json.loads(json.dumps(to_record(chat, format)))
    assert from_record(record, format, source="set") == chat


@settings(max_examples=200, deadline=None)
@given(chat=chats())
def test_a_conversation_survives_a_walk_through_all_formats(chat):
    there = chat
    for format in FORMATS:
        there = from_record(to_record(there, format), format, source="set")
    assert there == chat


@EVERY
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".parquet"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(told=st.lists(chats(), max_size=4))
def test_what_is_written_to_a_file_is_read_from_it(tmp_path, format, ending, told):
    told = [replace(chat, id=f"set/{number}") for number, chat in enumerate(told)]
    path = tmp_path / f"chats{ending}"
    write(path, [to_record(chat, format) for chat in told], format)
    config = SetConfig(reader=format, annotations=(path.name,), images=".")
    found = list(read("set", config=config, root=tmp_path, max_images=99, seed=0))
    assert [(chat.id, chat.images, chat.turns) for chat in found] == [
        (chat.id, chat.images, chat.turns) for chat in told
    ]


PLAIN = {
    "llava_json": [
        {"id": "1", "image": "a.jpg", "conversations": [
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A\ncat. "}]},
        {"id": "2", "image": ["a.jpg", "b.jpg"], "conversations": [
            {"from": "human", "value": "<image>\n<image>\nBoth?"}, {"from": "gpt", "value": "Yes."},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "No."}]},
        {"id": "3", "image": ["a.jpg", "b.jpg"], "conversations": [
            {"from": "human", "value": "Is <image> like\n<image>"}, {"from": "gpt", "value": "Yes."}]},
        {"id": "4", "conversations": [
            {"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]},
    ],
    "sharegpt": [
        {"id": "1", "images": ["a.jpg"], "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A\ncat. "}]},
        {"conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}]},
    ],
    "hf_messages": [
        {"id": "1", "images": ["a.jpg"], "messages": [
            {"role": "system", "content": "Be brief.\nVery."},
            {"role": "user", "content": [{"type": "text", "text": "Is "}, {"type": "image"}]},
            {"role": "assistant", "content": "<image>"}]},
        {"id": "2", "images": [], "messages": [
            {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("format", "record"), [(format, record) for format in PLAIN for record in PLAIN[format]]
)
def test_a_record_comes_back_as_it_was_and_carries_nothing(format, record):
    assert to_record(from_record(record, format, source="set"), format) == record


CHAT = Conversation(
    "set/one",
    "set",
    "record:0 (one)",
    (ImageRef("a.jpg"),),
    (
        Turn("user", (Part("image", image=0), Part("text", "What is in "), Part("ref", image=0))),
        Turn("assistant", (Part("ref", image=0), Part("text", " shows a cat."))),
    ),
    {"key": "set/one"},
)


@EVERY
def test_a_record_that_was_edited_is_believed_rather_than_what_it_carries(format):
    record = to_record(CHAT, format)
    assert KEY in record
    edited = json.loads(json.dumps(record).replace("a cat", "a dog", 1))
    found = from_record(edited, format, source="set")
    assert "".join(part.text for part in found.turns[1].content) == "image 1 shows a dog."


@EVERY
@pytest.mark.parametrize(
    "carried",
    [
        None,
        7,
        [["user", [["image", 0], ["text", "What is in "], ["ref", 1]]]],
        [["user", [["image", True]]], ["assistant", [["text", "x"]]]],
        [["assistant", []]],
        [["robot", []], []],
        [[]],
    ],
)
def test_carried_turns_that_are_none_are_ignored(format, carried):
    record = to_record(CHAT, format)
    found = from_record({**record, KEY: carried}, format, source="set")
    assert found == from_record({k: v for k, v in record.items() if k != KEY}, format, source="set")
    assert found == replace(CHAT, turns=found.turns)
