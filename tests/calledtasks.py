"""Tasks that the client's tests call: with streams either way, with progress, and that call other tasks."""

import hashlib
import os
import resource
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

from servedtasks import add, fail, hold, stay, tell

from workers import context, task

__all__ = ["add", "fail", "hold", "stay"]


@dataclass
class Square:
    number: int
    square: int


@task
def squares(count: int) -> Iterator[Square]:
    for number in range(count):
        yield Square(number, number * number)


@task
async def letters(text: str) -> AsyncIterator[bytes]:
    for letter in text:
        yield letter.encode()


@task
def breaks(count: int) -> Iterator[int]:
    yield from range(count)
    raise ValueError("on purpose")


@task
def endless(marker: str) -> Iterator[int]:
    """Counts for ever; tells the FIFO `marker` when it is closed."""
    number = 0
    try:
        while True:
            yield number
            number += 1
    finally:
        tell(marker)


@task
def digest() -> str:
    """The SHA-256 of the request's stream."""
    return hashlib.file_digest(context().stream, "sha256").hexdigest()  # type: ignore[arg-type]


@task
def lines_upper() -> Iterator[str]:
    """Streams what it is sent, while it is sent."""
    for line in context().stream:
        yield line.decode().strip().upper()


@task
def ignore_stream() -> int:
    return 1


@task
def advance(started: str, release: str) -> int:
    """Tells how far it is, then waits."""
    context().progress(3, 10, "a third")
    tell(started)
    with open(release) as fifo:
        fifo.read()
    return os.getpid()


@task
def nested(number: int) -> int:
    """Has another worker add."""
    answer: int = add.submit(number, 1).result(20)
    return answer


@task
def default_url() -> str:
    return os.environ["ACOMM_URL"]


@task
def crash(words: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    print(words, file=sys.stderr)
    os.abort()
