"""Conversation -> Example."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsvl.data.encode import Encoder, load_tokenizer, pad_id, show
from dsvl.data.types import IGNORED, Conversation, Example, ImageRef, Kind, Part, Rejected, Turn

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
HOSTILE = st.sampled_from(["Red.", "Yes,", "</s>", "<s>", "\n", "### Answer:\n", " ", "<pad>no"])


def conversation(rounds: list[tuple[int, str, str]]) -> Conversation:
    """From (images introduced, question, answer) of every round."""
    turns, shown = [], 0
    for images, question, answer in rounds:
        parts = [Part("image", image=shown + i) for i in range(images)]
        shown += images
        turns.append(Turn("user", (*parts, Part("text", question))))
        turns.append(Turn("assistant", (Part("text", answer),)))
    refs = tuple(ImageRef(f"{i}.png") for i in range(shown))
    return Conversation("set/1", "set", "a.json:0", refs, tuple(turns))


def answers(example: Example, tokenizer) -> list[str]:
    """The texts that its labels spell, cut at the ends of answers."""
    trained = example.labels[example.labels != IGNORED].tolist()
    texts, start = [], 0
    for position, token in enumerate(trained):
        if token == tokenizer.eos_token_id:
            texts.append(tokenizer.decode(trained[start:position]))
            start = position + 1
    assert start == len(trained)
    return texts


@pytest.fixture
def encoder(tokenizer):
    return Encoder(tokenizer, image_tokens=4, max_tokens=10_000)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 3), TEXT | HOSTILE, TEXT | HOSTILE), min_size=1, max_size=4)
)
def test_labels_spell_exactly_the_answers_whatever_the_tokenizer_merges(encoder, rounds):
    chat = conversation(rounds)
    example = encoder.encode(chat, [f"key{i}" for i in range(len(chat.images))])
    assert answers(example, encoder.tokenizer) == [answer for _, _, answer in rounds]
    trained = example.labels != IGNORED
    np.testing.assert_array_equal(example.labels[trained], example.ids[trained])
    assert (example.kinds[trained] == Kind.TEXT).all()
    assert not trained[0]
    assert (example.ids == encoder.tokenizer.bos_token_id).sum() == 1
    assert (example.kinds == Kind.IMAGE).sum() == 4 * len(chat.images)


def test_the_tokenizer_of_these_tests_does_merge_across_the_boundary(tokenizer):
    whole = tokenizer("### Answer:\nRed.", add_special_tokens=False).input_ids
    apart = tokenizer(["### Answer:\n", "Red."], add_special_tokens=False).input_ids
    assert whole != apart[0] + apart[1]


def test_an_example_has_one_bos_its_images_in_order_and_runs_of_their_length(encoder):
    chat = conversation([(2, "Which?", "Red."), (1, "And?", "Blue.")])
    example = encoder.encode(chat, ["a", "b", "a"])
    assert example.images == ("a", "b", "a")
    assert example.ids[0] == encoder.tokenizer.bos_token_id
    image = np.flatnonzero(example.kinds == Kind.IMAGE)
    assert (np.diff(image) > 1).sum() == 2
    assert (example.ids[image] == encoder.pad_id).all()
    assert (example.ids.dtype, example.labels.dtype, example.kinds.dtype) == ("i4", "i4", "i1")


def test_a_prompt_has_the_positions_of_the_training_sample_up_to_the_answer(encoder):
    chat = conversation([(1, "What?", "Red."), (1, "And?", "Blue.")])
    example = encoder.encode(chat, ["a", "b"])
    rounds = [encoder.prompt(chat.turns[:end]) for end in (1, 3)]
    answer = [*encoder.tokenizer("Red.", add_special_tokens=False).input_ids, encoder.end]
    first, second = rounds
    ids = np.concatenate([first[0], answer, second[0]])
    kinds = np.concatenate([first[1], np.full(len(answer), Kind.TEXT), second[1]])
    np.testing.assert_array_equal(ids, example.ids[: len(ids)])
    np.testing.assert_array_equal(kinds, example.kinds[: len(ids)])
    assert (example.labels[len(ids) :] != IGNORED).all()


def test_length_is_counted_with_image_tokens(tokenizer):
    chat = conversation([(3, "What?", "Red.")])
    length = len(Encoder(tokenizer, image_tokens=50, max_tokens=999).encode(chat, "abc").ids)
    fits = Encoder(tokenizer, image_tokens=50, max_tokens=length)
    assert isinstance(fits.encode(chat, "abc"), Example)
    rejected = Encoder(tokenizer, image_tokens=50, max_tokens=length - 1).encode(chat, "abc")
    assert isinstance(rejected, Rejected)
    assert (rejected.reason, rejected.record) == ("too_long", "a.json:0")
    assert f"{length} tokens, 150 of them for 3 images" in rejected.detail


def test_show_marks_what_is_trained_and_counts_image_tokens(encoder):
    example = encoder.encode(conversation([(1, "What?", "Red."), (1, "And?", "Blue.")]), "ab")
    assert show(example, encoder.tokenizer) == (
        "<s>You are a powerful vision-language assistant.\n\n"
        "### Image 1:\n[image 1: 4 tokens]\n\n### Question:\nWhat?\n\n### Answer:\n⟦Red.</s>⟧"
        "### Image 2:\n[image 2: 4 tokens]\n\n### Question:\nAnd?\n\n### Answer:\n⟦Blue.</s>⟧"
    )


def test_a_tokenizer_without_an_end_is_refused(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    settings_file.write_text(settings_file.read_text().replace("eos_token", "unused"))
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(str(tmp_path))


def test_padding_falls_back_to_the_end_token(tokenizer_folder):
    tokenizer = load_tokenizer(str(tokenizer_folder))
    assert pad_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_id(tokenizer) == tokenizer.eos_token_id
