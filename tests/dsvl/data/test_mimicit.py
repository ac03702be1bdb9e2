"""Which instructions of MIMIC-IT become one conversation: laws over random links and images."""

import json
from itertools import chain

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl.config import SetConfig
from dsvl.data.readers import read
from dsvl.data.types import Conversation, Rejected

NAMES = st.sampled_from("abcdefgh")
RECORDS = st.dictionaries(
    NAMES,
    st.fixed_dictionaries(
        {
            "images": st.lists(st.sampled_from("xy"), max_size=2),
            "links": st.lists(NAMES, max_size=3),
            "bad": st.booleans() | st.just(False),
        }
    ),
    min_size=1,
)
FREE = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_back(folder, records):
    """(groups of names in the order of their rounds, names of the rejected)."""
    data = {
        name: {
            "instruction": name,
            "answer": "" if record["bad"] else name.upper(),
            "image_ids": record["images"],
            "rel_ins_ids": record["links"],
        }
        for name, record in records.items()
    }
    (folder / "x.json").write_text(json.dumps({"data": data}))
    config = SetConfig(reader="otter_mimicit_sd", annotations=("x.json",), images="SD.json")
    found = list(read("set", config=config, root=folder, max_images=8, seed=0))
    groups = [record for record in found if isinstance(record, Conversation)]
    for chat in groups:
        texts = [turn.content[-1].text for turn in chat.turns]
        assert [text.upper() for text in texts[::2]] == texts[1::2]
        assert [chat.id, *chat.records][0] == f"set/{texts[0]}"
        assert [record.split("(")[1][0] for record in chat.records] == texts[::2]
        shown = [p.image for turn in chat.turns for p in turn.content if p.type == "image"]
        assert shown == list(range(len(chat.images)))
        assert all(
            [image.path for image in chat.images] == records[name]["images"] for name in texts[::2]
        )
    names = [[turn.content[-1].text for turn in chat.turns[::2]] for chat in groups]
    return names, [bad.record.split("(")[1][0] for bad in found if isinstance(bad, Rejected)]


def linked_slowly(records):
    """The definition: the smallest sets closed under links between good records with equal images."""
    good = [name for name, record in records.items() if not record["bad"]]
    groups = {name: {name} for name in good}
    for _ in good:
        for a in good:
            for b in records[a]["links"]:
                if b in groups and records[a]["images"] == records[b]["images"]:
                    both = groups[a] | groups[b]
                    groups |= dict.fromkeys(both, both)
    return {frozenset(group) for group in groups.values()}


@FREE
@given(RECORDS)
def test_linked_records_with_equal_images_and_no_others_become_one(tmp_path, records):
    groups, rejected = read_back(tmp_path, records)
    assert {frozenset(group) for group in groups} == linked_slowly(records)
    assert sorted([*chain.from_iterable(groups), *rejected]) == sorted(records)
    assert set(rejected) == {name for name, record in records.items() if record["bad"]}


@FREE
@given(RECORDS, st.randoms(use_true_random=False))
def test_rounds_follow_the_file_and_groups_do_not_depend_on_it(tmp_path, records, draw):
    order = list(records)
    groups, _ = read_back(tmp_path, records)
    assert all(group == sorted(group, key=order.index) for group in groups)
    draw.shuffle(order)
    again, _ = read_back(tmp_path, {name: records[name] for name in order})
    assert {frozenset(group) for group in groups} == {frozenset(group) for group in again}


def test_a_repeated_id_is_a_record_of_its_own(tmp_path):
    record = {"instruction": "q", "answer": "a", "image_ids": [], "rel_ins_ids": ["b"]}
    texts = ", ".join(f'"{name}": {json.dumps(record)}' for name in "aba")
    (tmp_path / "x.json").write_text(f'{{"data": {{{texts}}}}}')
    config = SetConfig(reader="otter_mimicit_sd", annotations=("x.json",), images="SD.json")
    one, copy = read("set", config=config, root=tmp_path, max_images=8, seed=0)
    assert (one.records, one.id) == (("x.json:0 (a)", "x.json:1 (b)"), "set/a")
    assert (copy.records, copy.id) == (("x.json:2 (a)",), "set/a#2")
