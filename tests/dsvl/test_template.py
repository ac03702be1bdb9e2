"""The text of a turn."""

import pytest

from dsvl.data.types import Part, Turn
from dsvl.template import prompt, render


def question(*content: Part | str) -> Turn:
    return Turn("user", tuple(Part("text", c) if isinstance(c, str) else c for c in content))


def answer(text: str) -> Turn:
    return Turn("assistant", (Part("text", text),))


def image(index: int) -> Part:
    return Part("image", image=index)


def written(pieces) -> str:
    shown = {"begin": "<s>", "end": "</s>"}
    return "".join(
        f"<{piece.image}>" if piece.type == "image" else shown.get(piece.type, piece.text)
        for piece in pieces
    )


CHAT = (
    question(image(0), image(1), "Which is larger?"),
    answer("The first."),
    question("And ", image(2), "this?"),
    answer("Smaller."),
    question("Sure?"),
    answer("Yes."),
)


OPENED = (
    "### Image 1:\n<0>\n### Image 2:\n<1>\n\n"
    "### Question:\nWhich is larger?\n\n### Answer:\nThe first.</s>"
)


def test_a_conversation_is_written_as_in_the_paper():
    assert written(render(CHAT)) == (
        "<s>You are a powerful vision-language assistant.\n\n"
        "### Image 1:\n<0>\n### Image 2:\n<1>\n\n"
        "### Question:\nWhich is larger?\n\n### Answer:\nThe first.</s>"
        "### Image 3:\n<2>\n\n### Question:\nAnd this?\n\n### Answer:\nSmaller.</s>"
        "### Question:\nSure?\n\n### Answer:\nYes.</s>"
    )


def test_the_original_code_has_another_system_text_and_begins_every_round():
    opening, second, third = written(render(CHAT, "original")).split("<s>")[1:]
    assert opening.startswith("You are a helpful language and vision assistant. ")
    assert opening.endswith("natural language.\n\n" + OPENED)
    assert second == "### Image 3:\n<2>\n\n### Question:\nAnd this?\n\n### Answer:\nSmaller.</s>"
    assert third == "### Question:\nSure?\n\n### Answer:\nYes.</s>"


def test_only_answers_and_their_ends_are_supervised():
    supervised = [piece for piece in render(CHAT) if piece.supervise]
    assert written(supervised) == "The first.</s>Smaller.</s>Yes.</s>"


def test_a_reference_is_written_with_the_number_of_its_image():
    turns = (question(image(0), image(1), "Is ", Part("ref", image=1), " red?"), answer("No."))
    assert "### Question:\nIs image 2 red?\n\n" in written(render(turns))


def test_a_system_turn_replaces_the_usual_one():
    turns = (Turn("system", (Part("text", "Be brief."),)), question("Hi"), answer("Hi."))
    assert written(render(turns)).startswith("<s>Be brief.\n\n### Question:\nHi")
    assert "powerful" not in written(render(turns))


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_a_prompt_is_a_prefix_of_what_was_trained_piece_by_piece(rounds):
    asked = list(prompt(CHAT[: 2 * rounds - 1]))
    assert asked == list(render(CHAT))[: len(asked)]
    assert asked[-1].text.endswith("### Answer:\n")


def test_a_prompt_must_end_with_a_question():
    with pytest.raises(ValueError, match="last turn is assistant"):
        prompt(CHAT)
