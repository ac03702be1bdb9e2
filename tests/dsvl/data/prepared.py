"""A prepared set made of conversations in memory, without Ray."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from dsvl.data.encode import Encoder
from dsvl.data.folders import sha256
from dsvl.data.images import ImageProcessor, StoredImage
from dsvl.data.shard import ImageShard
from dsvl.data.spool import Row, samples, spool
from dsvl.data.types import Conversation, Rejected
from dsvl.data.writer import Writer

PROCESSOR = ImageProcessor(8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Sample:
    """A conversation that is kept."""

    conversation: Conversation
    images: tuple[str, ...]
    """Keys."""
    split: str
    group_keys: tuple[str, ...]


def take_over(writer: Writer, images: Sequence[StoredImage], *, edge: int = 8) -> None:
    """Give a writer images."""
    with TemporaryDirectory(dir=writer.folder.parent) as folder:
        shard = ImageShard(Path(folder), edge=edge)
        for image in images:
            shard.append(image, source_id=f"set/{image.path}")
        shard.close()
        digests = {path.name: sha256(path) for path in Path(folder).iterdir()}
        writer.images(Path(folder), digests, wanted={image.key for image in images})


def write(
    folder: Path,
    kept: Sequence[Sample],
    *,
    encoder: Encoder,
    images: Mapping[str, StoredImage],
    quarantine: Sequence[Rejected] = (),
    processor: ImageProcessor = PROCESSOR,
    shard: int = 100,
    max_images: int = 8,
) -> dict:
    """Write a prepared set, `shard` images a shard, and return its manifest."""
    with Writer(
        folder,
        processor=processor,
        image_tokens=encoder.image_tokens,
        pad_id=encoder.pad_id,
        phrases=encoder.phrases(max_images),
    ) as writer:
        stored = list(images.values())
        for first in range(0, len(stored), shard):
            take_over(writer, stored[first : first + shard], edge=processor.size)
        raw = Counter(rejected.source for rejected in quarantine)
        with TemporaryDirectory(dir=folder.parent) as spooled:
            for number, sample in enumerate(kept):
                chat, records = sample.conversation, Path(spooled) / str(number)
                spool([chat], records)
                writer.example(encoder.encode(chat, sample.images))
                row = Row(0, sample.images, sample.split, sample.group_keys)
                writer.samples(samples(records / "00000.parquet", chat.source, [row]))
                raw[chat.source] += len(chat.records)
        return writer.finish(
            quarantine=quarantine,
            bad_images=(),
            raw=raw,
            merged=Counter(),
            identity={"seed": 1},
            about={},
        )
