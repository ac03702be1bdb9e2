"""Alpaca, as LLaMA-Factory has it: {"instruction", "input", "output", "history", "system", "images"}.

A question is the instruction, and the input on another line. `history` has pairs of question and answer that
came before; all but the instruction and the output may be absent. `fields` of the set name its columns, as
LLaMA-Factory calls them.
"""

from dsvl.data.readers.records import Chat, Fault, Record, instruction
from dsvl.data.readers.rounds import asked
from dsvl.data.types import Part, Turn

FIELDS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "images": "images",
}
"""The columns of LLaMA-Factory, where nothing else is said."""


def parse(record: Record) -> Chat:
    """The conversation of a record; raises Fault."""
    columns = FIELDS | record.config.fields.given()
    held = {name: record.value.get(column) for name, column in columns.items()}
    pieces = [held[name] for name in ("prompt", "query")]
    texts = [piece for piece in pieces if isinstance(piece, str) and piece]
    if not texts or any(piece is not None and not isinstance(piece, str) for piece in pieces):
        raise Fault("unpaired_round", "there is no instruction, or it is no text")
    history = held["history"] or []
    if not isinstance(history, list) or not all(map(_is_pair, history)):
        raise Fault("unpaired_round", "history is no list of pairs")
    questions, answers = ([pair[place] for pair in history] for place in (0, 1))
    images = record.images(held["images"], columns["images"])
    turns = asked([*questions, "\n".join(texts)], [*answers, held["response"]], images=len(images))
    if system := instruction(held["system"]):
        turns = (Turn("system", (Part("text", system),)), *turns)
    return Chat(images, turns)


def _is_pair(held: object) -> bool:
    return isinstance(held, list) and len(held) == 2
