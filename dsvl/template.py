"""The text of a turn (paper, figure 3): the only place where prompts are written.

    SYSTEM ### Image 1:⏎ [image] ⏎⏎ ### Question:⏎ {question} ⏎⏎ ### Answer:⏎ {answer} [end] ...

No special tokens mark images or roles: the paper found that they made answers worse.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from dsvl.data.types import Part, Turn

SYSTEM = "You are a powerful vision-language assistant.\n\n"


@dataclass(frozen=True, slots=True)
class Piece:
    """What is tokenised on its own: text, an image, or the end of an answer (the EOS token).

    Only answers and their ends are trained (`supervise`). As no token ever spans two pieces, a
    tokenizer that merges across characters cannot blur where an answer starts.
    """

    type: Literal["text", "image", "end"]
    text: str = ""
    image: int = -1
    supervise: bool = False


def render(turns: Sequence[Turn]) -> Iterator[Piece]:
    """The pieces of a conversation, in order; `prompt` gives a prefix of them.

    A leading system turn replaces `SYSTEM`. Images stand before the question of their turn,
    wherever they were placed in it, numbered by their index in the conversation.
    """
    system = SYSTEM
    if turns and turns[0].role == "system":
        system, turns = text(turns[0].content) + "\n\n", turns[1:]
    pending = system  # text that no image or answer has cut off yet
    for turn in turns:
        if turn.role == "assistant":
            yield Piece("text", text=pending)
            yield Piece("text", text=text(turn.content), supervise=True)
            yield Piece("end", supervise=True)
            pending = ""
            continue
        images = [part.image for part in turn.content if part.type == "image"]
        for image in images:
            yield Piece("text", text=f"{pending}### Image {image + 1}:\n")
            yield Piece("image", image=image)
            pending = "\n"
        if images:
            pending += "\n"
        pending += f"### Question:\n{text(turn.content)}\n\n### Answer:\n"
    if pending:
        yield Piece("text", text=pending)


def prompt(turns: Sequence[Turn]) -> Iterator[Piece]:
    """The pieces that a generation goes on from: they end with `### Answer:` and a newline.

    Raises ValueError unless the last turn is a question.
    """
    if not turns or turns[-1].role != "user":
        last = turns[-1].role if turns else "missing"
        raise ValueError(f"the last turn is {last}: a prompt must end with a user turn to answer")
    return render(turns)


def text(content: Iterable[Part]) -> str:
    """What a turn says, its references to images in words, without the images it shows."""
    return "".join(
        f"image {part.image + 1}" if part.type == "ref" else part.text for part in content
    )
