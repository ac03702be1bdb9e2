"""dsvl convert: files of records from format to format, as people type it."""

import json
from itertools import permutations
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dsvl.data.readers.exact import KEY
from orchestration import cli

LLAVA = [
    {
        "id": "one",
        "image": "red.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhich colour?"},
            {"from": "gpt", "value": "Red,\nI think."},
        ],
    },
    {
        "id": "two",
        "image": ["red.png", "sub/white.webp"],
        "conversations": [
            {"from": "human", "value": "Is <image> like\n<image>"},
            {"from": "gpt", "value": "No."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes. “Quite”."},
        ],
    },
    {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "gpt", "value": "2"},
        ]
    },
]
BROKEN = [{"id": "b", "conversations": [{"from": "human", "value": "Who?"}]}, 7]
FORMATS = ("llava_json", "sharegpt", "hf_messages")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """A folder with `llava.json` to work in."""
    monkeypatch.chdir(tmp_path)
    Path("llava.json").write_text(json.dumps(LLAVA))
    return tmp_path


def convert(command: str, status: int = 0) -> None:
    assert cli.main(["convert", *command.split()]) == status


@pytest.mark.parametrize("endings", [("json", "json"), ("jsonl", "parquet"), ("parquet", "jsonl")])
@pytest.mark.parametrize(("first", "second"), list(permutations(FORMATS, 2)))
def test_records_come_back_through_any_formats_and_files(first, second, endings):
    one, two = (f"{name}.{ending}" for name, ending in zip((first, second), endings, strict=True))
    Path("there").mkdir()
    convert(f"llava.json there/{one} --from llava_json --to {first}")
    convert(f"there/{one} there/{two} --from {first} --to {second} --force")
    convert(f"there/{two} back.json --from {second} --to llava_json")
    assert json.loads(Path("back.json").read_text()) == LLAVA


def test_chat_messages_are_what_hugging_face_has():
    convert("llava.json out.jsonl --from llava_json --to hf_messages")
    first, *_ = map(json.loads, Path("out.jsonl").read_text().splitlines())
    parts = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
    assert first == {
        "id": "one",
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "Red,\nI think."},
        ],
        "images": ["red.png"],
    }


def test_sharegpt_has_an_entry_by_which_llama_factory_finds_it():
    other = {"file_name": "other.json"}
    Path("dataset_info.json").write_text(json.dumps({"other": other}))
    convert("llava.json chats.json --from llava_json --to sharegpt")
    entry = {
        "file_name": "chats.json",
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "images": "images"},
    }
    assert json.loads(Path("dataset_info.json").read_text()) == {"other": other, "chats": entry}
    assert json.loads(Path("chats.json").read_text())[0]["images"] == ["red.png"]


def test_a_dataset_info_beside_a_file_says_how_it_is_read():
    said = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    Path("in.json").write_text(json.dumps([{"said": said}]))
    tags = dict(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
    entry = {"file_name": "in.json", "formatting": "sharegpt", "columns": {"messages": "said"}}
    Path("dataset_info.json").write_text(json.dumps({"in": entry | {"tags": tags}}))
    convert("in.json out.json --from sharegpt --to hf_messages")
    assert json.loads(Path("out.json").read_text()) == [{"messages": said, "images": []}]


def test_a_table_of_questions_becomes_conversations():
    Path("qa.csv").write_text('picture,q,choice,why\nred.png,"Which, now?",red,it glows\n')
    fields = ["question=q", "answer={choice}, as {why}.", "image=picture"]
    command = ["convert", "qa.csv", "out.json", *fields, "--from", "qa", "--to", "llava_json"]
    assert cli.main(command) == 0
    (found,) = json.loads(Path("out.json").read_text())
    assert found == {
        "image": "red.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhich, now?"},
            {"from": "gpt", "value": "red, as it glows."},
        ],
    }


