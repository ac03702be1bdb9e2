"""A-OKVQA: {"image_id", "question", "choices", "correct_choice_idx", "rationales", "split"}.

The splits `val` and `test`, on which others measure themselves, are held out.
"""

from dsvl.data.readers.records import Chat, Fault, Record, valid
from dsvl.data.readers.rounds import asked

WHY = (
    "How do you know?",
    "Why is that so?",
    "Give your reasons.",
    "What makes you think so?",
    "Say why.",
    "Please justify the answer.",
)


def parse(record: Record) -> Chat:
    """The question with a request for reasons; the correct choice with its rationales. Raises Fault."""
    split = record.value.get("split")
    if split != "train":
        raise Fault("held_out", f"split {ascii(split)[:100]} is not for training")
    image = record.image(record.value.get("image_id"), "image_id")
    question = valid(record.value.get("question"))
    if question is None:
        raise Fault("unpaired_round", "question is no valid text")
    answer = " ".join([f"The answer is {_choice(record)}.", *_rationales(record)])
    return Chat([image], asked(f"{question} {record.choose('why', WHY)}", answer, images=1))


def _choice(record: Record) -> str:
    choices, index = record.value.get("choices"), record.value.get("correct_choice_idx")
    if isinstance(index, bool) or not isinstance(index, int) or not isinstance(choices, list):
        raise Fault("empty_answer", "there are no choices, or no index of the correct one")
    choice = valid(choices[index]) if 0 <= index < len(choices) else None
    if not (choice and choice.strip()):
        raise Fault("empty_answer", f"choice {index} of {len(choices)} is missing or blank")
    return choice


def _rationales(record: Record) -> list[str]:
    found = record.value.get("rationales")
    told = [valid(text) or "" for text in found] if isinstance(found, list) else []
    if not told or not all(text.strip() for text in told):
        raise Fault("empty_answer", "there are no rationales, or one is blank")
    return told
