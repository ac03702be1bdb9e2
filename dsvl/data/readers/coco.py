"""COCO captions in Karpathy's splits: {"images": [{"filename", "split", "sentences": [{"raw"}, ...]}]}.

Images of `val` and `test`, on which others measure themselves, are held out.
"""

from dsvl.data.readers import captions
from dsvl.data.readers.records import Chat, Fault, Record, valid
from dsvl.data.readers.rounds import asked


def parse(record: Record) -> Chat:
    """A request for a caption, and one of the captions; raises Fault."""
    split = record.value.get("split")
    if split not in ("train", "restval"):
        raise Fault("held_out", f"split {ascii(split)[:100]} is not for training")
    image = record.image(record.value.get("filename"), "filename")
    sentences = record.value.get("sentences")
    told = [
        raw
        for sentence in (sentences if isinstance(sentences, list) else [])
        if isinstance(sentence, dict) and (raw := valid(sentence.get("raw"))) and raw.strip()
    ]
    if not told:
        raise Fault("empty_answer", "there is no sentence with a text")
    question = record.choose("question", captions.SHORT)
    return Chat([image], asked(question, record.choose("answer", told), images=1))
