"""Answers are measured as the programs that defined the measures do."""

import pytest

from dsvl import metrics
from dsvl.metrics import Objects


@pytest.mark.parametrize(
    ("said", "normal"),
    [
        # By the program itself, run over thousands of such texts; these show each of its rules.
        ("The Two dogs.", "2 dogs"),
        ("dont", "don't"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("t-shirt", "t shirt"),
        ("a (big) dog", "big dog"),
        ("x, y", "x y"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("U.S.A.", "usa"),
        ("none\n", "0"),
    ],
)
def test_answers_are_normalised_as_the_program_of_vqa_does(said, normal):
    assert metrics.normal(said) == normal


def test_vqa_accuracy_counts_the_people_who_agree_each_left_out_once():
    def share(agree: int) -> float:
        people = ["dog"] * agree + [f"other {k}" for k in range(10 - agree)]
        return metrics.vqa_accuracy("Dog.", people)

    # With k of ten: (k * min(1, (k - 1) / 3) + (10 - k) * min(1, k / 3)) / 10
    assert [share(k) for k in range(5)] == pytest.approx([0, 0.3, 0.6, 0.9, 1])
    assert metrics.vqa_accuracy("t shirt", ["t-shirt"] * 10) == 0, "nothing is normalised there"
    assert metrics.vqa_accuracy(" t-shirt\n", ["t-shirt"] * 10) == 1


def test_pope_reads_an_answer_as_its_program_does():
    said = ["Yes, there is.", "No, there is not.", "There is no dog. Yes", "no", "Nothing at all"]
    assert [metrics.says_yes(answer) for answer in said] == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("A. a dog", "A"),
        ("The answer is D.", "D"),
        ("A dog", ""),
        ("F", ""),
    ],
)
def test_a_choice_is_a_letter_that_can_be_chosen(said, letter):
    assert metrics.choice(said, "ABCD") == letter


def test_chair_counts_objects_named_that_are_not_there():
    objects = Objects(
        {
            "person": ["man", "woman", "baby"],
            "dog": ["puppy"],
            "chair": ["seat"],
            "toilet": [],
            "hot dog": [],
            "tie": [],
            "knife": [],
            "bird": [],
        }
    )
    assert objects.named("Two men and a puppy with knives") == ["person", "dog", "knife"]
    assert objects.named("A hot dog, no dogs; a bow tie") == ["hot dog", "dog", "tie"]
    assert objects.named("a baby bird on a toilet seat") == ["bird", "toilet"]
    assert metrics.chair(["dog", "dog", "tie"], {"dog", "person"}) == (3, 1, 1)


def test_repetition_is_the_share_of_phrases_said_before():
    assert metrics.repetition("a b c") == 0
    assert metrics.repetition("a b c d e f") == 0
    assert metrics.repetition("a b c d a b c d") == pytest.approx(1 / 5)


def test_agreement_is_over_pairs_and_of_normalised_answers():
    assert metrics.agreement(["Two.", "2", "three"]) == pytest.approx(1 / 3)
    assert metrics.agreement(["yes", "Yes"]) == 1


def test_references_to_images_are_read_as_the_template_writes_them():
    assert metrics.images_named("Image 12 is like image 3, not images 4.") == [12, 3]
