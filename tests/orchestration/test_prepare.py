"""Raw datasets -> a prepared set, on Ray."""

import base64
import json
import os
import shutil
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dsvl.data.collate import collate
from dsvl.data.encode import load_tokenizer, show
from dsvl.data.store import open_store, verify
from orchestration import commands
from orchestration.config import validated
from orchestration.prepare import prepare
from orchestration.preparing.check import REMEDIES, check
from tests.conftest import COLOURS, raw_records

pytestmark = pytest.mark.ray

SAID: list[str] = []


BOTH = {
    "good": {"annotations": ["good.json"], "split": "eval"},
    "broken": {"annotations": ["broken.json", "copies.json"], "split": "train"},
}


@pytest.fixture
def with_copies(llava_set):
    """Beside the broken records, training records whose images are not held out."""
    shutil.copy(llava_set / "images/green.png", llava_set / "images/unused.png")
    with open(llava_set / "images/unused.png", "ab") as file:
        file.write(b"other bytes, another key")
    chat = [
        {"from": "human", "value": "<image>\nColour?"},
        {"from": "gpt", "value": "Green."},
    ]
    records = [{"id": f"copy {i}", "image": "unused.png", "conversations": chat} for i in range(40)]
    (llava_set / "copies.json").write_text(json.dumps(records))


@pytest.mark.usefixtures("cluster", "with_copies")
def test_every_broken_record_is_quarantined_with_its_reason_and_none_is_lost(experiment):
    result = prepare(experiment(BOTH), progress=SAID.append)
    folder = Path(result["folder"])
    expected = raw_records("broken.json")
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["record"], line["reason"]) for line in lines] == [
        (f"broken.json:{i} ({record['id']})", record["expect"]) for i, record in enumerate(expected)
    ]
    assert all(line["source"] == "broken" and line["detail"] for line in lines)
    assert result["sources"]["broken"] == {
        "raw": len(expected) + 40,
        "used": 40,
        "merged": 0,
        "dropped": dict(sorted(Counter(record["expect"] for record in expected).items())),
        "held_out": 0,
    }
    assert result["sources"]["good"]["used"] == result["splits"]["eval"] == 8
    assert verify(folder) == []
    assert "Traceback" not in "".join(SAID)


@pytest.mark.usefixtures("cluster")
def test_an_image_is_stored_if_a_sample_shows_it_and_only_then(experiment, llava_set):
    for name in ("kept", "lost"):
        Image.new("RGB", (24, 16), (9, 99, ord(name[0]))).save(llava_set / f"images/{name}.png")
    said = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]
    records = [
        {"id": "dropped", "image": ["lost.png", "kept.png", "absent.png"], "conversations": said},
        {"id": "used", "image": ["kept.png"], "conversations": said},
    ]
    (llava_set / "two.json").write_text(json.dumps(records))
    sets = {"good": BOTH["good"], "two": {"annotations": ["two.json"], "split": "train"}}
    prepared = open_store(prepare(experiment(sets))["folder"])
    (sample,) = (prepared.train[i] for i in range(len(prepared.train)))
    held = (llava_set / "images/kept.png").read_bytes()
    assert prepared.image(sample.images[0]) == held
    stored = pq.read_table(prepared.folder / "images")["path"].to_pylist()
    assert "kept.png" in stored
    assert "lost.png" not in stored


@pytest.mark.usefixtures("cluster", "with_copies")
def test_images_arrive_in_their_own_slots_by_pixel(experiment):
    prepared = open_store(prepare(experiment(BOTH))["folder"])
    colours = {}
    for sample in map(prepared.eval.__getitem__, range(len(prepared.eval))):
        batch = collate([sample], pixels=prepared.pixels, image_tokens=4, pad_id=prepared.pad_id)
        shown = (batch.pixels.mean((2, 3)) * 127.5 + 127.5).round().int().tolist()
        colours[sample.id] = [tuple(int(v > 128) * 255 for v in colour) for colour in shown]
    named = {f"good/{record['id']}": record["image"] for record in raw_records("good.json")[1:4]}
    for name, paths in named.items():
        assert colours[name] == [COLOURS[path] for path in paths]


@pytest.mark.usefixtures("cluster", "with_copies")
def test_one_and_two_actors_write_the_same_bytes(experiment):
    one = prepare(experiment(BOTH, storage="one", preparers=1))
    two = prepare(experiment(BOTH, storage="two", preparers=2))
    manifests = [json.loads(Path(r["folder"], "manifest.json").read_text()) for r in (one, two)]
    assert manifests[0] == manifests[1]
    assert manifests[0]["images"] == 5


