"""Rows become figures by their kinds; controls, groups and differences follow from them."""

import pytest

from dsvl.metrics import Objects
from orchestration.evaluating.scores import differences, figures, grouped


def row(number, answer, expected, *, kind="answer", **more):
    asked = {"set": "s", "sample": f"s{number}", "round": 1, "images": 1, "kind": kind}
    said = {"answer": answer, "tokens": 2, "ended": True, "expected": expected, "blend": "b"}
    return asked | said | more


def values(rows, *names, **options):
    found = figures(rows, **options)
    return [found[name]["value"] for name in names]


def test_an_answer_is_right_to_the_letter_or_normalised():
    rows = [
        row(0, "two", ["two"]),
        row(1, "Two.", ["2"]),
        row(2, "three", ["2"]),
        row(3, None, ["2"]),
    ]
    assert values(rows, "exact", "soft", "answered") == pytest.approx([1 / 3, 2 / 3, 3 / 4])


def test_controls_have_figures_of_their_own():
    rows = [row(k, "a", ["a"], answer_blind="ab"[k % 2], answer_shuffled="b") for k in range(4)]
    assert values(rows, "exact", "exact_blind", "exact_shuffled") == [1, 0.5, 0]
    rows = [row(0, "a", ["a"], seen=[2.0, 4, True], blind=[6.0, 4, False])]
    assert values(rows, "loss", "loss_blind", "accuracy", "accuracy_blind") == [0.5, 1.5, 1, 0]


def test_yes_and_no_are_counted_as_popes_program_does():
    """Its formulas: three hit, one is a false alarm, two are missed, two rightly denied."""
    said = ["Yes"] * 3 + ["Yes, there is."] + ["No"] * 2 + ["There is no dog."] * 2
    true = ["yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 2
    rows = [
        row(k, answer, [label], kind="yes_no")
        for k, (answer, label) in enumerate(zip(said, true, strict=True))
    ]
    precision, recall = 3 / 4, 3 / 5
    assert values(rows, "exact", "precision", "recall", "f1", "yes_ratio") == pytest.approx(
        [5 / 8, precision, recall, 2 * precision * recall / (precision + recall), 4 / 8]
    )


def test_choices_and_objects_are_measured_by_their_protocols():
    rows = [row(k, answer, ["A", "A", "B"], kind="choice") for k, answer in enumerate("AB?")]
    assert values(rows, "exact", "no_choice") == pytest.approx([1 / 3, 1 / 3])
    objects = Objects({"dog": [], "cat": []})
    rows = [
        row(0, "a dog", ["dog"], kind="objects"),
        row(1, "a dog, a cat", ["cat"], kind="objects"),
    ]
    assert values(rows, "chair_i", "chair_s", "objects_found", objects=objects) == pytest.approx(
        [1 / 3, 1 / 2, 1]
    )


def test_references_to_images_are_followed():
    rows = [
        row(0, "image 2", ["image 2"], images=2, earlier=True),
        row(1, "image 7", ["image 1"], images=2),
        row(2, "three", ["four"], images=2, earlier=True),
    ]
    assert values(rows, "which_image", "earlier_image", "dangling_reference") == [0.5, 0.5, 0.5]


def test_rewordings_of_one_question_are_compared_with_each_other_alone():
    rows = [
        row(0, "two", ["x"], group="a"),
        row(1, "2", ["x"], group="a"),
        row(2, "yes", ["x"], group="b"),
        row(3, "no", ["x"], group="b"),
        row(4, "no", ["x"]),
    ]
    assert values(rows, "consistency") == [0.5]


def test_groups_are_told_by_blend_round_and_images():
    rows = [row(k, "a", ["ab"[k % 2]], blend="xy"[k % 2], images=k % 2) for k in range(4)]
    found = grouped(rows)
    assert {name: of["exact"]["value"] for name, of in found["blend"].items()} == {"x": 1, "y": 0}
    assert [of["rounds"] for of in found["images"].values()] == [2, 2]
    assert list(found["round"]) == ["1"]


def test_two_models_are_compared_on_what_both_have_answered():
    ours = [row(k, "a" if k < 8 else "b", ["a"]) for k in range(10)]
    theirs = [row(k, "a" if k < 4 else "b", ["a"]) for k in range(9)]
    found = differences(ours, theirs)
    assert found["rounds"] == 9
    assert found["exact"]["value"] == pytest.approx(4 / 9)
    assert found["exact"]["low"] > 0
    assert found["exact"]["above"] > 0.95
    assert differences(ours, [])["rounds"] == 0
