"""The prepared format."""

import json
import multiprocessing
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from dsvl.config import SetConfig
from dsvl.data.encode import Encoder, Phrases
from dsvl.data.folders import claim, sha256
from dsvl.data.images import load
from dsvl.data.readers import read
from dsvl.data.sources import Images
from dsvl.data.store import open_store, verify
from dsvl.data.types import Rejected
from dsvl.data.writer import Writer, conservation
from tests.dsvl.data.prepared import PROCESSOR, Sample, take_over, write

BAD = Rejected("set", "bad.json:0", "bad_roles", "message 0 is from 'robot'")


class Made:
    """What `good.json` holds, encoded."""

    def __init__(self, llava_set, tokenizer):
        config = SetConfig(reader="llava_json", annotations=("good.json",), images="images")
        chats = read("set", config=config, root=llava_set, max_images=8, seed=0)
        folder = Images(llava_set / "images")
        encoder = Encoder(tokenizer, image_tokens=4, max_tokens=999)
        self.images, self.samples, self.examples = {}, [], []
        self.encoder = encoder
        for number, chat in enumerate(chats):
            keys = []
            for ref in chat.images:
                image = load(folder, ref.path, processor=PROCESSOR, max_pixels=999)
                self.images[image.key] = image
                keys.append(image.key)
            split = "eval" if number % 4 == 0 else "train"
            self.samples.append(Sample(chat, tuple(keys), split, (*keys, chat.meta["key"])))
            self.examples.append(encoder.encode(chat, keys))

    def write(self, folder, **options):
        options = {"images": self.images, "quarantine": (BAD,), **options}
        return write(folder, self.samples, encoder=self.encoder, **options)


@pytest.fixture
def made(llava_set, tokenizer):
    return Made(llava_set, tokenizer)


def assert_same(found, example):
    assert (found.id, found.images) == (example.id, example.images)
    for name in ("ids", "labels", "kinds"):
        np.testing.assert_array_equal(getattr(found, name), getattr(example, name))


def test_samples_come_back_by_index_in_the_order_of_their_records(made, tmp_path):
    made.write(tmp_path / "set")
    prepared = open_store(tmp_path / "set")
    for split, examples in (("train", prepared.train), ("eval", prepared.eval)):
        wanted = [
            example
            for sample, example in zip(made.samples, made.examples, strict=True)
            if sample.split == split
        ]
        assert len(examples) == len(wanted) > 0
        for index, example in enumerate(wanted):
            assert_same(examples[index], example)
        assert examples.lengths.tolist() == [len(example.ids) for example in wanted]
        counted = [int((example.labels[1:] != -100).sum()) for example in wanted]
        assert examples.targets.tolist() == counted
        assert prepared.samples(split)["id"].to_pylist() == [example.id for example in wanted]
        assert [name for name, _, _ in prepared.conversations(split)] == [e.id for e in wanted]
    with pytest.raises(IndexError):
        prepared.train[len(prepared.train)]


def test_conversations_come_back_as_they_were(made, tmp_path):
    made.write(tmp_path / "set")
    prepared = open_store(tmp_path / "set")
    for split in ("train", "eval"):
        kept = [sample for sample in made.samples if sample.split == split]
        for sample, (_, keys, turns) in zip(kept, prepared.conversations(split), strict=True):
            assert (keys, turns) == (sample.images, sample.conversation.turns)
        table = prepared.samples(split).to_pylist()
        assert [tuple(row["group_keys"]) for row in table] == [s.group_keys for s in kept]
        assert json.loads(table[0]["meta"])["record"] == kept[0].conversation.record


def test_images_come_back_as_bytes_and_as_pixels_once_each(made, tmp_path):
    manifest = made.write(tmp_path / "set")
    prepared = open_store(tmp_path / "set")
    assert manifest["images"] == len(made.images) == 4
    for key, image in made.images.items():
        assert prepared.image(key) == image.bytes
        np.testing.assert_array_equal(prepared.pixels(key), PROCESSOR.normalise(image.fitted))


def test_images_are_found_across_shards_and_row_groups(made, tmp_path, monkeypatch):
    monkeypatch.setattr("dsvl.data.shard.GROUP_BYTES", 1)
    made.write(tmp_path / "set", shard=3)
    assert len(list((tmp_path / "set/images").iterdir())) == 2
    prepared = open_store(tmp_path / "set")
    for key, image in made.images.items():
        assert prepared.image(key) == image.bytes
        np.testing.assert_array_equal(prepared.pixels(key), PROCESSOR.normalise(image.fitted))


def test_an_image_that_several_shards_hold_is_stored_once(made, tmp_path, monkeypatch):
    monkeypatch.setattr("dsvl.data.shard.GROUP_BYTES", 1)
    first, second, third, fourth = made.images.values()
    phrases = Phrases(*([],) * 9)
    with Writer(
        tmp_path / "set", processor=PROCESSOR, image_tokens=4, pad_id=2, phrases=phrases
    ) as writer:
        for images in ([first, second], [second, first], [third, first, fourth, second]):
            take_over(writer, images)
        counts = {name: Counter() for name in ("raw", "merged", "identity", "about")}
        manifest = writer.finish(quarantine=(), bad_images=(), **counts)
    assert manifest["images"] == 4
    prepared = open_store(tmp_path / "set")
    for key, image in made.images.items():
        assert prepared.image(key) == image.bytes
        np.testing.assert_array_equal(prepared.pixels(key), PROCESSOR.normalise(image.fitted))
    assert verify(tmp_path / "set") == []