@pytest.mark.usefixtures("cluster", "with_copies")
def test_prepared_data_is_used_again_and_repaired_if_damaged(experiment):
    first = prepare(experiment(BOTH))
    folder = Path(first["folder"])
    stamp = os.stat(folder / "manifest.json").st_mtime_ns
    again = prepare(experiment(BOTH))
    assert (again["reused"], first["reused"]) == (True, False)
    assert {**again, "reused": 0, "seconds": 0} == {**first, "reused": 0, "seconds": 0}
    assert os.stat(folder / "manifest.json").st_mtime_ns == stamp
    (folder / "encoded/ids.npy").write_bytes(b"damaged")
    assert prepare(experiment(BOTH))["reused"] is False
    assert verify(folder) == []


@pytest.mark.usefixtures("cluster", "with_copies")
def test_what_has_not_changed_is_not_checked_again(experiment, llava_set):
    prepare(experiment(BOTH))
    work = Path(experiment(BOTH).storage.path, "prepared/.work")
    before = {path.name: path.stat().st_ino for path in work.iterdir()}
    assert len(before) == 4, "records and a shard of each set"
    copies = llava_set / "copies.json"
    copies.write_text(copies.read_text() + "\n")
    prepare(experiment(BOTH))
    after = {path.name: path.stat().st_ino for path in work.iterdir()}
    assert before.items() < after.items()
    assert len(after) == 6, "only the set that names the file is read and checked again"


@pytest.mark.usefixtures("cluster", "with_copies")
def test_a_repaired_image_is_noticed_and_its_record_used(experiment, llava_set, caplog):
    before = prepare(experiment(BOTH))
    (llava_set / "images/page.jpg").unlink()
    assert prepare(experiment(BOTH))["reused"], "an image that is gone repairs nothing"
    Image.new("RGB", (24, 16), (9, 99, 199)).save(llava_set / "images/empty.png")
    after = prepare(experiment(BOTH))
    assert not after["reused"]
    assert "images that could not be used have changed: empty.png" in caplog.text
    used = [result["sources"]["broken"]["used"] for result in (before, after)]
    assert used[1] == used[0] + 1
    assert prepare(experiment(BOTH))["reused"]


@pytest.mark.usefixtures("with_copies")
def test_of_two_that_prepare_at_once_the_second_uses_what_the_first_has_made(experiment):
    both = experiment(BOTH)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        results = [made.result() for made in [pool.submit(prepare, both) for _ in range(2)]]
    assert sorted(result["reused"] for result in results) == [False, True]
    folder = Path(results[0]["folder"])
    assert verify(folder) == []
    assert {path for path in folder.parent.iterdir() if path.is_dir()} == {
        folder,
        folder.parent / ".work",
    }


@pytest.mark.usefixtures("cluster", "with_copies")
def test_the_folder_follows_what_decides_a_sample_and_nothing_else(
    experiment, tokenizer_folder, llava_set, tmp_path
):
    folder = Path(prepare(experiment(BOTH))["folder"])
    assert folder.name.startswith("broken-good-")
    same = shutil.copytree(tokenizer_folder, tmp_path / "tokenizer-of-another-size")
    assert prepare(experiment(BOTH, tokenizer=same))["reused"]
    hinted = {name: own | {"records": 48} for name, own in BOTH.items()}
    assert prepare(experiment(hinted))["reused"]
    (llava_set / "good.json").write_text((llava_set / "good.json").read_text() + "\n")
    assert not prepare(experiment(BOTH))["reused"]


@pytest.fixture
def other_tokenizer(tokenizer_folder, tmp_path):
    """A tokenizer that knows a word more."""
    tokenizer = load_tokenizer(str(tokenizer_folder))
    tokenizer.add_tokens(["zebra"])
    tokenizer.save_pretrained(tmp_path / "other-tokenizer")
    return tmp_path / "other-tokenizer"


@pytest.mark.usefixtures("cluster", "with_copies")
def test_a_worker_refuses_data_that_another_tokenizer_encoded(
    experiment, tokenizer_folder, other_tokenizer
):
    from orchestration.worker import require_encoded_with

    prepared = open_store(prepare(experiment(BOTH))["folder"])
    require_encoded_with(load_tokenizer(str(tokenizer_folder)), prepared)
    with pytest.raises(ValueError, match=r"other-tokenizer: its tokenizer must be .*broken-good-"):
        require_encoded_with(load_tokenizer(str(other_tokenizer)), prepared)


