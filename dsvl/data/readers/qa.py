"""Question-answer tables: records with a question, an answer and an image, under whatever names.

`fields` of the set say which: `question`, `answer`, `image` and `id`, each a field of the record or a
text with fields in braces. A field may hold a list: of images, or of questions and as many answers.
An empty text names no image, as tables of texts (CSV) have nothing else to say so.
"""

from string import Formatter

from dsvl.data.readers.records import Chat, Fault, Record
from dsvl.data.readers.rounds import asked
from dsvl.data.types import Reason


def parse(record: Record) -> Chat:
    """The questions of a record; raises Fault."""
    fields = record.config.fields
    at = fields.image or "image"
    images = record.images(_value(record, at, "missing_image") or None, at)
    question = _value(record, fields.question or "question", "unpaired_round")
    answer = _value(record, fields.answer or "answer", "empty_answer")
    return Chat(images, asked(question, answer, images=len(images)))


def _value(record: Record, field: str, reason: Reason) -> object:
    """What a field holds, or a text with fields in it says."""
    if "{" not in field:
        return record.value.get(field)
    text = ""
    for literal, name, _, _ in Formatter().parse(field):
        text += literal
        if name is not None:
            value = record.value.get(name)
            if isinstance(value, bool) or not isinstance(value, str | int | float):
                raise Fault(reason, f"{name!r} holds no text")
            text += str(value)
    return text
