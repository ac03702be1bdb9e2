"""Caption metrics give what COCO's own program gives, on captions that it has scored."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsvl import captions

SCORED = json.loads((Path(__file__).parents[1] / "data/captions.json").read_text())
CAPTIONS = SCORED["captions"]
SAID = [captions.words(each["said"]) for each in CAPTIONS]
PEOPLE = [list(map(captions.words, each["people"])) for each in CAPTIONS]


def test_bleu_is_that_of_the_reference():
    counts = [captions.bleu_counts(said, people) for said, people in zip(SAID, PEOPLE, strict=True)]
    assert captions.bleu(np.sum(counts, axis=0)) == pytest.approx(SCORED["bleu"], rel=1e-8)


def test_rouge_l_is_that_of_the_reference():
    scores = [captions.rouge_l(said, people) for said, people in zip(SAID, PEOPLE, strict=True)]
    assert scores == pytest.approx([each["rouge_l"] for each in CAPTIONS])
    assert captions.rouge_l("", ["a dog"]) == 0


def test_cider_d_is_that_of_the_reference():
    scores = captions.cider_d(SAID, PEOPLE)
    assert scores == pytest.approx([each["cider_d"] for each in CAPTIONS])
    assert captions.cider_d([], []) == []


def test_words_are_lower_case_without_punctuation():
    assert captions.words("A man's black-and-white cat, (2) 'yes'.") == (
        "a man's black-and-white cat 2 yes"
    )
