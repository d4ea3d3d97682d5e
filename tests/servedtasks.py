"""Tasks that the tests of the supervisor, the client and the command line serve."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from workers import Retry, context, task


@dataclass
class Point:
    x: int
    y: int = 0


@task
def add(a: int, b: int = 0) -> int:
    """Add two numbers."""
    return a + b


@task
def echo(value: Any = None) -> Any:
    return value


@task
def text(value: str | None) -> str:
    return repr(value)


@task
def shift(point: Point, by: Annotated[int, Meta(ge=0)]) -> Point:
    return Point(point.x + by, point.y + by)


@task
def reverse(data: bytes) -> bytes:
    return data[::-1]


@task
def fail(message: str) -> None:
    raise ValueError(message)


@task
def worker_pid() -> int:
    return os.getpid()


@task
def spin(number: int) -> int:
    """A few hundred microseconds of work."""
    return number + 0 * sum(range(10_000))


@task
def crunch() -> int:
    """C code that holds the interpreter lock for minutes."""
    return sum(range(10**10))


@task
def hold(started: str, release: str) -> int:
    """Tells its pid through the FIFO `started`, then waits until somebody opens the FIFO `release`."""
    tell(started)
    with open(release) as fifo:
        fifo.read()
    return os.getpid()


@task
def stay(started: str) -> None:
    """Tells its pid through a FIFO and never ends."""
    tell(started)
    time.sleep(10_000)


@task(timeout=0.2)
def limited(started: str) -> None:
    tell(started)
    time.sleep(10_000)


@task
def die(marker: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@task(retry=Retry(times=0, crashes=1))
def survive(marker: str) -> int:
    """Kills its worker in the first attempt."""
    if context().attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return context().attempt


@task
def progress(done: float) -> None:
    context().progress(done, 10)


def tell(path: str) -> None:
    with open(path, "w") as fifo:
        fifo.write(str(os.getpid()))
