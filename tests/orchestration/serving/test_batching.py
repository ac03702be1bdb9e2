"""Questions that fail together are asked one by one."""

import asyncio
import weakref
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from dsvl.answers import Piece
from orchestration.serving import batching
from orchestration.serving.batching import Batches


class Cache:
    """What a batch holds in memory."""


class Small:
    """A machine whose memory is enough for one answer at a time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.caches: list[weakref.ref[Cache]] = []

    def read(self, question: str) -> Any:
        return SimpleNamespace(ended=False, text=question)

    def write(self, answers: Sequence[Any]) -> Iterator[list[Piece | None]]:
        assert not any(held() for held in self.caches), "what has failed is held no longer"
        self.sizes.append(len(answers))
        cache = Cache()
        self.caches.append(weakref.ref(cache))
        if len(answers) > 1:
            raise MemoryError
        yield [Piece(answer.text, 1, 1, "stop") for answer in answers]


async def heard(batches: Batches, question: Any) -> str:
    return "".join([piece.text async for piece in batches.ask(question)])


def test_a_batch_that_is_too_large_is_answered_one_by_one_in_the_memory_it_gave_back(monkeypatch):
    machine: Any = Small()
    monkeypatch.setattr(Batches, "_work", lambda self: None)  # until all wait
    monkeypatch.setattr(
        batching.log, "exception", lambda *_: None
    )  # pytest would keep what is logged
    batches = Batches(machine)

    async def all_at_once() -> list[str]:
        asking = [asyncio.ensure_future(heard(batches, word)) for word in ("a", "b", "c")]
        await asyncio.sleep(0)
        waiting = [batches._waiting.get_nowait() for _ in asking]
        await asyncio.to_thread(batches._answer, waiting)
        return await asyncio.gather(*asking)

    assert asyncio.run(all_at_once()) == ["a", "b", "c"]
    assert machine.sizes == [3, 1, 1, 1]
