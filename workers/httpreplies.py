"""What the HTTP door answers: results, acknowledgements, and refusals with their statuses."""

from __future__ import annotations

import asyncio
import math
import time
from email.utils import formatdate
from functools import lru_cache
from typing import cast

from aiohttp import HttpVersion11, web

from acomm.messages import Response, error_json
from workers.errors import AcommError, BadRequest, Busy, Forbidden, ShuttingDown, printable

STATUSES = {
    "bad_request": 400,
    "forbidden": 403,
    "unknown_task": 404,
    "conflict": 409,
    "cancelled": 409,
    "too_large": 413,
    "bad_args": 422,
    "task_error": 422,
    "poisoned": 422,
    "timeout": 422,
    "busy": 429,
    "worker_lost": 503,
    "shutting_down": 503,
}
"""Those of error codes. From 400 on it is about this call, from 500 on about the service: a worker that
died, a supervisor that stops. An error without a code is a fault of ours.
"""

_FAULT = 503
RETRY_AFTER = 1.0
HEADERS = {
    "Server": "acomm",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'",
}
JSON = {**HEADERS, "Content-Type": "application/json"}
TEXT = {**HEADERS, "Content-Type": "text/plain; charset=utf-8"}
_WHOLE = b"\r\n".join(
    (
        b"HTTP/1.1 200 OK",
        *(f"{name}: {value}".encode() for name, value in JSON.items()),
        b"Date: %b",
        b"Content-Length: %d",
        b"",
        b"%b",
    )
)
_SMALL = 16 * 1024
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
    b'Connection: close\r\nContent-Length: %d\r\n\r\n{"error":%b}'
)


class NotAllowed(AcommError):
    """The path exists, the method does not."""

    code = "bad_request"

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"the method {printable(method)} is not for this path; use {allowed}")
        self.allowed = allowed


class NoToken(Forbidden):
    """The token was not shown, or it was another."""


class NoSuchPath(BadRequest):
    """There is nothing at that path."""


def refusal(error: AcommError) -> web.Response:
    """The error with its status, as `{"error": ...}`."""
    headers = JSON
    if isinstance(error, NoToken):
        status, headers = 401, {**JSON, "WWW-Authenticate": "Bearer"}
    elif isinstance(error, NotAllowed):
        status, headers = 405, {**JSON, "Allow": error.allowed}
    elif isinstance(error, NoSuchPath):
        status = 404
    else:
        status = STATUSES.get(error.code, _FAULT)
    pause = error.retry_after
    if pause is None and isinstance(error, Busy | ShuttingDown):
        pause = RETRY_AFTER
    if pause is not None:
        headers = {**headers, "Retry-After": str(max(math.ceil(pause), 1))}
    return web.Response(status=status, body=b'{"error":%b}' % error_json(error), headers=headers)


def acknowledgement(error: AcommError, id: str = "", wire: int = 3, extended: bool = True) -> web.Response:
    """A refusal for peers that read nothing but the body. Before that is read nobody knows what its sender
    understands; keys that it does not know do no harm.
    """
    body = Response(id, error=error).encode(wire, extended=extended)
    return web.Response(body=body, headers=JSON)


class _Whole(web.StreamResponse):
    """A small answer of JSON to a caller who keeps the connection, head and body in one write. Answers are
    nearly all so, and aiohttp's own way of putting a head together costs a fifth of a call.
    """

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self._whole = _WHOLE % (_date(int(time.time())), len(body), body)

    async def prepare(self, request: web.BaseRequest) -> None:
        if request.transport is None:
            raise ConnectionResetError("the client has left")
        self._keep_alive = True
        request.transport.write(self._whole)

    async def write_eof(self, data: bytes = b"") -> None:
        pass


@lru_cache(maxsize=1)
def _date(now: int) -> bytes:
    return formatdate(now, usegmt=True).encode()


def answer(request: web.BaseRequest, body: bytes, *, last: bool) -> web.StreamResponse:
    """The answer to a request that went well. `last`: the connection ends with it, so its caller is told."""
    transport = request.transport
    if (
        len(body) <= _SMALL
        and request.version == HttpVersion11
        and request.keep_alive
        and not last
        and transport is not None
        # One who sends and does not read is waited for, which aiohttp's way does.
        and transport.get_write_buffer_size() == 0
    ):
        return _Whole(body)
    return web.Response(body=body, headers=JSON)


class Full(asyncio.Protocol):
    """A connection beyond the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.WriteTransport, transport)  # uvloop's are not of that class
        info = error_json(Busy("too many connections", retry_after=RETRY_AFTER))
        transport.write(_FULL % (len(info) + len('{"error":}'), info))
        transport.close()
