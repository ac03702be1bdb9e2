"""Shards of records whose checking is broken off."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
import pytest

from dsvl.config import SetConfig
from dsvl.data.readers import read
from dsvl.data.shard import stamp
from dsvl.data.sources import BadImage, Images
from dsvl.data.spool import spool

KILLED = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
from dsvl.data.encode import Encoder, load_tokenizer
from dsvl.data.images import ImageProcessor
from dsvl.data.shard import Checker, Result, Task

tokenizer, records, images, fresh, outdated = json.loads(sys.argv[1])
result = Path(records).parents[1] / "work/shard-0"
task = Task("good", records, images, tuple(fresh), str(result))
processor = ImageProcessor(8, mean=(0.5,) * 3, std=(0.5,) * 3)
encoder = Encoder(load_tokenizer(tokenizer), image_tokens=4, max_tokens=600)
checker = Checker(encoder, processor=processor, max_pixels=1 << 20, keep=True)

def check(kill):
    "Check in a process that is killed when it is about to touch a file for the KILLth time."
    touched = 0
    def note(event, arguments):
        nonlocal touched
        if any(str(result.parent) in str(argument) for argument in arguments):
            touched += 1
            if touched == kill:
                os.kill(os.getpid(), signal.SIGKILL)
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.addaudithook(note)
    checker.check(task)
    os._exit(0)

def whole():
    digests = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in result.iterdir()}
    return digests.pop("found.json", None) and digests == Result(result).sha256

kills, ended = 0, -signal.SIGKILL
while ended == -signal.SIGKILL:
    if outdated:
        assert check(0) == 0
        os.utime(Path(images) / "red.png", ns=(kills + 1, kills + 1))
    else:
        shutil.rmtree(result, ignore_errors=True)
    kills += 1
    ended = check(kills)
    assert not result.exists() or whole(), f"kill {kills} left a part"
    assert check(0) == 0, f"kill {kills} left what cannot be mended"
    assert whole() and Result(result).is_current(images)
print(json.dumps([kills, ended]))
"""


@pytest.mark.parametrize("outdated", [False, True])
def test_wherever_a_check_is_killed_its_shard_is_whole_or_not_there(
    tmp_path, llava_set, tokenizer_folder, outdated
):
    config = SetConfig(reader="llava_json", annotations=("good.json",), images="images")
    spool(read("good", config=config, root=llava_set, max_images=8, seed=0), tmp_path / "records")
    records = tmp_path / "records/00000.parquet"
    paths = sum(map(len, pq.read_table(records)["paths"].to_pylist()))
    arguments = (tokenizer_folder, records, llava_set / "images")
    request = json.dumps([*map(str, arguments), list(range(paths)), outdated])
    done = subprocess.run([sys.executable, "-c", KILLED, request], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, ended = json.loads(done.stdout)
    assert kills > 8
    assert ended == 0


def test_a_stamp_tells_of_files_in_the_folder_and_of_none_outside(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for file in (images / "in.png", images / "x.tar", tmp_path / "out.png"):
        file.write_bytes(b"12345")
    (images / "link.png").symlink_to(tmp_path / "out.png")
    (images / "loop.png").symlink_to(images / "loop.png")
    (images / "alias.png").symlink_to(images / "in.png")
    own = [5, (images / "in.png").stat().st_mtime_ns]
    assert stamp(str(images), "in.png") == stamp(str(images), "alias.png") == own
    inside = stamp(str(images), "x.tar/1.png")
    assert inside == stamp(str(images / "x.tar"), "1.png")
    assert inside is not None
    for path in ("absent.png", "link.png", "loop.png", "../out.png", f"{tmp_path}/out.png", "a\0b"):
        assert stamp(str(images), path) is None


def test_a_file_that_may_not_be_read_is_undecodable_and_noticed_once_it_may():
    with TemporaryDirectory() as name:  # not pytest's, which is closed to other users
        folder = Path(name)
        (folder / "closed").mkdir()
        for ref in (refs := ("shut.png", "closed/in.png")):
            (folder / ref).write_bytes(b"12345")
        images = Images(folder)
        folder.chmod(0o755)
        for ref in ("shut.png", "closed"):
            (folder / ref).chmod(0)
        was = os.geteuid()
        if was == 0:  # who may read all
            os.seteuid(65534)
        try:
            assert [stamp(name, ref) for ref in refs] == [None, None]
            for ref in refs:
                with pytest.raises(BadImage, match=r"undecodable_image: .*Permission denied"):
                    images.read(ref)
        finally:
            os.seteuid(was)
            (folder / "closed").chmod(0o700)
        (folder / "shut.png").chmod(0o600)
        assert all(stamp(name, ref) for ref in refs)
