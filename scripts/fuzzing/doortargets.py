"""Both doors, which take connections of strangers."""

from __future__ import annotations

import asyncio
import os
import random
import re
import struct
import tempfile
from typing import Any

import msgspec

from acomm.accepted import Accepted
from acomm.acks import salvage
from acomm.connection import Connection
from acomm.errors import AcommError, Busy
from acomm.framing import Framer, FrameTooLarge, frame
from acomm.messages import Request, Response
from acomm.tracker import Tracker
from fuzzing.connections import TURNS, Connected, Wire, pieces, settled
from fuzzing.messagetargets import requests
from workers.callers import Callers
from workers.config import Config
from workers.door import Door
from workers.registry import Registry, task
from workers.unixdoor import UnixDoor

_HEAD = re.compile(rb"HTTP/[0-9]\.[0-9] ([0-9]{3}) [ -~]*\r\n(?:[A-Za-z-]+: [ -~]*\r\n)*\r\n")
_LENGTH = re.compile(rb"\r\nContent-Length: ([0-9]+)\r\n")
_OURSELVES = struct.pack("iII", os.getpid(), os.getuid(), os.getgid())


@task
def echo(value: Any = None) -> Any:
    return value


@task(cancel_on_disconnect=True)
def waited_for(value: Any = None) -> Any:
    return value


class _Socket:
    """Tells who is at the other end."""

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        return _OURSELVES


class _Delivery:
    """Posts nothing."""

    def post(self, url: str, response: Response, wire: int, **more: Any) -> None:
        response.encode(wire, extended=response.extended)


class _Service:
    """Decides every request, sometimes later, and answers what it has taken."""

    draining = False

    def __init__(self, folder: str, tracker: Any) -> None:
        settings = {"modules": ("fuzzing",), "http": "127.0.0.1:0", "http_no_token": True}
        self.config = Config.load({**settings, "socket": f"{folder}/s.sock", "max_frame": 65536}, environ={})
        self.registry = Registry([echo, waited_for])
        self.tracker = tracker
        self.callers = Callers()
        self.dice = random.Random(0)

    def offer(
        self, request: Request, origin: Any, decided: Any, resolve: Any = None, message: bytes | None = None
    ) -> None:
        def decide() -> None:
            if self.dice.random() < 0.1:
                decided(Busy("no more", retry_after=1.0))
                return
            decided(None, Accepted(3, 0.5) if self.dice.random() < 0.2 else None)
            self.callers.ended(request.id)
            if resolve is not None:
                resolve(Response(request.id, request.args))

        if self.dice.random() < 0.2:
            asyncio.get_running_loop().call_soon(decide)
        else:
            decide()

    def is_answered(self, id: str) -> bool:
        return False

    def refused(self, error: AcommError) -> None: ...

    def caller_left(self, caller: Any) -> None:
        self.callers.left(caller)

    def unready(self) -> None:
        return None


class _Door(Connected):
    """What both have in common: a service."""

    def __init__(self, tracker: Any) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._service = _Service(self._folder.name, tracker)

    def feed(self, data: bytes, dice: random.Random) -> None:
        self._service.dice = dice
        super().feed(data, dice)

    async def stop(self) -> None:
        self._folder.cleanup()


