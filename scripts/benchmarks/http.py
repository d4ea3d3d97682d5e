"""The HTTP door, against web servers that echo JSON by themselves, in two workers each.

    client --POST {"value": n}--> server     keep-alive connections, one for each request in flight
    client <------ n ------------ server

`rate` is the client, on bare asyncio protocols, as a client library would cost more than some servers.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvloop

from benchmarks.harness import Figures

WORKERS = 2
START_TIMEOUT = 30.0

ECHO = '''
import json


def application(environ, start_response):
    """WSGI: read the body, take the value out of it, send it back."""
    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
    answer = json.dumps(json.loads(body)["value"]).encode()
    start_response("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(answer)))])
    return [answer]


async def asgi(scope, receive, send):
    """ASGI: the same."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    answer = json.dumps(json.loads(body)["value"]).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})
'''


class Target(NamedTuple):
    """Where to POST, and the token to show."""

    host: str
    port: int
    path: str
    token: str = ""


@contextmanager
def gunicorn() -> Iterator[Target]:
    """Its threaded workers: those of the default kind close each connection behind an answer."""
    options = ["--workers", str(WORKERS), "--worker-class", "gthread", "--threads", "8", "--keep-alive", "60"]
    with _server(lambda port: ["gunicorn", "echo:application", "--bind", f"127.0.0.1:{port}", *options]) as t:
        yield t


@contextmanager
def uvicorn() -> Iterator[Target]:
    options = ["--workers", str(WORKERS), "--no-access-log", "--log-level", "warning"]
    with _server(
        lambda port: ["uvicorn", "echo:asgi", "--host", "127.0.0.1", "--port", str(port), *options]
    ) as t:
        yield t


@contextmanager
def _server(command: Any) -> Iterator[Target]:
    with tempfile.TemporaryDirectory(prefix="acomm-bench-") as folder:
        Path(folder, "echo.py").write_text(ECHO)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", *command(port)], cwd=folder, stderr=subprocess.DEVNULL
        )
        try:
            _await(port, process)
            yield Target("127.0.0.1", port, "/")
        finally:
            process.terminate()
            process.wait()


def _await(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with status {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{process.args} did not start")


def rate(target: Target, in_flight: int, calls: int) -> Figures:
    """Requests per second with `in_flight` connections, each of which sends the next when it is answered."""
    return uvloop.run(_rate(target, in_flight, calls))


async def _rate(target: Target, in_flight: int, calls: int) -> Figures:
    loop = asyncio.get_running_loop()
    clients = [
        (await loop.create_connection(lambda: _Client(target), target.host, target.port))[1]
        for _ in range(in_flight)
    ]

    async def all_of(calls: int) -> float:
        started = time.perf_counter()
        await asyncio.gather(*(client.ask(range(n, calls, in_flight)) for n, client in enumerate(clients)))
        return time.perf_counter() - started

    await all_of(max(100, 2 * in_flight))
    seconds = await all_of(calls)
    for client in clients:
        client.transport.close()
    return {"calls/s": calls / seconds}


class _Client(asyncio.Protocol):
    """A keep-alive connection with one request at a time under way."""

    transport: asyncio.Transport

    def __init__(self, target: Target) -> None:
        token = f"Authorization: Bearer {target.token}\r\n" if target.token else ""
        self._head = (
            f"POST {target.path} HTTP/1.1\r\nHost: {target.host}:{target.port}\r\n{token}"
            "Content-Type: application/json\r\nContent-Length: "
        ).encode()
        self._held = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    async def ask(self, values: range) -> None:
        for value in values:
            body = b'{"value":%d}' % value
            self._answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
            self.transport.write(self._head + b"%d\r\n\r\n%b" % (len(body), body))
            if int(await self._answer) != value:
                raise AssertionError(f"{value} did not come back")

    def data_received(self, data: bytes) -> None:
        self._held += data
        head, found, body = self._held.partition(b"\r\n\r\n")
        if not found:
            return
        lower = head.lower()
        if not lower.startswith(b"http/1.1 200 "):
            self._fail(f"not an answer: {head[:200]!r}")
            return
        size = int(lower.partition(b"content-length:")[2].partition(b"\r\n")[0])
        if len(body) >= size:
            self._held = body[size:]
            self._answer.set_result(body[:size])

    def connection_lost(self, error: Exception | None) -> None:
        self._fail("the server closed the connection")

    def _fail(self, why: str) -> None:
        if hasattr(self, "_answer") and not self._answer.done():
            self._answer.set_exception(AssertionError(why))
