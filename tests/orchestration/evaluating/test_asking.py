"""Samples are asked together as far as memory goes."""

import pytest
import torch

from orchestration.evaluating.asking import Asker


class Small(Asker):
    """An asker whose GPU has memory for three samples at once."""

    def __init__(self, room: int = 3) -> None:
        self.room, self.asked = room, []

    def _ask(self, job):
        if len(job) > self.room:
            raise torch.OutOfMemoryError(f"{len(job)} samples")
        self.asked.append(list(job))
        return len(job)


def test_what_needs_too_much_memory_is_asked_in_halves_each_sample_once():
    asker, job = Small(), [(str(number), None) for number in range(11)]
    assert asker(job) == 11
    assert [one for part in asker.asked for one in part] == job


def test_a_sample_that_is_too_large_by_itself_is_an_error():
    with pytest.raises(torch.OutOfMemoryError, match="1 samples"):
        Small(room=0)([("0", None), ("1", None)])
