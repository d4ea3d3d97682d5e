"""What hooks of strangers answer to us."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

from acomm.acks import ok_ack
from acomm.channel import Channels
from acomm.errors import AcommError, ConnectionLost
from acomm.messages import Response
from acomm.outgoing import Outgoing
from fuzzing.connections import Connected, Wire, pieces

_URL = "http://127.0.0.1:8080/hook?key=1"
_PATIENCE = 0.05
"""Seconds for an answer. Each one ends at once, but aiohttp waits on for the rest of a body whose chunks
break in its second piece.
"""
_IN_TIME = "in time"


class _Answering(Wire):
    """A hook's connection: once the message is there, the answer is, and its end."""

    def __init__(self, protocol: ResponseHandler, parts: list[bytes]) -> None:
        super().__init__(protocol, {"peername": ("127.0.0.1", 8080), "sockname": ("127.0.0.1", 9)})
        self._parts = parts

    def write(self, data: bytes | bytearray | memoryview) -> None:
        super().write(data)
        asyncio.get_running_loop().call_soon(self._answer)

    def _answer(self) -> None:
        parts, self._parts = self._parts, []
        for part in parts:
            if not self.is_closing():
                self._protocol.data_received(part)
        if parts:
            self._protocol.eof_received()
            self.close()


class _Connector(aiohttp.BaseConnector):
    parts: list[bytes]

    async def _create_connection(self, req: Any, traces: Any, timeout: Any) -> ResponseHandler:
        protocol = ResponseHandler(asyncio.get_running_loop())
        protocol.connection_made(_Answering(protocol, self.parts))
        return protocol


class Hooks(Connected):
    """Raw bytes as the answer of an HTTP hook: an acknowledgement, its error, or no delivery at all."""

    def __init__(self) -> None:
        super().__init__()
        self.loop.run_until_complete(self._start())
        self._whole = frozenset(self.samples()[:4])

    async def _start(self) -> None:
        self._channels = Channels(timeout=_PATIENCE)
        session = self._channels.http(None)
        assert session.connector is not None
        await session.connector.close()
        self._connector = session._connector = _Connector()

    async def stop(self) -> None:
        await self._channels.close()

    def samples(self) -> list[bytes]:
        head = b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        ok, refusal = ok_ack(b'""', 3, True), Response("", error=AcommError("no")).encode(3, extended=True)
        made = [
            head % (b"200 OK", len(body), body) for body in (ok, ok_ack(b'"a"', 2, False), b"{}", ok + b"\n")
        ]
        made += [
            head % (status, len(ok), ok) for status in (b"202 Accepted", b"500 No", b"204 None", b"301 There")
        ]
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
            len(ok),
            ok,
        )
        more = (
            b"Set-Cookie: a=b; Path=/\r\nLocation: http://x/\r\nContent-Encoding: gzip\r\nConnection: close"
        )
        odd = made[0].replace(b"Content-Type: application/json", more)
        return [
            *made,
            head % (b"200 OK", len(refusal), refusal),
            chunked,
            b"HTTP/1.0 200 OK\r\n\r\n" + ok,
            odd,
        ]

    async def exchange(self, data: bytes, dice: random.Random) -> None:
        self._connector.parts = pieces(data, dice) or [b"\r\n"]
        told = self.loop.create_future()  # a second time is a fault that is logged
        wire = 1 if dice.random() < 0.1 else 3
        self._channels.post(_URL, Outgoing(b"{}", told.set_result, wire=wire, extended=wire == 3))
        error: AcommError | None = await told
        assert error is None or isinstance(error, AcommError), error
        assert isinstance(error, ConnectionLost | None) or b"HTTP/" in data, error
        assert error is None or data not in self._whole or str(error).endswith(_IN_TIME), error
        await asyncio.sleep(0)
        assert not len(self._channels)
