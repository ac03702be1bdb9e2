"""Images in folders and archives, and nothing outside them."""

import base64
import io
import json
import os
import pickle
import tarfile
import traceback
import tracemalloc
import zipfile
from contextlib import suppress
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl.config import SetConfig
from dsvl.data import sources
from dsvl.data.readers import read
from dsvl.data.sources import BadImage, Images

CONTENT = {"a.jpg": b"first", "sub/b.png": b"second " * 100, "c": b""}


def tar(path, content, **options):
    with tarfile.open(path, options.get("mode", "w")) as file:
        for name, data in content.items():
            info = tarfile.TarInfo(options.get("prefix", "") + name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def zipped(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in content.items():
            file.writestr(name, data)


def base64_json(path, content, **options):
    held = {name: base64.b64encode(data).decode() for name, data in content.items()}
    path.write_text(json.dumps(held, **options))


def table(path, content, **options):
    columns = {"key": list(content), "bytes": list(content.values())}
    pq.write_table(pa.table(columns), path, row_group_size=2)


MAKE = {".tar": tar, ".zip": zipped, ".json": base64_json, ".parquet": table}


def reason(images, ref):
    with pytest.raises(BadImage) as caught:
        images.read(ref)
    assert caught.value.detail.isprintable()
    return caught.value.reason


@pytest.mark.parametrize("ending", MAKE)
@pytest.mark.parametrize("as_root", [True, False])
def test_an_archive_is_entered_like_a_folder(tmp_path, ending, as_root):
    (tmp_path / "deep").mkdir()
    path = tmp_path / f"deep/birds{ending}"
    MAKE[ending](path, CONTENT)
    images, prefix = (Images(path), "") if as_root else (Images(tmp_path), f"deep/birds{ending}/")
    for name, data in [*CONTENT.items(), *reversed(CONTENT.items())]:
        assert images.read(prefix + name) == data
    assert reason(images, prefix + "absent.jpg") == "missing_image"
    assert reason(images, prefix + "sub") == "missing_image"
    assert reason(images, prefix + "sub/../a.jpg") == "forbidden_path"


@pytest.mark.parametrize("ending", MAKE)
def test_a_damaged_archive_makes_its_images_undecodable(tmp_path, ending):
    path = tmp_path / f"birds{ending}"
    path.write_bytes(b"<html>404</html>")
    assert reason(Images(path), "a.jpg") == "undecodable_image"
    assert reason(Images(tmp_path), f"birds{ending}/a.jpg") == "undecodable_image"


def test_what_a_damaged_archive_raises_holds_no_earlier_caller(tmp_path):
    (tmp_path / "birds.tar").write_bytes(b"<html>404</html>")
    images, depths = Images(tmp_path), []
    for name in "abc":
        with pytest.raises(BadImage) as caught:
            images.read(f"birds.tar/{name}.jpg")
        depths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(set(depths[1:])) == 1


def zip_of(method):
    def make(path, content):
        with zipfile.ZipFile(path, "w", method) as file:
            for name, data in content.items():
                file.writestr(name, data * 50)

    return make


@pytest.mark.parametrize(
    ("ending", "make"),
    [
        *MAKE.items(),
        *((".zip", zip_of(method)) for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)),
    ],
)
def test_no_damage_to_an_archive_raises_anything_but_a_bad_image(tmp_path, ending, make):
    make(tmp_path / f"whole{ending}", CONTENT | {"long" * 40 + "é": b"long"})
    whole, random = (tmp_path / f"whole{ending}").read_bytes(), Random(7)
    path = tmp_path / f"damaged{ending}"
    for _ in range(400):
        damaged = bytearray(whole)
        for _ in range(random.choice((1, 1, 2, 8))):
            at = random.randrange(len(damaged))
            damaged[at : at + random.choice((0, 1, 1, 4))] = random.randbytes(1)
        path.write_bytes(damaged)
        images = Images(path)
        for member in ("a.jpg", "sub/b.png", "0/bytes"):
            with suppress(BadImage):
                images.read(member)


def test_a_damaged_page_of_a_parquet_file_is_no_missing_image(tmp_path):
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": [bytes(range(256)) * 9]}), path, use_dictionary=False)
    place = pq.read_metadata(path).row_group(0).column(0).data_page_offset
    whole = bytearray(path.read_bytes())
    whole[place : place + 20] = b"\xff" * 20
    path.write_bytes(whole)
    assert reason(Images(path), "0/image") == "undecodable_image"
    assert reason(Images(path), "0/absent") == "missing_image"


def test_a_file_that_the_system_does_not_give_is_a_bad_image():
    # Of this file the first page is never mapped: reading it is an input/output error.
    assert reason(Images("/proc/self"), "mem") == "undecodable_image"


@pytest.mark.parametrize("ending", MAKE)
def test_a_link_out_of_the_folder_is_not_entered(tmp_path, ending):
    MAKE[ending](tmp_path / f"secret{ending}", CONTENT)
    (tmp_path / "images").mkdir()
    (tmp_path / f"images/link{ending}").symlink_to(tmp_path / f"secret{ending}")
    assert reason(Images(tmp_path / "images"), f"link{ending}/a.jpg") in (
        "forbidden_path",
        "missing_image",
    )


def test_only_regular_members_of_a_tar_are_found(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as file:
        for name, kind in (
            ("link", tarfile.SYMTYPE),
            ("hard", tarfile.LNKTYPE),
            ("pipe", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            file.addfile(info)
    assert {reason(Images(path), name) for name in ("link", "hard", "pipe")} == {"missing_image"}
    tar(path, CONTENT, prefix="./")
    assert Images(path).read("a.jpg") == b"first"
    tar(path, CONTENT, mode="w:gz")
    assert reason(Images(path), "a.jpg") == "undecodable_image"


def test_what_a_zip_claims_to_hold_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 1000)
    zipped(tmp_path / "x.zip", {"bomb": b"0" * 1_000_000, "small": b"0"})
    assert reason(Images(tmp_path), "x.zip/bomb") == "image_too_large"
    assert Images(tmp_path).read("x.zip/small") == b"0"
    (tmp_path / "large.png").write_bytes(b"0" * 1001)
    assert reason(Images(tmp_path), "large.png") == "image_too_large"


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
FREE = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FREE
@given(
    st.dictionaries(NAMES.filter(lambda name: name not in (".", "..")), st.binary(max_size=40)),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.integers(1, 50),
)
def test_offsets_into_base64_find_what_json_would(tmp_path, content, ascii_only, indent, block):
    path = tmp_path / "x.json"
    base64_json(path, content, ensure_ascii=ascii_only, indent=indent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK", block)
        archive = sources.Base64Json(path)
    assert {name: archive.read(name) for name in content} == content


@pytest.mark.parametrize(
    "text",
    [
        '["a"]',
        '{"a": 5}',
        '{"a": {"b": "c"}}',
        '{"a": "b"',
        '{"a"}',
        '{"a": "b',
        "{,}",
        "",
        '{"a": "b"} x',
    ],
)
def test_what_is_no_object_of_texts_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert reason(Images(tmp_path), "x.json/a") == "undecodable_image"


def test_escapes_line_breaks_and_heads_of_base64_are_understood(tmp_path):
    code = base64.b64encode(bytes(range(256))).decode()
    assert "/" in code
    held = {
        "a": code.replace("/", "\\/"),
        "b": f"data:image/png;base64,{code}",
        "c": code[:9] + "\\n" + code[9:],
    }
    members = ",".join(f'"{name}": "{text}"' for name, text in held.items())
    (tmp_path / "x.json").write_text(f"{{{members}}}")
    assert {Images(tmp_path).read(f"x.json/{name}") for name in held} == {bytes(range(256))}
    (tmp_path / "x.json").write_text('{"a": "abc", "b": "\\u20ac"}')
    assert reason(Images(tmp_path), "x.json/a") == "undecodable_image"


def test_fifty_megabytes_of_base64_are_found_in_the_memory_of_a_few(tmp_path):
    code = base64.b64encode(os.urandom(40_000)).decode()
    with open(tmp_path / "SD.json", "w") as file:
        file.write("{" + ", ".join(f'"SD_IMG_{i}": "{code}"' for i in range(1000)) + "}")
    tracemalloc.start()
    try:
        assert len(Images(tmp_path / "SD.json").read("SD_IMG_999")) == 40_000
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()


def test_images_within_annotations_are_named_by_their_place(tmp_path):
    (tmp_path / "shop").mkdir()
    image = {"bytes": b"one", "path": "ignored.png"}
    part = {"type": "image", "text": None, "image": {"bytes": b"two", "path": None}}
    chat = [
        {"role": "user", "content": [{"type": "image", "text": None, "image": None}, part]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two.", "image": None}]},
    ]
    held = [{"messages": chat, "images": [image]}] * 3
    pq.write_table(pa.Table.from_pylist(held), tmp_path / "shop/a.parquet", row_group_size=2)
    for folder in ("shop", "shop/a.parquet"):
        config = SetConfig(reader="hf_messages", annotations=("shop/a.parquet",), images=folder)
        *_, found = read("set", config=config, root=tmp_path, max_images=8, seed=0)
        images = Images(tmp_path / folder)
        assert [images.read(ref.path) for ref in found.images] == [b"one", b"two"]
        assert found.images[1].path.endswith("2/messages/0/content/1/image")
    config = SetConfig(reader="hf_messages", annotations=("shop/a.parquet",), images="other")
    with pytest.raises(ValueError, match=r"a\.parquet holds images itself; name it"):
        list(read("set", config=config, root=tmp_path, max_images=8, seed=0))


def test_places_in_a_parquet_file_that_hold_no_image_are_missing(tmp_path):
    pq.write_table(pa.table({"image": [b"x"], "text": ["word"], "n": [7]}), tmp_path / "x.parquet")
    images = Images(tmp_path)
    assert images.read("x.parquet/0/image") == b"x"
    for place in ("1/image", "-1/image", "0", "0/absent", "0/n", "0/image/3", "0/text/x", "image"):
        assert reason(images, f"x.parquet/{place}") == "missing_image"


def test_a_pickle_is_data_like_any_other(tmp_path):
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    code = pickle.dumps(Evil())
    for ending, make in MAKE.items():
        make(tmp_path / f"x{ending}", {"a": code})
        assert Images(tmp_path).read(f"x{ending}/a") == code
    assert not ran.exists()


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("data:image/png;base64,Zmlyc3Q=", b"first"),
        ("data:;base64,", b""),
        ("data:image/png;base64,Zm", None),
        ("data:,é", None),
    ],
)
def test_a_data_uri_holds_its_image(tmp_path, uri, expected):
    if expected is None:
        assert reason(Images(tmp_path), uri) == "undecodable_image"
    else:
        assert Images(tmp_path).read(uri) == expected
