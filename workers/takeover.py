"""A new supervisor takes the place of a live one: its sockets, and the ids that it knows. Nobody is refused.

    new                                      old
    acomm.takeover [path, journal]  ------>  takes no more connections: the kernel keeps them
    sockets, locks                  <------  over a unix socket at `path`
    ready                           ------>
    resting                         <------  with a journal, now and then until it is at its end
    go                              <------  with a journal: at its end, when that is closed
    accepts; serving                ------>
    known                           <----->  ids, before each kept connection is closed
    bye                             <------  all that it had accepted is done

If the new one ends before it serves, the old one goes on. If the old one dies on the way, what it had is
the new one's: nobody else has the sockets. Here is what both have in common, and the old one's side;
`workers.successor` is the new one's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Iterable
from typing import Any, Protocol

import msgspec

from acomm.errors import AcommError, BadArgs, Conflict, Forbidden
from acomm.listener import UnixListener
from workers.errors import printable

log = logging.getLogger("acomm.supervisor")

PATIENCE = 30.0
"""Seconds for the other one's next step, before anything is lost."""

STILL_THERE = 5.0
"""Seconds between words of an old one that lets its calls end before it hands over."""

LATECOMERS = 5.0
"""Seconds for peers that have connected to the old one to say what they want."""

LOOK = 0.05  # seconds between looks whether they have
FDS = 200  # descriptors in one message; the kernel takes 253
SIZE = struct.Struct(">I")
_LIMIT = 64 * 1024 * 1024  # bytes of a line
GONE = (OSError, EOFError, TimeoutError, msgspec.DecodeError)


class Listening(Protocol):
    """The HTTP door's listening socket."""

    @property
    def fd(self) -> int: ...
    async def accept(self) -> None: ...
    async def pause(self) -> None: ...
    def see_off(self) -> bool: ...
    def give_away(self) -> None: ...


class Ids(Protocol):
    """What is known of requests, by their ids."""

    def export(self) -> Iterable[tuple[str, bytes]]: ...
    def inherit(self, ids: Iterable[tuple[str, bytes]]) -> None: ...
    def inheritance_ended(self, done: bool) -> None: ...


class Old(Protocol):
    """What the one that is replaced knows."""

    def listeners(self) -> list[UnixListener]: ...
    def http(self) -> Listening | None: ...
    def ids(self) -> Ids | None:
        """None where a journal keeps them."""

    def rest(self, gone: asyncio.Event) -> Awaitable[bool]:
        """Take no more, and let what runs end, within the time for that. False, and it goes on, when `gone`
        is set meanwhile.
        """

    def depart(self) -> None:
        """End when all is done."""


