"""The real `dsvl serve`: OpenAI's own client through Ray Serve, tokens, and Ctrl-C."""

import json
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import openai
import psutil
import pytest

from orchestration import cli
from tests.orchestration.hosting import TOKEN, asked, bad_requests, model_folder, picture


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [model_folder(folder / f"model-{seed}", seed=seed) for seed in range(2)]


@pytest.fixture(scope="module")
def address(folders) -> Iterator[str]:
    """Where `dsvl serve` answers for two models; ended by Ctrl-C."""
    yield from serving(*folders)


def serving(*folders: Path) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "orchestration.cli", "serve", *map(str, folders)]
    server = Popen(
        [*command, "--port", str(port), "--json"],
        env={**os.environ, "DSVL_TOKEN": TOKEN},
        stdout=PIPE,
        stderr=PIPE,
        text=True,
        start_new_session=True,
    )
    told = []
    try:
        assert server.stderr is not None
        for line in server.stderr:
            told.append(line)
            if ": serving " in line:
                break
        assert server.poll() is None, told
        threading.Thread(target=lambda: told.extend(server.stderr or ()), daemon=True).start()
        yield f"http://127.0.0.1:{port}"
        os.kill(server.pid, signal.SIGINT)
        out = server.communicate(timeout=60)[0]
        assert server.returncode == 0, told
        assert list(json.loads(out)["models"]) == [folder.name for folder in folders]
        assert not any(TOKEN in line or "Traceback" in line for line in told)
    finally:
        server.kill()
        server.wait()


def client_of(address: str, **options: Any) -> openai.OpenAI:
    settings = {"api_key": TOKEN, "max_retries": 0, **options}
    return openai.OpenAI(base_url=f"{address}/v1", **settings)


@pytest.mark.ray
@pytest.mark.slow
def test_the_official_client_is_answered_by_each_model_whole_streamed_and_over_rounds(address):
    client = client_of(address)
    names = [model.id for model in client.models.list()]
    assert names == ["model-0", "model-1"]
    for name in names:
        messages: list[Any] = []
        for question, shades in (("What is it?", [1, 2]), ("And now?", []), ("And?", [3])):
            messages.append(asked(question, *map(picture, shades)))
            whole = client.chat.completions.create(model=name, messages=messages)
            chunks = client.chat.completions.create(model=name, messages=messages, stream=True)
            streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert streamed == whole.choices[0].message.content
            messages.append(whole.choices[0].message.model_dump())
        assert whole.usage.prompt_tokens > 3 * 4


@pytest.mark.ray
@pytest.mark.slow
def test_sixteen_clients_at_once_are_all_answered(address):
    start = threading.Barrier(16)

    def rounds(number: int) -> list[str]:
        client, messages = client_of(address), []
        start.wait()
        for round_number in range(3):
            messages.append(asked(f"What is it? {number}", picture(16 * round_number + number)))
            reply = client.chat.completions.create(
                model=f"model-{number % 2}", messages=messages, temperature=1, seed=number
            )
            messages.append(reply.choices[0].message.model_dump())
        return [message["content"] for message in messages[1::2]]

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(rounds, range(16)))
    assert [len(each) for each in answers] == [3] * 16


@pytest.mark.ray
@pytest.mark.slow
def test_a_thousand_bad_requests_take_no_memory_and_a_good_one_is_answered(address):
    client = client_of(address)
    port = int(address.rpartition(":")[2])
    (server,) = {
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if str(port) in (process.info["cmdline"] or []) and "serve" in process.info["cmdline"]
    }

    def memory() -> int:
        family = psutil.Process(server).children(recursive=True)
        return sum(each.memory_info().rss for each in family)

    bad = [(body, status) for _, body, status in bad_requests("model-0") if isinstance(body, dict)]
    bad += [({"model": "x", "user": "A" * 40 * 2**20}, 413)]

    def provoke(count: int) -> None:
        for number in range(count):
            body, status = bad[number % len(bad)]
            with pytest.raises(openai.APIStatusError) as raised:
                client.post("/chat/completions", body=body, cast_to=object)
            assert raised.value.status_code == status

    provoke(len(bad))
    before = memory()
    provoke(1000)
    assert memory() < before + 400 * 2**20
    with pytest.raises(openai.AuthenticationError):
        client_of(address, api_key="wrong").models.list()
    question = asked("What?", picture(1))
    assert client.chat.completions.create(model="model-0", messages=[question]).choices


def refused(folder: Path, capsys, *options: str) -> str:
    """What `dsvl serve` says of a request that it refuses before it starts anything."""
    assert cli.main(["serve", str(folder), *options]) == 2
    return capsys.readouterr().err


def test_others_may_come_with_a_token_of_their_own_alone(folders, capsys, monkeypatch):
    monkeypatch.delenv("DSVL_TOKEN", raising=False)
    assert "set DSVL_TOKEN" in refused(folders[0], capsys, "--host", "0.0.0.0")
    monkeypatch.setenv("DSVL_TOKEN", "short")
    told = refused(folders[0], capsys)
    assert "16 or more letters" in told
    assert "short" not in told


def test_a_token_of_our_own_is_told_once_and_kept_for_its_owner(
    folders, capsys, monkeypatch, tmp_path
):
    monkeypatch.delenv("DSVL_TOKEN", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        first = refused(folders[0], capsys, "--port", port)
        again = refused(folders[0], capsys, "--port", port)
    assert "Address already in use; choose another" in first
    kept = tmp_path / "dsvl/token"
    token = kept.read_text().strip()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert token in first
    assert token not in again
    kept.chmod(0o644)
    assert "chmod 600" in refused(folders[0], capsys)


def test_a_port_or_a_folder_that_is_none_is_refused(folders, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DSVL_TOKEN", TOKEN)
    assert "--port=70000" in refused(folders[0], capsys, "--port", "70000")
    assert "192.0.2.1" in refused(folders[0], capsys, "--host", "192.0.2.1")
    assert cli.main(["serve", str(folders[0]), str(tmp_path / "none")]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
