"""MiniGPT-4's cc_sbu_align: {"annotations": [{"image_id", "caption"}]}, captions of a paragraph."""

from dsvl.data.readers import captions
from dsvl.data.readers.records import Chat, Record
from dsvl.data.readers.rounds import asked


def parse(record: Record) -> Chat:
    """A request for a description, and the caption; raises Fault."""
    image = record.image(record.value.get("image_id"), "image_id")
    question = record.choose("question", captions.LONG)
    return Chat([image], asked(question, record.value.get("caption"), images=1))
