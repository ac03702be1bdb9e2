"""Conversations: cached and streamed, they say what the whole text, computed anew each time, says."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dsvl import chat as chat_module
from dsvl import template
from dsvl.attention import SCHEMES
from dsvl.cache import ImageStore
from dsvl.chat import Chat, TooLongError
from dsvl.data.collate import collate
from dsvl.data.encode import Encoder
from dsvl.data.types import IGNORED, Example, Kind, Part, Turn
from dsvl.decoder import Interleaved
from dsvl.generate import Sampling, generate
from dsvl.model import VisualChat
from tests.dsvl.conftest import open_gates
from tests.dsvl.test_decoder import BrokenOffError, break_off
from tests.dsvl.test_model import PIXELS, wanting

CPU = torch.device("cpu")
NEW = 6
"""Most tokens of an answer here."""
ROUNDS = [
    ("What is here?", "0"),
    ("And there?", ""),
    ("", "12"),
    ("Which is larger?", "2"),
    ("Why", ""),
]
"""Questions, and the images that come with them: some without, one without words, one shown twice."""


def talker(model_config, language, scheme):
    """A model in float64, where no two tokens are as good as tied."""
    config = replace(model_config, languages={"tiny": language}, attention=scheme, cross_every=1)
    model = VisualChat(config, precision="fp32", seed=0).double().eval()
    model.projection.bias.data.zero_()  # which all images share
    return open_gates(model)


@pytest.fixture(scope="module", params=[*SCHEMES, "gated_cross"])
def any_model(request, model_config, language):
    return talker(model_config, language, request.param)


@pytest.fixture(scope="module", params=["mmca", "causal_cross"])
def streams_model(request, model_config, language):
    return talker(model_config, language, request.param)


@pytest.fixture
def model(model_config, language):
    return talker(model_config, language, "mmca")


@pytest.fixture
def begin(tokenizer):
    """A new conversation with a model."""

    def begin(model, **options):
        options = {"max_tokens": 2000, "max_new_tokens": NEW, **options}
        return Chat(model, tokenizer, device=CPU, **options)

    return begin


def pictures(names: str) -> list[np.ndarray]:
    return [PIXELS[name] for name in names]


def ask_all(chat, rounds) -> list[str]:
    return [chat.ask(question, images=pictures(names)) for question, names in rounds]


def dictate(model, monkeypatch, ids):
    """Have the model write these ids, whatever it is asked."""
    script = iter(ids)

    def logits(states):
        scores = torch.zeros(len(states), model.config.language.vocab_size)
        scores[:, next(script)] = 1.0
        return scores

    monkeypatch.setattr(model, "logits", logits)


class Counter:
    """How many images went through the tower, and how many tokens through the decoder."""

    def __init__(self, model):
        self.images = self.tokens = 0

        def see(_, arguments):
            self.images += len(arguments[0])

        def read(_, arguments):
            self.tokens += arguments[0].shape[1]

        model.vision.register_forward_pre_hook(see)
        model.language.model.layers[0].input_layernorm.register_forward_pre_hook(read)

    def during(self, work):
        """(images, tokens) of some work, and its result."""
        before = self.images, self.tokens
        result = work()
        return (self.images - before[0], self.tokens - before[1]), result


def whole_conversation(tokenizer, turns, answers):
    """Ids and kinds of all that has been said, and the last question; answers as the ids they were."""
    written = iter(answers)
    ids, kinds = [tokenizer.bos_token_id], [Kind.TEXT]
    for piece in template.prompt(turns):
        if piece.type == "image":
            run, kind = [0] * 4, Kind.IMAGE
        elif piece.type == "end":
            run, kind = [tokenizer.eos_token_id], Kind.TEXT
        elif piece.supervise:
            run, kind = next(written), Kind.TEXT
        else:
            run, kind = tokenizer(piece.text, add_special_tokens=False).input_ids, Kind.TEXT
        ids += run
        kinds += [kind] * len(run)
    return ids, kinds


def answers_without_cache(model, tokenizer, rounds, *, first=NEW):
    """The ids of every answer: for each id the whole conversation runs through the decoder, by definition.

    The first answer is cut off after `first` ids, the others after NEW.
    """
    gated = model.config.attention == "gated_cross"
    decoder = model.decoder if gated else Interleaved(model.language.model)
    turns, answers, shown = [], [], ""
    for question, names in rounds:
        numbers = range(len(shown), len(shown) + len(names))
        content = (*(Part("image", image=n) for n in numbers), Part("text", text=question))
        turns.append(Turn("user", content))
        shown += names
        answer: list[int] = []
        while len(answer) < (NEW if answers else first):
            ids, kinds = whole_conversation(tokenizer, turns, answers)
            row = np.array(ids + answer, np.int32)
            kinds = np.array(kinds + [Kind.TEXT] * len(answer), np.int8)
            said = Example("whole", row, np.full_like(row, IGNORED), kinds, tuple(shown))
            batch = collate([said], pixels=PIXELS.__getitem__, image_tokens=4, pad_id=0)
            batch = wanting(batch, np.arange(len(row))[None] == len(row) - 1)
            with torch.no_grad():
                state = decoder(*model.embed(batch), batch.layout)
            token = int(model.logits(state).argmax())
            if token == tokenizer.eos_token_id:
                break
            answer.append(token)
        answers.append(answer)
        turns.append(Turn("assistant", (Part("text", text="in other ids"),)))
    return answers


@pytest.fixture
def written(monkeypatch):
    """The ids of each answer, as they are written."""
    answers: list[list[int]] = []

    def recorded(*arguments, **settings):
        answers.append([])
        for (token,) in generate(*arguments, **settings):
            answers[-1].append(token)
            yield [token]

    monkeypatch.setattr(chat_module, "generate", recorded)
    return answers


def test_a_conversation_writes_the_ids_that_its_whole_text_computed_anew_gives(
    any_model, tokenizer, begin, written, monkeypatch
):
    lengths, scores = [], any_model.logits
    for leaning in (0.0, 1.0, 2.0):  # towards an end
        bias = torch.zeros(len(tokenizer), dtype=torch.float64)
        bias[tokenizer.eos_token_id] = leaning
        monkeypatch.setattr(any_model, "logits", lambda states, bias=bias: scores(states) + bias)
        expected = answers_without_cache(any_model, tokenizer, ROUNDS)
        written.clear()
        answers = ask_all(begin(any_model), ROUNDS)
        assert written == expected
        assert answers == [tokenizer.decode(ids) for ids in expected]
        lengths += [len(ids) for ids in expected]
    assert NEW in lengths, "some are cut off, their last id not read"
    assert min(lengths) < NEW, "and some end by themselves"


def test_an_answer_that_nobody_heard_to_its_end_ends_where_it_was_left(
    any_model, tokenizer, begin, written, monkeypatch
):
    monkeypatch.setattr(Encoder, "decode", lambda _, ids: "".join(f" {token}" for token in ids))
    chat, (question, names) = begin(any_model), ROUNDS[0]
    pieces = chat.stream(question, images=pictures(names))
    heard = next(pieces) + next(pieces)
    pieces.close()
    assert chat.turns[-1] == Turn("assistant", (Part("text", text=heard),))
    ask_all(chat, ROUNDS[1:])
    assert written == answers_without_cache(any_model, tokenizer, ROUNDS, first=2)


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("rounds", [0, 1])
def test_an_answer_that_breaks_off_leaves_the_conversation_as_it_was(any_model, begin, rounds, at):
    sampling = Sampling(seed=2)
    broken, fresh = begin(any_model, sampling=sampling), begin(any_model, sampling=sampling)
    assert ask_all(broken, ROUNDS[:rounds]) == ask_all(fresh, ROUNDS[:rounds])
    break_off(any_model.language.model.layers[1], at=at)
    with pytest.raises(BrokenOffError):
        broken.ask("And these?", images=pictures("34"))
    assert (broken.turns, broken.images) == (fresh.turns, fresh.images)
    again = [("Which is larger?", ""), *ROUNDS[1:]]
    assert ask_all(broken, again) == ask_all(fresh, again)


def test_more_images_than_training_allows_are_seen_each_in_its_place(
    any_model, tokenizer, begin, written
):
    for shown in ("012345012345", "543210543210", "5" * 10):
        begin(any_model).ask("Which?", images=pictures(shown))
        assert [written[-1]] == answers_without_cache(any_model, tokenizer, [("Which?", shown)])
    assert len(set(map(tuple, written))) > 1


def test_without_a_new_image_the_tower_is_not_run(any_model, begin):
    count, chat = Counter(any_model), begin(any_model)
    assert count.during(lambda: chat.ask("Hello"))[0][0] == 0
    assert count.during(lambda: chat.ask("And here?", images=pictures("12")))[0][0] == 2
    assert count.during(lambda: chat.ask("And now?"))[0][0] == 0


def test_a_known_image_passes_neither_tower_nor_decoder_and_changes_no_answer(streams_model, begin):
    count, store = Counter(streams_model), ImageStore(limit_bytes=10**7)
    rounds = [("Hello, who are you?", "2"), ("And there?", "13"), ("Which is larger?", "")]
    (images, tokens), expected = count.during(lambda: ask_all(begin(streams_model), rounds))
    begin(streams_model, store=store).ask("What?", images=pictures("31"))
    for known in (2, 3):  # two of the three at first; then all
        chat = begin(streams_model, store=store)
        found = count.during(lambda chat=chat: ask_all(chat, rounds))
        assert found == ((images - known, tokens - 4 * known), expected)


def test_a_store_without_room_costs_time_and_changes_no_answer(streams_model, begin):
    layers, heads, tokens, size = 3, 2, 4, 8
    one = layers * 2 * heads * tokens * size * 8
    store, count = ImageStore(limit_bytes=2 * one), Counter(streams_model)
    expected = begin(streams_model).ask("Which?", images=pictures("012"))
    for _ in range(2):
        chat = begin(streams_model, store=store)
        assert chat.ask("Which?", images=pictures("012")) == expected
        assert len(store._held) == 2
    for name, images in (("2", 0), ("0", 0), ("1", 1), ("2", 1)):  # as 1 took its room
        assert (
            count.during(lambda name=name: chat.ask("And?", images=pictures(name)))[0][0] == images
        )


def test_clear_forgets_all_that_was_said_and_shown(any_model, begin):
    chat = begin(any_model)
    fresh = ask_all(chat, ROUNDS)
    assert ask_all(chat, ROUNDS) != fresh
    chat.clear()
    assert (chat.turns, chat.images) == ([], 0)
    assert ask_all(chat, ROUNDS) == fresh


def test_a_round_that_is_undone_might_never_have_been(any_model, begin):
    chat, fresh = begin(any_model), begin(any_model)
    assert not chat.undo()
    ask_all(chat, ROUNDS[:1])
    ask_all(fresh, ROUNDS[:1])
    ask_all(chat, ROUNDS[2:4])
    assert chat.undo()
    assert chat.undo()
    assert (chat.turns, chat.images, chat.tokens) == (fresh.turns, fresh.images, fresh.tokens)
    assert ask_all(chat, ROUNDS[1:]) == ask_all(fresh, ROUNDS[1:])


def test_a_conversation_without_room_stays_as_it_was(any_model, begin):
    free, tight = begin(any_model), begin(any_model, max_tokens=180)
    rounds = ROUNDS[:2]
    assert ask_all(free, rounds) == ask_all(tight, rounds)
    before = list(tight.turns), tight.images
    with pytest.raises(TooLongError, match=r"at most 180 fit; clear it to go on"):
        tight.ask("word " * 50, images=pictures("5"))
    assert (tight.turns, tight.images) == before
    assert tight.ask("Why?", images=pictures("4")) == free.ask("Why?", images=pictures("4"))


@pytest.mark.parametrize("shape", [(8, 8, 3), (3, 16, 16), (8, 8)])
def test_an_image_of_another_shape_is_named_and_the_conversation_stays_as_it_was(
    model, begin, shape
):
    chat = begin(model)
    chat.ask("What?", images=pictures("0"))
    before = list(chat.turns)
    wrong = np.zeros(shape, np.float32)
    with pytest.raises(ValueError, match=r"image 3: shape=.*: must be \(3, 8, 8\)"):
        chat.ask("And these?", images=[PIXELS["1"], wrong])
    assert (chat.turns, chat.images) == (before, 1)


@pytest.mark.parametrize(
    ("image", "complaint"),
    [
        (np.zeros((3, 8, 8), np.uint8), "type='uint8': must be a numpy array of float32"),
        (torch.zeros(3, 8, 8), r"type=.*torch\.Tensor.*: must be a numpy array of float32"),
        (np.full((3, 8, 8), np.nan, np.float32), "infinite or NaN values=192: must be finite"),
    ],
)
def test_an_image_that_is_no_array_of_finite_float32_is_refused(model, begin, image, complaint):
    with pytest.raises(ValueError, match=f"image 2: {complaint}"):
        begin(model).ask("And these?", images=[PIXELS["1"], image])


def test_an_answer_without_room_for_a_token_is_refused(model, begin):
    with pytest.raises(ValueError, match="max_new_tokens=0: must be positive"):
        begin(model, max_new_tokens=0)


def test_every_round_of_a_conversation_has_draws_of_its_own(model, begin, written, monkeypatch):
    def logits(states):  # whatever was said
        return torch.zeros(len(states), model.config.language.vocab_size)

    monkeypatch.setattr(model, "logits", logits)
    ask_all(begin(model, sampling=Sampling(seed=1)), ROUNDS)
    assert len(set(map(tuple, written))) == len(ROUNDS)


def test_pieces_are_whole_characters_and_together_the_answer(model, tokenizer, begin, monkeypatch):
    said = "naïve 東京 🦊!"
    ids = tokenizer(said, add_special_tokens=False).input_ids
    assert len(ids) > len(said), "characters of several tokens each"
    dictate(model, monkeypatch, [*ids, tokenizer.eos_token_id])
    chat = begin(model, max_new_tokens=99)
    pieces = list(chat.stream("What?"))
    assert "".join(pieces) == said == chat.turns[-1].content[0].text
    assert all(piece and "\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)
    assert len(pieces) > 5


def test_half_a_character_at_the_end_is_part_of_the_answer_all_the_same(
    model, tokenizer, begin, monkeypatch
):
    ids = tokenizer("a🦊", add_special_tokens=False).input_ids
    dictate(model, monkeypatch, ids[:3])
    pieces = list(begin(model, max_new_tokens=3).stream("What?"))
    assert "".join(pieces) == tokenizer.decode(ids[:3]) != "a"


def test_what_is_drawn_depends_on_the_seed_alone(any_model, begin):
    def answers(**settings):
        return ask_all(begin(any_model, sampling=Sampling(**settings)), ROUNDS)

    assert answers(seed=1) == answers(seed=1)
    assert len({tuple(answers(seed=seed)) for seed in range(4)}) == 4
    torch.manual_seed(5)  # nor do draws elsewhere matter
    assert answers(seed=1, top_k=9, top_p=0.9) == answers(seed=1, top_k=9, top_p=0.9)


def test_the_likeliest_answer_is_the_limit_of_drawing_it(any_model, begin):
    likeliest = ask_all(begin(any_model), ROUNDS)
    for sampling in (Sampling(temperature=1e-5), Sampling(top_k=1), Sampling(top_p=1e-6)):
        assert ask_all(begin(any_model, sampling=sampling), ROUNDS) == likeliest
