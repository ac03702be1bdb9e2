"""How like a caption is to those of several people: BLEU, ROUGE-L and CIDEr-D as COCO's server scores them.

The scores of `pycocoevalcap` 1.2, whose own package needs Java and 100 MB for two metrics that are not here.
Only words are cut otherwise: by `words`, where COCO runs Stanford's tokenizer.
"""

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from math import e, log, sqrt

from sacrebleu.metrics.bleu import BLEU

SIGMA = 6.0
"""CIDEr-D's tolerance for another length."""
BETA = 1.2
"""How much more ROUGE-L weighs recall."""
ORDER = 4
"""The longest n-grams."""


def words(text: str) -> str:
    """A text in lower case, punctuation left out, a blank between words."""
    return " ".join(re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower()))


@cache
def _bleu() -> BLEU:
    return BLEU(tokenize="none", smooth_method="none", max_ngram_order=ORDER, force=True)


def bleu_counts(caption: str, people: Sequence[str]) -> list[int]:
    """What BLEU-4 of a corpus is made of, to be summed over its captions; texts as of `words`."""
    score = _bleu().corpus_score([caption], [[said] for said in people])
    return [score.sys_len, score.ref_len, *score.counts, *score.totals]


def bleu(sums: Sequence[float]) -> float:
    """BLEU-4 of summed `bleu_counts`, from 0 to 1, without smoothing."""
    length, people, *grams = map(int, sums)
    score = BLEU.compute_bleu(
        grams[:ORDER], grams[ORDER:], length, people, smooth_method="none", max_ngram_order=ORDER
    )
    return score.score / 100


def rouge_l(caption: str, people: Sequence[str]) -> float:
    """ROUGE-L against the best precision and the best recall among people, 0 to 1; texts as of `words`."""
    said = caption.split()
    common = [(_common(said, other.split()), len(other.split())) for other in people]
    precision = max(length for length, _ in common) / max(len(said), 1)
    recall = max(length / max(size, 1) for length, size in common)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def cider_d(captions: Sequence[str], people: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption of a corpus (arXiv:1411.5726), from 0 to 10; texts as of `words`.

    Rare n-grams weigh most: those that few of the corpus' images are described by.
    """
    grams = [[_grams(said) for said in of_one] for of_one in people]
    images = Counter(gram for of_one in grams for gram in set().union(*of_one))
    total = log(max(len(people), 1))

    def vectors(counts: Counter[tuple[str, ...]]) -> tuple[list[dict], list[float], int]:
        weights: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDER)]
        for gram, count in counts.items():
            weights[len(gram) - 1][gram] = count * (total - log(max(1, images[gram])))
        norms = [sqrt(sum(w * w for w in of_order.values())) for of_order in weights]
        return weights, norms, sum(n for gram, n in counts.items() if len(gram) == 2)

    scores = []
    for caption, of_one in zip(captions, grams, strict=True):
        mine, my_norms, my_length = vectors(_grams(caption))
        score = 0.0
        for other in of_one:
            theirs, norms, length = vectors(other)
            for order in range(ORDER):
                known = theirs[order]
                like = sum(
                    min(w, known[g]) * known[g] for g, w in mine[order].items() if g in known
                )
                if my_norms[order] and norms[order]:
                    like /= my_norms[order] * norms[order]
                score += like * e ** (-((my_length - length) ** 2) / (2 * SIGMA**2))
        scores.append(10 * score / ORDER / len(of_one))
    return scores


def _grams(text: str) -> Counter[tuple[str, ...]]:
    """How often it has each n-gram of up to four words."""
    said = text.split()
    return Counter(
        tuple(said[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(said) - n + 1)
    )


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of their longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, there in enumerate(other):
            here = row[place + 1]
            row[place + 1] = before + 1 if word == there else max(here, row[place])
            before = here
    return row[-1]
