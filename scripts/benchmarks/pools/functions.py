"""What the workers run. They import this, so it imports next to nothing."""

import os
import time


def identity(value):  # type: ignore[no-untyped-def]  # typing.Any would be an import in each worker
    """As little work as there can be, with an argument and a result to check."""
    return value


def pid_after(seconds: float) -> int:
    """Which process this is, later: meanwhile another call must go to another worker."""
    time.sleep(seconds)
    return os.getpid()


def spin(turns: int) -> int:
    """Work for the processor, the same amount whoever else uses it."""
    total = 0
    for turn in range(turns):
        total += turn
    return total


def where_and_when(turns: int) -> "tuple[int, float]":
    """The process, and when it began (CLOCK_MONOTONIC, one for all processes); then works for a while."""
    began = time.monotonic()
    spin(turns)
    return os.getpid(), began


def hold(started: str, release: str) -> None:
    """Keep a worker busy: tell the one FIFO, then wait for a byte from the other."""
    descriptor = os.open(started, os.O_WRONLY)
    os.write(descriptor, b".")
    os.close(descriptor)
    descriptor = os.open(release, os.O_RDONLY)
    os.read(descriptor, 1)
    os.close(descriptor)