class Unix(_Door):
    """Raw bytes at the unix door: an acknowledgement for each message, in order, and no fault of ours."""

    def __init__(self) -> None:
        tracker = Tracker()
        tracker.delivery = _Delivery()  # type: ignore[assignment]
        super().__init__(tracker)
        self._door = UnixDoor(self._service)

    def samples(self) -> list[bytes]:
        several = requests()
        framed = [frame(message) for message in several]
        ours = [frame(r) for r in several if r.endswith(b'"acomm":1}')]
        ends = Request("waited_for", id="w", response_hook="unix:///tmp/x").encode(extended=True)
        return [*framed, *several, b"".join(ours), ours[0] + frame(b"x") + frame(ends) + ours[1], frame(ends)]

    async def exchange(self, data: bytes, dice: random.Random) -> None:
        conn = Connection(self._door.listener)
        wire = Wire(conn, {"socket": _Socket()})
        conn.connection_made(wire)
        parts = pieces(data, dice)
        for piece in parts:
            if not wire.is_closing():
                conn.data_received(piece)
        await asyncio.sleep(0)
        if not wire.is_closing():
            conn.eof_received()
        await settled(wire)
        wire.abort()
        await asyncio.sleep(0)
        self._check_acks(data, wire.written, whole=len(parts) <= 1)
        for grace in self._door._graces.values():
            grace.cancel()
        for caller in list(self._door._graces):
            self._door._left(caller)
        room = self._door.room
        assert (len(room), room.used, len(self._service.callers), len(self._door.listener._open)) == (0,) * 4

    def _check_acks(self, data: bytes, written: bytes, *, whole: bool) -> None:
        framer, failed = Framer(self._service.config.max_frame), False
        try:
            messages = framer.receive(data)
            if not framer.raw:
                messages += framer.receive_eof()
        except FrameTooLarge as error:
            messages, failed = error.messages, True
        except AcommError:
            messages, failed = Framer(self._service.config.max_frame).receive(data), True
        acks = Framer().receive(written)
        assert b"".join(frame(ack) for ack in acks) == written, written
        if framer.raw:
            assert not acks, acks
            return
        ids = [Response.decode(ack).id for ack in acks]
        due = [salvage(message)[0] for message in messages] + [""] * failed
        assert ids == (due if whole else due[: len(ids)]), (ids, due)


class Http(_Door):
    """Raw bytes at the HTTP door: an answer or none, nothing that stays behind, and no fault of ours."""

    def __init__(self) -> None:
        super().__init__(Tracker())
        self._door = Door(self._service)
        self.loop.run_until_complete(self._start())
        self._whole = frozenset(self.samples())

    async def _start(self) -> None:
        await self._service.tracker.start()
        await self._door.start()
        await self._door.pause()

    async def stop(self) -> None:
        await self._door.close(0)
        await self._service.tracker.stop(0)
        await super().stop()

    def samples(self) -> list[bytes]:
        json = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        body = Request("echo", [1], id="a", response_hook="unix:///tmp/x").encode(extended=True)
        close = b"Host: localhost\r\nConnection: close\r\n"
        posts = [(b"/", body), (b"/call/echo?timeout=5", b"[1]"), (b"/proxy?key=1", b"{}")]
        gets = (b"/healthz", b"/readyz", b"/openapi.json", b"/stream?x=1")
        made = [b"POST %b HTTP/1.1\r\n%b%b" % (path, close, json % (len(data), data)) for path, data in posts]
        made += [b"GET %b HTTP/1.1\r\n%b\r\n" % (path, close) for path in gets]
        chunked = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n[1]\r\n0\r\n\r\n"
        kept = made[1].replace(b"Connection: close\r\n", b"")
        made += [b"POST /call/echo HTTP/1.1\r\n" + close + chunked, kept + kept + made[0]]
        return [
            *made,
            b"HEAD" + made[3][3:],
            made[1].replace(b"Content-L", b"Expect: 100-continue\r\nContent-L"),
        ]

    async def exchange(self, data: bytes, dice: random.Random) -> None:
        protocol = self._door._protocol()
        wire = Wire(protocol, {"peername": ("127.0.0.1", 9), "sockname": ("127.0.0.1", 8)})
        protocol.connection_made(wire)
        for piece in pieces(data, dice):
            if not wire.is_closing():
                protocol.data_received(piece)
                await asyncio.sleep(0)
        await settled(wire)
        if not wire.is_closing():
            protocol.eof_received()
            wire.close()
        for _ in range(TURNS):
            await asyncio.sleep(0)
            if wire.lost and not self._door.connections and len(asyncio.all_tasks()) == 1:
                break
        answers = _answers(wire.written) if b"HEAD" not in data else []
        assert wire.written or data not in self._whole, "no answer"
        for status, head, body in answers:
            if status >= 400 and b"application/json" in head:
                assert msgspec.json.decode(body)["error"], body
            assert body, head
        assert not any(self._door._reading.values()), self._door._reading
        assert not self._door.connections


def _answers(data: bytes) -> list[tuple[int, bytes, bytes]]:
    """Status, head and body of each of the answers that `data` is made of."""
    found = []
    while data:
        match = _HEAD.match(data)
        assert match is not None, data[:200]
        length = _LENGTH.search(match[0])
        end = match.end() + int(length[1] if length is not None else 0)
        assert end <= len(data), data
        if match[1] != b"100":
            found.append((int(match[1]), match[0], data[match.end() : end]))
        data = data[end:]
    return found
