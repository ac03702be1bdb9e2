"""Every format: what becomes of good and broken records, and what holds for all of them."""

import copy
import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from dsvl.config import FieldsConfig, SetConfig
from dsvl.data.readers import READERS, read
from dsvl.data.types import Conversation, Rejected

RAW = Path(__file__).parents[2] / "data/readers"
SETTINGS = {
    "aokvqa": {"image_name": "{image:0>12}.jpg"},
    "coco_caption": {},
    "minigpt4": {"image_name": "{image}.jpg"},
    "ocr_vqa": {},
    "otter_mimicit_cgd": {"image_rewrite": ("^CGD_IMG_", ""), "image_name": "{image}.jpg"},
    "sparkles_dialogue": {"image_name": "{file}/images/{image}.jpg"},
    "sharegpt": {},
    "hf_messages": {},
    "alpaca": {},
    "qa": {"fields": FieldsConfig(question="q", answer="{choice}, as {why}.", image="img")},
}
FILES = {
    "otter_mimicit_cgd": "mimicit.json",
    "sparkles_dialogue": "sparkles.json",
}
WITHIN = {"coco_caption": "images", "minigpt4": "annotations", "otter_mimicit_cgd": "data"}


def settings(reader: str) -> SetConfig:
    names = (FILES.get(reader, f"{reader}.json"),)
    names += ("dataset_info.json",) if reader == "sharegpt" else ()
    return SetConfig(reader=reader, annotations=names, images="images", **SETTINGS[reader])


def read_raw(reader: str, folder: Path = RAW, seed: int = 0) -> list[Conversation | Rejected]:
    return list(read("set", config=settings(reader), root=folder, max_images=8, seed=seed))


def raw(reader: str) -> dict[str, dict]:
    """Place -> record of the fixture."""
    name = settings(reader).annotations[0]
    held = json.loads((RAW / name).read_text())
    held = held[WITHIN[reader]] if reader in WITHIN else held
    values = held.values() if isinstance(held, dict) else held
    return {f"{name}:{position}": value for position, value in enumerate(values)}


def place(record: str) -> str:
    return record.split(" ")[0]


def chats(reader: str, **options) -> list[Conversation]:
    return [chat for chat in read_raw(reader, **options) if isinstance(chat, Conversation)]


def said(chat: Conversation) -> list[str]:
    """The texts of the turns, images as <0>, references as [0]."""
    shown = {"text": "{0.text}", "image": "<{0.image}>", "ref": "[{0.image}]"}
    return ["".join(shown[p.type].format(p) for p in turn.content) for turn in chat.turns]


def paths(chat: Conversation) -> list[str]:
    return [image.path for image in chat.images]


