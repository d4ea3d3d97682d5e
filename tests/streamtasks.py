"""Tasks that stream, or read a stream, which the tests serve."""

import asyncio
import hashlib
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from servedtasks import tell

from workers import Retry, context, task


@task
def count(number: int) -> Iterator[int]:
    yield from range(number)


@task
async def count_async(number: int) -> AsyncIterator[int]:
    for n in range(number):
        if n % 1000 == 0:
            await asyncio.sleep(0)
        yield n


@task
def chunks(number: int, size: int) -> Iterator[bytes | memoryview]:
    """The same buffer again and again: chunk n is full of the byte n."""
    buffer = bytearray(size)
    for n in range(number):
        buffer[:] = bytes([n % 256]) * size
        yield memoryview(buffer)


@task
async def chunks_async(number: int, size: int) -> AsyncIterator[bytes]:
    for n in range(number):
        yield bytes([n % 256]) * size


@task
def mixed() -> Iterator[Any]:
    yield {"a": [1, None]}
    yield "text\n"
    yield b"raw"
    yield bytearray(b" bytes\n")
    yield None
    yield b""


@task
def nothing() -> Iterator[int]:
    yield from ()


@task
def whose(started: str) -> Iterator[str]:
    """What the call knows of itself."""
    tell(started)
    yield context().request_id


@task
def step(started: str, release: str) -> Iterator[str]:
    """One item; the next when somebody writes to the FIFO."""
    yield "first"
    tell(started)
    with open(release) as fifo:
        fifo.readline()
    yield "second"


@task
def endless(started: str) -> Iterator[int]:
    """Yields until it is closed; tells when it begins, and when it is closed."""
    try:
        tell(started)
        while True:
            yield 1
    finally:
        tell(started)


@task
async def endless_wait(started: str) -> AsyncIterator[int]:
    """One item, then a wait without an end; tells before, and when that is cancelled."""
    yield 1
    try:
        tell(started)
        await asyncio.sleep(10_000)
    except asyncio.CancelledError:
        await asyncio.sleep(0.001)  # what cleans up may wait, too
        tell(started)
        raise


@task
def attentive(started: str) -> Iterator[int]:
    """One item, then work that looks whether it is still wanted."""
    yield 1
    tell(started)
    while not context().cancelled:
        time.sleep(0.001)
    tell(started)
    yield 2


@task
def stubborn(started: str) -> Iterator[int]:
    """One item, then sleep."""
    yield 1
    tell(started)
    time.sleep(10_000)


@task(timeout=0.3)
def limited_stream(started: str) -> Iterator[int]:
    yield 1
    tell(started)
    time.sleep(10_000)


@task(retry=Retry(times=3, backoff=0.0, crashes=3))
def raises(number: int) -> Iterator[int]:
    yield from range(number)
    raise ValueError("half-way")


@task(retry=Retry(times=3, backoff=0.0, crashes=3))
def dies(number: int) -> Iterator[int]:
    yield from range(number)
    os.kill(os.getpid(), signal.SIGKILL)


@task
def forks(how: str) -> Iterator[int]:
    """Its copy yields, returns or raises, too; the last item is the copy's status."""
    yield 1
    copy = os.fork()
    if not copy:
        if how == "raise":
            raise ValueError("on purpose")
        if how == "return":
            return
        yield 2
    yield os.waitpid(copy, 0)[1]


@task
async def raises_async(number: int) -> AsyncIterator[int]:
    for n in range(number):
        yield n
    raise ValueError("half-way")


@task
def odd(told: str) -> Iterator[Any]:
    """Its second item is none that JSON can express."""
    try:
        yield 1
        yield {"set": object()}
    finally:
        tell(told)


@task
def digest() -> list[Any]:
    """Of the stream that the request brought."""
    size, sha = 0, hashlib.sha256()
    stream = context().stream
    assert context().stream is stream
    while data := stream.read(1 << 16):
        size += len(data)
        sha.update(data)
    return [size, sha.hexdigest()]


@task
def first_line() -> str:
    """Of the stream that the request brought, which is left open."""
    return context().stream.readline().decode()


@task
def upper() -> Iterator[bytes]:
    """A stream of a stream."""
    for line in context().stream:
        yield line.upper()


@task
def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@task
def noted(started: str, release: str) -> int:
    context().progress(3, 10, "häuser")
    tell(started)
    with open(release) as fifo:
        fifo.readline()
    return 1


@task
def note_of_noise(started: str, release: str) -> None:
    context().progress(1, note="\x1b[31m\ud800" + "x" * 200)
    tell(started)
    with open(release) as fifo:
        fifo.readline()
