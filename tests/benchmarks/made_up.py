"""Numbers, words and pictures that are made up, each a pure function of a counter and a purpose."""

import random
from io import BytesIO
from zlib import crc32

import numpy as np
from PIL import Image

WORDS = """
a an the this that one two three several many some most small large young old red green blue white
dark bright wooden metal round tall open busy quiet empty man woman child boy girl person people dog
cat horse bird bear bus car train truck boat plane bicycle street road bridge park beach field
mountain river lake sky cloud tree flower grass wall door window table chair bench lamp book cup
plate pizza cake apple banana bottle bowl knife umbrella bag kite ball racket surfboard skateboard
snow rain sun light shadow is are was has holds shows wears rides carries watches stands sits walks
runs waits plays eats looks leans lies moves turns and or but while because with without near behind
beside under over between in on at from to toward across into of for as it its their his her they
there likely perhaps clearly also together slowly carefully front background foreground left right
center scene image
"""


def dealt(whole: int, parts: int, part: int) -> int:
    """How many of `whole` are in one of the parts, if they are dealt evenly."""
    return (part + 1) * whole // parts - part * whole // parts


def draw(counter: int, purpose: str) -> int:
    """A random number of 32 bits, which depends on nothing else: the finaliser of MurmurHash3."""
    bits = (counter * 0x9E3779B1 + crc32(purpose.encode())) & 0xFFFFFFFF
    bits = ((bits ^ bits >> 16) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ bits >> 13) * 0xC2B2AE35) & 0xFFFFFFFF
    return bits ^ bits >> 16


def between(limits: tuple[int, int], counter: int, purpose: str) -> int:
    """A random number from the first to the last, both included."""
    first, last = limits
    return first + draw(counter, purpose) % (last - first + 1)


class Pictures:
    """Small JPEGs: few different pictures, but each file has its name in a comment, so no two are equal."""

    def __init__(self, edge: int, different: int = 256) -> None:
        self._made = [self._jpeg(edge, seed) for seed in range(different)]

    def __call__(self, name: str) -> bytes:
        """The bytes of a file."""
        made = self._made[crc32(name.encode()) % len(self._made)]
        comment = b"\xff\xfe" + (2 + len(name)).to_bytes(2) + name.encode()
        return made[:20] + comment + made[20:]  # behind the header, which has to come first

    @staticmethod
    def _jpeg(edge: int, seed: int) -> bytes:
        colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
        size, file = (edge, edge * 3 // 4), BytesIO()
        Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG")
        return file.getvalue()


class Text:
    """Sentences of random words, cut out of one long text."""

    def __init__(self, words: int = 1 << 16, sentence: int = 11) -> None:
        lot, known = random.Random(0), WORDS.split()
        text = [lot.choice(known) for _ in range(words)]
        text[::sentence] = [word.capitalize() for word in text[::sentence]]
        text[sentence - 1 :: sentence] = [f"{word}." for word in text[sentence - 1 :: sentence]]
        self._text = " ".join(text)
        self._starts = [0, *(1 + at for at, char in enumerate(self._text) if char == " ")]
        self._sentences = range(0, words - 1000, sentence)

    def __call__(self, words: int, counter: int, purpose: str, end: str = ".") -> str:
        """So many words from the beginning of some sentence."""
        first = self._sentences[draw(counter, purpose) % len(self._sentences)]
        cut = self._text[self._starts[first] : self._starts[first + words]]
        return cut.rstrip(" .") + end
