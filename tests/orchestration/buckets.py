"""An object store on this machine: moto's S3 server, and a way to it on which requests fail."""

import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import boto3

BUCKET = "experiments"
ANYONE = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "no-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",  # or clients look for a machine of a cloud first
}
"""The environment of a user whom the store does not know."""
SETTING_UP = 4
"""Requests that moto answers to anyone before it wants signatures of a user who may."""


class Store:
    """An S3 server in a process of its own, with a bucket, and one user who may use it."""

    def __init__(self, *, failing: float = 0.0, seed: int = 0) -> None:
        """Of the requests that go its `way` a share fails, drawn by a seed."""
        port = free_port()
        self._server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            env=os.environ | ANYONE | {"INITIAL_NO_AUTH_ACTION_COUNT": str(SETTING_UP)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 60
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            assert self._server.poll() is None, "the server has ended"
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.05)
        self.environment = ANYONE | self._user(f"http://127.0.0.1:{port}")
        self.way = Way(port, failing=failing, seed=seed)

    def _user(self, endpoint: str) -> dict[str, str]:
        """Make the bucket, and a user who may do anything in it; returns the credentials."""
        about = {"endpoint_url": endpoint, "region_name": ANYONE["AWS_DEFAULT_REGION"]}
        about |= {"aws_access_key_id": "root", "aws_secret_access_key": "root"}
        boto3.client("s3", **about).create_bucket(Bucket=BUCKET)
        users, name = boto3.client("iam", **about), "user"
        users.create_user(UserName=name)
        made = users.create_access_key(UserName=name)["AccessKey"]
        places = [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"]
        allowed = {"Effect": "Allow", "Action": "s3:*", "Resource": places}
        policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        users.put_user_policy(UserName=name, PolicyName="all", PolicyDocument=policy)
        return {
            "AWS_ACCESS_KEY_ID": made["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"],
        }

    def uri(self, prefix: str, *, bucket: str = BUCKET) -> str:
        """Of a place in the store, on its failing way."""
        return f"s3://{bucket}/{prefix}?scheme=http&endpoint_override=127.0.0.1:{self.way.port}"

    def end(self) -> None:
        """Stop both."""
        self.way.end()
        self._server.kill()
        self._server.wait()


class Way:
    """Passes requests on to a server; of a share of them, drawn by a seed, the store knows nothing.

    Half of those are answered with 503, the others with a closed connection.
    """

    def __init__(self, target: int, *, failing: float, seed: int) -> None:
        self.failing, self.counts = failing, Counter[str]()
        self._draw, self._lock = random.Random(seed), threading.Lock()
        way = self

        class Passing(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                with suppress(ConnectionError):
                    super().handle_one_request()

            def do(self) -> None:
                body = b"".join(self.received())
                fate = way.fate()
                if fate == "closed":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif fate == "503":
                    self.answer(503, [], b"<Error><Code>SlowDown</Code></Error>")
                else:
                    with closing(http.client.HTTPConnection("127.0.0.1", target)) as server:
                        del self.headers["Transfer-Encoding"], self.headers["Expect"]
                        sent = dict(self.headers) | {"Content-Length": str(len(body))}
                        server.request(self.command, self.path, body, sent)
                        found = server.getresponse()
                        self.answer(found.status, found.getheaders(), found.read())

            def received(self) -> Iterator[bytes]:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    yield self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    return
                while size := int(self.rfile.readline(), 16):
                    yield self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()

            def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
                self.send_response_only(status)
                length = str(len(body))
                for name, value in headers:
                    if name.lower() == "content-length":
                        length = value  # of an answer to HEAD, which has no body
                    elif name.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do  # noqa: N815

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Passing)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def fate(self) -> str:
        """What becomes of a request."""
        with self._lock:
            fails = self._draw.random() < self.failing
            fate = self._draw.choice(("503", "closed")) if fails else "passed"
            self.counts[fate] += 1
            return fate

    def end(self) -> None:
        """Take no request any more."""
        self._server.shutdown()
        self._server.server_close()


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
