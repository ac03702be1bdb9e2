"""Photographs and conversations about them, opened as a preparation does it and as the original does."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from dsvl.config import SetConfig
from dsvl.data.encode import Encoder, load_tokenizer
from dsvl.data.images import ImageProcessor, StoredImage, load
from dsvl.data.readers import read
from dsvl.data.sources import Images
from dsvl.data.types import IGNORED, Conversation, Example, Rejected
from tests.benchmarks.made_up import Text
from tests.benchmarks.nine_sets import LLAVA, llava

EDGE = 448
"""Pixels of QWen-VL's tower."""
IMAGE_TOKENS = 256


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


class AsPrepared(Dataset):
    """What an actor of a preparation makes of conversations about an image each."""

    def __init__(self, folder: Path, chats: Sequence[Conversation]) -> None:
        self._images, self._chats = Images(folder / "images"), chats
        self.processor = ImageProcessor.from_checkpoint(folder / "vision")
        tokenizer = load_tokenizer(str(folder / "language"))
        self.encoder = Encoder(tokenizer, image_tokens=IMAGE_TOKENS, max_tokens=4096)

    def __len__(self) -> int:
        return len(self._chats)

    def __getitem__(self, index: int) -> tuple[StoredImage, Example]:
        chat = self._chats[index]
        (ref,) = chat.images
        image = load(self._images, ref.path, processor=self.processor, max_pixels=50_000_000)
        example = self.encoder.encode(chat, [image.key])
        assert not isinstance(example, Rejected)
        return image, example

    @staticmethod
    def batch(opened: Sequence[tuple[StoredImage, Example]]) -> tuple[torch.Tensor, list, list]:
        """Resized images as one tensor, which goes through shared memory; files and examples."""
        fitted = torch.from_numpy(np.stack([image.fitted for image, _ in opened]))
        return fitted, [(image.key, image.bytes) for image, _ in opened], [e for _, e in opened]


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

    @staticmethod
    def batch(
        opened: Sequence[tuple[np.ndarray, list[int], list[int]]],
    ) -> tuple[torch.Tensor, ...]:
        """Pixels as one tensor, ids and labels padded to the longest."""
        pixels, ids, labels = zip(*opened, strict=True)
        padded = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
        return (
            torch.from_numpy(np.stack(pixels)),
            padded([torch.tensor(row) for row in ids]),
            padded([torch.tensor(row) for row in labels], padding_value=IGNORED),
        )
