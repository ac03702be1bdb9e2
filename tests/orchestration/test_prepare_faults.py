"""Preparation of data that is damaged or hostile, and of what killed processes have left."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from dsvl.data.store import open_store, verify
from orchestration import cli
from orchestration.prepare import _tidy, prepare
from tests.benchmarks.made_up import Pictures
from tests.conftest import png_header
from tests.orchestration.machines import finished

pytestmark = pytest.mark.ray

CHAT = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A picture."}]


def encoded(format: str) -> bytes:
    file = io.BytesIO()
    noise = random.Random(0).randbytes(32 * 24 * 3)
    Image.frombytes("RGB", (32, 24), noise).save(file, format)
    return file.getvalue()


def write_records(path: Path, images: list[str]) -> None:
    records = [{"id": name, "image": name, "conversations": CHAT} for name in images]
    path.write_text(json.dumps(records))


def reasons(folder: Path) -> dict[str, str]:
    """Which reason the quarantine gives for the record of every image."""
    lines = map(json.loads, (folder / "quarantine.jsonl").read_text().splitlines())
    return {line["record"].partition("(")[2][:-1]: line["reason"] for line in lines}


@pytest.fixture
def damaged(llava_set, images) -> dict[str, str]:
    """So many images, of which one in a hundred is damaged: name -> reason, of those."""
    draw, picture = random.Random(0), Pictures(32)
    drawing, png = encoded("GIF"), encoded("PNG")

    def cut(data: bytes) -> bytes:
        return data[: draw.randrange(1, len(data) * 3 // 4)]

    damages = [
        ("undecodable_image", lambda data: b""),
        ("undecodable_image", cut),
        ("undecodable_image", lambda data: cut(png)),
        ("undecodable_image", lambda data: b"<!DOCTYPE html><html>404</html>"),
        ("undecodable_image", lambda data: drawing),
        ("undecodable_image", lambda data: draw.randbytes(len(data))),
        ("undecodable_image", lambda data: b"\0\0" + data[2:]),
        ("undecodable_image", lambda data: b"8BPS" + data),
        ("image_too_large", lambda data: png_header(9_000, 9_000)),
        ("image_too_large", lambda data: png_header(60_000, 60_000)),
    ]
    (llava_set / "images/many").mkdir()
    names = [f"many/{number:05}.{draw.choice(['jpg', 'png'])}" for number in range(images)]
    bad = dict(zip(draw.sample(names, images // 100), cycle(damages), strict=False))
    for name in names:
        _, damage = bad.get(name, ("", bytes))
        (llava_set / "images" / name).write_bytes(damage(picture(name)))
    write_records(llava_set / "many.json", names)
    return {name: bad[name][0] for name in names if name in bad}


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("images", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_of_many_images_exactly_the_damaged_ones_are_lost_each_with_its_reason(
    experiment, settings, images, damaged, llava_set, tmp_path, monkeypatch, capsys
):
    bad = images // 100
    many = {"many": {"annotations": ["many.json"]}}
    experiment(many, max_dropped=0.0099)
    monkeypatch.chdir(tmp_path)
    Path("strict.yaml").write_text(yaml.safe_dump(settings))
    assert cli.main(["prepare", "strict.yaml"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    first = next(name for name in damaged if damaged[name] == "undecodable_image")
    place = int(first[5:10])
    for part in (
        f"data.sets.many: {bad} of {images} records dropped (1.0%), more than data.max_dropped=0.0099",
        f"{bad * 8 // 10} undecodable_image (many.json:{place} ({first}): ",
        f"; {bad * 2 // 10} image_too_large (many.json:",
        "repair them, or raise the limit",
    ):
        assert part in said

    result = prepare(experiment(many, max_dropped=0.01))
    assert reasons(Path(result["folder"])) == damaged
    assert result["sources"]["many"] == {
        "raw": images,
        "used": images - bad,
        "merged": 0,
        "dropped": dict(sorted(Counter(damaged.values()).items())),
        "held_out": 0,
    }
    assert sum(result["splits"].values()) == result["images"] == images - bad
    prepared = open_store(result["folder"])
    kept = [
        key
        for side in ("train", "eval")
        for keys in prepared.samples(side)["images"].to_pylist()
        for key in keys
    ]
    whole = [
        path for path in (llava_set / "images/many").iterdir() if f"many/{path.name}" not in damaged
    ]
    assert sorted(kept) == sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in whole)
    assert verify(Path(result["folder"])) == []


WATCHED = """
import json, os, sys
import ray
from orchestration.compose import load
from orchestration.prepare import prepare

