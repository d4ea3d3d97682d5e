"""Requests that wait for a supervisor: none is there, since it restarts or starts late, or it is stopping."""

from __future__ import annotations

import asyncio
import math
import socket
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from acomm import urls
from acomm.errors import AcommError, ShuttingDown

_FIRST_PAUSE = 0.01
_LONGEST_PAUSE = 0.25
_CALM = 1.0  # seconds without a look, after which the first pause is short again
_CONNECT_TIMEOUT = 1.0  # seconds; for hosts that say nothing


class Waiting(Protocol):
    """What waits: `until` is when it gives up, on the event loop's clock; None before it has waited."""

    until: float | None


T = TypeVar("T", bound=Waiting)


class Away(Generic[T]):
    """Holds what nobody at `url` has taken, and looks now and then whether somebody is there; then
    `send(item)` is called for each, in order. `give_up(item, error)` is called for one that has
    waited `wait` seconds in all. `connected()` tells whether a connection to `url` is open: as long as that
    is to a supervisor that is stopping, it is not asked again, since what is under way when it ends may or
    may not have been taken. It belongs to one event loop.
    """

    def __init__(
        self,
        url: str,
        wait: float,
        send: Callable[[T], None],
        give_up: Callable[[T, AcommError], None],
        connected: Callable[[], bool],
    ) -> None:
        self._url = url
        self._wait = wait
        self._send = send
        self._give_up = give_up
        self._connected = connected
        self._items: deque[tuple[T, AcommError]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._pause = _FIRST_PAUSE
        self._looked = -math.inf

    def __len__(self) -> int:
        return len(self._items)

    def add(self, item: T, error: AcommError) -> None:
        """Keep `item`, which was met with `error`, or give it up at once if its time is over."""
        now = asyncio.get_running_loop().time()
        if item.until is None:
            item.until = now + self._wait
        if item.until <= now:
            self._give_up(item, error)
            return
        self._items.append((item, error))
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._watch())

    def join(self, item: T) -> bool:
        """Keep `item` behind those that wait; False if none does, so that it can be sent."""
        if not self._items:
            return False
        self.add(item, self._items[-1][1])
        return True

    async def settled(self) -> None:
        """Wait until nothing waits."""
        while self._task is not None and not self._task.done():
            await asyncio.wait({self._task})

    def close(self) -> None:
        """Look no more. What waits is left to its owner."""
        self._items.clear()
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() - self._looked > _CALM:
            self._pause = _FIRST_PAUSE
        while self._items:
            first = min(item.until or 0.0 for item, _ in self._items)
            await asyncio.sleep(max(0.0, min(self._pause, first - loop.time())))
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._looked = loop.time()
            stopping = isinstance(self._items[-1][1], ShuttingDown) and self._connected()
            there = not stopping and await reachable(self._url)
            items, self._items = self._items, deque()
            for item, error in items:
                if there:
                    self._send(item)
                else:
                    self.add(item, error)


async def reachable(url: str) -> bool:
    """Whether somebody listens at `url`. What else may be wrong is for those to find who send to it."""
    path = urls.unix_path(url)
    if path is not None:
        try:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:  # out of descriptors, so that nothing could be sent either
            return False
        with sock:
            try:
                sock.connect(path)
            except (FileNotFoundError, ConnectionRefusedError):
                return False
            except OSError:  # a full queue, for one
                return True
            return True
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        async with asyncio.timeout(_CONNECT_TIMEOUT):
            _, writer = await asyncio.open_connection(parts.hostname, port)
    except OSError:
        return False
    writer.close()
    return True
