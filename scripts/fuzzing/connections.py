"""Connections in memory: what the kernel would do between takes most of the time."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

TURNS = 12
"""Turns of the event loop in which a connection has come to rest: a request takes four."""


_LOGGERS = ("acomm", "asyncio", "aiohttp")


class Wire(asyncio.Transport):
    """A connection whose peer takes all that is written at once."""

    def __init__(self, protocol: asyncio.Protocol, about: dict[str, Any]) -> None:
        super().__init__(about)
        self.written = b""
        self.lost = False
        self._protocol = protocol
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            self.written += data

    def write_eof(self) -> None: ...

    def can_write_eof(self) -> bool:
        return True

    def is_reading(self) -> bool:
        return True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._lose)

    abort = close

    def _lose(self) -> None:
        self.lost = True
        self._protocol.connection_lost(None)


async def settled(wire: Wire) -> None:
    """Wait until a connection is closed, or has come to rest."""
    for _ in range(TURNS):
        if wire.lost:
            return
        await asyncio.sleep(0)


class Connected:
    """A target with an event loop. What is logged as a fault of ours is a failure, and a task left behind."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._faults: list[str] = []
        self.loop.set_exception_handler(lambda loop, context: self._faults.append(repr(context)))
        self._handler = logging.Handler(logging.ERROR)
        self._handler.emit = lambda record: self._faults.append(logging.Formatter().format(record))  # type: ignore[method-assign]
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self._handler)

    def close(self) -> None:
        """Leave nothing behind, for programs that go on."""
        self.loop.run_until_complete(self.stop())
        self.loop.close()
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)

    async def stop(self) -> None:
        """Close what `exchange` uses."""

    def feed(self, data: bytes, dice: random.Random) -> None:
        self.loop.run_until_complete(self.exchange(data, dice))
        faults, self._faults[:] = self._faults[:], []
        assert not faults, faults[0]
        left = asyncio.all_tasks(self.loop)
        assert not left, left

    async def exchange(self, data: bytes, dice: random.Random) -> None:
        raise NotImplementedError


def pieces(data: bytes, dice: random.Random) -> list[bytes]:
    """`data` as it comes: whole for the most part, or in two."""
    cut = dice.randrange(len(data) + 1) if dice.random() < 0.25 else 0
    return [piece for piece in (data[:cut], data[cut:]) if piece]
