"""Alpaca, as LLaMA-Factory has it: {"instruction", "input", "output", "history", "system", "images"}.

A question is the instruction, and the input on another line. `history` has pairs of question and answer that
came before; all but the instruction and the output may be absent.
"""

from dsvl.data.readers.records import Chat, Fault, Record, valid
from dsvl.data.readers.rounds import asked
from dsvl.data.types import Part, Turn


def parse(record: Record) -> Chat:
    """The conversation of a record; raises Fault."""
    pieces = [record.value.get(name) for name in ("instruction", "input")]
    texts = [piece for piece in pieces if isinstance(piece, str) and piece]
    if not texts or any(piece is not None and not isinstance(piece, str) for piece in pieces):
        raise Fault("unpaired_round", "there is no instruction, or it is no text")
    history = record.value.get("history") or []
    if not isinstance(history, list) or not all(_is_pair(held) for held in history):
        raise Fault("unpaired_round", "history is no list of pairs")
    questions, answers = ([pair[place] for pair in history] for place in (0, 1))
    images = record.images(record.value.get("images"), "images")
    turns = asked(
        [*questions, "\n".join(texts)], [*answers, record.value.get("output")], images=len(images)
    )
    if system := valid(record.value.get("system")):
        turns = (Turn("system", (Part("text", system),)), *turns)
    return Chat(images, turns)


def _is_pair(held: object) -> bool:
    return isinstance(held, list) and len(held) == 2
