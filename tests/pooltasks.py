"""Tasks for the tests of the pool, as a service has them: most do something that a good one would not."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any

from workers.errors import SoftTimeout
from workers.options import Retry
from workers.registry import task
from workers.running import context


@task
def add(a: int, b: int) -> int:
    return a + b


@task
async def add_later(a: int, b: int) -> int:
    await asyncio.sleep(0)
    return a + b


@task
def pid() -> int:
    return os.getpid()


@task
def fail(text: str) -> None:
    raise ValueError(text)


@task
def attempt(fails: int) -> int:
    if context().attempt <= fails:
        raise ValueError("not yet")
    return context().attempt


@task(retry=Retry(2, on=(OSError,)))
def fail_with(kind: str) -> None:
    raise {"os": OSError, "value": ValueError}[kind]("on purpose")


@task
def die(how: str) -> None:
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "segfault":
        ctypes.string_at(0)
    if how == "_exit":
        os._exit(3)
    if how == "abort":
        os.abort()
    if how == "without descriptors":
        os.closerange(3, 1024)  # it dies when it answers
    if how == "exit":
        sys.exit(3)
    if how == "interrupt":
        raise KeyboardInterrupt


@task
def fork(how: str) -> list[int]:
    """Forks, and comes out of the task in both processes; the status of the copy."""
    copy = os.fork()
    if not copy:
        if how == "exit":
            sys.exit(7)
        if how == "raise":
            raise ValueError("on purpose")
        return [os.getpid()]
    return [os.waitpid(copy, 0)[1]]


@task
def die_first(attempts: int) -> int:
    """Kills its worker in the first so many attempts."""
    if context().attempt <= attempts:
        os._exit(9)
    return context().attempt


@task
def crunch() -> int:
    """C code that holds the interpreter lock for minutes."""
    return sum(range(10**10))


@task
def nap(path: str) -> None:
    """Sleeps for ever after it has told, through a FIFO, who it is and what it is called."""
    tell(path, os.getpid())
    time.sleep(10_000)


@task
def nap_if(path: str) -> None:
    """Tiny but for one call."""
    if path:
        tell(path, os.getpid())
        time.sleep(10_000)


@task
def note(path: str, text: str) -> None:
    """Leaves a line: what has run, and how often."""
    with open(path, "a") as file:
        file.write(text + "\n")


@task
def escape(path: str) -> None:
    """Leaves a descendant in a session of its own behind, and sleeps."""
    child = subprocess.Popen(["sleep", "10000"], start_new_session=True, stdout=subprocess.DEVNULL)
    tell(path, child.pid)
    time.sleep(10_000)


@task
def step(path: str) -> None:
    context().progress(3, 10)
    tell(path, os.getpid())
    time.sleep(10_000)


@task
def size(bytes: int) -> str:
    return "x" * bytes


@task
def babble() -> None:
    """A worker that has lost its mind: it writes into its supervisor's socket by itself."""
    import gc

    import zmq

    for thing in gc.get_objects():
        if type(thing) is zmq.Socket and thing.type == zmq.DEALER:
            thing.send(b"\xc1 this is no msgpack")
    time.sleep(10_000)


def tell(path: str, what: Any) -> None:
    with open(path, "w") as fifo:
        fifo.write(f"{what}\n")


@task(soft_timeout=0.05)
def sleep_softly() -> None:
    time.sleep(10_000)


@task(soft_timeout=0.05)
def spin_softly() -> None:
    while True:
        pass


@task(soft_timeout=0.05)
async def await_softly() -> None:
    await asyncio.sleep(10_000)


@task(soft_timeout=0.05, retry=Retry(1, backoff=0))
def sleep_softly_once() -> str:
    if context().attempt == 1:
        time.sleep(10_000)
    return f"attempt {context().attempt}"


@task(soft_timeout=0.05)
def as_far_as_it_comes() -> bool:
    try:
        time.sleep(10_000)
    except SoftTimeout:
        return True
    return False


@task
def spin(number: int) -> int:
    """A few milliseconds of work."""
    return number + 0 * sum(range(100_000))
