"""Question-answer tables: records with a question, an answer and an image, under whatever names.

`fields` of the set say which: `question`, `answer`, `image` and `id`, each a field of the record or a
text with fields in braces. A field may hold a list: of images, or of questions and as many answers.
An empty text names no image, as tables of texts (CSV) have nothing else to say so. A number is a text.
"""

from math import isfinite
from string import Formatter

from dsvl.data.readers.records import Chat, Fault, Record
from dsvl.data.readers.rounds import asked
from dsvl.data.types import Reason


def parse(record: Record) -> Chat:
    """The questions of a record; raises Fault."""
    fields = record.config.fields
    at = fields.image or "image"
    images = record.images(_value(record, at, "missing_image") or None, at)
    question = _texts(_value(record, fields.question or "question", "unpaired_round"))
    answer = _texts(_value(record, fields.answer or "answer", "empty_answer"))
    return Chat(images, asked(question, answer, images=len(images)))


def _value(record: Record, field: str, reason: Reason) -> object:
    """What a field holds, or a text with fields in it says."""
    if "{" not in field:
        return record.value.get(field)
    text = ""
    for literal, name, _, _ in Formatter().parse(field):
        text += literal
        if name is not None:
            value = _texts(record.value.get(name))
            if not isinstance(value, str):
                raise Fault(reason, f"{name!r} holds no text")
            text += value
    return text


def _texts(held: object) -> object:
    """What a field holds, numbers as texts; one that is none (NaN, as tables have it) is no text."""
    if isinstance(held, list):
        return [_texts(one) for one in held]
    if isinstance(held, bool) or not isinstance(held, int | float):
        return held
    return str(held) if isinstance(held, int) or isfinite(held) else held