def assert_correct(chat: Conversation) -> None:
    """The invariants of a sample that a reader answers for."""
    roles = [turn.role for turn in chat.turns]
    first = int(roles[0] == "system")
    assert roles[first:] == ["user", "assistant"] * ((len(roles) - first) // 2)
    assert len(roles) - first >= 2
    shown = 0
    for turn in chat.turns:
        here = [part.image for part in turn.content if part.type == "image"]
        assert not here or turn.role == "user"
        assert here == list(range(shown, shown + len(here))), "each image once and in order"
        shown += len(here)
        assert all(part.image < shown for part in turn.content if part.type == "ref")
        texts = [part.text for part in turn.content if part.type == "text"]
        assert all(texts)
        "".join(texts).encode()
        if turn.role == "assistant":
            assert "".join(texts).strip() or any(part.type == "ref" for part in turn.content)
        elif turn.role == "user":
            assert "\n" not in "".join(texts)
    assert shown == len(chat.images) <= 8
    chat.id.encode()


@pytest.mark.parametrize("reader", SETTINGS)
def test_what_becomes_of_every_record_is_as_its_fixture_says(reader):
    expected = {place: value.get("expect", "used") for place, value in raw(reader).items()}
    found = {}
    for record in read_raw(reader):
        if isinstance(record, Rejected):
            found[place(record.record)] = record.reason
            assert record.detail
        else:
            found[place(record.record)] = "used"
            found |= {place(other): "merged" for other in record.merged}
            assert_correct(record)
    assert found == expected
    assert len(set(expected.values())) > 3


@pytest.mark.parametrize("reader", SETTINGS)
def test_records_come_in_their_order_with_ids_of_their_own(reader):
    found = read_raw(reader)
    places = [
        int(
            place((r.merged or (r.record,))[-1] if isinstance(r, Conversation) else r.record).split(
                ":"
            )[1]
        )
        for r in found
    ]
    assert places == sorted(places)
    ids = [chat.id for chat in chats(reader)]
    assert len(set(ids)) == len(ids)


def test_an_aokvqa_answer_is_the_correct_choice_with_its_rationales():
    one, two, copy_of_one = chats("aokvqa")
    question, answer = said(one)
    assert question.startswith("<0>What is the man waiting for? ")
    assert answer == (
        "The answer is bus. He is at a stop. There is a sign. He looks down the road."
    )
    assert said(two)[1].startswith("The answer is snow.")
    assert (paths(one), paths(two)) == (["000000000042.jpg"], ["123456789012.jpg"])
    assert (one.id, copy_of_one.id) == ("set/q1", "set/q1#2")


def test_a_coco_caption_is_one_of_its_sentences_verbatim():
    told = {said(chat)[1] for seed in range(20) for chat in chats("coco_caption", seed=seed)[:1]}
    assert told == {"A dog.", "The  dog runs.\n"}
    assert said(chats("coco_caption")[2])[1] == "Only this one is a text."
    assert paths(chats("coco_caption")[0]) == ["COCO_val2014_000000000042.jpg"]


def test_a_description_is_verbatim():
    lake, hill, _ = chats("minigpt4")
    assert said(lake)[1] == "A quiet lake at dawn, with NASA's  boat on it.\nMist rises."
    assert (paths(lake), paths(hill)) == (["17.jpg"], ["18.jpg"])


def test_all_questions_about_a_cover_are_asked():
    cover, one, bare = chats("ocr_vqa")
    assert said(cover) == ["<0>Who wrote this book?", "A. Author", "Is it a travel guide?", "Yes"]
    assert [paths(chat) for chat in (cover, one, bare)] == [
        ["0001234567.jpg"],
        ["one.png"],
        ["no ending"],
    ]


def test_sparkles_references_are_exact_and_words_keep_their_case():
    linked, again, text, empty = chats("sparkles_dialogue")
    assert said(linked) == [
        "<0><1>Link [0] with [1].",
        "[0] shows iPhone docks. the NASA crane of [1]'s is\nlarge.",
        "<2>Add [2] to [1]",
        "[2] is third.",
    ]
    assert paths(linked) == [f"sparkles/images/{name}.jpg" for name in (14, 1417, 7)]
    assert said(again)[2:] == ["Again [0]?", "[0] again."]
    assert (said(text)[0], said(empty)[2]) == ("No image at all?", "Empty list?")


def test_sharegpt_is_read_as_its_dataset_info_says():
    two, system, first, prompted = chats("sharegpt")
    assert said(two) == [
        "<0>Who are they?",
        "Kane and  Gretzka.",
        "What are they doing?<1>",
        "Celebrating.",
    ]
    assert paths(two) == ["mllm_demo_data/1.jpg", "mllm_demo_data/2.jpg"]
    assert said(system)[0] == "You are brief.\nVery."
    assert said(first)[0] == "<0><1>Two at first"
    assert (prompted.turns[0].role, said(prompted)[0]) == ("system", "Be kind.")


def test_a_dataset_info_that_does_not_describe_a_file_is_refused(tmp_path):
    shutil.copy(RAW / "sharegpt.json", tmp_path)
    for entry in ({"file_name": "other.json"}, {"file_name": "sharegpt.json"}):
        (tmp_path / "dataset_info.json").write_text(json.dumps({"demo": entry}))
        with pytest.raises(ValueError, match=r"must list sharegpt\.json once, with formatting"):
            read_raw("sharegpt", tmp_path)


def test_parts_of_messages_are_taken_one_by_one():
    one, two, first, literal, inline, system = chats("hf_messages")
    assert said(one) == ["<0>What is this?", "A  cat.\n"]
    assert said(two)[0] == "Compare <0> and <1>."
    assert paths(two) == ["1.jpg", "sub/2.jpg"]
    assert said(first)[0] == "<0><1>No part places them"
    assert said(literal) == ["A literal <image> is a text", "Yes, <image>."]
    assert paths(inline) == ["data:image/png;base64,iVBORw0KGgo="]
    assert [turn.role for turn in system.turns] == ["system", "user", "assistant"]


def test_alpaca_has_its_question_in_two_fields_and_its_past_in_a_third():
    one, two, past, plain, given = chats("alpaca")
    assert said(one) == ["What is in <0>?", "A  cat."]
    assert (said(two)[0], paths(two)) == ("<0><1>Compare them. Be brief.", ["1.jpg", "2.jpg"])
    assert said(past) == [
        "Be kind.\nVery.",
        "What?<0>",
        "A bus.",
        "Sure?",
        "Yes.",
        "And now?",
        "Red.",
    ]
    assert (said(plain), said(given)[0]) == (["1 + 1?", "2"], "Only an input")


def told(record: Conversation | Rejected) -> object:
    """What must not depend on the names of columns: all but the words about a fault."""
    return record if isinstance(record, Conversation) else (record.record, record.reason)


def test_alpaca_is_read_as_its_dataset_info_says(tmp_path):
    names = {
        "prompt": "q",
        "query": "more",
        "response": "a",
        "history": "past",
        "system": "be",
        "images": "shown",
    }
    usual = ("instruction", "input", "output", "history", "system", "images")
    called = dict(zip(usual, names.values(), strict=True))
    renamed = [
        {called.get(name, name): value for name, value in record.items()}
        for record in raw("alpaca").values()
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(renamed))
    entry = {"file_name": "alpaca.json", "columns": names}  # their `formatting`, if none is given
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    files = ("alpaca.json", "dataset_info.json")
    by_info = SetConfig(reader="alpaca", annotations=files, images="i")
    by_fields = SetConfig(
        reader="alpaca", annotations=files[:1], images="i", fields=FieldsConfig(**names)
    )
    for config in (by_info, by_fields):
        found = list(read("set", config=config, root=tmp_path, max_images=8, seed=0))
        assert list(map(told, found)) == list(map(told, read_raw("alpaca")))
    (tmp_path / "dataset_info.json").write_text(
        json.dumps({"mine": entry | {"formatting": "sharegpt"}})
    )
    with pytest.raises(ValueError, match=r"must list alpaca\.json once, with formatting: alpaca"):
        list(read("set", config=by_info, root=tmp_path, max_images=8, seed=0))


def test_a_csv_table_is_read_as_the_same_table_in_json(tmp_path):
    (tmp_path / "t.csv").write_text(
        'id,q,img,choice,why\n1,"Where, he?",1.jpg,bus,"he\nwaits"\n2,What?,,5,so\n3,short\n'
    )
    config = SetConfig(reader="qa", annotations=("t.csv",), images="i", **SETTINGS["qa"])
    one, two, short = read("set", config=config, root=tmp_path, max_images=8, seed=0)
    assert (one.id, paths(one)) == ("set/1", ["1.jpg"])
    assert said(one) == ["<0>Where, he?", "bus, as he\nwaits."]
    assert (paths(two), said(two)) == ([], ["What?", "5, as so."])
    assert (short.record, short.reason) == ("t.csv:2", "bad_roles")


def test_a_table_is_read_by_the_names_of_its_fields():
    one, two, text, number, named = chats("qa")
    assert said(one) == ["<0>Where is he?", "bus, as he waits."]
    assert said(two)[0] == "<0>Which of<1>"
    assert (paths(text), said(number)[1]) == ([], "5, as he waits.")
    assert paths(named) == ["42"]


def test_numbers_in_a_table_are_texts_unless_they_are_none(tmp_path):
    rows = [
        {"question": "How many?", "answer": 3},
        {"question": ["1 + 1?", 7], "answer": [10**400, 0.5]},
        {"question": "How many?", "answer": float("nan")},
        {"question": "How many?", "answer": True},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def found(**fields):
        config = SetConfig(
            reader="qa", annotations=("t.jsonl",), images="i", fields=FieldsConfig(**fields)
        )
        return read("set", config=config, root=tmp_path, max_images=8, seed=0)

    one, two, *bad = found()
    assert (said(one), said(two)) == (["How many?", "3"], ["1 + 1?", str(10**400), "7", "0.5"])
    assert [record.reason for record in bad] == ["empty_answer"] * 2
    one, *bad = found(answer="{answer}.")
    assert said(one)[1] == "3."
    assert [record.reason for record in bad] == ["empty_answer"] * 3


def test_random_choices_depend_on_the_seed_and_the_record_alone(tmp_path):
    records = list(raw("coco_caption").values())
    (tmp_path / "coco_caption.json").write_text(json.dumps({"images": records[::-1]}))
    backwards = [said(chat) for chat in chats("coco_caption", folder=tmp_path)]
    assert backwards[::-1] == [said(chat) for chat in chats("coco_caption")]
    drawn = Counter(said(chats("aokvqa", seed=seed)[1])[0] for seed in range(60))
    assert len(drawn) == 6
    assert max(drawn.values()) < 25


def test_llava_and_cgd_are_read_into_one_set(tmp_path):
    shutil.copy(RAW / "mimicit.json", tmp_path)
    chat = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A bus."}]
    record = {"id": "1", "image": "000000000042.jpg", "conversations": chat}
    (tmp_path / "llava.json").write_text(json.dumps([record]))
    config = SetConfig(
        reader="llava_otter_blend",
        annotations=("llava.json", "mimicit.json"),
        images="coco/train2017",
        image_rewrite=("^CGD_IMG_(.*)$", r"\1.jpg"),
    )
    found = list(read("set", config=config, root=tmp_path, max_images=8, seed=0))
    llava, *otter = (record for record in found if isinstance(record, Conversation))
    assert (paths(llava), llava.meta["part"]) == (["000000000042.jpg"], "llava")
    assert [(said(chat), chat.merged) for chat in otter] == [
        (said(chat), chat.merged) for chat in chats("otter_mimicit_cgd")
    ]
    (one,) = (chat for chat in otter if chat.meta == {"key": "set/I1", "part": "otter"})
    assert paths(one) == ["000000000042.jpg", "000000000099.jpg"]


def test_every_name_of_a_reader_has_a_reader():
    names = SetConfig.__dataclass_fields__["reader"].type.__args__
    assert READERS.keys() == set(names)
    assert len(names) == 13 + 5


JUNK = [None, True, 0, -1, 7.5, "", " ", "<image>", "\ud800", "IMAGE#14", "data:,", "../x", [], {}]


def mutate(draw: random.Random, value, depth: int = 0):
    """The value with something in it replaced, removed, repeated, swapped or wrapped."""
    inner = isinstance(value, dict | list) and value
    if not inner or (depth and draw.random() < 0.3):
        return draw.choice([*JUNK, [value], [value, value], {"text": value}])
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, other = draw.choice(keys), draw.choice(keys)
    match draw.randrange(6):
        case 0:
            del value[key]
        case 1 if isinstance(value, list):
            value.insert(other, copy.deepcopy(value[key]))
        case 2:
            value[key], value[other] = value[other], value[key]
        case _:
            value[key] = mutate(draw, value[key], depth + 1)
    return value


@pytest.mark.parametrize("reader", SETTINGS)
def test_no_mutation_of_records_raises_or_loses_one(reader, tmp_path):
    draw = random.Random(reader)
    good = list(raw(reader).values())
    records = []
    for _ in range(2000):
        record = copy.deepcopy(draw.choice(good))
        for _ in range(draw.choice([1, 1, 2, 4])):
            record = mutate(draw, record)
        records.append(record)
    held = records
    if reader in ("ocr_vqa", "otter_mimicit_cgd"):
        names = [*raw_keys(reader), *map(str, range(2000))]
        held = dict(zip(names, records, strict=False))
    held = {WITHIN[reader]: held} if reader in WITHIN else held
    config = settings(reader)
    (tmp_path / config.annotations[0]).write_text(json.dumps(held))
    for other in config.annotations[1:]:
        shutil.copy(RAW / other, tmp_path)
    found = read_raw(reader, tmp_path)
    kept = [record for record in found if isinstance(record, Conversation)]
    places = [p for chat in kept for p in chat.records] + [
        bad.record for bad in found if isinstance(bad, Rejected)
    ]
    assert len(places) == len(set(places)) == len(records)
    assert len({chat.id for chat in kept}) == len(kept) > 30
    for chat in kept:
        assert_correct(chat)
    assert read_raw(reader, tmp_path) == found


def raw_keys(reader: str) -> list[str]:
    held = json.loads((RAW / settings(reader).annotations[0]).read_text())
    return list(held[WITHIN[reader]] if reader in WITHIN else held)
