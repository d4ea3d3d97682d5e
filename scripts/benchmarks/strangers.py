"""Programs that know nothing of our extensions: a connection a message, as the Go original's.

    client --connect, request--> server     each message on a connection of its own, which both ends
    client <---ack, close------- server     close behind the acknowledgement
    client <--connect, response- server
    client ----ack, close------> server

`rate` is such a client. `serve` is the floor: a server that answers it without any task, worker or JSON.
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
_response_ack = ok_ack(b'""', 3, False)


def _frame(payload: bytes) -> bytes:
    return _header.pack(len(payload)) + payload


class _OneFrame(asyncio.Protocol):
    """A connection for one frame: sends `outgoing`, if any, when it is made, and takes one frame."""

    transport: asyncio.Transport

    def __init__(self, outgoing: bytes = b"") -> None:
        self._outgoing = outgoing
        self._held = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        if self._outgoing:
            transport.write(self._outgoing)

    def data_received(self, data: bytes) -> None:
        self._held += data
        if len(self._held) >= 4 and len(self._held) - 4 >= _header.unpack_from(self._held)[0]:
            self.frame_received(self._held[4:])

    def frame_received(self, payload: bytes) -> None:
        self.transport.close()


class _ClientHook(_OneFrame):
    """The client's hook: acknowledges the response, and wakes who waits for it."""

    def __init__(self, waiting: dict[str, asyncio.Future[int]]) -> None:
        super().__init__()
        self._waiting = waiting

    def frame_received(self, payload: bytes) -> None:
        response = Response.decode(payload)
        self.transport.write(_frame(_response_ack))
        self.transport.close()
        self._waiting.pop(response.id).set_result(response.result_as(int))


class _Server(_OneFrame):
    """The floor's server: acknowledges, and answers at the hook, which it finds beside itself."""

    def __init__(self, hook: str, tasks: set[asyncio.Task[Any]]) -> None:
        super().__init__()
        self._hook = hook
        self._tasks = tasks

    def frame_received(self, payload: bytes) -> None:
        # Where the id and the value stand is known, as the client is: there is nothing to decode.
        id = payload[7:43]
        value = payload[payload.rindex(b"[") + 1 : payload.rindex(b"]")]
        self.transport.write(_frame(ok_ack(b'"%b"' % id, 3, False)))
        self.transport.close()
        answer = b'{"error":"","id":"%b","result":%b,"streamURL":null}' % (id, value)
        connecting = asyncio.get_running_loop().create_unix_connection(
            lambda: _OneFrame(_frame(answer)), self._hook
        )
        task = asyncio.ensure_future(connecting)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def serve(path: str, ready: Connection) -> None:
    """The floor's process."""
    uvloop.run(_serve(path, ready))


async def _serve(path: str, ready: Connection) -> None:
    tasks: set[asyncio.Task[Any]] = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(lambda: _Server(hook_of(path), tasks), path, backlog=1024)
    ready.send(True)
    await server.serve_forever()


def hook_of(path: str) -> str:
    """Where the client of the server at `path` listens."""
    return f"{path}.hook"


def rate(path: str, in_flight: int, calls: int) -> Figures:
    """Calls of the task `echo` at the socket `path`."""
    return uvloop.run(_rate(path, in_flight, calls))


async def _rate(path: str, in_flight: int, calls: int) -> Figures:
    loop = asyncio.get_running_loop()
    waiting: dict[str, asyncio.Future[int]] = {}
    hook_path = hook_of(path)
    hook = await loop.create_unix_server(lambda: _ClientHook(waiting), hook_path, backlog=1024)

    async def call_many(values: range) -> None:
        for value in values:
            request = Request("echo", [value], response_hook=unix_url(hook_path))
            answer = waiting[request.id] = loop.create_future()
            frame = _frame(request.encode(3))
            await loop.create_unix_connection(lambda frame=frame: _OneFrame(frame), path)
            if await answer != value:
                raise AssertionError(f"{value} did not come back")

    async def all_of(calls: int) -> float:
        started = time.perf_counter()
        await asyncio.gather(*(call_many(range(caller, calls, in_flight)) for caller in range(in_flight)))
        return time.perf_counter() - started

    await all_of(max(100, 2 * in_flight))
    seconds = await all_of(calls)
    hook.close()
    with contextlib.suppress(FileNotFoundError):  # some event loops remove it themselves
        os.unlink(hook_path)
    return {"calls/s": calls / seconds}
