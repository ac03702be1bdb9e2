"""Questions and answers -> turns, with the images where `<image>` markers have them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dsvl.data.readers.records import Fault, valid
from dsvl.data.types import Part, Turn

MARKER = "<image>"
Role = Literal["system", "user", "assistant"]


def alternating(
    messages: object, *, speaker: str, content: str, roles: Mapping[str, Role]
) -> list[tuple[Role, Any]]:
    """(role, content) of every message, of whatever content; a system message may come first.

    Raises Fault unless questions and answers alternate and every question has its answer.
    """
    if not isinstance(messages, list) or not messages:
        raise Fault("unpaired_round", "there is no list of messages, or it is empty")
    said: list[tuple[Role, Any]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            kind = type(message).__name__
            raise Fault("bad_roles", f"message {index} is a {kind}, not an object")
        name = message.get(speaker)
        role = roles.get(name) if isinstance(name, str) else None
        if role is None:
            raise Fault("bad_roles", f"message {index} is from {ascii(name)[:100]}")
        said.append((role, message.get(content)))
    first = int(said[0][0] == "system")
    for index, (role, _) in enumerate(said[first:], first):
        expected = ("user", "assistant")[(index - first) % 2]
        if role != expected:
            raise Fault("bad_roles", f"message {index} is from the {role}, not the {expected}")
    if (len(said) - first) % 2 or len(said) == first:
        raise Fault("unpaired_round", f"{len(said)} messages: the last question has no answer")
    return said


def worded(role: Role, text: object, index: int) -> str:
    """The text of message `index`, or of a part of it; raises Fault where it is none."""
    found = valid(text)
    if found is None:
        reason = "empty_answer" if role == "assistant" else "unpaired_round"
        raise Fault(reason, f"message {index}, from the {role}, has no valid text")
    return found


def spoken(role: Role, text: object, index: int) -> str:
    """The same; raises Fault also where it is a blank answer."""
    found = worded(role, text, index)
    if role == "assistant" and not found.strip():
        raise Fault("empty_answer", f"message {index} is blank")
    return found


def marked(said: Sequence[tuple[Role, object]], *, images: int) -> tuple[Turn, ...]:
    """The turns of messages in whose questions the k-th marker is the k-th of `images`.

    Images without any marker open the first question; a newline in a question becomes a space.
    Raises Fault where a text is not valid, or markers and images differ in number.
    """
    texts = [spoken(role, text, index) for index, (role, text) in enumerate(said)]
    markers = 0
    for index, (role, _) in enumerate(said):
        if role == "user":
            markers += texts[index].count(MARKER)
        elif MARKER in texts[index]:
            raise Fault("marker_mismatch", f"message {index}, from the {role}, has {MARKER}")
    if markers and markers != images:
        raise Fault("marker_mismatch", f"{markers} {MARKER} markers for {images} images")

    turns: list[Turn] = []
    placed = 0
    for (role, _), text in zip(said, texts, strict=True):
        if role != "user":
            turns += [Turn(role, (Part("text", text),))] if text else []  # no system message
            continue
        parts: list[Part] = []
        while not markers and placed < images:
            parts.append(Part("image", image=placed))
            placed += 1
        for number, piece in enumerate(_pieces(text)):
            if number:
                parts.append(Part("image", image=placed))
                placed += 1
            if piece:
                parts.append(Part("text", piece))
        turns.append(Turn("user", tuple(parts)))
    return tuple(turns)


def asked(questions: object, answers: object, *, images: int) -> tuple[Turn, ...]:
    """The turns of a question and its answer, or of two lists of them; raises Fault as `marked` does."""
    questions = questions if isinstance(questions, list) else [questions]
    answers = answers if isinstance(answers, list) else [answers]
    if len(questions) != len(answers) or not questions:
        raise Fault("unpaired_round", f"{len(questions)} questions for {len(answers)} answers")
    said: list[tuple[Role, object]] = []
    for question, answer in zip(questions, answers, strict=True):
        said.append(("user", question))
        said.append(("assistant", answer))
    return marked(said, images=images)


def one_line(question: str) -> str:
    """A question without its newlines."""
    return question.replace("\r\n", " ").replace("\n", " ")


def _pieces(question: str) -> list[str]:
    """The text between the markers, in one line, without the blanks that they leave at its ends."""
    pieces = one_line(question).split(MARKER)
    for ends, strip in ((range(len(pieces)), str.lstrip), (range(len(pieces))[::-1], str.rstrip)):
        for number, index in enumerate(ends):
            if number or (len(pieces) > 1 and not pieces[index].strip()):
                pieces[index] = strip(pieces[index])
            if pieces[index]:
                break
    return pieces