def test_sizes_with_other_tokenizers_are_refused_before_ray_starts(
    experiment, other_tokenizer, search, monkeypatch
):
    monkeypatch.setattr(commands, "connect", lambda _: pytest.fail("it asked for a cluster"))
    settings = experiment(BOTH).as_dict() | {"search": search}
    settings["model"]["languages"]["large"]["checkpoint"] = str(other_tokenizer)
    with pytest.raises(ValueError, match=r"model\.size: large must have .* of model\.size=small"):
        commands.sweep(validated(settings))


@pytest.mark.usefixtures("cluster")
def test_an_auto_split_keeps_every_image_on_one_side(experiment, llava_set):
    chat = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (llava_set / "texts.json").write_text(json.dumps([{"conversations": chat}] * 30))
    sets = {"good": {"annotations": ["good.json"]}, "texts": {"annotations": ["texts.json"]}}
    result = prepare(experiment(sets))
    prepared = open_store(result["folder"])
    train, held_out = (
        prepared.samples(split)["group_keys"].to_pylist() for split in ("train", "eval")
    )
    assert {*chain(*train)}.isdisjoint(chain(*held_out))
    for own in result["sources"].values():
        assert own["raw"] == own["used"] + sum(own["dropped"].values())


@pytest.mark.usefixtures("cluster", "with_copies")
def test_too_many_drops_fail_with_the_top_reasons_and_leave_the_quarantine(experiment, tmp_path):
    with pytest.raises(ValueError, match=r"39 of 79 records dropped \(49\.4%\)") as caught:
        prepare(experiment(BOTH, max_dropped=0.05))
    message = str(caught.value)
    assert "data.sets.broken" in message
    assert "12 forbidden_path (broken.json:6 (traversal)" in message
    (left,) = (tmp_path / "runs/prepared").glob("*.jsonl")
    assert str(left) in message
    assert len(left.read_text().splitlines()) == 39


@pytest.mark.usefixtures("cluster")
def test_an_empty_side_of_the_split_is_refused(experiment):
    with pytest.raises(ValueError, match="no sample is on the eval side"):
        prepare(experiment({"good": {"annotations": ["good.json"], "split": "train"}}))


def test_missing_annotations_are_named_before_ray_starts(experiment):
    with pytest.raises(FileNotFoundError, match=r"data\.sets\.good\.annotations: .*absent\.json"):
        prepare(experiment({"good": {"annotations": ["absent.json"]}}))


@pytest.mark.usefixtures("with_copies")
def test_a_checkpoint_that_is_nowhere_is_named_before_ray_starts(experiment):
    with pytest.raises(
        FileNotFoundError, match=r"path/to/folder: neither a folder .* nor on the hub"
    ):
        prepare(experiment(BOTH, tokenizer="path/to/folder"))


@pytest.mark.usefixtures("cluster", "with_copies")
def test_a_blend_of_which_no_sample_can_be_made_is_refused(experiment):
    """No record of these sets is over several images."""
    blends = {"all": {"sets": ["good", "broken"]}, "none": {"sets": ["broken"], "join": True}}
    with pytest.raises(ValueError, match=r"data\.blends\.none: no sample can be made"):
        prepare(experiment(BOTH, blends=blends))


@pytest.mark.usefixtures("cluster", "with_copies")
def test_check_finds_every_problem_and_stores_nothing(experiment, llava_set, tmp_path):
    (llava_set / "garbage.json").write_text("[\n{,}]")
    sets = BOTH | {"garbage": {"annotations": ["garbage.json"]}}
    found = check(experiment(sets))
    assert found["ok"] is False
    assert found["errors"] == [
        f"{llava_set}/garbage.json:2: is not JSON: "
        "Expecting property name enclosed in double quotes"
    ]
    expected = Counter(record["expect"] for record in raw_records("broken.json"))
    assert {problem["reason"]: problem["count"] for problem in found["problems"]} == expected
    assert found["sets"]["broken"]["used"] == 40
    assert all(len(problem["records"]) == problem["count"] for problem in found["problems"])
    assert all(problem["remedy"] for problem in found["problems"])
    assert not (tmp_path / "runs").exists()
    as_found = check(experiment(BOTH))
    assert as_found["ok"] is True
    assert as_found["sets"] == prepare(experiment(BOTH))["sources"]
    assert check(experiment(BOTH, max_dropped=0.1))["ok"] is False


