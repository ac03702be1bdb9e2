"""How fast images are opened and samples are read: against a DataLoader that does the original's work.

    python -m tests.benchmarks.loading [--write tests/benchmarks/results] [--rounds 7] [--samples 200000]

Images: two processes read, decode, hash and fit photographs to 448 pixels and encode a conversation about
each, as the actors of a preparation do; a `torch.utils.data.DataLoader` with two workers does what the
original does for each sample of each epoch. Both hand over their results. Times are of the processor, over
all processes, and beside them those of the clock; the two ways take turns. Samples: encoded ones by index, in
random order, from a prepared set. About three minutes.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dsvl.config import SetConfig
from dsvl.data.blend import order
from dsvl.data.encode import Encoder, load_tokenizer
from dsvl.data.images import ImageProcessor, StoredImage, load
from dsvl.data.readers import read
from dsvl.data.sources import Images
from dsvl.data.store import Prepared, open_store
from dsvl.data.types import IGNORED, Conversation, Example, ImageRef, Kind, Part, Rejected, Turn
from dsvl.data.writer import Sample, Writer
from tests.benchmarks.case import ORIGINAL, OURS
from tests.benchmarks.made_up import Text
from tests.benchmarks.measure import Figures, ratios, spread
from tests.benchmarks.mmca import machine
from tests.benchmarks.nine_sets import LLAVA, llava

EDGE = 448
"""Pixels of QWen-VL's tower."""
IMAGE_TOKENS = 256
WORKERS = 2
BLOCK = 32
"""Conversations that a process takes at once, as in `orchestration.survey`."""
FASTER = 1.5
"""Target: images a second, against the original's."""
SAMPLES_PER_S = 50_000
"""Target of reading by index."""

Opened = tuple[Example, StoredImage]


def write_set(folder: Path, images: int) -> list[Conversation]:
    """Photographs, a tokenizer and conversations about them, as LLaVA has them."""
    (folder / "images").mkdir()
    for number, data in enumerate(photographs(images)):
        (folder / f"images/{number}.jpg").write_bytes(data)
    style, _ = LLAVA["conversation_58k"]
    records = [llava(number, str(number), style) for number in range(images)]
    (folder / "chats.json").write_text(json.dumps(records), encoding="utf-8")
    CLIPImageProcessorPil(
        size={"shortest_edge": EDGE}, crop_size={"height": EDGE, "width": EDGE}
    ).save_pretrained(folder / "vision")
    write_tokenizer(folder / "language")
    config = SetConfig(reader="llava_dial", annotations=("chats.json",), images="images")
    found = read("chats", config=config, root=folder, max_images=8, seed=0)
    return [chat for chat in found if isinstance(chat, Conversation)]


def photographs(images: int) -> Iterator[bytes]:
    """JPEGs of 640 x 480 pixels, as most of COCO's, cut out of two photographs and their mirror images."""
    one, other = load_sample_images().images
    wall = np.block([[[one], [other]], [[other[:, ::-1]], [one[:, ::-1]]]])
    places = np.random.default_rng(0).integers(
        0, np.subtract(wall.shape[:2], (479, 639)), (images, 2)
    )
    for top, left in places:
        file = BytesIO()
        cut = wall[top : top + 480, left : left + 640]
        Image.fromarray(np.ascontiguousarray(cut)).save(file, "JPEG", quality=90)
        yield file.getvalue()


