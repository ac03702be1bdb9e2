"""Chat completions as OpenAI's clients ask for them and read them: requests, answers, errors."""

import json
import time
import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from dsvl.answers import Piece
from dsvl.data.types import Part, Turn
from dsvl.generate import Sampling
from orchestration.problems import dotted, explain


class RefusedError(Exception):
    """A request that gets no answer: `status` is that of HTTP, `code` for programs."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """As OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        told = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": told}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Text(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where an image is: in a `data:` URL."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"
    """Of no effect: the tower sees every image at its own size."""


class Image(_Strict):
    """A part of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _listed(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Content = Annotated[
    list[Annotated[Text | Image, Field(discriminator="type")]], BeforeValidator(_listed)
]
"""A text, or a list of parts."""


class Message(_Strict):
    """What one speaker said."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: str | None = None
    """Ignored, as is what clients send back of an answer: `refusal`, `annotations`, ..."""
    refusal: None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Ignored."""


class Request(_Strict):
    """A request for an answer. What would change it and cannot be had is refused, never ignored."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2, allow_inf_nan=False)
    """0 writes the likeliest tokens: the answers that evaluation measures."""
    top_p: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1, None] = 1
    logprobs: Literal[False, None] = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None

    def stops(self) -> list[str]:
        """The texts to stop at."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(stops) or max(map(len, stops), default=0) > 256:
            told = "stop: must be at most 4 texts of 1 to 256 letters"
            raise RefusedError(400, told, code="invalid_value", param="stop")
        return stops

    def sampling(self) -> Sampling | None:
        """How to draw; without a `seed`, by one of its own."""
        if self.temperature == 0:
            return None
        seed = uuid.uuid4().int if self.seed is None else self.seed
        return Sampling(temperature=self.temperature, top_p=self.top_p, seed=seed % 2**63)

    def turns(self) -> tuple[list[Turn], list[str]]:
        """The conversation, and the URLs of its images in order.

        Raises RefusedError where no conversation could go that way.
        """
        turns, urls = [], []
        for number, message in enumerate(self.messages):
            role = "system" if message.role == "developer" else message.role
            begun = len(turns) - (turns[0].role == "system") if turns else 0
            expected = ("user", "assistant")[begun % 2]
            if role != expected and (role, number) != ("system", 0):
                raise _misplaced(number, f"is {message.role}, but must be {expected}: a system message may "
                                 "come first, then user and assistant take turns")  # fmt: skip
            content = []
            for part in message.content:
                if isinstance(part, Text):
                    content.append(Part("text", text=part.text))
                elif role != "user":
                    raise _misplaced(number, f"shows an image, which only a user can, not {role}")
                else:
                    content.append(Part("image", image=len(urls)))
                    urls.append(part.image_url.url)
            turns.append(Turn(role, tuple(content)))
        if turns[-1].role != "user":
            raise _misplaced(len(turns) - 1, "must be the user's: there is nothing to answer")
        return turns, urls


def _misplaced(number: int, told: str) -> RefusedError:
    param = f"messages.{number}"
    return RefusedError(400, f"{param}: {told}", code="invalid_messages", param=param)


def parse(body: bytes) -> Request:
    """The request that a body holds; raises RefusedError, with all that is wrong with it."""
    try:
        document = from_json(body)
    except ValueError as error:
        raise RefusedError(400, f"the body is no JSON: {error}", code="invalid_json") from error
    if not isinstance(document, dict):
        raise RefusedError(400, "the body must be a JSON object", code="invalid_json")
    try:
        return Request.model_validate(document)
    except ValidationError as error:
        problems = explain(error, Request)
        told = "; ".join(map(str, problems[:8]))
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        param = dotted(problems[0].keys)
        raise RefusedError(400, told + more, code="invalid_request", param=param) from error


class Reply:
    """An answer on its way to one client."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": request.model,
        }

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """All at once."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": last.end}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(last),
        }

    def opening(self) -> bytes:
        """The first event of a stream."""
        return self._event({"role": "assistant", "content": ""})

    def event(self, piece: Piece) -> bytes:
        """The event, or events, of a piece."""
        delta = {"content": piece.text} if piece.text else {}
        if piece.end is None:
            return self._event(delta)
        events = self._event(delta) if delta else b""
        events += self._event({}, end=piece.end)
        options = self._request.stream_options
        if options and options.include_usage:
            events += _sent(self._chunk() | {"choices": [], "usage": _usage(piece)})
        return events + b"data: [DONE]\n\n"

    def _event(self, delta: dict[str, str], end: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": end}
        return _sent(self._chunk() | {"choices": [choice]})

    def _chunk(self) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk"}


def failure(error: RefusedError) -> bytes:
    """The event that ends a stream which broke off."""
    return _sent(error.body())


def _sent(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _usage(piece: Piece) -> dict[str, int]:
    return {
        "prompt_tokens": piece.prompt_tokens,
        "completion_tokens": piece.answer_tokens,
        "total_tokens": piece.prompt_tokens + piece.answer_tokens,
    }