@pytest.mark.usefixtures("cluster", "with_copies")
def test_progress_is_told_now_and_then_and_in_the_end_of_all_records(experiment, monkeypatch):
    said: list[str] = []
    check(experiment(BOTH), progress=said.append)
    assert said == ["data: 87 of 87 records checked"]
    monkeypatch.setattr("orchestration.preparing.survey.SAY_EVERY", 0.0)
    said.clear()
    check(experiment(BOTH), progress=said.append)
    counts = [int(line.split()[1]) for line in said]
    assert counts == sorted(counts)
    assert all(line.endswith("about 0 minutes to go") for line in said[:-1])
    assert said[-1] == "data: 87 of 87 records checked"


def test_every_reason_has_a_remedy():
    from typing import get_args

    from dsvl.data.types import Reason

    assert set(REMEDIES) == set(get_args(Reason))


@pytest.mark.usefixtures("cluster")
def test_the_digits_prepare_and_read_back(experiment, llava_set):
    chats = pytest.importorskip("dsvl.digits.chats")
    pytest.importorskip("sklearn")
    small = Path(chats.__file__).parent / "checkpoints/small"
    chats.write(llava_set / "digits", train=40, evaluation=10)
    sets = {
        split: {"annotations": [f"digits/{split}.json"], "images": "digits/images", "split": split}
        for split in ("train", "eval")
    }
    prepared = open_store(prepare(experiment(sets, tokenizer=small, max_dropped=0.0))["folder"])
    assert (len(prepared.train), len(prepared.eval)) == (40, 10)
    tokenizer = load_tokenizer(str(small))
    raw = json.loads((llava_set / "digits/train.json").read_text())
    for index, record in enumerate(raw):
        shown = show(prepared.train[index], tokenizer)
        for answer in record["conversations"][1::2]:
            assert f"⟦{answer['value']}{tokenizer.eos_token}⟧" in shown
        assert len(prepared.train[index].images) == len(record["image"])
    assert np.isfinite(prepared.pixels(prepared.train[0].images[0])).all()


@pytest.mark.usefixtures("cluster")
def test_merged_records_are_counted_and_fall_together(experiment, llava_set):
    for name in ("dusk", "dawn"):
        Image.new("RGB", (24, 16), (9, 99, ord(name[1]))).save(llava_set / f"images/{name}.png")
    code = {
        name: base64.b64encode((llava_set / f"images/{file}").read_bytes()).decode()
        for name, file in (("dusk", "dusk.png"), ("dawn", "dawn.png"), ("bad", "truncated.jpg"))
    }
    (llava_set / "SD.json").write_text(json.dumps(code))
    asked = {
        "a": (["dusk", "dawn"], ["b", "c"]),
        "b": (["dusk", "dawn"], []),
        "c": (["dusk", "dawn"], []),
        "d": (["bad"], ["e"]),
        "e": (["bad"], []),
        "f": (["dusk", "absent"], []),
        "g": ([], []),
    }
    data = {
        name: {"instruction": "q", "answer": name, "image_ids": images, "rel_ins_ids": related}
        for name, (images, related) in asked.items()
    }
    (llava_set / "SD_instructions.json").write_text(json.dumps({"data": data}))
    sd = {
        "reader": "otter_mimicit_sd",
        "annotations": ["SD_instructions.json"],
        "images": "SD.json",
        "split": "train",
    }
    sets = {"good": {"annotations": ["good.json"], "split": "eval"}, "sd": sd}
    result = prepare(experiment(sets))
    assert result["sources"]["sd"] == {
        "raw": 7,
        "used": 2,
        "merged": 2,
        "dropped": {"missing_image": 1, "undecodable_image": 2},
        "held_out": 0,
    }
    lines = (Path(result["folder"]) / "quarantine.jsonl").read_text().splitlines()
    dropped = [json.loads(line)["record"] for line in lines if '"sd"' in line]
    assert dropped == [
        f"SD_instructions.json:{i} ({name})" for i, name in ((3, "d"), (4, "e"), (5, "f"))
    ]
    one, _ = open_store(result["folder"]).conversations("train")
    assert (len(one[1]), len(one[2])) == (2, 6)
    assert prepare(experiment(sets))["reused"]