def write_tokenizer(folder: Path) -> None:
    """A byte-level one that has learnt the words of our texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = Text()
    tokenizer.train_from_iterator((text(100, n, "training") for n in range(200)), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def prepare(folder: Path, block: Sequence[Conversation]) -> list[Opened]:
    """What an actor of the preparation makes of conversations about an image each."""
    images, processor, encoder = _tools(folder)
    done = []
    for chat in block:
        (ref,) = chat.images
        image = load(images, ref.path, processor=processor, max_pixels=50_000_000)
        example = encoder.encode(chat, [image.key])
        assert not isinstance(example, Rejected)
        done.append((example, image))
    return done


@cache
def _tools(folder: Path) -> tuple[Images, ImageProcessor, Encoder]:
    """What a process opens once."""
    tokenizer = load_tokenizer(str(folder / "language"))
    encoder = Encoder(tokenizer, image_tokens=IMAGE_TOKENS, max_tokens=4096)
    processor = ImageProcessor.from_checkpoint(folder / "vision")
    return Images(folder / "images"), processor, encoder


class AsTheOriginal(Dataset):
    """The samples of the original: pixels as floats, every round tokenised with and without its answer."""

    SYSTEM = "You are a powerful vision-language assistant.\n\n### Image 1:\n<image>\n\n"

    def __init__(self, folder: Path, chats: Sequence[Conversation]) -> None:
        self._folder, self._chats = folder, chats
        self._tokenizer = load_tokenizer(str(folder / "language"))
        self._processor = CLIPImageProcessorPil.from_pretrained(folder / "vision")

    def __len__(self) -> int:
        return len(self._chats)

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[int], list[int]]:
        chat = self._chats[index]
        (ref,) = chat.images
        image = Image.open(self._folder / "images" / ref.path).convert("RGB")
        pixels = self._processor(image)["pixel_values"][0]
        ids, labels = [], []
        texts = ["".join(part.text for part in turn.content) for turn in chat.turns]
        for number, (question, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
            asked = f"### Question:\n{question}\n\n### Answer:\n"
            asked = asked if number else self.SYSTEM + asked
            whole = [*self._tokens(asked + answer), self._tokenizer.eos_token_id]
            known = len(self._tokens(asked))
            ids += whole
            labels += [IGNORED] * known + whole[known:]
        return pixels, ids, labels

    def _tokens(self, text: str) -> list[int]:
        bos = [self._tokenizer.bos_token_id]
        return bos + self._tokenizer(text, truncation=True, max_length=511).input_ids


def collated(batch: Sequence[tuple[np.ndarray, list[int], list[int]]]) -> tuple[torch.Tensor, ...]:
    """Pixels of a batch as one tensor, ids and labels padded to the longest."""
    pixels, ids, labels = zip(*batch, strict=True)
    padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return (
        torch.from_numpy(np.stack(pixels)),
        padded([torch.tensor(row) for row in ids]),
        padded([torch.tensor(row) for row in labels], padding_value=IGNORED),
    )


def images_a_second(folder: Path, *, images: int, rounds: int) -> dict[str, Any]:
    """Both ways in turns; the first round only warms up."""
    chats = write_set(folder, images)
    blocks = [chats[start : start + BLOCK] for start in range(0, images, BLOCK)]
    loader = DataLoader(
        AsTheOriginal(folder, chats),
        batch_size=8,
        num_workers=WORKERS,
        persistent_workers=True,
        collate_fn=collated,
    )
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("fork")) as pool:
        ways: dict[str, Callable[[], int]] = {
            ORIGINAL: lambda: sum(len(pixels) for pixels, *_ in loader),
            OURS: lambda: sum(map(len, pool.map(partial(prepare, folder), blocks))),
        }
        figures = {way: Figures() for way in ways}
        for number in range(rounds + 1):
            for way, run in ways.items():
                wall, seconds = time.perf_counter(), processor_seconds()
                assert run() == images
                if number:
                    figures[way].seconds.append(processor_seconds() - seconds)
                    figures[way].wall.append(time.perf_counter() - wall)
    times = ratios(figures[ORIGINAL], figures[OURS])
    by_the_clock = Figures(figures[ORIGINAL].wall), Figures(figures[OURS].wall)
    return {
        "images": images,
        "rounds": rounds,
        "processes": WORKERS,
        "ways": {
            way: {
                "processor_ms_an_image": spread([1000 * s / images for s in found.seconds]),
                "images_per_s": spread([images / s for s in found.wall]),
            }
            for way, found in figures.items()
        },
        "faster": spread(times),
        "faster_by_the_clock": spread(ratios(*by_the_clock)),
        "target": FASTER,
        "met": spread(times)[0] >= FASTER,
    }


def processor_seconds() -> float:
    """Of this process and all that it has started."""
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def samples_a_second(folder: Path, *, samples: int, rounds: int) -> dict[str, Any]:
    """Reading by index, in another random order each round; the first round only warms up."""
    examples = write_prepared(folder / "prepared", samples).train
    figures: dict[str, list[float]] = {"by index": [], "by index, every token read": []}
    for epoch in range(rounds + 1):
        indices = order(len(examples), seed=0, epoch=epoch).tolist()
        for way, found in figures.items():
            began = time.perf_counter()
            if way == "by index":
                for index in indices:
                    examples[index]
            else:
                for index in indices:
                    example = examples[index]
                    for tokens in (example.ids, example.labels, example.kinds):
                        tokens.max()
            if epoch:
                found.append(len(indices) / (time.perf_counter() - began))
    rates = {way: spread(found) for way, found in figures.items()}
    met = rates["by index"][0] >= SAMPLES_PER_S
    return {"samples": samples, "rounds": rounds, "positions": int(examples.lengths.sum()),
            "samples_per_s": rates, "target": SAMPLES_PER_S, "met": met}  # fmt: skip


def write_prepared(folder: Path, samples: int) -> Prepared:
    """A prepared set of short samples with an image each, of which there are a thousand tiny ones."""
    lot = np.random.default_rng(0)
    processor = ImageProcessor(8, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    keys = [f"{number:064x}" for number in range(1000)]
    said = (
        Turn("user", (Part("image", image=0), Part("text", "?"))),
        Turn("assistant", (Part("text", "."),)),
    )

    def kept() -> Iterator[Sample]:
        for number in range(samples):
            key, name = keys[number % len(keys)], f"made/{number}"
            chat = Conversation(name, "made", f"made.json:{number}", (ImageRef(key),), said)
            yield Sample(chat, (key,), "train" if number else "eval", (key, name))

    with Writer(folder, processor=processor, image_tokens=IMAGE_TOKENS, pad_id=0) as writer:
        for key in keys:
            fitted = lot.integers(0, 256, (3, 8, 8), np.uint8)
            image = StoredImage(key, key.encode(), f"{key}.jpg", 8, 8, "image/jpeg", fitted)
            writer.image(image, source_id=f"made/{key}")
        for number, words in enumerate(lot.integers(40, 240, samples).tolist()):
            kinds = np.repeat(np.array([Kind.IMAGE, Kind.TEXT], np.int8), (IMAGE_TOKENS, words))
            ids = np.where(kinds == Kind.TEXT, number % 32_000, 0).astype(np.int32)
            labels = np.where(np.arange(len(ids)) > IMAGE_TOKENS + words // 2, ids, IGNORED)
            key = keys[number % len(keys)]
            writer.example(Example(f"made/{number}", ids, labels.astype(np.int32), kinds, (key,)))
        raw = {"made": samples}
        writer.finish(kept(), quarantine=(), bad_images=(), raw=raw, identity={})
    return open_store(folder)


def table(document: dict[str, Any]) -> str:
    """All figures as Markdown."""
    images, samples, of = document["images"], document["samples"], document["machine"]
    lines = [
        f"`{document['command']}`, {document['seconds']} s in all.",
        f"{of['device']}, {of['cores']} cores, torch {of['torch']}. Medians, least and most in brackets.",
        "",
        f"### {images['images']} photographs of 640 x 480 to {EDGE} pixels, each with a conversation",
        "",
        f"| {images['processes']} processes, {images['rounds']} rounds | ms of the processor an image "
        "| images/s by the clock |",
        "|---|---|---|",
    ]
    for way, found in images["ways"].items():
        ms, rate = found["processor_ms_an_image"], found["images_per_s"]
        lines.append(f"| {way} | {_spread(ms, 2)} | {_spread(rate, 0)} |")
    reached = {True: "met", False: "MISSED"}
    lines += [
        "",
        f"dsvl is {_spread(images['faster'], 2)} times as fast (target {images['target']}: "
        f"{reached[images['met']]}), by the clock {_spread(images['faster_by_the_clock'], 2)}.",
        "",
        f"### Samples by index, of {samples['samples']:,} with {samples['positions']:,} positions in all",
        "",
        f"| {samples['rounds']} rounds, one process | samples/s |",
        "|---|---|",
        *(f"| {way} | {_spread(found, 0)} |" for way, found in samples["samples_per_s"].items()),
        "",
        f"Target: {samples['target']:,} by index: {reached[samples['met']]}.",
    ]
    return "\n".join(lines) + "\n"


def _spread(values: Sequence[float], digits: int) -> str:
    median, least, most = (f"{value:,.{digits}f}" for value in values)
    return f"{median} [{least}..{most}]"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", type=Path, metavar="FOLDER")
    options = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core a process
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        images = images_a_second(Path(folder), images=options.images, rounds=options.rounds)
        samples = samples_a_second(Path(folder), samples=options.samples, rounds=options.rounds)
    document = {
        "machine": machine(torch.device("cpu")),
        "command": f"python -m tests.benchmarks.loading {' '.join(sys.argv[1:])}".strip(),
        "seconds": round(time.monotonic() - began),
        "images": images,
        "samples": samples,
    }
    print(table(document))
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        text = json.dumps(document, indent=1) + "\n"
        (options.write / "loading.json").write_text(text, encoding="utf-8")
        (options.write / "loading.md").write_text(table(document), encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
