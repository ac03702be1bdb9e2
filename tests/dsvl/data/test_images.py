"""One image, safely."""

import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from dsvl.data.images import ImageProcessor, load, pixels
from dsvl.data.sources import BadImage, Images
from tests.conftest import raw_records

PROCESSOR = ImageProcessor(8, mean=(0.5, 0.4, 0.3), std=(0.5, 0.6, 0.7))
LIMIT = 50_000_000


def open_image(llava_set, ref: str, max_pixels: int = LIMIT):
    return load(Images(llava_set / "images"), ref, processor=PROCESSOR, max_pixels=max_pixels)


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def clip(size: int) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )


@pytest.mark.parametrize("size", [8, 224])
@pytest.mark.parametrize(
    "shape", [(8, 8), (640, 480), (333, 640), (1001, 100), (3, 40), (225, 224)]
)
def test_pixels_are_those_of_the_clip_processor_of_transformers(tmp_path, size, shape):
    theirs = clip(size)
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_checkpoint(tmp_path)
    image = noise(*shape)
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    found = pixels(encoded(image), ours)
    assert (found.shape, found.dtype) == ((3, size, size), np.float32)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(16, 16), (640, 480), (3, 40)])
def test_pixels_are_those_of_the_siglip_processor_of_transformers(tmp_path, shape):
    theirs = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    theirs.save_pretrained(tmp_path)
    ours = ImageProcessor.from_checkpoint(tmp_path)
    image = noise(*shape)
    expected = theirs(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(pixels(encoded(image), ours), expected)


def test_a_squeezed_image_keeps_its_edges():
    image = Image.new("RGB", (40, 8))
    image.paste((255, 0, 0), (0, 0, 8, 8))  # outside the central square
    squeezing = ImageProcessor(8, PROCESSOR.mean, PROCESSOR.std, crop=False)
    assert squeezing.fit(image)[0].any()
    assert not PROCESSOR.fit(image)[0].any()


def test_a_strip_within_the_pixel_cap_is_fitted_without_blowing_it_up(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def spy(image, size, *rest):
        sizes.append(tuple(size))
        return resize(image, size, *rest)

    monkeypatch.setattr(Image.Image, "resize", spy)
    assert PROCESSOR.fit(Image.new("RGB", (100_000, 1))).shape == (3, 8, 8)
    assert sizes == [(128, 8)]


@pytest.mark.parametrize(
    "change",
    [
        {"resample": 2},
        {"crop_size": {"height": 4, "width": 4}},
        {"size": {"height": 8, "width": 8}},
        {"size": {"height": 8, "width": 6}, "crop_size": None},
        {"do_center_crop": False},
        {"size": None},
    ],
)
def test_a_processor_of_another_kind_is_refused(tmp_path, change):
    clip(8).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"with resample=3 \(bicubic\), resize the shortest edge"):
        ImageProcessor.from_checkpoint(tmp_path)


def test_a_checkpoint_without_a_processor_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json: no such file"):
        ImageProcessor.from_checkpoint(tmp_path)


def test_loading_keeps_the_bytes_their_hash_and_the_size(llava_set):
    image = open_image(llava_set, "sub/white.webp")
    content = (llava_set / "images/sub/white.webp").read_bytes()
    assert image.bytes == content
    assert image.key == hashlib.sha256(content).hexdigest()
    assert (image.path, image.mime) == ("sub/white.webp", "image/webp")
    assert (image.width, image.height) == (24, 16)
    assert image.fitted.dtype == np.uint8
    assert image.fitted.min() > 250


def test_a_link_within_the_folder_is_followed(llava_set):
    (llava_set / "images/alias.png").symlink_to(llava_set / "images/red.png")
    assert open_image(llava_set, "alias.png").key == open_image(llava_set, "red.png").key


FAULTS = [
    (raw["image"], raw["expect"])
    for raw in raw_records("broken.json")
    if isinstance(raw.get("image"), str) and raw["expect"].endswith(("_image", "_path", "_large"))
]


@pytest.mark.parametrize(("ref", "reason"), FAULTS, ids=[ascii(ref)[:30] for ref, _ in FAULTS])
def test_a_bad_image_is_refused_with_its_reason(llava_set, ref, reason):
    with pytest.raises(BadImage) as caught:
        open_image(llava_set, ref)
    assert caught.value.reason == reason
    assert caught.value.detail.isprintable()


def test_forbidden_paths_are_never_opened(llava_set, monkeypatch):
    opened = []
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda path: opened.append(path))
    for ref, reason in FAULTS:
        if reason == "forbidden_path":
            with pytest.raises(BadImage):
                open_image(llava_set, ref)
    assert not opened


def test_a_loop_of_links_and_a_pipe_are_refused(llava_set):
    (llava_set / "images/loop.png").symlink_to("loop.png")
    os.mkfifo(llava_set / "images/pipe.png")
    for ref in ("loop.png", "pipe.png"):
        with pytest.raises(BadImage):
            open_image(llava_set, ref)


