"""LLaVA's conversations and CGD's instructions, read from their own files into one set.

Both are about pictures of COCO train2017 under one name, by which blending joins them; `part` in the
meta of a conversation tells them apart.
"""

from dsvl.data.readers import llava_json, mimicit
from dsvl.data.readers.records import Chat, Record


def parse(record: Record) -> Chat:
    """A conversation of LLaVA, or an instruction of CGD before it is merged; raises Fault."""
    part, parse_part = ("otter", mimicit.parse) if record.row.key else ("llava", llava_json.parse)
    chat = parse_part(record)
    return Chat(chat.images, chat.turns, {**chat.meta, "part": part})
