"""The types that data passes through, from a raw record to a batch; standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy
    import torch

    from dsvl.data.layout import Layout

Reason = Literal[
    "held_out",
    "missing_image",
    "undecodable_image",
    "forbidden_path",
    "image_too_large",
    "too_many_images",
    "unpaired_round",
    "bad_roles",
    "empty_answer",
    "marker_mismatch",
    "too_long",
    "straddles_split",
]
"""Why a raw record did not come through."""

IGNORED = -100
"""The label of a token that is not trained."""


class Kind(IntEnum):
    """What a position of a sequence holds; the values are those of the attention contract."""

    PAD = 0
    TEXT = 1
    IMAGE = 2


@dataclass(frozen=True, slots=True)
class Row:
    """A raw record as an annotation file has it, whatever it holds."""

    file: str
    """The annotation file, as its set names it."""
    position: int
    """Counted from 0 within the file."""
    key: str
    """Its name, where the file is an object of records; else empty."""
    value: Any


@dataclass(frozen=True, slots=True)
class Rejected:
    """A raw record that cannot become a conversation."""

    source: str
    record: str
    """Where it stands: file name and position, then its own id if it has one."""
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image as the annotation names it: a path below the images of its set, or a `data:` URI.

    The path may lead through an archive, to a member of `birds.tar/1.jpg`; see `dsvl.data.sources`.
    """

    path: str


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a turn: text, an image shown here, or a reference to an image shown before."""

    type: Literal["text", "image", "ref"]
    text: str = ""
    image: int = -1
    """Index into the conversation's images, for `image` and `ref`."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says."""

    role: Literal["system", "user", "assistant"]
    content: tuple[Part, ...]

    @property
    def supervise(self) -> bool:
        """Whether its tokens are trained: answers are, questions are not."""
        return self.role == "assistant"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat over images, before any template, numbering or token."""

    id: str
    """`SOURCE/KEY`, unique in the prepared set."""
    source: str
    record: str
    """Where the raw record stands, for messages."""
    images: tuple[ImageRef, ...]
    """In the order of their first use."""
    turns: tuple[Turn, ...]
    meta: Mapping[str, str] = field(default_factory=dict)
    merged: tuple[str, ...] = ()
    """Where the other raw records stand whose rounds are in this one."""

    @property
    def records(self) -> tuple[str, ...]:
        """Where all the raw records stand that it is made of."""
        return (self.record, *self.merged)


@dataclass(frozen=True, slots=True)
class Example:
    """An encoded conversation of S positions, images already given their room."""

    id: str
    ids: "numpy.ndarray"
    """(S,) int32 token ids; image positions hold the padding id."""
    labels: "numpy.ndarray"
    """(S,) int32: the token itself where it is trained, else IGNORED. Not shifted."""
    kinds: "numpy.ndarray"
    """(S,) int8 of Kind."""
    images: tuple[str, ...]
    """sha256 keys; the k-th run of image positions belongs to the k-th image."""


@dataclass(frozen=True, slots=True)
class Encoded(Example):
    """A conversation encoded by itself, and where it may be taken apart."""

    source: str
    """The set it is of."""
    alone: bool
    """Whether it has a system turn of its own, so that no other conversation may stand beside it."""
    rounds: "numpy.ndarray"
    """(R, 4) int32 of every round: where its question starts (after its images), where its answer starts,
    where it ends, and how many images have been shown by then."""
    refs: "numpy.ndarray"
    """(n, 4) int32 of every reference to an image: start, end, the image, and whether a blank is with it."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples in B rows, padded on the right to S positions."""

    ids: "torch.Tensor"
    """(B, S) int64."""
    labels: "torch.Tensor"
    """(B, S) int64."""
    images: tuple[str, ...]
    """sha256 keys of the I images, row by row in order of appearance; I may be 0."""
    pixels: "torch.Tensor"
    """(I, 3, P, P), or (I, tokens, hidden_size) features that the tower has already made of them."""
    layout: "Layout"
    """Where text, images and labels lie."""

    @property
    def targets(self) -> int:
        """How many supervised tokens the loss is over."""
        return len(self.layout.wanted)

    @property
    def kinds(self) -> "torch.Tensor":
        """(B, S) int8 of Kind."""
        return self.layout.kinds

    def to(self, device: "torch.device") -> "Batch":
        """The same batch on another device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("ids", "labels", "pixels")
        }
        return replace(self, layout=self.layout.to(device), **moved)
