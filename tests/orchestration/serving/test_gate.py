"""What clients may ask and get, over HTTP, without a cluster: OpenAI's client, many at once, foul play."""

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import openai
import psutil
import pytest
import torch

from dsvl import pretrained
from dsvl.answers import Answers, Question
from dsvl.cache import ImageStore
from dsvl.chat import Chat
from dsvl.data.encode import load_tokenizer
from dsvl.data.images import ImageProcessor, pixels
from dsvl.data.types import Part, Turn
from dsvl.generate import Sampling
from orchestration.serving.batching import Batches, BusyError
from orchestration.serving.gate import Limits, LostError, Model
from tests.orchestration.hosting import TOKEN, asked, bad_requests, hosted, model_folder, picture

CPU = torch.device("cpu")
NAME = "digits"
LIMITS = Limits(body_bytes=2**21, answer_tokens=24)


class Served(NamedTuple):
    """A server of these tests, with what is behind it."""

    address: str
    folder: Path
    answers: Answers
    batches: list[int]
    """How many were answered together, batch by batch."""

    def client(self, **options: Any) -> openai.OpenAI:
        settings = {"api_key": TOKEN, "max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.address}/v1", **settings)


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[Served]:
    folder = model_folder(tmp_path_factory.mktemp("served") / NAME)
    answers = Answers(
        pretrained.load(folder, precision="fp32").eval(),
        load_tokenizer(str(folder)),
        device=CPU,
        max_tokens=512,
        store=ImageStore(limit_bytes=2**24),
    )
    scores, least = answers.model.logits, torch.zeros(512)
    least[answers.encoder.end] = -30.0  # else its answers are of a word
    answers.model.logits = lambda states: scores(states) + least  # type: ignore
    sizes: list[int] = []
    write = answers.write
    answers.write = lambda some: (sizes.append(len(some)), write(some))[1]  # type: ignore
    processor = ImageProcessor.from_checkpoint(folder)
    model = Model(processor, 512, 50_000_000, Batches(answers).ask)

    async def broken(question):
        raise RuntimeError("not for clients")
        yield

    async def lost(question):
        raise LostError("gone")
        yield

    async def busy(question):
        raise BusyError("many")
        yield

    models = {NAME: model} | {
        name: model._replace(answer=answer)
        for name, answer in (("broken", broken), ("lost", lost), ("busy", busy))
    }
    with hosted(models, limits=LIMITS) as address:
        yield Served(address, folder, answers, sizes)


@pytest.fixture
def client(served) -> openai.OpenAI:
    return served.client()


def said(client: openai.OpenAI, *messages: Any, **options: Any) -> str:
    """The answer to a conversation."""
    reply = client.chat.completions.create(model=NAME, messages=messages, **options)
    return reply.choices[0].message.content


def post(client: openai.OpenAI, body: Any) -> None:
    """Send a document, or the bytes of a body."""
    kind = {"body": body} if isinstance(body, dict) else {"content": body}
    client.post("/chat/completions", cast_to=object, **kind)


def test_the_official_client_gets_an_answer_and_what_it_took(client):
    reply = client.chat.completions.create(model=NAME, messages=[asked("What?", picture(1))])
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert 0 < reply.usage.completion_tokens <= LIMITS.answer_tokens
    assert reply.usage.prompt_tokens > 4, "the positions of the image among them"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert next(iter(client.models.list())).id == NAME


