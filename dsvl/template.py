"""The text of a turn (paper, figure 3): the only place where prompts are written.

    SYSTEM ### Image 1:⏎ [image] ⏎⏎ ### Question:⏎ {question} ⏎⏎ ### Answer:⏎ {answer} [end] ...

No special tokens mark images or roles: the paper found that they made answers worse.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dsvl.data.types import Part, Turn

BETWEEN_IMAGES = "\n"
AFTER_IMAGES = "\n\n"
QUESTION = "### Question:\n"
ANSWER = "\n\n### Answer:\n"


@dataclass(frozen=True, slots=True)
class Template:
    """What differs between the templates."""

    system: str
    """Opens every conversation that has no system turn of its own."""
    begins_rounds: bool = False
    """Put the token that begins a text (BOS) before every round, not only before the first."""


TEMPLATES = {
    "paper": Template("You are a powerful vision-language assistant.\n\n"),
    "original": Template(
        "You are a helpful language and vision assistant. You are able to understand the visual content "
        "that the user provides, and assist the user with a variety of tasks using natural language.\n\n",
        begins_rounds=True,
    ),
}
"""Of figure 3, and of the code that the paper was made with (DeepSpeedExamples, DeepSpeed-VisualChat)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is tokenised on its own.

    As no token spans two pieces, a tokenizer that merges across characters cannot blur where an answer
    starts, and encoded rounds can be put together anew. `ask` is the heading of a question, `ref` a reference
    to an image; `begin` and `end` are the tokens around a text (BOS, EOS). Only answers and their ends are
    trained (`supervise`).
    """

    type: Literal["begin", "text", "image", "ask", "ref", "end"]
    text: str = ""
    image: int = -1
    supervise: bool = False


def render(turns: Sequence[Turn], template: str = "paper") -> Iterator[Piece]:
    """The pieces of a conversation, in order; `prompt` gives a prefix of them.

    A leading system turn replaces that of the template. Images stand before the question of their turn,
    wherever they were placed in it, numbered by their index in the conversation.
    """
    style = TEMPLATES[template]
    system = style.system
    if turns and turns[0].role == "system":
        system, turns = text(turns[0].content) + "\n\n", turns[1:]
    yield Piece("begin")
    yield Piece("text", text=system)
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            yield from _said(turn.content, supervise=True)
            yield Piece("end", supervise=True)
            continue
        if style.begins_rounds and number:
            yield Piece("begin")
        images = [part.image for part in turn.content if part.type == "image"]
        for place, image in enumerate(images):
            yield Piece("text", text=(BETWEEN_IMAGES if place else "") + header(image))
            yield Piece("image", image=image)
        if images:
            yield Piece("text", text=AFTER_IMAGES)
        yield Piece("ask", text=QUESTION)
        yield from _said((*turn.content, Part("text", ANSWER)))


def prompt(turns: Sequence[Turn], template: str = "paper") -> Iterator[Piece]:
    """The pieces that a generation goes on from: they end with `### Answer:` and a newline.

    Raises ValueError unless the last turn is a question.
    """
    if not turns or turns[-1].role != "user":
        last = turns[-1].role if turns else "missing"
        raise ValueError(f"the last turn is {last}: a prompt must end with a user turn to answer")
    return render(turns, template)


def header(image: int) -> str:
    """What stands before an image, counted from 0."""
    return f"### Image {image + 1}:\n"


def reference(image: int) -> str:
    """An image in words."""
    return f"image {image + 1}"


def follow_up(image: int) -> str:
    """Opens a question about one of several images that were all shown before."""
    return f"In {reference(image)}:\n"


def text(content: Iterable[Part]) -> str:
    """What a turn says, its references to images in words, without the images it shows."""
    return "".join(reference(part.image) if part.type == "ref" else part.text for part in content)


def _said(content: Iterable[Part], *, supervise: bool = False) -> Iterator[Piece]:
    """The texts and references of a turn. A blank before a reference goes with it, as in tokenizers."""
    pending = ""
    for part in content:
        if part.type == "text":
            pending += part.text
        elif part.type == "ref":
            before = pending.removesuffix(" ")
            if before:
                yield Piece("text", text=before, supervise=supervise)
            words = pending[len(before) :] + reference(part.image)
            yield Piece("ref", text=words, image=part.image, supervise=supervise)
            pending = ""
    if pending:
        yield Piece("text", text=pending, supervise=supervise)