def test_the_pixel_cap_is_on_the_product_and_inclusive(llava_set):
    assert open_image(llava_set, "red.png", max_pixels=24 * 16).width == 24
    with pytest.raises(BadImage, match="24 x 16 pixels, more than 383"):
        open_image(llava_set, "red.png", max_pixels=24 * 16 - 1)


def png(width: int, height: int, *, rows: int, chunks: bytes = b"") -> bytes:
    """A grey PNG whose header and whose data differ: so many black rows, packed a thousand to one."""
    packed, size = zlib.compressobj(9), rows * (1 + width)
    blocks = (packed.compress(bytes(min(1 << 20, size - at))) for at in range(0, size, 1 << 20))
    data = b"".join([*blocks, packed.flush()])
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + chunks + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PEAK = """
import json, re, sys
from pathlib import Path
from dsvl.data.images import ImageProcessor, load
from dsvl.data.sources import BadImage, Images

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3

images, processor = Images(sys.argv[1]), ImageProcessor(8, (0.5,) * 3, (0.5,) * 3)
load(images, "ordinary.png", processor=processor, max_pixels=50_000_000)
before, found = peak(), {}
for name in sys.argv[2:]:
    try:
        load(images, name, processor=processor, max_pixels=50_000_000)
        found[name] = "used"
    except BadImage as bad:
        found[name] = bad.reason
print(json.dumps([found, peak() - before]))
"""


def test_no_bomb_takes_200_megabytes(tmp_path):
    text = zlib.compress(bytes(300_000_000), 9)
    described, profile = (chunk(kind, b"a\0\0" + text) for kind in (b"zTXt", b"iCCP"))
    bombs = {
        "header.png": (png(14_000, 14_000, rows=0), "image_too_large"),
        "whole.png": (png(13_000, 13_000, rows=13_000), "image_too_large"),
        "more-than-it-says.png": (png(10, 10, rows=20_000_000), "used"),
        "text.png": (png(10, 10, rows=10, chunks=described), "undecodable_image"),
        "profile.png": (png(10, 10, rows=10, chunks=profile), "undecodable_image"),
    }
    (tmp_path / "ordinary.png").write_bytes(png(10, 10, rows=10))
    for name, (data, _) in bombs.items():
        assert len(data) < 2_000_000
        (tmp_path / name).write_bytes(data)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb.png", bytes(300_000_000))
    command = [sys.executable, "-c", PEAK, tmp_path, *bombs, "x.zip/bomb.png"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, megabytes = json.loads(done.stdout)
    expected = {name: reason for name, (_, reason) in bombs.items()}
    assert found == expected | {"x.zip/bomb.png": "image_too_large"}
    assert megabytes < 200


def test_orientation_of_a_camera_is_applied():
    image = Image.new("RGB", (16, 16), (255, 0, 0))
    image.paste((0, 0, 255), (0, 0, 16, 8))  # blue above red
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    upright = pixels(encoded(image, "JPEG", exif=exif, quality=95), PROCESSOR)
    assert upright[0, 0, 0] > upright[0, -1, 0]


def test_a_file_of_several_pictures_is_its_first(tmp_path):
    """As telephones write them, a JPEG with another one behind it (MPO)."""
    first = noise(16, 16)
    data = encoded(first, "MPO", save_all=True, append_images=[noise(8, 8)], quality=95)
    (tmp_path / "phone.jpg").write_bytes(data)
    stored = load(Images(tmp_path), "phone.jpg", processor=PROCESSOR, max_pixels=LIMIT)
    assert (stored.mime, stored.width, stored.bytes) == ("image/jpeg", 16, data)


def test_the_size_of_a_picture_is_that_of_it_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    (tmp_path / "a.jpg").write_bytes(encoded(noise(24, 16), "JPEG", exif=exif))
    stored = load(Images(tmp_path), "a.jpg", processor=PROCESSOR, max_pixels=LIMIT)
    assert (stored.width, stored.height) == (16, 24)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_every_mode_becomes_rgb(mode):
    assert pixels(encoded(noise(16, 16).convert(mode)), PROCESSOR).shape == (3, 8, 8)


def test_cmyk_becomes_rgb():
    assert pixels(encoded(noise(16, 16).convert("CMYK"), "JPEG"), PROCESSOR).shape == (3, 8, 8)


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    found = PROCESSOR.normalise(
        PROCESSOR.fit(Image.fromarray((ramp >> 8).astype(np.uint8)).convert("RGB"))
    )
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(ramp)), PROCESSOR), found)


WHOLE = encoded(noise(20, 20), "JPEG"), encoded(noise(20, 20)), encoded(noise(20, 20), "WEBP")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(WHOLE), st.data())
def test_damaged_bytes_give_pixels_or_a_bad_image_and_nothing_else(whole, data):
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 8))):
        if damaged:
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(BadImage):
        assert pixels(bytes(damaged), PROCESSOR).shape == (3, 8, 8)
