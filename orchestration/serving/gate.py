"""What stands between clients and models: who may ask, how much, and answers over HTTP. Without Ray."""

import asyncio
import base64
import hashlib
import hmac
import logging
import re
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Incoming
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dsvl.answers import Piece, Question
from dsvl.chat import TooLongError
from dsvl.data.images import ImageProcessor, load
from dsvl.data.sources import BadImage, Images
from orchestration.serving.batching import BusyError
from orchestration.serving.completions import RefusedError, Reply, Request, failure, parse

log = logging.getLogger(__name__)

PAGE = Path(__file__).with_name("chat.html")
MOST_PARTS = 2**18
"""Lists, objects and commas of a request: parsed, an empty list takes fifty times its two bytes."""
LETTERS_A_TOKEN = 32
"""More than any conversation has on average."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may take."""

    body_bytes: int = 32 * 2**20
    """Of a request, with the images in base64."""
    body_seconds: float = 60
    """Until it has arrived."""
    images: int = 32
    """In a conversation."""
    reading: int = 8
    """Bodies that are read at once; others wait."""
    decoding: int = 2
    """Images that are decoded at once."""
    known_bytes: int = 256 * 2**20
    """Of decoded images that are kept, for the next round of their conversation."""
    answer_tokens: int = 512
    """Where a request does not say."""


class Model(NamedTuple):
    """What is talked to."""

    processor: ImageProcessor
    max_tokens: int
    """Positions of a conversation."""
    max_image_pixels: int
    answer: Callable[[Question], AsyncGenerator[Piece, None]]
    """Raises BusyError, TooLongError, or LostError."""


class LostError(RuntimeError):
    """The model cannot be reached."""


