"""Exact answers in one pass are what greedy decoding writes; blindness and majorities are as defined."""

import numpy as np
import pytest
import torch

from dsvl.config import OptimConfig
from dsvl.data.types import IGNORED, Example
from dsvl.evaluate import evaluate, exchanged, majority_accuracy, score, score_rounds
from dsvl.generate import greedy
from dsvl.optim import groups
from tests.dsvl.test_model import batch_of, example
from tests.dsvl.test_train import Prepared


def taught(model, examples):
    """The model, fitted to some of the answers, so that right and wrong ones occur."""
    optimizer = torch.optim.AdamW(groups(model.trainable(), OptimConfig()), lr=0.02)
    for _ in range(12):
        optimizer.zero_grad()
        model(batch_of(*examples)).backward()
        optimizer.step()
    return model.eval()


def answers(sample: Example) -> list[tuple[int, list[int]]]:
    """Start and ids of every answer of an example."""
    trained = np.flatnonzero(sample.labels != IGNORED)
    runs = np.split(trained, np.flatnonzero(np.diff(trained) > 1) + 1)
    return [(int(run[0]), sample.ids[run].tolist()) for run in runs]


def prefix(sample: Example, end: int) -> Example:
    images = tuple(sample.images[: int((sample.kinds[:end] == 2).sum()) // 4])
    return Example(sample.id, sample.ids[:end], sample.labels[:end], sample.kinds[:end], images)


def test_an_answer_is_right_where_greedy_decoding_after_the_true_history_writes_it(model):
    samples = [
        example(layout, seed=k) for k, layout in enumerate(("t1tTTtT", "tTtT1tTT", "11tTtTTT"))
    ]
    taught(model, samples)
    expected = 0
    for sample in samples:
        for start, ids in answers(sample):
            (written,) = greedy(
                model, batch_of(prefix(sample, start)), end=-1, max_new_tokens=len(ids)
            )
            expected += written == ids
    batch = batch_of(*samples)
    tally = score(model, batch, others=batch.pixels)
    assert tally.rounds == 7
    assert tally.right == expected
    assert 0 < expected < 7, "right and wrong answers both occur"


def test_blind_accuracy_is_that_of_zeroed_images(model):
    samples = [example("t1tTTtT"), example("ttTT", seed=1)]
    taught(model, samples)
    shown, zeroed = batch_of(*samples), batch_of(*samples)
    zeroed.pixels.zero_()
    blind = score(model, zeroed, others=shown.pixels)
    assert score(model, shown, others=zeroed.pixels).right_blind == blind.right


def test_shuffled_accuracy_is_that_of_the_images_of_others(model):
    samples = [example("t1tTTtT"), example("1ttTT", seed=1), example("ttTT", seed=2)]
    taught(model, samples)
    shown, others = batch_of(*samples), batch_of(*samples)
    others.pixels.copy_(others.pixels.flip(0))
    tally = score(model, shown, others=others.pixels)
    assert tally.right_shuffled == score(model, others, others=shown.pixels).right
    assert score(model, shown, others=shown.pixels).right_shuffled == tally.right


def test_every_image_is_exchanged_for_another_and_none_is_shown_more_often():
    another = exchanged(key for one in Prepared.eval for key in one.images)
    assert len(another) > 1
    assert all(key != other for key, other in another.items())
    assert sorted(another) == sorted(another.values())
    assert exchanged([]) == {}


@pytest.mark.parametrize("batch", [1, 4, 50])
def test_a_tally_does_not_depend_on_the_batch(model, batch):
    held_out = Prepared.eval
    whole = evaluate(model, Prepared(), held_out, batch=18, device=torch.device("cpu"))
    part = evaluate(model, Prepared(), held_out, batch=batch, device=torch.device("cpu"))
    assert part.loss == pytest.approx(whole.loss, rel=1e-5)
    counts = ("targets", "right", "right_blind", "right_shuffled", "rounds")
    assert [getattr(part, n) for n in counts] == [getattr(whole, n) for n in counts]
    first = evaluate(model, Prepared(), held_out[:5], batch=batch, device=torch.device("cpu"))
    assert first.targets == sum(held_out.targets[:5])


def test_rounds_told_one_by_one_add_up_to_the_tally(model):
    samples = [example("t1tTTtT"), example("tT", seed=1), example("11tTtTTT", seed=2)]
    taught(model, samples)
    batch = batch_of(*samples)
    rounds, tally = score_rounds(model, batch), score(model, batch, others=batch.pixels)
    assert [len(told) for told in rounds] == [2, 1, 2]
    flat = [told for of_one in rounds for told in of_one]
    assert sum(told.loss for told in flat) == pytest.approx(tally.loss, rel=1e-5)
    assert sum(told.targets for told in flat) == tally.targets
    assert sum(told.right for told in flat) == tally.right
    for sample, told in zip(samples, rounds, strict=True):
        assert [n.targets for n in told] == [len(ids) for _, ids in answers(sample)]


class Said(list):
    """Samples, by what is said in them: questions and answers."""

    def said(self):
        return iter(self)


def test_the_majority_answers_each_question_as_training_mostly_did():
    pairs = ("a?x", "b?y", "a?x", "a?z", "b?y", "c?y")
    train = Said((pair[:2].encode(), pair[2:].encode()) for pair in pairs)
    held_out = [(b"a?", b"x"), (b"b?", b"x"), (b"new?", b"y"), (b"a?", b"z")]
    assert majority_accuracy(train, Said(held_out)) == 2 / 4
    assert majority_accuracy(train, Said(held_out[:2])) == 1 / 2
