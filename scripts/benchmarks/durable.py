"""Requests that are stored before they are acknowledged: how many a second, and how long each waits for that.

Ours runs the calls meanwhile. Of the others only what stores is at work, no worker, so that what they take
from the machine is the storing alone. `answers` are calls whose answers are
waited for, which are stored, too.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from acomm import Request
from acomm.acks import ok_ack
from acomm.channel import Channels
from acomm.client import Client
from acomm.errors import AcommError
from acomm.outgoing import Outgoing
from benchmarks.harness import Contender, Figures, percentiles
from benchmarks.tasks import identity
from benchmarks.trackercalls import tracker_calls
from workers import launch

START_TIMEOUT = 30.0
WORKERS = 2


def ours(client: Client, in_flight: int, calls: int) -> Figures:
    """Requests on a kept channel, so many unacknowledged at a time; all have run when it returns."""
    figures = uvloop.run(_acknowledged(client.url, in_flight, calls))
    end = time.monotonic() + START_TIMEOUT
    while client.stats()["tracked"]:
        if time.monotonic() > end:
            raise AssertionError("calls that were acknowledged have not ended")
    return figures


def answered(client: Client, in_flight: int, calls: int) -> Figures:
    """Calls until their answers, each of which is stored before it is told."""
    seconds, *each = uvloop.run(tracker_calls(client.url, in_flight, calls))
    return {"calls/s": calls / seconds, **percentiles(each)}


async def _acknowledged(url: str, in_flight: int, calls: int) -> Figures:
    channels = Channels()
    each: list[float] = []
    finished: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    clock = time.perf_counter
    sent = 0

    def send() -> None:
        nonlocal sent
        sent += 1
        request = Request("echo", [sent])
        # As our clients do: an acknowledgement that begins like this need not be decoded.
        expected = ok_ack(msgspec.json.encode(request.id), 3, True)[:-1]
        told = partial(acknowledged, clock())
        message = Outgoing(request.encode(extended=True), told, wire=3, extended=True, expected=expected)
        channels.post(url, message)

    def acknowledged(since: float, error: AcommError | None) -> None:
        if error is not None:
            if not finished.done():
                finished.set_exception(error)
            return
        each.append(clock() - since)
        if sent < calls:
            send()
        elif len(each) == calls and not finished.done():
            finished.set_result(clock())

    started = clock()
    for _ in range(min(in_flight, calls)):
        send()
    try:
        return {"calls/s": calls / (await finished - started), **percentiles(each)}
    finally:
        await channels.close()


def theirs(submit: Callable[[int], Any], forget: Callable[[], Any], in_flight: int, calls: int) -> Figures:
    """Calls by as many threads as are to be in flight, each of which waits until its call is stored."""
    each: list[float] = []
    failures: list[Exception] = []
    numbers = iter(range(calls))
    lock = threading.Lock()

    def some() -> None:
        while not failures:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            started = time.perf_counter()
            try:
                submit(number)
            except Exception as error:
                failures.append(error)
            each.append(time.perf_counter() - started)

    threads = [threading.Thread(target=some) for _ in range(in_flight)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    forget()
    if failures:
        raise failures[0]
    return {"calls/s": calls / seconds, **percentiles(each)}


@contextmanager
def contenders() -> Iterator[list[Contender]]:
    """Those that are installed; a line on stderr tells of the others."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="acomm-bench-")))
        found = _ours(stack, folder, ours)
        if _has("huey"):
            found.append(_huey(folder / "huey.db"))
        if _has("celery", "redis") | _has("rq", "redis"):
            if shutil.which("redis-server") is None:
                _left_out("Celery and RQ", "no redis-server here: install it")
            else:
                found += _on_redis(stack.enter_context(_redis(folder)))
        yield found


@contextmanager
def answers() -> Iterator[list[Contender]]:
    """Ours alone, with and without a journal."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="acomm-bench-")))
        yield _ours(stack, folder, answered)


def _ours(stack: ExitStack, folder: Path, measure: Callable[[Client, int, int], Figures]) -> list[Contender]:
    found = []
    for name, settings in (
        ("journal", {"journal": str(folder / "power.db")}),
        ("journal, process", {"journal": str(folder / "process.db"), "durability": "process"}),
        ("no journal", {}),
    ):
        client = stack.enter_context(launch("benchmarks.tasks", workers=WORKERS, **settings))
        found.append(Contender(name, partial(measure, client), ours=bool(settings)))
    return found


def _has(*packages: str) -> bool:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        _left_out(packages[0], f"{' and '.join(missing)} not installed: run scripts/setup bench")
    return not missing


def _left_out(who: str, why: str) -> None:
    print(f"durable: without {who}, {why}", file=sys.stderr, flush=True)


def _huey(path: Path) -> Contender:
    from huey import SqliteHuey

    huey = SqliteHuey(filename=str(path), fsync=True)
    return Contender("Huey, SQLite", partial(theirs, huey.task()(identity), huey.flush))


def _on_redis(path: str) -> Iterator[Contender]:
    if find_spec("celery") is not None:
        from celery import Celery

        app = Celery(broker=f"redis+socket://{path}")
        echo = app.task(name="echo", ignore_result=True)(identity)
        yield Contender("Celery, Redis", partial(theirs, echo.delay, app.control.purge))
    if find_spec("rq") is not None:
        from redis import Redis
        from rq import Queue

        queue = Queue(connection=Redis(unix_socket_path=path, max_connections=1024))
        yield Contender("RQ, Redis", partial(theirs, partial(queue.enqueue, identity), queue.empty))


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    """A Redis that syncs each command before it answers; the path of its socket."""
    path = str(folder / "redis.sock")
    command = ["redis-server", "--port", "0", "--unixsocket", path, "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "always"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            _await_socket(path)
            yield path
        finally:
            process.terminate()


def _await_socket(path: str) -> None:
    end = time.monotonic() + START_TIMEOUT
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX) as sock:
            if sock.connect_ex(path) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"nobody listens at {path}")
