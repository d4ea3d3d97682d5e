"""Coroutine tasks for the tests of calls that overlap."""

import asyncio
import os
import time

from workers.registry import task
from workers.running import context


@task
async def short(seconds: float) -> int:
    await asyncio.sleep(seconds)
    return os.getpid()


@task
async def last(path: str, name: str) -> str:
    """Tells that it runs, and lasts until it is cancelled; then it tells that, too."""
    context().progress(1, 2, name)
    tell(path, f"{name} begins")
    try:
        await asyncio.sleep(10_000)
    except asyncio.CancelledError:
        tell(path, f"{name} is cancelled {context().cancelled}")
        raise
    return name


@task
async def stubborn(path: str) -> None:
    """Will not be cancelled."""
    tell(path, "stubborn begins")
    while True:
        try:
            await asyncio.sleep(10_000)
        except asyncio.CancelledError:
            tell(path, "stubborn is cancelled")


@task
async def block(path: str) -> None:
    """Does not await."""
    tell(path, "block begins")
    while True:
        time.sleep(1)


@task
async def save(path: str) -> str:
    """Has a result when it is cancelled."""
    tell(path, "save begins")
    try:
        await asyncio.sleep(10_000)
    except asyncio.CancelledError:
        return "saved"
    return "done"


@task
async def die() -> None:
    os._exit(9)


@task
async def attempt(path: str) -> int:
    """Lasts in its first attempt."""
    tell(path, f"attempt {context().attempt} begins in {os.getpid()}")
    if not os.path.exists(path + ".again"):
        await asyncio.sleep(10_000)
    return context().attempt


@task
def plain() -> int:
    return os.getpid()


def tell(path: str, what: str) -> None:
    with open(path, "a") as file:
        file.write(what + "\n")
