"""The new one's side of a takeover: have the sockets of the live supervisor, and learn what it has taken."""

from __future__ import annotations

import array
import asyncio
import logging
import os
import socket
import struct
from typing import Any, NamedTuple

import msgspec

from acomm import socketpath
from acomm.client import connect
from acomm.errors import ConnectionLost
from acomm.urls import unix_url
from workers.errors import ConfigError
from workers.takeover import FDS, GONE, LOOK, PATIENCE, SIZE, Ids, Line

log = logging.getLogger("acomm.supervisor")

_ALIVE = 0.5  # seconds between looks whether the one that comes is alive
_DEATH = 2.0  # seconds that the kernel may take to close what a killed one had, on a busy machine


class Offer(NamedTuple):
    """What the old one gives: its unix sockets by their paths, and its HTTP socket. `process` is the pidfd of
    the old one, None if that has ended or is not to be seen from here.
    """

    line: Line
    pid: int
    process: int | None
    unix: dict[str, tuple[int, int]]
    http: int | None

    async def agreed(self) -> None:
        """Say that we are ready, and wait until the sockets are ours, for as long as the old one says that it
        needs more time. Raises ConfigError when they are not to be: the old one keeps them then.
        """
        said = "resting"
        try:
            await self.line.say("ready")
            while said == "resting":
                async with asyncio.timeout(PATIENCE):
                    said, _ = await self.line.hear()
        except TimeoutError:
            self.refuse()
            raise ConfigError(f"the live supervisor {self.pid} does not say whether it hands over") from None
        except (OSError, EOFError):
            log.warning("the supervisor %d died while it handed over", self.pid)
            # The kernel closes one descriptor after the other: it may hold its journal yet.
            await self._ended()
            return
        if said == "no":
            self.refuse()
            raise ConfigError(f"the live supervisor {self.pid} has not handed over; its log tells why")

    async def _ended(self) -> None:
        """Wait until the old one has nothing any more, if we can see it."""
        if self.process is None:
            return
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self.process, ended.set)
        try:
            async with asyncio.timeout(PATIENCE):
                await ended.wait()
        except TimeoutError:
            log.error("the supervisor %d has closed its connection, and does not end", self.pid)
        finally:
            loop.remove_reader(self.process)

    def close(self) -> None:
        """Nothing more is to come from the old one."""
        self.line.close()
        if self.process is not None:
            os.close(self.process)

    def refuse(self) -> None:
        """Leave the sockets to the old one."""
        self.close()
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
        self.close()


async def ask(path: str, journal: str | None) -> Offer | None:
    """Ask the supervisor at `path` for its sockets; None if there is none, or it dies before it has given
    them. Raises its refusal.
    """
    path = _absolute(path)
    here = socketpath.bind(socketpath.private_path("takeover", os.path.dirname(path)))
    try:
        async with connect(unix_url(path), wait=0) as client:
            try:
                await client.submit("acomm.takeover", here.path, journal)
            except ConnectionLost as error:
                if await _dies(path, within=_DEATH):
                    return None
                raise ConfigError(f"the live supervisor has not answered: {error}") from None
        sock = await _come(here.socket, path)
    finally:
        here.release()
    if sock is None:
        return None
    process = _process(sock)
    try:
        head, fds = await asyncio.to_thread(_take, sock)
        line = await Line.over(sock)
    except (*GONE, KeyError) as error:
        sock.close()
        if process is not None:
            os.close(process)
        if await _dies(path, within=_DEATH):
            return None
        raise ConfigError(f"the live supervisor has not handed over: {error}") from None
    paths = head["paths"]
    pairs = {path: (fds[2 * index], fds[2 * index + 1]) for index, path in enumerate(paths)}
    return Offer(line, head["pid"], process, pairs, fds[-1] if head["http"] else None)


async def _come(here: socket.socket, path: str) -> socket.socket | None:
    """The connection of the supervisor at `path`, which has said that it comes; None if it dies. Raises
    ConfigError when it does not come.
    """
    coming = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(here))
    try:
        async with asyncio.timeout(PATIENCE):
            while not (await asyncio.wait({coming}, timeout=_ALIVE))[0]:
                if await _dies(path, within=0.0):
                    return None
        return coming.result()[0]
    except TimeoutError:
        raise ConfigError("the live supervisor does not hand over") from None
    finally:
        coming.cancel()


async def _dies(path: str, within: float) -> bool:
    """Whether the supervisor at `path` is dead, or will be within so many seconds."""
    for _ in range(1 + round(within / LOOK)):
        alive = socketpath.is_live(path)
        # Also when it is not: it may have other paths and its journal for a moment yet.
        await asyncio.sleep(LOOK)
        if not alive:
            return True
    return False


def _process(sock: socket.socket) -> int | None:
    """A pidfd of whoever has connected; None if it has ended, or is in a place that we do not see."""
    pid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    try:
        return os.pidfd_open(pid) if pid > 0 else None
    except OSError:
        return None


def _absolute(path: str) -> str:
    return os.path.abspath(path)


def _take(sock: socket.socket) -> tuple[dict[str, Any], list[int]]:
    sock.settimeout(PATIENCE)
    (size,) = SIZE.unpack(_exactly(sock, SIZE.size))
    head = msgspec.json.decode(_exactly(sock, size))
    wanted = 2 * len(head["paths"]) + bool(head["http"])
    fds: list[int] = []
    while len(fds) < wanted:
        data, ancillary, _, _ = sock.recvmsg(1, socket.CMSG_SPACE(4 * FDS), socket.MSG_CMSG_CLOEXEC)
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