class Gate:
    """The routes, and what they share."""

    def __init__(
        self,
        models: Mapping[str, Model],
        *,
        token: str,
        limits: Limits,
        hosts: Collection[str],
    ) -> None:
        """`token` is the sha256, in hexadecimal, of the one that clients show.

        `hosts` are the names by which they may call this machine; any where there are none.
        """
        self.models, self.limits, self._hosts = models, limits, hosts
        self._token = token
        self._reading = asyncio.Semaphore(limits.reading)
        self._decoders = ThreadPoolExecutor(limits.decoding, thread_name_prefix="images")
        self._known: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        """(model, sha256 of the URL) -> what `ImageProcessor.fit` made of an image."""
        self._page, self._policy = page()

    def app(self) -> Starlette:
        """All of it as an ASGI application."""
        return Starlette(
            routes=[
                Route("/", self.show_page),
                Route("/v1/models", self.list_models),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ],
            exception_handlers={
                HTTPException: _no_such_route,
                RefusedError: _refused,
                Exception: _failed,
            },
        )

    async def show_page(self, incoming: Incoming) -> Response:
        """The page for people; it asks for the token itself."""
        self._expect(incoming)
        headers = {
            "Content-Security-Policy": self._policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(self._page, headers=headers)

    async def list_models(self, incoming: Incoming) -> Response:
        """Names, and what a conversation with each may hold."""
        self._admit(incoming)
        models = [
            {
                "id": name,
                "object": "model",
                "created": 0,
                "owned_by": "dsvl",
                "max_tokens": model.max_tokens,
                "max_images": self.limits.images,
            }
            for name, model in self.models.items()
        ]
        return JSONResponse({"object": "list", "data": models})

    async def complete(self, incoming: Incoming) -> Response:
        """An answer, whole or as a stream of events."""
        self._admit(incoming)
        request, model, question = await self._read(incoming)
        pieces = model.answer(question)
        try:
            first = await anext(pieces)  # what is refused is known by then
        except Exception as error:
            raise _as_refused(error) from error
        reply = Reply(request)
        if request.stream:
            events = _events(reply, first, pieces)
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        text, last = first.text, first
        async with aclosing(pieces):
            try:
                async for last in pieces:
                    text += last.text
            except Exception as error:
                raise _as_refused(error) from error
        return JSONResponse(reply.whole(text, last))

    def _expect(self, incoming: Incoming) -> None:
        # Another site's name may lead here: its page would be one with ours to a browser.
        name = incoming.url.hostname
        if self._hosts and name not in self._hosts:
            told = f"Host {(name or '')[:60]!r} is not this server; use {' or '.join(self._hosts)}"
            raise RefusedError(421, told, code="unknown_host")

    def _admit(self, incoming: Incoming) -> None:
        self._expect(incoming)
        scheme, _, token = incoming.headers.get("Authorization", "").partition(" ")
        shown = hashlib.sha256(token.strip().encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(shown, self._token):
            told = "no such token: send the server's as `Authorization: Bearer TOKEN`"
            raise RefusedError(401, told, code="invalid_api_key")

    async def _read(self, incoming: Incoming) -> tuple[Request, Model, Question]:
        """What is asked, of whom."""
        async with self._reading:
            try:
                body = await asyncio.wait_for(self._body(incoming), self.limits.body_seconds)
            except TimeoutError as error:
                told = f"the request had not arrived after {self.limits.body_seconds:g} s"
                raise RefusedError(408, told, code="request_timeout") from error
            request = await asyncio.to_thread(parse, body)
            if request.model not in self.models:
                told = f"model: no {request.model[:60]!r}; there is {', '.join(self.models)}"
                raise RefusedError(404, told, code="model_not_found", param="model")
            model = self.models[request.model]
            turns, urls = request.turns()
            letters = sum(len(part.text) for turn in turns for part in turn.content)
            if (
                letters > LETTERS_A_TOKEN * model.max_tokens
            ):  # else to tokenise it would stop all others
                told = f"messages: {letters} letters are more than {model.max_tokens} tokens; begin anew"
                code = "context_length_exceeded"
                raise RefusedError(400, told, code=code, param="messages")
            if len(urls) > self.limits.images:
                told = (
                    f"messages: {len(urls)} images, but at most {self.limits.images} may be shown"
                )
                raise RefusedError(400, told, code="too_many_images", param="messages")
            images = [
                await self._image(url, number, request.model)
                for number, url in enumerate(urls, start=1)
            ]
        most = request.max_completion_tokens or request.max_tokens or self.limits.answer_tokens
        return (
            request,
            model,
            Question(
                turns=turns,
                images=images,
                max_new_tokens=most,
                sampling=request.sampling(),
                stop=request.stops(),
            ),
        )

    async def _body(self, incoming: Incoming) -> bytes:
        """All of it; refused as soon as it is too much."""
        most = self.limits.body_bytes
        stated = incoming.headers.get("Content-Length", "0")
        told = f"the request is larger than {most} bytes; send fewer or smaller images"
        too_large = RefusedError(413, told, code="request_too_large")
        if not stated.isdecimal() or int(stated) > most:
            raise too_large
        body = bytearray()
        try:
            async for some in incoming.stream():
                body += some
                if len(body) > most:
                    raise too_large
        except ClientDisconnect as error:
            raise RefusedError(400, "the request broke off", code="broken_off") from error
        if sum(map(body.count, b"[{,")) > MOST_PARTS:
            told = f"the request has over {MOST_PARTS} parts; send a shorter conversation"
            raise RefusedError(400, told, code="request_too_large")
        return bytes(body)

    async def _image(self, url: str, number: int, name: str) -> np.ndarray:
        """(3, P, P) float32 pixels of an image, decoded once."""
        model = self.models[name]
        if not url.startswith("data:"):
            told = (
                f"image {number}: {url[:60]!r}: URLs are not fetched; send the image as a data: URL"
            )
            raise RefusedError(400, told, code="forbidden_url", param="messages")
        key = name, await asyncio.to_thread(_digest, url)
        if (fitted := self._known.get(key)) is None:
            loop = asyncio.get_running_loop()
            try:
                fitted = await loop.run_in_executor(self._decoders, _decode, url, model)
            except BadImage as bad:
                told = f"image {number}: {bad.detail}"
                raise RefusedError(400, told, code=bad.reason, param="messages") from bad
        self._known[key] = fitted
        self._known.move_to_end(key)
        while sum(each.nbytes for each in self._known.values()) > self.limits.known_bytes:
            self._known.popitem(last=False)
        return model.processor.normalise(fitted)


def page() -> tuple[str, str]:
    """The page, and the policy that lets it run its own script and style and talk to its own host alone."""
    html = PAGE.read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", html, flags=re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in inline)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return html, (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _decode(url: str, model: Model) -> np.ndarray:
    # No path is read: what begins with `data:` is never looked up.
    image = load(Images("."), url, processor=model.processor, max_pixels=model.max_image_pixels)
    return image.fitted


async def _events(
    reply: Reply, first: Piece, pieces: AsyncGenerator[Piece, None]
) -> AsyncIterator[bytes]:
    """The answer as events; where it breaks off, the last one says why."""
    yield reply.opening()
    yield reply.event(first)
    async with aclosing(pieces):
        try:
            async for piece in pieces:
                yield reply.event(piece)
        except Exception as error:
            yield failure(_as_refused(error))


def _as_refused(error: Exception) -> RefusedError:
    """What a client is told of it."""
    if isinstance(error, RefusedError):
        return error
    if isinstance(error, TooLongError):
        return RefusedError(400, str(error), code="context_length_exceeded", param="messages")
    if isinstance(error, BusyError):
        return RefusedError(429, str(error), code="too_many_requests")
    if isinstance(error, LostError):
        return RefusedError(503, str(error), code="model_unavailable")
    log.exception("a request failed", exc_info=error)
    return RefusedError(500, "the server failed; its log says how", code="internal_error")


def _refused(_: Incoming, error: Exception) -> Response:
    assert isinstance(error, RefusedError)
    headers = {
        401: {"WWW-Authenticate": "Bearer"},
        429: {"Retry-After": "1"},
        503: {"Retry-After": "5"},
    }
    return JSONResponse(error.body(), status_code=error.status, headers=headers.get(error.status))


def _no_such_route(incoming: Incoming, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    asked = f"{incoming.method} {incoming.url.path[:60]}"
    told = f"{asked}: {error.detail}; there are GET /v1/models and POST /v1/chat/completions"
    return _refused(incoming, RefusedError(error.status_code, told, code="no_such_route"))


def _failed(incoming: Incoming, error: Exception) -> Response:
    return _refused(incoming, _as_refused(error))