def test_the_manifest_accounts_for_every_record_and_file(made, tmp_path):
    manifest = made.write(tmp_path / "set")
    assert manifest["sources"]["set"] == {
        "raw": 9,
        "used": 8,
        "merged": 0,
        "dropped": {"bad_roles": 1},
        "held_out": 0,
    }
    assert open_store(tmp_path / "set").quarantined == 1
    assert manifest["splits"] == {"train": 6, "eval": 2}
    assert manifest["mix"] == {"set": 1.0}
    files = {str(p.relative_to(tmp_path / "set")) for p in (tmp_path / "set").rglob("*.*")}
    assert files == {*manifest["files"], "manifest.json"}
    (line,) = (tmp_path / "set/quarantine.jsonl").read_text().splitlines()
    assert Rejected(**json.loads(line)) == BAD


def test_a_lost_record_is_never_published(made, tmp_path):
    with pytest.raises(AssertionError, match="records were lost"):
        conservation({"set": 10}, used={"set": 7}, merged={"set": 1}, quarantine=[BAD])
    held = Rejected("set", "r", "held_out", "")
    table = conservation({"set": 10}, used={"set": 7}, merged={"set": 1}, quarantine=[BAD, held])
    assert (table["set"]["held_out"], table["set"]["dropped"]) == (1, {"bad_roles": 1})


def test_two_samples_of_one_id_are_never_published(made, tmp_path):
    made.samples.append(made.samples[0])
    with pytest.raises(AssertionError, match="is stored already"):
        made.write(tmp_path / "set")


def test_nothing_is_left_of_an_interrupted_write(made, tmp_path):
    (tmp_path / "out").mkdir()
    made.samples.append(missing(made.samples[1]))
    with pytest.raises(KeyError):
        made.write(tmp_path / "out/set")
    assert list((tmp_path / "out").iterdir()) == []


def write_half(made, folder, written, go_on):
    phrases = Phrases(*([],) * 9)
    with (
        claim(folder),
        Writer(folder, processor=PROCESSOR, image_tokens=4, pad_id=2, phrases=phrases) as writer,
    ):
        take_over(writer, list(made.images.values()))
        written.set()
        go_on.wait()


def test_what_a_killed_writer_left_is_removed_and_a_living_one_is_waited_for(made, tmp_path):
    context, folder = multiprocessing.get_context("fork"), tmp_path / "out/set"

    def start():
        written, go_on = context.Event(), context.Event()
        arguments = (made, folder, written, go_on)
        process = context.Process(target=write_half, args=arguments, daemon=True)
        process.start()
        assert written.wait(30)
        return process, go_on

    def halves():
        return list(folder.parent.glob(".set-*"))

    killed, _ = start()
    killed.kill()
    killed.join()
    assert len(halves()) == 1
    with claim(folder):
        assert halves() == []

    living, go_on = start()
    (half,) = halves()
    threading.Timer(0.5, lambda: half.exists() and go_on.set()).start()
    with claim(folder):  # else the other would wait for ever
        assert go_on.is_set(), "it came in beside one that is alive"
        assert halves() == []
    living.join()
    assert living.exitcode == 0


def missing(sample):
    return replace(sample, images=("an image that is not stored",) * len(sample.images))


def test_writing_again_replaces_the_set_and_gives_the_same_bytes(made, tmp_path):
    first = made.write(tmp_path / "set")
    assert made.write(tmp_path / "set") == first
    assert [path.name for path in tmp_path.iterdir() if "set" in path.name] == ["set"]


def test_verify_names_every_damaged_or_missing_file(made, tmp_path):
    made.write(tmp_path / "set")
    assert verify(tmp_path / "set") == []
    with open(tmp_path / "set/encoded/ids.npy", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    (tmp_path / "set/encoded/kinds.npy").unlink()
    damaged, gone = sorted(verify(tmp_path / "set"))
    assert "ids.npy: differs" in damaged
    assert "kinds.npy: is missing" in gone
    (tmp_path / "set/manifest.json").write_text("{")
    assert "manifest.json: is damaged" in verify(tmp_path / "set")[0]
    assert "has no manifest.json" in verify(tmp_path / "nowhere")[0]


def test_what_was_verified_is_read_again_only_where_it_has_changed(made, tmp_path, monkeypatch):
    made.write(tmp_path / "set")
    read = []
    monkeypatch.setattr("dsvl.data.store.sha256", lambda path: read.append(path) or sha256(path))
    assert verify(tmp_path / "set") == []
    assert len(read) > 9
    read.clear()
    assert verify(tmp_path / "set") == []
    assert read == []
    ids = tmp_path / "set/encoded/ids.npy"
    ids.write_bytes(ids.read_bytes()[::-1])
    assert [str(ids) in fault for fault in verify(tmp_path / "set")] == [True]
    assert read == [ids]


@pytest.mark.parametrize("left", ["", "{", "7", "[1]", "null"])
def test_what_is_left_of_an_earlier_verification_need_not_be_whole(made, tmp_path, left):
    made.write(tmp_path / "set")
    (tmp_path / "set/.verified.json").write_text(left)
    assert verify(tmp_path / "set") == []
    assert json.loads((tmp_path / "set/.verified.json").read_text())


def test_a_set_of_another_version_is_refused(made, tmp_path):
    made.write(tmp_path / "set")
    path = tmp_path / "set/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version=99"):
        open_store(tmp_path / "set")


def test_a_set_without_images_can_be_written_and_read(made, tmp_path):
    texts = [i for i, sample in enumerate(made.samples) if not sample.images]
    made.images = {}
    made.samples = [made.samples[i] for i in texts]
    made.write(tmp_path / "set")
    prepared = open_store(tmp_path / "set")
    everything = [*prepared.train, *prepared.eval]
    assert [example.images for example in everything] == [()]