def test_a_stream_says_piece_by_piece_what_the_whole_answer_says(client):
    question = asked("Which digit is larger, image 1 or image 2?", picture(1), picture(2))
    whole = client.chat.completions.create(model=NAME, messages=[question])
    *chunks, usage = client.chat.completions.create(
        model=NAME, messages=[question], stream=True, stream_options={"include_usage": True}
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert usage.usage == whole.usage


def test_three_rounds_are_answered_as_in_a_chat(served, client):
    model, tokenizer = served.answers.model, served.answers.encoder.tokenizer
    chat = Chat(model, tokenizer, device=CPU, max_tokens=512, max_new_tokens=24)
    processor = ImageProcessor.from_checkpoint(served.folder)
    messages: list[Any] = []
    rounds = [("Who are you?", []), ("What is it?", [1, 2]), ("Which is larger?", [3])]
    for question, shades in rounds:
        expected = chat.ask(question, images=[pixels(picture(n), processor) for n in shades])
        messages.append(asked(question, *map(picture, shades)))
        reply = client.chat.completions.create(model=NAME, messages=messages)
        assert reply.choices[0].message.content == expected
        messages.append(reply.choices[0].message.model_dump())


def test_an_image_that_was_shown_before_passes_the_tower_no_more(served, client):
    seen: list[int] = []
    hook = served.answers.model.vision.register_forward_pre_hook(
        lambda _, arguments: seen.append(len(arguments[0]))
    )
    messages = [asked("What?", picture(71), picture(72))]
    answer = {"role": "assistant", "content": said(client, *messages)}
    assert sum(seen) == 2
    said(client, *messages, answer, asked("And now?"))
    said(client, *messages, answer, asked("And now?", picture(73), picture(71)))
    hook.remove()
    assert sum(seen) == 3


def test_a_system_message_takes_the_place_of_the_templates(client):
    prompt = client.chat.completions.create(model=NAME, messages=[asked("Hi")]).usage.prompt_tokens
    for role in ("system", "developer"):
        system = {"role": role, "content": "a " * 100}
        reply = client.chat.completions.create(model=NAME, messages=[system, asked("Hi")])
        assert reply.usage.prompt_tokens > prompt + 50


def test_an_answer_ends_at_its_limit_before_a_stop_and_where_the_conversation_is_full(client):
    def ended(**options):
        messages = [asked(options.pop("text", "What?"), picture(1))]
        reply = client.chat.completions.create(model=NAME, messages=messages, **options)
        return reply.choices[0].message.content, reply.choices[0].finish_reason, reply.usage

    whole, *_ = ended(temperature=2, seed=3, max_tokens=60)
    cut, reason, usage = ended(temperature=2, seed=3, max_completion_tokens=5)
    assert (reason, usage.completion_tokens) == ("length", 5)
    assert whole.startswith(cut.rstrip("\N{REPLACEMENT CHARACTER}"))
    stop = whole[7:10]
    before, reason, _ = ended(temperature=2, seed=3, max_tokens=60, stop=["no such text", stop])
    assert (before, reason) == (whole[: whole.index(stop)], "stop")
    *_, usage = ended(text="a" * 440, temperature=2, seed=3, max_tokens=500)
    assert usage.total_tokens <= 512


def test_draws_follow_their_seed_whatever_is_asked_beside_them(served, client):
    def drawn(seed):
        return said(client, asked("What?", picture(1)), temperature=1.5, top_p=0.95, seed=seed)

    alone = [drawn(seed) for seed in range(8)]
    assert len(set(alone)) > 4
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(drawn, range(8))) == alone


def test_sixteen_clients_at_once_are_answered_in_batches_each_as_if_alone(served):
    questions = [asked(f"What digit is it? {n}", *map(picture, range(n % 4))) for n in range(16)]
    alone = [said(served.client(), question) for question in questions]
    served.batches.clear()
    start = threading.Barrier(16)

    def all_rounds(number):
        client = served.client()
        start.wait()
        return [said(client, questions[number]) for _ in range(3)]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(all_rounds, range(16)))
    assert answers == [[answer] * 3 for answer in alone]
    assert sum(served.batches) == 48
    assert max(served.batches) > 4


def test_bad_requests_get_their_status_and_the_server_goes_on(served):
    client = served.client()
    for what, body, status in bad_requests(NAME):
        with pytest.raises(openai.APIStatusError) as raised:
            post(client, body)
        assert (what, raised.value.status_code) == (what, status)
        error = raised.value.response.json()["error"]
        assert error["message"], what
        assert error["type"] == "invalid_request_error", what
        assert error["code"], what
        assert "Traceback" not in error["message"], what
        assert len(error["message"]) < 1000, what
    assert said(client, asked("What?", picture(1)))


