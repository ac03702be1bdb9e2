"""Open, check, decode and resize one image, safely: what an annotation names is not trusted."""

import builtins
import hashlib
import io
import json
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from transformers.utils.hub import cached_file

from dsvl.data.sources import BadImage, Images

FORMATS = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


@dataclass(frozen=True, slots=True)
class StoredImage:
    """What is kept of an image, which was decoded in full."""

    key: str
    """sha256 of the bytes, in hexadecimal."""
    bytes: builtins.bytes = field(repr=False)
    path: str
    """As the annotation has it, relative to the images of its set; of a `data:` URI the head."""
    width: int
    height: int
    mime: str
    fitted: np.ndarray = field(repr=False)
    """(3, P, P) uint8, as `ImageProcessor.fit` gives it."""


@dataclass(frozen=True)
class ImageProcessor:
    """How a tower's image is prepared: resized to a square, then normalised."""

    size: int
    """Pixels of each edge afterwards, P."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: bool = True
    """Keep its proportions and crop its centre, as CLIP does; else squeeze all of it into the square."""

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> "ImageProcessor":
        """Read `preprocessor_config.json`.

        Raises ValueError where it asks for anything but a bicubic resize, of the shortest edge to
        the size of the crop or of the whole image to a square; FileNotFoundError where there is none.
        """
        path = Path(folder) / "preprocessor_config.json"
        if not Path(folder).is_dir() and str(folder).count("/") == 1:  # a name on the hub
            try:
                path = Path(str(cached_file(str(folder), path.name)))
            except OSError as error:
                raise FileNotFoundError(f"{folder}: neither a folder nor on the hub") from error
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; name a folder that holds a checkpoint")
        settings = json.loads(path.read_text(encoding="utf-8"))
        size, crop = settings.get("size"), settings.get("crop_size")
        if isinstance(size, int):
            size = {"shortest_edge": size}
        if isinstance(crop, int):
            crop = {"height": crop, "width": crop}
        if not settings.get("do_center_crop", crop):
            crop = None
        edge = next(iter(size.values())) if isinstance(size, dict) and size else None
        square = {"height": edge, "width": edge}
        known = (size, crop) in (({"shortest_edge": edge}, square), (square, None))
        if not isinstance(edge, int) or not known or settings.get("resample", 3) != 3:
            raise ValueError(
                f"{path}: size={size}, crop_size={crop}, resample={settings.get('resample')}: must, "
                "with resample=3 (bicubic), resize the shortest edge to a square crop of that size, "
                "or the whole image to a square"
            )
        mean, std = tuple(settings["image_mean"]), tuple(settings["image_std"])
        return cls(edge, mean, std, crop=crop is not None)

    def fit(self, image: Image.Image) -> np.ndarray:
        """(3, P, P) uint8 of an RGB image: its centre, the shortest edge resized to P, or all of it."""
        if not self.crop:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
            return np.asarray(image).transpose(2, 0, 1)
        short = min(image.size)
        # The pixel cap allows strips of 1 x 50,000,000, which a resize of the shortest edge would
        # blow up to P times P * 50,000,000: only their middle is resized.
        image = _centre(image, *(min(edge, 16 * short) for edge in image.size))
        resized = [int(self.size * edge / short) for edge in image.size]
        image = image.resize(resized, Image.Resampling.BICUBIC)
        return np.asarray(_centre(image, self.size, self.size)).transpose(2, 0, 1)

    def normalise(self, fitted: np.ndarray) -> np.ndarray:
        """(3, P, P) float32 of (3, P, P) uint8: scaled to [0, 1], then by mean and std."""
        return np.stack([t.take(c) for t, c in zip(self._normalised, fitted, strict=True)])

    @cached_property
    def _normalised(self) -> np.ndarray:
        """(3, 256) float32: what each value of each channel becomes."""
        scaled = (np.arange(256) / 255).astype(np.float32)
        mean, std = (np.array(values, np.float32)[:, None] for values in (self.mean, self.std))
        return (scaled - mean) / std


def load(images: Images, ref: str, *, processor: ImageProcessor, max_pixels: int) -> StoredImage:
    """Read, decode and fit the image that an annotation names.

    Raises BadImage: as `Images.read` does; `image_too_large` by its header, before it is decoded;
    `undecodable_image`.
    """
    data = images.read(ref)
    image = _open(data, max_pixels=max_pixels)
    decoded = _decode(image)
    return StoredImage(
        key=hashlib.sha256(data).hexdigest(),
        bytes=data,
        path=ref.partition(",")[0] if ref.startswith("data:") else ref,
        width=decoded.width,
        height=decoded.height,
        mime=FORMATS.get(str(image.format), "image/jpeg"),
        fitted=processor.fit(decoded),
    )


def pixels(data: bytes, processor: ImageProcessor) -> np.ndarray:
    """(3, P, P) float32 pixels of an encoded image, as the tower takes them.

    Raises BadImage where the bytes are no image, or one of over 178 million pixels.
    """
    return processor.normalise(processor.fit(_decode(_open(data))))


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _open(data: bytes, *, max_pixels: int | None = None) -> Image.Image:
    if not data:
        raise BadImage("undecodable_image", "the file is empty")
    with warnings.catch_warnings():
        # Its own limit is applied on opening; ours, which is lower and a setting, comes below.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
        except Image.DecompressionBombError as error:
            raise BadImage("image_too_large", str(error)) from error
        except Exception as error:
            raise _undecodable(data, error) from error
    if max_pixels is not None and image.width * image.height > max_pixels:
        detail = f"{image.width} x {image.height} pixels, more than {max_pixels} in all"
        raise BadImage("image_too_large", detail)
    return image


def _decode(image: Image.Image) -> Image.Image:
    """The image in full, upright, as RGB."""
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return image.convert("RGB")
    except Exception as error:
        raise _undecodable(b"", error) from error


def _undecodable(data: bytes, error: Exception) -> BadImage:
    # Hostile bytes raise anything in a decoder: OSError, SyntaxError, struct.error, zlib.error ...
    if data.lstrip()[:1] == b"<":
        return BadImage("undecodable_image", "the file is HTML or XML, not an image")
    if isinstance(error, Image.UnidentifiedImageError):
        return BadImage("undecodable_image", f"the file is none of {', '.join(FORMATS)}")
    return BadImage("undecodable_image", f"{type(error).__name__}: {error}")
