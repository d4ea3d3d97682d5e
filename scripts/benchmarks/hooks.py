"""A thousand callers with a hook each, one of which never takes its answers."""

from __future__ import annotations

import asyncio
import resource
import socket
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import uvloop

from acomm import Request, Tracker, send
from acomm.urls import unix_url
from benchmarks.harness import Figures, percentiles

HOOKS = 1000


def allow_descriptors() -> None:
    """Each hook takes some, here and in the supervisor that is started next."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def measure(url: str, in_flight: int, calls: int, *, unreachable: bool) -> Figures:
    """Calls by HOOKS trackers in turn; if `unreachable`, the last one's answers go to a socket that
    accepts nobody, and only the others are timed.
    """
    return uvloop.run(_measure(url, in_flight, calls, unreachable))


async def _measure(url: str, in_flight: int, calls: int, unreachable: bool) -> Figures:
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="acomm-bench-"))
        black_hole = stack.enter_context(socket.socket(socket.AF_UNIX))
        black_hole.bind(path := str(Path(folder, "hole.sock")))
        black_hole.listen(0)
        trackers = [await stack.enter_async_context(Tracker()) for _ in range(HOOKS - 1)]
        each: list[float] = []

        async def call(value: int) -> None:
            number = value % HOOKS
            request = Request("echo", [value])
            if number == HOOKS - 1 and unreachable:
                await send(url, Request("echo", [value], response_hook=unix_url(path)))
                return
            started = time.perf_counter()
            response = await trackers[number % len(trackers)].call(url, request)
            each.append(time.perf_counter() - started)
            if response.result_as(int) != value:
                raise AssertionError(f"{value} did not come back")

        async def call_many(values: range) -> None:
            for value in values:
                await call(value)

        async def all_of(calls: int) -> float:
            started = time.perf_counter()
            await asyncio.gather(*(call_many(range(n, calls, in_flight)) for n in range(in_flight)))
            return time.perf_counter() - started

        await all_of(2 * HOOKS)
        each.clear()
        seconds = await all_of(calls)
        return {"calls/s": calls / seconds, **percentiles(each)}
