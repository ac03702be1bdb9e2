"""OCR-VQA: {ID: {"imageURL", "split", "questions": [...], "answers": [...]}}, all questions of a cover.

Splits 2 and 3, on which others measure themselves, are held out.
"""

from pathlib import PurePosixPath
from urllib.parse import urlsplit

from dsvl.data.readers.records import Chat, Fault, Record
from dsvl.data.readers.rounds import asked


def parse(record: Record) -> Chat:
    """The questions about one cover; its image is called ID with the ending of its URL. Raises Fault."""
    split = record.value.get("split")
    if split is True or split != 1:
        raise Fault("held_out", f"split {ascii(split)[:100]} is not for training")
    try:
        ending = PurePosixPath(urlsplit(record.value["imageURL"]).path).suffix
    except (KeyError, TypeError, ValueError, AttributeError):
        raise Fault("missing_image", "imageURL is not the address of an image") from None
    image = record.image(f"{record.row.key}{ending}")
    turns = asked(record.value.get("questions"), record.value.get("answers"), images=1)
    return Chat([image], turns)
