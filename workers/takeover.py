"""A new supervisor takes the place of a live one: its sockets, and the ids that it knows. Nobody is refused.

    new                                      old
    acomm.takeover [path, journal]  ------>  takes no more connections: the kernel keeps them
    sockets, locks                  <------  over a unix socket at `path`
    ready                           ------>
    go                              <------  with a journal: at its end, when that is closed
    accepts; serving                ------>
    known                           <----->  ids, before each kept connection is closed
    bye                             <------  all that it had accepted is done

If the new one ends before it serves, the old one goes on. If the old one dies on the way, what it had is
the new one's: nobody else has the sockets.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Iterable
from typing import Any, NamedTuple, Protocol

import msgspec

from acomm import socketpath
from acomm.client import connect
from acomm.errors import AcommError, BadArgs, Conflict, Forbidden, Unreachable
from acomm.listener import UnixListener
from acomm.urls import unix_url
from workers.errors import ConfigError, printable

log = logging.getLogger("acomm.supervisor")

PATIENCE = 30.0
"""Seconds for the other one's next step, before anything is lost."""

LATECOMERS = 5.0
"""Seconds for peers that have connected to the old one to say what they want."""

_LOOK = 0.05  # seconds between looks whether they have
_FDS = 200  # descriptors in one message; the kernel takes 253
_SIZE = struct.Struct(">I")
_LIMIT = 64 * 1024 * 1024  # bytes of a line
_GONE = (OSError, EOFError, TimeoutError, msgspec.DecodeError)


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
                exc_info=None if isinstance(error, _GONE) else error,
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
            with contextlib.suppress(*_GONE):
                await line.hear()
            gone.set()

        listening = asyncio.create_task(listen())
        try:
            await self._see_off(listeners, http)
            if not await self._old.rest(gone):
                raise EOFError("it has ended")
        finally:
            listening.cancel()

    async def _see_off(self, listeners: list[UnixListener], http: Listening | None) -> None:
        """Close kept connections, whose peers go to the new one, which knows by then what we have taken; and
        wait a moment for what those say who have just connected. Callers over HTTP go with their answer.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + LATECOMERS
        while True:
            held = [conn for listener in listeners for conn in listener.hold()]
            while any(conn.owed > 0 and not conn.closed for conn in held) and loop.time() < until:  # noqa: ASYNC110
                await asyncio.sleep(_LOOK)
            await self._tell_ids()
            for conn in held:
                conn.close()
            callers = http is not None and http.see_off()
            gone = not callers and not any(listener.connections for listener in listeners)
            if gone or loop.time() > until:
                return
            await asyncio.sleep(_LOOK)

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
        except _GONE as error:
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
    sock.sendall(_SIZE.pack(len(head)) + head)
    for start in range(0, len(fds), _FDS):
        socket.send_fds(sock, [b"f"], fds[start : start + _FDS])


class Offer(NamedTuple):
    """What the old one gives: its unix sockets by their paths, and its HTTP socket."""

    line: Line
    pid: int
    unix: dict[str, tuple[int, int]]
    http: int | None

    async def agreed(self) -> None:
        """Say that we are ready, and wait until the sockets are ours. Raises ConfigError when they are not
        to be: the old one keeps them then.
        """
        try:
            await self.line.say("ready")
            said, _ = await self.line.hear()
        except (OSError, EOFError):
            log.warning("the supervisor %d died while it handed over", self.pid)
            return
        if said == "no":
            self.refuse()
            raise ConfigError(f"the live supervisor {self.pid} has not handed over; its log tells why")

    def refuse(self) -> None:
        """Leave the sockets to the old one."""
        self.line.close()
        for pair in self.unix.values():
            for fd in pair:
                os.close(fd)
        self.unix.clear()
        if self.http is not None:
            os.close(self.http)

    async def follow(self, ids: Ids) -> None:
        """We serve: learn from the old one what it has taken, until it is done."""
        done = False
        try:
            await self.line.say("serving")
            while True:
                said, value = await self.line.hear()
                if said == "bye":
                    done = True
                    break
                if said == "known":
                    ids.inherit((id, bytes.fromhex(digest)) for id, digest in value)
                    await self.line.say("known")
        except (OSError, EOFError):
            log.info("the supervisor %d has ended", self.pid)
        ids.inheritance_ended(done)
        self.line.close()


async def ask(path: str, journal: str | None) -> Offer | None:
    """Ask the supervisor at `path` for its sockets; None if there is none. Raises its refusal."""
    path = _absolute(path)
    here = socketpath.bind(socketpath.private_path("takeover", os.path.dirname(path)))
    try:
        async with connect(unix_url(path), wait=0) as client:
            try:
                await client.submit("acomm.takeover", here.path, journal)
            except Unreachable:
                return None
        async with asyncio.timeout(PATIENCE):
            sock, _ = await asyncio.get_running_loop().sock_accept(here.socket)
    except TimeoutError:
        raise ConfigError("the live supervisor does not hand over") from None
    finally:
        here.release()
    try:
        head, fds = await asyncio.to_thread(_take, sock)
        line = await Line.over(sock)
    except (*_GONE, KeyError) as error:
        sock.close()
        raise ConfigError(f"the live supervisor has not handed over: {error}") from None
    paths = head["paths"]
    pairs = {path: (fds[2 * index], fds[2 * index + 1]) for index, path in enumerate(paths)}
    return Offer(line, head["pid"], pairs, fds[-1] if head["http"] else None)


def _absolute(path: str) -> str:
    return os.path.abspath(path)


def _take(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    sock.settimeout(PATIENCE)
    (size,) = _SIZE.unpack(_exactly(sock, _SIZE.size))
    head = msgspec.json.decode(_exactly(sock, size))
    wanted = 2 * len(head["paths"]) + bool(head["http"])
    fds: list[int] = []
    while len(fds) < wanted:
        data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(4 * _FDS), socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(content[: len(content) - len(content) % found.itemsize])
                fds += found
        if not data:
            raise EOFError("it has ended")
    return head, fds


def _exactly(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError("it has ended")
        data += more
    return bytes(data)
