"""The first token of an answer, where the decoder has read part of the conversation already."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from dsvl.cache import ImageStore
from dsvl.chat import Chat
from dsvl.data.collate import collate
from dsvl.data.types import Conversation, Example, ImageRef, Part, Turn
from dsvl.generate import generate
from dsvl.model import VisualChat
from tests.benchmarks.case import OURS, Case, Target, at_once
from tests.benchmarks.measure import Run
from tests.benchmarks.setting import Setting, pixels, visual_chat, words

ANEW = "all read anew"
IMAGES = 4


class Room:
    """A model to talk to, and what is said and shown."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.model = setting, visual_chat(setting).eval()
        self.tokenizer = words(setting)
        self.pictures = [pixels(setting, str(number)) for number in range(IMAGES)]

    def chat(self, store: ImageStore | None = None) -> Chat:
        """A new conversation."""
        turn = self.setting.size.turn
        return Chat(
            self.model,
            self.tokenizer,
            device=self.setting.device,
            max_tokens=IMAGES * self.setting.size.image_tokens + 100 * turn,
            max_new_tokens=turn,
            store=store,
        )

    def question(self, number: int) -> str:
        """As many words as a turn has, other ones for each number."""
        random, size = np.random.default_rng(number), self.setting.size
        return " ".join(f"w{word}" for word in random.integers(2, size.vocabulary, size=size.turn))

    def anew(self, chat: Chat, question: str) -> str:
        """The first token that follows on a whole conversation, without anything kept of it."""
        turns = (*chat.turns, Turn("user", (Part("text", text=question),)))
        keys = [str(number) for number in range(IMAGES)]
        images = tuple(map(ImageRef, keys))
        example = chat.encoder.encode(Conversation("chat", "", "", images, turns), keys)
        assert isinstance(example, Example)
        batch = collate(
            [example],
            pixels=lambda key: self.pictures[int(key)],
            image_tokens=chat.encoder.image_tokens,
            pad_id=chat.encoder.pad_id,
        )
        batch = batch.to(chat.device)
        ((token,),) = generate(self.model, batch, end=chat.encoder.end, max_new_tokens=1)
        assert token is not None
        return chat.encoder.decode([token])


def second_round(setting: Setting, targets: dict[str, Target]) -> Case:
    """The second of two rounds, which shows no image; the first shows four."""
    room = Room(setting)

    def after_one_round() -> Chat:
        chat = room.chat()
        chat.ask(room.question(1), images=room.pictures)
        return chat

    before = after_one_round()

    def ours() -> Run:
        chat = after_one_round()
        return lambda: next(chat.stream(room.question(2)))

    read = sum(before._cache.past[0])
    return Case(
        "second-round",
        f"Second round of a chat after {IMAGES} images and {read:,} tokens: to the first token",
        {ANEW: at_once(lambda: room.anew(before, room.question(2))), OURS: ours},
        targets,
        same=ANEW,
    )


def known_images(setting: Setting, targets: dict[str, Target]) -> Case:
    """A new conversation that shows images which an earlier one has shown."""
    room, store = Room(setting), ImageStore(limit_bytes=2**34)
    room.chat(store).ask(room.question(1), images=room.pictures)

    def first_token(store: ImageStore | None) -> str:
        return next(room.chat(store).stream(room.question(2), images=room.pictures))

    ways = {ANEW: lambda: first_token(None), OURS: lambda: first_token(store)}
    calls, positions = passes(room.model, ways[OURS])
    return Case(
        "known-images",
        f"New chat that shows {IMAGES} known images: to the first token",
        {name: at_once(run) for name, run in ways.items()},
        targets,
        same=ANEW,
        note=f"{calls} calls of the tower, and {positions} tokens pass through the decoder.",
    )


def passes(model: VisualChat, run: Callable[[], Any]) -> tuple[int, int]:
    """How often a run calls the tower, and how many tokens pass through the decoder."""
    calls, positions = 0, 0

    def seen(module: object, inputs: Sequence[Any], output: object) -> None:
        nonlocal calls
        calls += 1

    def passed(module: object, inputs: Sequence[Any], output: object) -> None:
        nonlocal positions
        positions += inputs[0].shape[1]

    hooks = [
        model.vision.register_forward_hook(seen),
        model.language.model.layers[0].input_layernorm.register_forward_hook(passed),
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls, positions
