"""Questions of many at once, answered by one thread: those that wait together are a batch."""

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Sequence

from dsvl.answers import Answers, Piece, Question, Writing

log = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """Too many questions wait already."""


class _Asked:
    """A question, and whom to tell the answer."""

    def __init__(self, question: Question) -> None:
        self.question = question
        self.left = False
        """Nobody listens any more."""
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def tell(self, news: Piece | Exception) -> None:
        """From the thread that answers."""
        try:
            self._loop.call_soon_threadsafe(self._told.put_nowait, news)
        except RuntimeError:  # its loop is closed
            self.left = True

    async def hear(self) -> Piece:
        """The next piece of the answer; raises what went wrong."""
        news = await self._told.get()
        if isinstance(news, Exception):
            raise news
        return news


class Batches:
    """Answers in the order of asking, up to `size` questions together; others wait, at most `waiting`."""

    def __init__(self, answers: Answers, *, size: int = 16, waiting: int = 64) -> None:
        """Start the thread."""
        self.size = size
        self._answers = answers
        self._waiting: queue.Queue[_Asked] = queue.Queue(waiting)
        threading.Thread(target=self._work, name="answers", daemon=True).start()

    async def ask(self, question: Question) -> AsyncGenerator[Piece, None]:
        """The answer, piece by piece; who stops listening frees its place.

        Raises:
            BusyError: if too many wait.
            TooLongError: as `Answers.read`.
        """
        asked = _Asked(question)
        try:
            self._waiting.put_nowait(asked)
        except queue.Full as error:
            raise BusyError(
                f"{self._waiting.maxsize} questions wait already; ask again later"
            ) from error
        try:
            end = None
            while end is None:
                piece = await asked.hear()
                end = piece.end
                yield piece
        finally:
            asked.left = True

    def _work(self) -> None:
        while True:
            asked = [self._waiting.get()]
            while len(asked) < self.size and not self._waiting.empty():
                asked.append(self._waiting.get_nowait())
            self._answer([each for each in asked if not each.left])

    def _answer(self, asked: Sequence[_Asked]) -> None:
        answers: dict[_Asked, Writing] = {}
        for each in asked:
            try:
                answers[each] = self._answers.read(each.question)
            except Exception as error:  # of this question, and of no other
                each.tell(error)
        if not answers:
            return
        told = failed = False
        try:
            for pieces in self._answers.write(list(answers.values())):
                for each, piece in zip(answers, pieces, strict=True):
                    if piece is not None and not each.left:
                        each.tell(piece)
                        told = True
                if all(each.left or answer.ended for each, answer in answers.items()):
                    break
        except Exception as error:
            log.exception("a batch of %s questions failed", len(answers))
            if told or len(answers) == 1:
                for each in answers:
                    each.tell(error)
            else:
                failed = True
        if failed:  # for one of them alone, perhaps, or for want of memory, which the error held
            for each in answers:
                self._answer([each])
