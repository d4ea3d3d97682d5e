"""The floor of the protocol: the same frames, between two bare event loops, and nothing else.

    client --request--> server          the server answers each request frame with an acknowledgement on
    client <---ack----- server          the same connection, and with a response frame on a connection of
    client <--response- server          its own to the client's hook socket, which the client acknowledges
    client ----ack----> server

The frames are as long as the real ones, but only the first eight bytes mean anything. There is no JSON, no
task, no pool, no table of ids, no timer: what a call costs above this is what all of those cost.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import time
from multiprocessing.connection import Connection
from typing import Any

import uvloop

from acomm.acks import ok_ack
from acomm.messages import Request, Response
from acomm.urls import unix_url
from benchmarks.harness import Figures

_header = struct.Struct(">I")
_value = struct.Struct(">Q")
_id = "0" * 36


def _like(message: bytes) -> bytes:
    """What follows the value in a frame of the same length."""
    return bytes(len(message) - _value.size)


_request_rest = _like(
    Request("echo", [12345], id=_id, response_hook=unix_url(f"/tmp/{_id}")).encode(extended=True)
)
_response_rest = _like(Response(_id, 12345).encode(extended=True))
_request_ack_rest = _like(ok_ack(f'"{_id}"'.encode(), 3, True))
_response_ack_rest = _like(ok_ack(b'""', 3, True))


class Frames(asyncio.Protocol):
    """A connection that carries frames; those written in one turn of the loop leave in one write."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._held = b""
        self._output: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        data = self._held + data if self._held else data
        position, end = 0, len(data)
        while end - position >= 4:
            (length,) = _header.unpack_from(data, position)
            if end - position - 4 < length:
                break
            (value,) = _value.unpack_from(data, position + 4)
            self.frame_received(value)
            position += 4 + length
        self._held = data[position:]

    def frame_received(self, value: int) -> None:
        raise NotImplementedError

    def write_frame(self, value: int, rest: bytes) -> None:
        if not self._output:
            self._loop.call_soon(self._flush)
        self._output += (_header.pack(_value.size + len(rest)), _value.pack(value), rest)

    def _flush(self) -> None:
        self.transport.write(b"".join(self._output))
        self._output.clear()


class _Requests(Frames):
    """The server's end of the request connection. A new one connects back to the hook beside it."""

    def __init__(self, hook_path: str) -> None:
        super().__init__()
        self._hook_path = hook_path
        self._hook: _Responses | None = None
        self._early: list[int] = []

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        _, self._hook = await self._loop.create_unix_connection(_Responses, self._hook_path)
        for value in self._early:
            self._hook.write_frame(value, _response_rest)

    def frame_received(self, value: int) -> None:
        self.write_frame(value, _request_ack_rest)
        if self._hook is None:
            self._early.append(value)
        else:
            self._hook.write_frame(value, _response_rest)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._hook is not None:
            self._hook.transport.close()


class _Responses(Frames):
    """The server's end of the hook connection: takes acknowledgements."""

    def frame_received(self, value: int) -> None:
        pass


class _ClientRequests(Frames):
    """The client's end of the request connection: counts acknowledgements."""

    acknowledged = 0

    def frame_received(self, value: int) -> None:
        self.acknowledged += 1


class _ClientHook(Frames):
    """The client's hook: acknowledges each response, and wakes who waits for it."""

    def __init__(self, waiting: dict[int, asyncio.Future[int]]) -> None:
        super().__init__()
        self._waiting = waiting

    def frame_received(self, value: int) -> None:
        self.write_frame(value, _response_ack_rest)
        self._waiting.pop(value).set_result(value)


def serve(path: str, ready: Connection) -> None:
    """The server's process."""
    uvloop.run(_serve(path, ready))


async def _serve(path: str, ready: Connection) -> None:
    server = await asyncio.get_running_loop().create_unix_server(lambda: _Requests(f"{path}.hook"), path)
    ready.send(True)
    await server.serve_forever()


async def measure(path: str, in_flight: int, calls: int) -> Figures:
    """Keep `in_flight` calls under way until `calls` have come back."""
    loop = asyncio.get_running_loop()
    waiting: dict[int, asyncio.Future[int]] = {}
    hook = await loop.create_unix_server(lambda: _ClientHook(waiting), f"{path}.hook")
    transport, requests = await loop.create_unix_connection(_ClientRequests, path)

    async def call_many(values: range) -> None:
        for value in values:
            answer = waiting[value] = loop.create_future()
            requests.write_frame(value, _request_rest)
            if await answer != value:
                raise AssertionError(f"{value} did not come back")

    warm_up = range(max(100, 2 * in_flight))
    await asyncio.gather(*(call_many(warm_up[caller::in_flight]) for caller in range(in_flight)))
    values = range(len(warm_up), len(warm_up) + calls)
    started = time.perf_counter()
    await asyncio.gather(*(call_many(values[caller::in_flight]) for caller in range(in_flight)))
    seconds = time.perf_counter() - started
    if requests.acknowledged != values.stop:
        raise AssertionError(f"{requests.acknowledged} acknowledgements of {values.stop}")
    transport.close()
    hook.close()
    with contextlib.suppress(FileNotFoundError):  # some event loops remove it themselves
        os.unlink(f"{path}.hook")
    return {"calls/s": calls / seconds}
