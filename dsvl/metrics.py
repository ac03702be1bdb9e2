"""How good an answer is, by the definitions that the field compares itself by; pure functions of texts.

Where a definition is a program, the function gives what that program gives; its source is named.
Captions are in `captions`, intervals in `bootstrap`.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
WHOLE = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:place] + word[place + 1 :]: word
    for word in WHOLE.split()
    for place, letter in enumerate(word)
    if letter == "'"
}
"""What lacks one of its apostrophes, and one word that the program has the other way round."""
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTED)}
ARTICLES = ("a", "an", "the")
ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
           "animal", "cub")  # fmt: skip
IMAGE = re.compile(r"\bimage (\d{1,3})\b", re.IGNORECASE)
"""A reference to an image, as `dsvl.template.reference` writes it."""


def normal(answer: str) -> str:
    """A short answer without punctuation, articles and case, numbers in digits.

    As `vqaEvaluation/vqaEval.py` of github.com/GT-Vision-Lab/VQA does it, its quirks included.
    """
    answer = one_line(answer)
    bare, commas = answer, re.search(r"\d,\d", answer)
    for mark in PUNCTUATION:
        beside_a_blank = f"{mark} " in answer or f" {mark}" in answer
        bare = bare.replace(mark, "" if beside_a_blank or commas else " ")
    words = re.sub(r"\.(?!\d)", "", bare).lower().split()
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def one_line(answer: str) -> str:
    """Without line breaks, tabs and blanks around it."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """How far an answer agrees with those of several people (arXiv:1505.00468): three agreeing are enough.

    The mean over each person left out; as the program that `normal` names, which normalises nothing where all
    people agree.
    """
    answer, people = one_line(answer), list(map(one_line, people))
    if len(set(people)) > 1:
        answer, people = normal(answer), list(map(normal, people))
    agree = sum(said == answer for said in people)
    left_out = (min(1.0, (agree - (said == answer)) / 3) for said in people)
    return sum(left_out) / len(people)


def says_yes(answer: str) -> bool:
    """Whether an answer is a yes: its first sentence has no `No`, `no` or `not`.

    As `evaluate.py` of github.com/AoiDragon/POPE reads it (POPE, arXiv:2305.10355).
    """
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def choice(answer: str, letters: Collection[str]) -> str:
    """The letter that an answer chooses among `A`, `B`, ...; empty where it chooses none.

    It stands alone or begins the answer (`B`, `(B)`, `B. a dog`), or is named (`the answer is B`).
    """
    found = re.match(r"\(?([A-Z])(?:[).:,]|\s*$)", answer.strip()) or re.search(
        r"\b(?:answer|option) (?:is )?\(?([A-Z])\b", answer
    )
    return found[1] if found and found[1] in letters else ""


class Objects:
    """Objects that a text names: the vocabulary of CHAIR (arXiv:1809.02156).

    Reads as `utils/chair.py` of github.com/LisaAnne/Hallucination, except that plurals are taken back by
    rules of English, where that program asks the library `pattern`.
    """

    def __init__(self, synonyms: Mapping[str, Sequence[str]]) -> None:
        """`synonyms`: object -> what it may be called; of one word, or of two."""
        self._names = {word: name for name, words in synonyms.items() for word in (name, *words)}
        # A baby bird is no person, and a passenger jet none either.
        self._pairs = {word: word for word in self._names if " " in word}
        self._pairs |= {
            f"{age} {animal}": animal for animal in ANIMALS for age in ("baby", "adult")
        }
        self._pairs |= {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie"}
        self._pairs |= {"toilet seat": "toilet"}

    def named(self, text: str) -> list[str]:
        """The objects that a text names, in order, each as often as it does."""
        words = [self._singular(word) for word in re.findall(r"[a-z']+", text.lower())]
        joined: list[str] = []
        while words:
            pair = self._pairs.get(" ".join(words[:2]))
            joined.append(pair or words[0])
            words = words[2 if pair else 1 :]
        return [self._names[word] for word in joined if word in self._names]

    def _singular(self, word: str) -> str:
        if word in self._names:
            return word
        rules = (("men", "man"), ("ves", "fe"), ("ies", "y"), ("es", ""), ("s", ""))
        ways = (word.removesuffix(end) + put for end, put in rules if word.endswith(end))
        parts = {part for name in self._names for part in name.split()}
        return next((way for way in ways if way in parts), word)


def chair(named: Sequence[str], there: Collection[str]) -> tuple[int, int, int]:
    """What a caption names: objects in all, those that are not in the image, and how many different ones are.

    CHAIR_i is the second over the first, both summed over captions; CHAIR_s the share of captions where the
    second is not zero.
    """
    return len(named), sum(name not in there for name in named), len(set(named) & set(there))


def repetition(answer: str, *, length: int = 4) -> float:
    """The share of an answer's word n-grams that it has said before; 0 where it is shorter than one."""
    words = answer.lower().split()
    grams = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def images_named(text: str) -> list[int]:
    """The numbers, from 1, of the images that a text refers to."""
    return [int(number) for number in IMAGE.findall(text)]


def agreement(answers: Sequence[str]) -> float:
    """The share of pairs among answers to rewordings of one question that are the same, normalised."""
    count = Counter(map(normal, answers))
    pairs = len(answers) * (len(answers) - 1)
    return sum(n * (n - 1) for n in count.values()) / pairs if pairs else 1.0