class Line:
    """Messages between the two: a JSON object a line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> Line:
        sock.setblocking(False)
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=_LIMIT))

    async def say(self, what: str, value: Any = None) -> None:
        """Raises EOFError, OSError when the other one is gone."""
        if self._writer.is_closing():  # uvloop raises RuntimeError
            raise EOFError("it has ended")
        self._writer.write(msgspec.json.encode([what, value]) + b"\n")
        await self._writer.drain()

    async def hear(self) -> tuple[str, Any]:
        """The next message. Raises EOFError when the other one is gone."""
        text = await self._reader.readline()
        if not text.endswith(b"\n"):
            raise EOFError("it has ended")
        return msgspec.json.decode(text, type=tuple[str, Any])

    async def expect(self, what: str) -> Any:
        said, value = await self.hear()
        if said != what:
            raise EOFError(f"it has said {printable(said)}, not {what}")
        return value

    def close(self) -> None:
        self._writer.close()


class HandOver:
    """The old one's side: from a question for its sockets to its end."""

    def __init__(self, old: Old) -> None:
        self._old = old
        self._line: Line | None = None
        self._told: set[str] = set()
        self._going = False
        self.given = False

    async def run(self, path: str) -> None:
        """Give our sockets to the supervisor that listens at `path`, and depart; go on if it ends before it
        has taken over.
        """
        listeners, http = self._old.listeners(), self._old.http()
        try:
            sock = await asyncio.to_thread(_call, path)
        except (OSError, AcommError) as error:
            log.error("the supervisor that was to take over cannot be reached: %s", error)
            return
        try:
            for listener in listeners:
                await listener.pause()
            if http is not None:
                await http.pause()
            fds = [fd for listener in listeners for fd in listener.fds]
            fds += [] if http is None else [http.fd]
            paths = [listener.addr for listener in listeners]
            head = msgspec.json.encode({"pid": os.getpid(), "paths": paths, "http": http is not None})
            await asyncio.to_thread(_give, sock, head, fds)
            self._line = await Line.over(sock)
            async with asyncio.timeout(PATIENCE):
                await self._line.expect("ready")
            if self._old.ids() is None:
                await self._leave_to_journal(self._line, listeners, http)
            else:
                self._going = True
                await self._line.say("go")
                await self._line.expect("serving")
        except Exception as error:
            self._going = False
            log.error(
                "the supervisor that was to take over has not: %s; going on",
                printable(error),
                exc_info=None if isinstance(error, GONE) else error,
            )
            await self._go_on(sock, listeners, http)
            return
        self.given = True
        for listener in listeners:
            listener.give_away()
        if http is not None:
            http.give_away()
        if self._old.ids() is not None:
            await self._see_off(listeners, http)
        log.info("another supervisor has taken over")
        self._old.depart()

    async def _go_on(
        self, sock: socket.socket, listeners: list[UnixListener], http: Listening | None
    ) -> None:
        if self._line is not None:
            await self._refuse(self._line)
        else:
            sock.close()
        for listener in listeners:
            await listener.accept()
        if http is not None:
            await http.accept()

    @staticmethod
    async def _refuse(line: Line) -> None:
        with contextlib.suppress(OSError, EOFError):
            await line.say("no")
        line.close()

    async def abandon(self) -> None:
        """We are to end before we have given anything; what the other one may have by now is left to it."""
        if self.given:
            return
        if self._going:
            for listener in self._old.listeners():
                listener.give_away()
        elif self._line is not None:
            await self._refuse(self._line)

    async def _leave_to_journal(
        self, line: Line, listeners: list[UnixListener], http: Listening | None
    ) -> None:
        """Raises EOFError when the new one ends before ours has begun to."""
        gone = asyncio.Event()

        async def listen() -> None:
            with contextlib.suppress(*GONE):
                await line.hear()
            gone.set()

        async def ask_for_time() -> None:
            with contextlib.suppress(*GONE):
                while True:
                    await asyncio.sleep(STILL_THERE)
                    await line.say("resting")

        beside = [asyncio.create_task(listen()), asyncio.create_task(ask_for_time())]
        try:
            await self._see_off(listeners, http)
            if not await self._old.rest(gone):
                raise EOFError("it has ended")
        finally:
            for task in beside:
                task.cancel()

    async def _see_off(self, listeners: list[UnixListener], http: Listening | None) -> None:
        """Close kept connections, whose peers go to the new one, which knows by then what we have taken; and
        wait a moment for what those say who have just connected. Callers over HTTP go with their answer.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + LATECOMERS
        while True:
            held = [conn for listener in listeners for conn in listener.hold()]
            while any(conn.owed > 0 and not conn.closed for conn in held) and loop.time() < until:  # noqa: ASYNC110
                await asyncio.sleep(LOOK)
            await self._tell_ids()
            for conn in held:
                conn.close()
            callers = http is not None and http.see_off()
            gone = not callers and not any(listener.connections for listener in listeners)
            if gone or loop.time() > until:
                return
            await asyncio.sleep(LOOK)

    async def _tell_ids(self) -> None:
        ids = self._old.ids()
        if ids is None or self._line is None:
            return
        new = [(id, digest.hex()) for id, digest in ids.export() if id not in self._told]
        self._told.update(id for id, _ in new)
        try:
            await self._line.say("known", new)
            async with asyncio.timeout(PATIENCE):
                await self._line.expect("known")
        except GONE as error:
            log.error("the supervisor that has taken over does not answer: %s", error)
            self._line = None

    async def bye(self) -> None:
        """All that we had is done, or in a journal that we have closed."""
        if self.given and self._line is not None:
            with contextlib.suppress(OSError, EOFError):
                await self._line.say("bye")
            self._line.close()


def check(journal: str | None, other: object) -> None:
    """Refuse a successor with another journal than ours: it would not know what ours holds. Raises
    Conflict.
    """
    mine, its = (None if path is None else os.path.realpath(str(path)) for path in (journal, other))
    if mine is not None and mine != its:
        raise Conflict(f"the live supervisor has the journal {mine}: take over with the same one")


def asked(args: list[Any]) -> tuple[str, str | None]:
    """The arguments of `acomm.takeover`. Raises BadArgs."""
    if len(args) != 2 or not isinstance(args[0], str) or not isinstance(args[1], str | None):
        raise BadArgs("acomm.takeover takes the path of a socket, and that of the journal or null")
    return args[0], args[1]


def _call(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        uid = struct.unpack("iII", credentials)[1]
        if uid not in (0, os.getuid()):
            raise Forbidden(f"{printable(path)} is served by uid {uid}")
    except BaseException:
        sock.close()
        raise
    return sock


def _give(sock: socket.socket, head: bytes, fds: list[int]) -> None:
    sock.sendall(SIZE.pack(len(head)) + head)
    for start in range(0, len(fds), FDS):
        socket.send_fds(sock, [b"f"], fds[start : start + FDS])