def test_a_request_that_is_too_large_is_refused_stated_or_not(served):
    large = asked("What?", "data:image/png;base64," + "A" * LIMITS.body_bytes)
    with pytest.raises(openai.APIStatusError) as raised:
        said(served.client(), large)
    assert raised.value.status_code == 413

    def pieces():
        yield b'{"model": "'
        for _ in range(40):
            yield b"A" * 2**16

    with pytest.raises(openai.APIStatusError) as raised:
        served.client().post("/chat/completions", content=pieces(), cast_to=object)
    assert raised.value.status_code == 413
    assert raised.value.code == "request_too_large"


@pytest.mark.parametrize("token", ["wrong", f"{TOKEN}x", TOKEN[:-1], "x y"])
def test_without_the_token_nothing_is_told(served, token):
    client = served.client(api_key=token)
    for request in (
        lambda: said(client, asked("What?")),
        lambda: client.models.list(),
        lambda: client.post("/chat/completions", body={"model": "x"}, cast_to=object),
    ):
        with pytest.raises(openai.AuthenticationError) as raised:
            request()
        assert raised.value.code == "invalid_api_key"
        assert raised.value.response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/", "/v1/models"])
def test_a_name_of_another_site_that_leads_here_is_refused(served, path):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with urlopen(Request(served.address + path, headers=headers)) as answer:
        assert answer.status == 200
    headers["Host"] = "a-site.example"
    with pytest.raises(HTTPError) as raised:
        urlopen(Request(served.address + path, headers=headers))
    assert raised.value.code == 421
    assert json.load(raised.value)["error"]["code"] == "unknown_host"


def test_what_models_fail_at_has_a_status_and_tells_nothing_of_the_inside(served, client):
    for name, status in (("busy", 429), ("lost", 503), ("broken", 500)):
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) as raised:
                client.chat.completions.create(model=name, messages=[asked("?")], stream=stream)
            assert raised.value.status_code == status
            assert "not for clients" not in str(raised.value)


def test_other_paths_and_methods_are_told_in_the_same_form(client):
    for method, path, status in (("get", "/chat/completions", 405), ("post", "/embeddings", 404)):
        with pytest.raises(openai.APIStatusError) as raised:
            getattr(client, method)(path, cast_to=object)
        assert raised.value.status_code == status
        assert raised.value.code == "no_such_route"


@pytest.mark.slow
def test_a_thousand_bad_requests_in_a_row_take_no_memory_and_a_good_one_is_answered(served):
    client, process = served.client(), psutil.Process()
    bad = [each for each in bad_requests(NAME) if isinstance(each[1], dict)]

    def provoke(count):
        for number in range(count):
            _, body, status = bad[number % len(bad)]
            with pytest.raises(openai.APIStatusError) as raised:
                post(client, body)
            assert raised.value.status_code == status
        gc.collect()
        return process.memory_info().rss

    before = provoke(100)
    assert provoke(1000) < before + 200 * 2**20
    assert said(client, asked("What?", picture(1)))


def test_who_leaves_frees_the_place_and_who_comes_too_many_is_told(served):
    turns = (Turn("user", (Part("text", text="What?"),)),)
    long = Question(turns=turns, max_new_tokens=400, sampling=Sampling(temperature=9.0))

    async def crowd():
        batches = Batches(served.answers, size=1, waiting=2)
        first = batches.ask(long)
        await anext(first)
        waiting = [asyncio.ensure_future(anext(batches.ask(long))) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await anext(batches.ask(long))
        await first.aclose()
        for each in asyncio.as_completed(waiting):
            assert (await each).answer_tokens
            break

    asyncio.run(crowd())


def test_a_question_that_fails_its_batch_fails_alone(served, monkeypatch):
    write = served.answers.write

    def fragile(answers):
        if any("poison" in answer.question.turns[0].content[0].text for answer in answers):
            raise RuntimeError("poison")
        yield from write(answers)

    monkeypatch.setattr(served.answers, "write", fragile)

    async def ask(batches, text):
        question = Question(turns=(Turn("user", (Part("text", text=text),)),), max_new_tokens=4)
        return [piece async for piece in batches.ask(question)][-1].end

    async def together():
        batches = Batches(served.answers)
        texts = ["one", "poison", "two", "three"]
        return await asyncio.gather(*(ask(batches, text) for text in texts), return_exceptions=True)

    one, poison, *others = asyncio.run(together())
    assert isinstance(poison, RuntimeError)
    assert all(end in ("stop", "length") for end in (one, *others))