def test_what_plain_formats_cannot_say_is_carried_through_parquet():
    said = [["user", [["image", 0], ["text", "See "], ["ref", 0]]], ["assistant", [["text", "x"]]]]
    record = {
        "id": "s",
        "image": "a.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nSee image 1"},
            {"from": "gpt", "value": "x"},
        ],
        KEY: said,
    }
    Path("in.json").write_text(json.dumps([record]))
    convert("in.json out.parquet --from llava_json --to hf_messages")
    (row,) = pq.read_table("out.parquet").to_pylist()
    assert json.loads(row[KEY]) == said
    convert("out.parquet back.json --from hf_messages --to llava_json")
    assert json.loads(Path("back.json").read_text()) == [record]


def test_lost_records_are_named_counted_and_the_others_written(capsys):
    Path("in.json").write_text(json.dumps([*BROKEN, *LLAVA]))
    convert("in.json out.json --from llava_json --to llava_json", status=1)
    assert json.loads(Path("out.json").read_text()) == LLAVA
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "out.json: 3 records"
    assert told[1].startswith("lost in.json:0 (b): unpaired_round: 1 messages")
    assert told[2].startswith("lost in.json:1: bad_roles: the record is a int")
    assert told[3] == "2 lost: 1 unpaired_round, 1 bad_roles"
    convert("in.json out.json --from llava_json --to llava_json --force --json", status=1)
    result = json.loads(capsys.readouterr().out)
    assert (result["ok"], result["written"]) == (False, 3)
    assert [bad["reason"] for bad in result["lost"]] == ["unpaired_round", "bad_roles"]


def test_the_id_of_a_lost_record_gives_no_orders_to_a_terminal(capsys):
    Path("in.json").write_text(json.dumps([{"id": "\x1b[31mred\x07"}]))
    convert("in.json out.json --from llava_json --to llava_json", status=1)
    assert r"lost in.json:0 (\x1b[31mred\x07): unpaired_round" in capsys.readouterr().out


def test_every_image_is_looked_up_where_a_folder_is_named(llava_set, capsys):
    command = f"llava.json out.json --from llava_json --to hf_messages --images {llava_set}/images"
    convert(command)
    (llava_set / "images/sub/white.webp").unlink()
    convert(f"{command} --force", status=1)
    assert "lost llava.json:1 (two): missing_image" in capsys.readouterr().out
    assert [record.get("id") for record in json.loads(Path("out.json").read_text())] == [
        "one",
        None,
    ]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("llava.json llava.json --from llava_json --to sharegpt", "exists already; give another"),
        ("llava.json out.txt --from llava_json --to sharegpt", "must end with .json"),
        ("llava.json out.json --from lava_json --to sharegpt", "did you mean 'llava_json'?"),
        ("llava.json out.json --from llava_json --to qa", "there are llava_json, sharegpt"),
        ("llava.json out.json --from qa --to sharegpt questin=q", "did you mean 'question'?"),
        ("lost.json out.json --from llava_json --to sharegpt", "no such annotation file"),
        ("llava.json out.json --from mimicit --to sharegpt", "--from mimicit: no such format"),
        ("llava.json out.json --from ocr_vqa --to sharegpt", "must hold an object of records"),
        ("llava.json out.json --from llava_json", "required: --to"),
        ("llava.json --from llava_json --to sharegpt", "required: OUT"),
        ("llava.json no/out.json --from llava_json --to sharegpt", "No such file or directory"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_and_nothing_is_written(command, says, capsys):
    convert(command, status=2)
    assert says in capsys.readouterr().err
    assert sorted(path.name for path in Path().iterdir()) == ["llava.json"]
    assert json.loads(Path("llava.json").read_text()) == LLAVA


def test_what_is_read_is_never_overwritten(capsys):
    before = Path("llava.json").read_bytes()
    convert("llava.json llava.json --from llava_json --to llava_json --force", status=2)
    assert "is what is read" in capsys.readouterr().err
    assert Path("llava.json").read_bytes() == before


def test_an_entry_of_another_dataset_is_not_overwritten(capsys):
    Path("dataset_info.json").write_text(json.dumps({"out": {"file_name": "else.json"}}))
    convert("llava.json out.json --from llava_json --to sharegpt", status=2)
    assert "has an entry 'out'" in capsys.readouterr().err
    assert not Path("out.json").exists()
    convert("llava.json out.json --from llava_json --to sharegpt --force")
    assert json.loads(Path("dataset_info.json").read_text())["out"]["file_name"] == "out.json"
