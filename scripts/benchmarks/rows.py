"""The rows: who is measured against whom."""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvloop
import zmq

from acomm.client import Client
from acomm.urls import unix_path
from benchmarks import durable, floor, hooks, http, strangers
from benchmarks.harness import Contender, Figures, Row, percentiles
from benchmarks.processes import serving
from benchmarks.tasks import identity
from benchmarks.trackercalls import tracker_calls
from workers import launch

WORKERS = 2

# -- ours ---------------------------------------------------------------------------------------------


def tracker_rate(url: str, in_flight: int, calls: int) -> Figures:
    """Calls by an asyncio program."""
    times = uvloop.run(tracker_calls(url, in_flight, calls))
    return {"calls/s": calls / times[0]}


def tracker_latency(url: str, in_flight: int, calls: int) -> Figures:
    return percentiles(uvloop.run(tracker_calls(url, in_flight, calls))[1:])


def client_rate(client: Client, in_flight: int, calls: int) -> Figures:
    """Calls by a program without an event loop."""
    return future_rate(partial(client.submit, "echo"), in_flight, calls)


def client_latency(client: Client, in_flight: int, calls: int) -> Figures:
    return future_latency(partial(client.call, "echo"), calls)


# -- baselines ----------------------------------------------------------------------------------------


def floor_rate(path: str, in_flight: int, calls: int) -> Figures:
    return uvloop.run(floor.measure(path, in_flight, calls))


def executor_rate(executor: Executor, in_flight: int, calls: int) -> Figures:
    return future_rate(partial(executor.submit, identity), in_flight, calls)


def serve_zmq(path: str, ready: Connection) -> None:
    """Returns every message to its sender."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(f"ipc://{path}")
        ready.send(True)
        while True:
            router.send_multipart(router.recv_multipart())


def zmq_latency(path: str, in_flight: int, calls: int) -> Figures:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.connect(f"ipc://{path}")

        def ping(value: int) -> int:
            dealer.send(b"[%d]" % value)
            return int(dealer.recv()[1:-1])

        return future_latency(ping, calls)


# -- what they share ----------------------------------------------------------------------------------


def future_rate(submit: Callable[[int], Future[Any]], in_flight: int, calls: int) -> Figures:
    """Keep a window of futures, the oldest of which is waited for."""

    def all_of(calls: int) -> float:
        window: deque[tuple[int, Future[Any]]] = deque()
        started = time.perf_counter()
        for value in range(calls):
            if len(window) == in_flight:
                check(*window.popleft())
            window.append((value, submit(value)))
        while window:
            check(*window.popleft())
        return time.perf_counter() - started

    def check(value: int, future: Future[Any]) -> None:
        if future.result() != value:
            raise AssertionError(f"{value} did not come back")

    all_of(max(100, 2 * in_flight))
    return {"calls/s": calls / all_of(calls)}


def future_latency(call: Callable[[int], Any], calls: int) -> Figures:
    """One blocking call after the other."""

    def timed(value: int) -> float:
        started = time.perf_counter()
        found = call(value)
        seconds = time.perf_counter() - started
        if found != value:
            raise AssertionError(f"{value} did not come back")
        return seconds

    for value in range(100):
        timed(value)
    return percentiles([timed(value) for value in range(calls)])


class NotInstalled(Exception):
    """A contender is not on this machine."""


def needs(*packages: str) -> None:
    """Raises NotInstalled."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise NotInstalled(f"{' and '.join(missing)} not installed: run scripts/setup bench")


# -- the rows -----------------------------------------------------------------------------------------


@contextmanager
def _socket() -> Iterator[list[Contender]]:
    with (
        launch("benchmarks.tasks", workers=WORKERS) as client,
        serving(floor.serve) as path,
        ProcessPoolExecutor(WORKERS, get_context("forkserver")) as executor,
    ):
        yield [
            Contender("Tracker.call", partial(tracker_rate, client.url), ours=True),
            Contender("Client.submit", partial(client_rate, client), ours=True),
            Contender("bare echo server", partial(floor_rate, path)),
            Contender("ProcessPoolExecutor", partial(executor_rate, executor)),
        ]


@contextmanager
def _latency() -> Iterator[list[Contender]]:
    with launch("benchmarks.tasks", workers=WORKERS) as client, serving(serve_zmq) as path:
        yield [
            Contender("Tracker.call", partial(tracker_latency, client.url), ours=True),
            Contender("Client.call", partial(client_latency, client), ours=True),
            Contender("pyzmq ping", partial(zmq_latency, path)),
        ]


@contextmanager
def _strangers() -> Iterator[list[Contender]]:
    with launch("benchmarks.tasks", workers=WORKERS) as client, serving(strangers.serve) as floor_path:
        path = unix_path(client.url)
        assert path is not None
        yield [
            Contender("a connection a message", partial(strangers.rate, path), ours=True),
            Contender("Tracker.call", partial(tracker_rate, client.url), ours=True),
            Contender("bare server, as strangers", partial(strangers.rate, floor_path)),
        ]


@contextmanager
def _hooks() -> Iterator[list[Contender]]:
    hooks.allow_descriptors()
    with launch("benchmarks.tasks", workers=WORKERS) as client:
        yield [
            Contender(
                "one hook unreachable", partial(hooks.measure, client.url, unreachable=True), ours=True
            ),
            Contender("all hooks there", partial(hooks.measure, client.url, unreachable=False)),
        ]


@contextmanager
def _http() -> Iterator[list[Contender]]:
    needs("gunicorn", "uvicorn")
    with (
        tempfile.TemporaryDirectory(prefix="acomm-bench-") as folder,
        launch(
            "benchmarks.tasks", workers=WORKERS, http="127.0.0.1:0", http_token_file=f"{folder}/token"
        ) as client,
        http.gunicorn() as gunicorn,
        http.uvicorn() as uvicorn,
    ):
        port = urlsplit(client.stats()["http"]["url"]).port
        assert port is not None
        door = http.Target("127.0.0.1", port, "/call/echo", Path(folder, "token").read_text().strip())
        yield [
            Contender("HTTP door", partial(http.rate, door), ours=True),
            Contender("gunicorn", partial(http.rate, gunicorn)),
            Contender("uvicorn", partial(http.rate, uvicorn)),
        ]


ROWS = {
    row.name: row
    for row in (
        Row("socket", "calls/s of a tiny task, by how many are in flight", _socket, (1, 16, 64, 256)),
        Row("latency", "round trip of one call at a time", _latency, (1,), calls=2000),
        Row("strangers", "calls/s by programs that open a connection a message", _strangers, (1, 16, 64)),
        Row("http", "calls/s over HTTP, against web servers that echo by themselves", _http, (1, 16, 64)),
        Row("hooks", "999 good hooks, beside one that takes nothing", _hooks, (64,), seconds=2.0),
        Row(
            "durable",
            "acknowledgements/s of stored requests, against queues that store",
            durable.contenders,
            (256,),
            seconds=2.0,
        ),
        Row("answers", "calls/s with request and answer stored", durable.answers, (1, 16, 256), seconds=2.0),
    )
}
