"""Passing on what workers print to our own stdout and stderr, without ever being held up by them.

A reader that is slow slows down those who print, as it would without us. One that is stuck, a terminal
after Ctrl-S or a pager that nobody scrolls, would stop them all: after PATIENCE seconds without a byte
taken, what is printed is dropped, until it takes some again and is told how much that was.
"""

from __future__ import annotations

import os
import select
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from time import monotonic

BACKLOG = 65536
"""Bytes that wait for the reader before those who print must."""

LIMIT = 2**20
"""Bytes that wait at most: the last words of the dead do not ask whether there is room."""

PATIENCE = 1.0

_GONE = (BrokenPipeError, ConnectionError)

Write = Callable[["bytes | memoryview"], int]


class Sink:
    """Where output goes: `write` takes what it can at once, or raises BlockingIOError. `fd` polls writable
    when it takes more.
    """

    def __init__(self, fd: int, write: Write | None, close: Callable[[], None] = lambda: None) -> None:
        self.fd = fd
        self.close = close  # what was opened for it
        self.lost = 0  # bytes; above 0 all further ones are dropped
        self._write = write
        self._backlog = bytearray()
        self._stuck: float | None = None  # since when it takes nothing

    def __repr__(self) -> str:
        return f"<Sink {self.fd}, {len(self._backlog)} bytes wait, {self.lost} are lost>"

    @property
    def full(self) -> bool:
        """Whether those who print should wait."""
        return len(self._backlog) >= BACKLOG

    @property
    def waiting(self) -> bool:
        """Whether to `pump` as soon as `fd` is writable."""
        return self._write is not None and bool(self._backlog or self.lost)

    @property
    def due(self) -> float | None:
        """When to `pump` at the latest."""
        return self._stuck + PATIENCE if self._stuck is not None and self._backlog else None

    def add(self, data: bytes, now: float) -> None:
        """Pass `data` on, now or later."""
        if self._write is None:
            return
        if self.lost or len(self._backlog) > LIMIT:
            self.lost += len(data)
            return
        self._backlog += data
        self.pump(now)

    def pump(self, now: float, *, writable: bool = False) -> None:
        """Write what is taken. `writable` is whether the descriptor polls so."""
        if self.lost and writable:
            self._backlog += (
                f"\n[acomm: {self.lost} bytes of output were dropped, as nobody read them]\n".encode()
            )
            self.lost, self._stuck = 0, None
        try:
            while self._backlog and self._write is not None:
                del self._backlog[: self._write(bytes(self._backlog[:BACKLOG]))]
                self._stuck = None
        except BlockingIOError:
            self._stuck = now if self._stuck is None else self._stuck
            if now - self._stuck >= PATIENCE:
                self.lost += len(self._backlog)
                self._backlog.clear()
        except _GONE:
            self._write = None
            self._backlog.clear()
        except OSError:  # a full disk, say: this is gone, what comes later may not be
            self._backlog.clear()

    def flush(self, seconds: float) -> None:
        """Write what is left, at the end, for `seconds` at most."""
        poller = select.poll()
        if self._backlog:
            poller.register(self.fd, select.POLLOUT)
        end = monotonic() + seconds
        while self._backlog and (left := end - monotonic()) > 0 and poller.poll(left * 1000):
            self.pump(monotonic(), writable=True)


def open_sink(fd: int) -> Sink:
    """A sink for the descriptor `fd`, which others have too, so its own settings are left alone."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return Sink(fd, None)
    if stat.S_ISREG(mode):
        return Sink(fd, partial(os.write, fd))  # at the place that all share; a file never makes one wait
    if stat.S_ISSOCK(mode):  # systemd's journal
        sock = socket.socket(fileno=os.dup(fd))
        return Sink(sock.fileno(), lambda data: sock.send(data, socket.MSG_DONTWAIT), sock.close)
    with suppress(OSError):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        own = os.open(f"/proc/self/fd/{fd}", flags)  # anew, so that it alone is not blocking
        return Sink(own, partial(os.write, own), partial(os.close, own))
    # Another user's terminal or pipe. What it has room for when it polls writable, by its kind.
    return Sink(fd, partial(_write_some, fd, 256 if stat.S_ISCHR(mode) else select.PIPE_BUF))


def _write_some(fd: int, room: int, data: bytes | memoryview) -> int:
    poller = select.poll()
    poller.register(fd, select.POLLOUT)
    if not poller.poll(0):
        raise BlockingIOError
    return os.write(fd, data[:room])