address, experiment, opened = sys.argv[1:]

def watch():
    file = os.open(opened, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes)):
            os.write(file, os.path.realpath(os.fsencode(arguments[0])) + b"\\n")
    sys.addaudithook(note)

watch()
ray.init(address=address, log_to_driver=False, runtime_env={"worker_process_setup_hook": watch})
prepare(load(experiment))
print(json.dumps(prepare(load(experiment))))
"""
"""Prepares twice, and notes every file that Python code of the driver or of an actor opens."""


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, ran: Path) -> None:
        self.ran = ran

    def __reduce__(self):
        return os.mkdir, (str(self.ran),)


@pytest.fixture
def hostile(llava_set) -> dict[str, str]:
    """A set of references to images, all but two of which are not to be followed: name -> reason."""
    images, outside = llava_set / "images", llava_set / "outside"
    outside.mkdir()
    own, secret = ((images / name).read_bytes() for name in ("red.png", "green.png"))
    (outside / "secret.png").write_bytes(secret)
    code = pickle.dumps(Evil(llava_set / "ran"))
    (images / "evil.png").write_bytes(code)
    (images / "own.png").write_bytes(own + b"of another key")
    with tarfile.open(images / "x.tar", "w") as tar:
        for name, data in {
            "own.png": own + b"in a tar",
            "evil.png": code,
            "../secret.png": secret,
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(outside / "secret.png")
            tar.addfile(info)
    (outside / "x.tar").write_bytes((images / "x.tar").read_bytes())
    pq.write_table(pa.table({"image": [code]}), images / "x.parquet")
    pickled = {
        "ARROW:extension:name": "ray.data.arrow_pickled_object",
        "ARROW:extension:metadata": code,
    }
    field = pa.field("image", pa.large_binary(), metadata=pickled)
    pq.write_table(
        pa.table([pa.array([code], pa.large_binary())], pa.schema([field])),
        images / "typed.parquet",
    )
    for name, target in {
        "link-to-file.png": "secret.png",
        "link-to-nothing.png": "absent.png",
        "linked": ".",
        "linked.tar": "x.tar",
    }.items():
        (images / name).symlink_to(outside / target)
    os.mkfifo(images / "pipe.png")
    return {
        f"{outside}/secret.png": "forbidden_path",
        f"{outside}/absent.png": "forbidden_path",
        "../outside/secret.png": "forbidden_path",
        "../outside/absent.png": "forbidden_path",
        "link-to-file.png": "forbidden_path",
        "link-to-nothing.png": "forbidden_path",
        "linked/secret.png": "forbidden_path",
        "linked/absent.png": "forbidden_path",
        "linked.tar/own.png": "forbidden_path",
        "https://127.0.0.1:9/secret.png": "forbidden_path",
        "ftp://127.0.0.1:9/secret.png": "forbidden_path",
        f"FILE:{outside}/secret.png": "forbidden_path",
        "x.tar/../secret.png": "forbidden_path",
        "x.tar/link.png": "missing_image",
        "x.tar/hard.png": "missing_image",
        f"x.tar/{outside}/secret.png": "missing_image",
        "pipe.png": "missing_image",
        "evil.png": "undecodable_image",
        "x.tar/evil.png": "undecodable_image",
        "x.parquet/0/image": "undecodable_image",
        "typed.parquet/0/image": "undecodable_image",
    }  # fmt: skip


def test_nothing_outside_a_set_is_opened_and_nothing_in_it_is_run(
    experiment, settings, hostile, llava_set, tmp_path, machines
):
    write_records(llava_set / "hostile.json", ["own.png", *hostile, "x.tar/own.png"])
    sets = {
        "hostile": {"annotations": ["hostile.json"], "split": "train"},
        "good": {"annotations": ["good.json"], "split": "eval"},
    }
    experiment(sets)
    (tmp_path / "hostile.yaml").write_text(yaml.safe_dump(settings))
    opened = tmp_path / "opened"
    driver = machines.run(WATCHED, machines.address, tmp_path / "hostile.yaml", opened)
    result, _ = finished(driver)
    assert reasons(Path(result["folder"])) == hostile
    assert result["sources"]["hostile"]["used"] == 2
    paths = {Path(line) for line in opened.read_text().splitlines()}
    assert {llava_set / "images" / name for name in ("own.png", "x.tar", "evil.png")} <= paths
    assert not any(path.is_relative_to(llava_set / "outside") for path in paths)
    assert not (llava_set / "ran").exists()


@pytest.mark.usefixtures("cluster")
def test_what_happens_to_a_file_outside_a_set_makes_nothing_anew(experiment, hostile, llava_set):
    write_records(llava_set / "hostile.json", ["own.png", *hostile])
    sets = {
        "hostile": {"annotations": ["hostile.json"], "split": "train"},
        "good": {"annotations": ["good.json"], "split": "eval"},
    }
    prepare(experiment(sets))
    (llava_set / "outside/secret.png").write_bytes(b"changed")
    (llava_set / "outside/absent.png").write_bytes(b"new")
    assert prepare(experiment(sets))["reused"]
    (llava_set / "images/link-to-file.png").unlink()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(llava_set / "images/link-to-file.png")
    after = prepare(experiment(sets))
    assert not after["reused"]
    assert after["sources"]["hostile"]["used"] == 2


@pytest.mark.usefixtures("cluster")
def test_the_shard_of_an_image_that_has_changed_is_made_again_and_no_other(
    experiment, llava_set, tmp_path
):
    sets = {"good": {"annotations": ["good.json"], "split": "eval"}}
    for name in ("first", "second", "third"):
        Image.new("RGB", (8, 8), (1, 2, len(name))).save(llava_set / f"images/{name}.png")
        write_records(llava_set / f"{name}.json", [f"{name}.png"])
        sets[name] = {"annotations": [f"{name}.json"], "split": "train"}

    def shards() -> dict[str, int]:
        found = (tmp_path / "runs/prepared/.work").glob("shard-*/found.json")
        return {file.parent.name: file.stat().st_mtime_ns for file in found}

    def made() -> dict:
        result = prepare(experiment(sets))
        shutil.rmtree(result["folder"])
        return result

    made()
    before = shards()
    assert made()["sources"]["second"]["used"] == 1
    assert shards() == before
    (llava_set / "images/second.png").write_bytes(b"damaged")
    assert made()["sources"]["second"]["used"] == 0
    again = {name for name, changed in shards().items() if changed != before[name]}
    assert shards().keys() == before.keys()
    assert len(again) == 1


@pytest.mark.usefixtures("cluster")
def test_pixels_that_are_damaged_in_place_are_read_anew(experiment):
    asked = experiment({"good": {"annotations": ["good.json"]}})
    folder = Path(prepare(asked)["folder"])
    shards = (folder.parent / ".work").glob(
        "shard-*/pixels.npy"
    )  # which may be the very same files
    files = sorted([*(folder / "encoded/pixels").iterdir(), *shards])
    before = [path.read_bytes() for path in files]
    for path in files:
        was = path.stat()
        with path.open("r+b") as file:
            file.seek(128)
            file.write(bytes(was.st_size - 128))
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))  # as a disk that fails has it
    (folder / ".verified.json").unlink(missing_ok=True)
    assert [path.read_bytes() for path in files] != before
    assert not prepare(asked)["reused"]
    assert [path.read_bytes() for path in files] == before
    assert prepare(asked)["reused"]


@pytest.mark.usefixtures("cluster")
def test_what_nobody_has_used_for_a_day_is_removed(experiment, tmp_path):
    work, yesterday = tmp_path / "runs/prepared/.work", time.time() - 25 * 3600
    for kind in (".shard-killed", "records-old"):
        for when in ("now", "yesterday"):
            (work / f"{kind}-{when}").mkdir(parents=True)
        os.utime(work / f"{kind}-yesterday", (yesterday, yesterday))

    def made() -> set[str]:
        shutil.rmtree(prepare(experiment({"good": {"annotations": ["good.json"]}}))["folder"])
        return {path.name for path in work.iterdir()}

    left = made()
    assert {name for name in left if "good" not in name and not name.startswith("shard-")} == {
        ".shard-killed-now",
        "records-old-now",
    }
    (used,) = work.glob("records-good-*")
    os.utime(used, (yesterday, yesterday))
    assert made() == left, "what a preparation uses again is not old"


def test_tidying_stumbles_over_nothing_that_others_remove_meanwhile(tmp_path, monkeypatch):
    for name in ("shard-gone", "records-gone", ".shard-gone", ".shard-old"):
        (tmp_path / name).mkdir()
    os.utime(tmp_path / ".shard-old", (0, 0))
    listed = sorted(tmp_path.iterdir())
    for path in listed:
        if path.name != ".shard-old":
            path.rmdir()
    monkeypatch.setattr(Path, "iterdir", lambda _: iter(listed))
    _tidy(tmp_path)
    assert not (tmp_path / ".shard-old").exists()
