"""Question suites are read as the sets hand them out: a handful of records of each."""

from pathlib import Path

import pytest

from dsvl.data.readers.captions import LONG, SHORT
from dsvl.suites import FORMATS, Asked, Dialogue, SuiteConfig, dialogues

SUITES = Path(__file__).parents[1] / "data/suites"

SINGLE = {
    "vqav2": (
        ("vqav2_questions.json", "vqav2_annotations.json"),
        [
            ("42000", "Is it red?", "42", "people", ("yes",)),
            ("7001", "How many?", "7", "people", ("2", "two")),
        ],
    ),
    "aokvqa": (
        ("aokvqa.json",),
        [("q1", "What is the man waiting for?", "42", "people", ("bus", "a bus"))],
    ),
    "ocr_vqa": (
        ("ocr_vqa.json",),
        [
            ("0001/0", "Who wrote this book?", "0001.jpg", "answer", ("A. Writer",)),
            ("0001/1", "Is this a novel?", "0001.jpg", "answer", ("No",)),
        ],
    ),
    "coco_caption": (
        ("captions_val.json",),
        [("42", SHORT[0], "42.jpg", "caption", ("A dog.", "A brown dog."))],
    ),
    "pope": (
        ("pope.json",),
        [
            ("1", "Is there a dog in the image?", "42.jpg", "yes_no", ("yes",)),
            ("2", "Is there a car in the image?", "42.jpg", "yes_no", ("no",)),
        ],
    ),
    "gqa": (("gqa.json",), [("201307251", "Is the sky dark?", "n42", "answer", ("yes",))]),
    "mmbench": (
        ("mmbench.tsv",),
        [
            (
                "241",
                "Look. Which is red? A. the sky B. the car Answer with the letter.",
                "data:image/jpeg;base64,iVBORw0KGgo=",
                "choice",
                ("B", "A", "B"),
            )
        ],
    ),
    "chair": (
        ("instances.json", "synonyms.txt", "seen.json"),
        [
            ("42", LONG[0], "42.jpg", "objects", ("dog", "person")),
            ("43", LONG[0], "43.jpg", "objects", ()),
        ],
    ),
}


def read(form, *files, **settings):
    return dialogues(SuiteConfig(format=form, files=files, **settings), SUITES)


@pytest.mark.parametrize("form", SINGLE)
def test_a_standard_set_is_read_in_its_own_format(form):
    files, expected = SINGLE[form]
    assert read(form, *files) == [
        Dialogue(name, (Asked(question, (image,), kind, said),))
        for name, question, image, kind, said in expected
    ]


def test_every_format_has_a_test():
    assert {*SINGLE, "visualchat", "jsonl"} == FORMATS.keys()


def test_karpathys_captions_are_those_of_the_test_split():
    (only,) = read("coco_caption", "karpathy.json")
    assert only.rounds[0].images == ("COCO_val2014_000000000042.jpg",)
    assert only.rounds[0].expected == ("A dog.", "A brown dog.")


def test_the_originals_layout_shows_several_images_over_several_rounds_and_expects_nothing():
    first, second = read("visualchat", "visualchat.json")
    assert [asked.images for asked in first.rounds] == [("red.png",), ("green.png", "blue.jpg"), ()]
    assert second == Dialogue("test2", (Asked("Say hello."),))


def test_lines_hold_rounds_answers_and_groups_of_rewordings():
    colours, one, other, story = read("jsonl", "lines.jsonl")
    assert [asked.kind for asked in colours.rounds] == ["answer", "yes_no"]
    assert colours.rounds[0].expected == ("red", "dark red")
    assert one.rounds[0] == Asked("What colour is it?", ("red.png",), "answer", ("red",), "colour")
    assert other.rounds[0].group == "colour"
    assert story.rounds[0].kind == "open"


def test_images_and_questions_are_put_as_the_suite_says():
    (only,) = read(
        "gqa", "gqa.json", image_name="images/{image:0>6}.jpg", prompt="{question} In a word."
    )
    assert only.rounds[0].images == ("images/000n42.jpg",)
    assert only.rounds[0].question == "Is the sky dark? In a word."
    assert len(read("pope", "pope.json", samples=1)) == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"imag": "a.png", "question": "?"}', "no field 'imag'; did you mean 'image'?"),
        (
            '{"rounds": [{"question": "?", "awnser": "a"}]}',
            "no field 'awnser'; did you mean 'answer'?",
        ),
    ],
)
def test_a_misspelt_field_is_no_question_without_it(tmp_path, line, told):
    (tmp_path / "s.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"record 0 is not of format jsonl") as refused:
        dialogues(SuiteConfig(format="jsonl", files=("s.jsonl",)), tmp_path)
    assert told in str(refused.value)


def test_what_else_a_line_holds_is_its_own_affair(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"question_id": 7, "question": "?", "split": "test"}')
    assert len(dialogues(SuiteConfig(format="jsonl", files=("s.jsonl",)), tmp_path)) == 1


def test_dialogues_of_one_name_are_asked_and_scored_apart(tmp_path):
    lines = [
        '{"id": 7, "question": "A?"}',
        '{"id": 7, "question": "B?"}',
        '{"id": 8, "question": "C?"}',
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    found = dialogues(SuiteConfig(format="jsonl", files=("s.jsonl",)), tmp_path)
    assert [dialogue.id for dialogue in found] == ["7", "7#2", "8"]


def test_a_mark_at_the_beginning_and_other_ends_of_lines_are_text(tmp_path):
    text = '\ufeff{"question": "a\u2028b\u0085c?"}\n{"question": "d?"}\n'
    (tmp_path / "s.jsonl").write_text(text, encoding="utf-8")
    found = dialogues(SuiteConfig(format="jsonl", files=("s.jsonl",)), tmp_path)
    assert [dialogue.rounds[0].question for dialogue in found] == ["a\u2028b\u0085c?", "d?"]


def test_a_file_of_another_format_is_named_with_the_record_and_the_remedy():
    with pytest.raises(
        ValueError, match=r"pope\.json: record 0 is not of format gqa.*name its own"
    ):
        read("gqa", "pope.json")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read("gqa", "nowhere.json")
    with pytest.raises(ValueError, match="format='vqa': must be one of visualchat, jsonl"):
        SuiteConfig(format="vqa", files=("a.json",))
    with pytest.raises(ValueError, match="must hold"):
        SuiteConfig(format="gqa", files=("a.json",), prompt="{text}")
