"""Many conversations in a batch say what each says by itself, whatever the attention."""

import numpy as np
import pytest

from dsvl.attention import SCHEMES
from dsvl.cache import ImageStore
from dsvl.chat import Chat
from dsvl.converse import Question, answers_of, converse, questions_of
from dsvl.data.encode import Encoder
from dsvl.data.types import Conversation, ImageRef, Part, Turn
from tests.dsvl.test_chat import CPU, NEW, Counter, pictures, talker
from tests.dsvl.test_model import PIXELS

CHATS = [
    [("What is here?", "0"), ("And there, in the other one?", "1"), ("Why?", "")],
    [("Which is larger?", "12")],
    [("No image at all", ""), ("", "2")],
    [("What is here?", "0"), ("Really?", ""), ("And now?", "0")],
]
"""Questions and the images that come with them: other lengths, other rounds, images in several of them."""


@pytest.fixture(scope="module", params=[*SCHEMES, "gated_cross"])
def any_model(request, model_config, language):
    return talker(model_config, language, request.param)


def turns_of(chat, answer="?"):
    shown, turns = 0, []
    for text, names in chat:
        images = [Part("image", image=shown + k) for k in range(len(names))]
        turns.append(Turn("user", (*images, Part("text", text=text))))
        turns.append(Turn("assistant", (Part("text", text=answer),)))
        shown += len(names)
    return turns


def asked(encoder, chat) -> list[Question]:
    turns = turns_of(chat)
    prompts = [encoder.prompt(turns[: 2 * k + 1]) for k in range(len(chat))]
    return [
        Question(*prompt, tuple(names)) for prompt, (_, names) in zip(prompts, chat, strict=True)
    ]


def encoder_of(model, tokenizer, *, max_tokens=2000):
    tokens = model.config.image_tokens
    return Encoder(tokenizer, image_tokens=tokens, max_tokens=max_tokens)


def alone(model, tokenizer, chat, *, max_tokens=2000) -> list[str]:
    talk = Chat(model, tokenizer, device=CPU, max_tokens=max_tokens, max_new_tokens=NEW)
    return [talk.ask(question, images=pictures(names)) for question, names in chat]


def together(model, encoder, chats, store=None) -> list[list[str]]:
    said = converse(
        model,
        encoder,
        [asked(encoder, chat) for chat in chats],
        pixels=PIXELS.__getitem__,
        max_new_tokens=NEW,
        device=CPU,
        store=store,
    )
    return [[encoder.decode(answer.ids) for answer in answers] for answers in said]


def endings(model, tokenizer, monkeypatch):
    """Have some answers end early: the likeliest tokens that are a multiple of seven become the end."""
    head = model.language.lm_head.forward

    def forward(states):
        scores = head(states)
        likeliest = scores.argmax(-1)
        scores[likeliest % 7 == 0, tokenizer.eos_token_id] = 1e9
        return scores

    monkeypatch.setattr(model.language.lm_head, "forward", forward)


def test_a_batch_of_conversations_says_what_each_says_alone(any_model, tokenizer, monkeypatch):
    endings(any_model, tokenizer, monkeypatch)
    expected = [alone(any_model, tokenizer, chat) for chat in CHATS]
    lengths = {len(answer) for answers in expected for answer in answers}
    assert len(lengths) > 1, "answers of several lengths, so that rows wait for each other"
    encoder = encoder_of(any_model, tokenizer)
    assert together(any_model, encoder, CHATS) == expected
    assert together(any_model, encoder, CHATS[::-1]) == expected[::-1]


def test_an_image_of_several_conversations_is_encoded_once(model_config, language, tokenizer):
    model = talker(model_config, language, "mmca")
    encoder, store, counter = (
        encoder_of(model, tokenizer),
        ImageStore(limit_bytes=2**20),
        Counter(model),
    )
    first = counter.during(lambda: together(model, encoder, CHATS, store))
    again = counter.during(lambda: together(model, encoder, CHATS, store))
    assert first[1] == again[1] == [alone(model, tokenizer, chat) for chat in CHATS]
    assert again[0][0] == 0, "no image goes through the tower a second time"


def test_a_conversation_without_room_for_another_answer_ends_and_the_others_go_on(
    model_config, language, tokenizer
):
    model = talker(model_config, language, "mmca")
    whole = together(model, encoder_of(model, tokenizer), CHATS)
    lengths = sorted(
        sum(len(question.ids) for question in asked(encoder_of(model, tokenizer), chat))
        for chat in CHATS
    )
    short = together(model, encoder_of(model, tokenizer, max_tokens=lengths[-2]), CHATS)
    assert sum(map(len, short)) < sum(map(len, whole))
    assert any(map(len, short))
    for some, all_of_them in zip(short, whole, strict=True):
        assert some == all_of_them[: len(some)]


def test_questions_and_answers_of_an_example_are_all_of_it(model_config, language, tokenizer):
    encoder = encoder_of(talker(model_config, language, "mmca"), tokenizer)
    chat = CHATS[0]
    conversation = Conversation(
        "chat", "", "", tuple(map(ImageRef, "01")), tuple(turns_of(chat, "So it is."))
    )
    example = encoder.encode(conversation, ["0", "1"])
    assert [q.images for q in questions_of(example, image_tokens=4)] == [("0",), ("1",), ()]
    pieces = []
    for question, (start, end) in zip(
        questions_of(example, image_tokens=4), answers_of(example), strict=True
    ):
        pieces += [question.ids, example.ids[start:end]]
        assert encoder.decode(example.ids[start : end - 1]) == "So it is."
    assert np.array_equal(np.concatenate(pieces), example.ids)
    for question, prompt in zip(
        questions_of(example, image_tokens=4), asked(encoder, chat), strict=True
    ):
        assert np.array_equal(question.ids, prompt.ids)
        assert np.array_equal(question.kinds, prompt.kinds)
