"""Reading a stream's URL: `stream` and `open_stream` on an event loop, StreamFile for code that may block."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import io
import logging
import socket
from collections.abc import (
    AsyncGenerator,
    Awaitable,
    Callable,
)
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from acomm import streamsocket, urls
from acomm.errors import ConnectionLost, Forbidden, TooLarge, printable
from acomm.streamsocket import CHUNK

# aiohttp is for HTTP streams alone, and takes longer to import than all the rest.
if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse

    import aiohttp

    from acomm.egress import Guard

log = logging.getLogger("acomm.streams")

SILENCE = 300.0
"""Seconds that a reader waits for more by default. A slow source is no fault, and a producer that dies is
noticed at once; this is for hosts that vanish from the network and producers that hang.
"""

_CONNECT_TIMEOUT = 30.0
_URL_SAFE = "/?%:@!$&'()*+,;=~[]"


class Writable(Protocol):
    """A binary file, or what can be written like one."""

    def write(self, data: bytes, /) -> Any: ...


Dest = asyncio.StreamWriter | Writable | Callable[[bytes], Any]


async def stream(
    dest: Dest,
    url: str,
    *,
    timeout: float | None = SILENCE,
    limit: int | None = None,
    session: aiohttp.ClientSession | None = None,
    guard: Guard | None = None,
) -> int:
    """Copy the stream at `url` into `dest`; the number of bytes.

    `dest` is a binary file (written to in a thread, unless it is a BytesIO), an asyncio.StreamWriter, or
    a function, plain or async, that is called with each chunk. It is not closed. What it raises is
    raised here. `timeout`, `session` and `guard` are as for `open_stream`.

    Raises ConnectionLost when the stream cannot be had, is broken, or shorter than announced; TooLarge
    when it is longer than `limit` bytes; BadRequest for a URL that is none.
    """
    write = _writer(dest)
    copied = 0
    async with aclosing(open_stream(url, timeout=timeout, session=session, guard=guard)) as chunks:
        async for chunk in chunks:
            copied += len(chunk)
            if limit is not None and copied > limit:
                raise TooLarge(f"the stream {printable(url)} is longer than {limit} bytes")
            await write(chunk)
    return copied


def _writer(dest: Any) -> Callable[[bytes], Awaitable[None]]:
    if isinstance(dest, asyncio.StreamWriter):

        async def write(chunk: bytes) -> None:
            dest.write(chunk)
            await dest.drain()

    elif isinstance(dest, io.TextIOBase):
        raise TypeError("a stream carries bytes, and the destination takes text")
    elif isinstance(dest, io.BytesIO) or inspect.iscoroutinefunction(getattr(dest, "write", None)):
        return _caller(dest.write)
    elif hasattr(dest, "write"):

        async def write(chunk: bytes) -> None:
            await asyncio.to_thread(_write_all, dest, chunk)

    elif callable(dest):
        return _caller(dest)
    else:
        raise TypeError(f"a stream goes to a file, a StreamWriter or a function, not {type(dest).__name__}")
    return write


def _caller(function: Callable[[bytes], Any]) -> Callable[[bytes], Awaitable[None]]:
    async def write(chunk: bytes) -> None:
        outcome = function(chunk)
        if inspect.isawaitable(outcome):
            await outcome

    return write


def _write_all(file: Any, chunk: bytes) -> None:
    """Raw files may take a part, and non-blocking ones None of it."""
    rest = memoryview(chunk)
    while rest:
        written = file.write(rest)
        if written is None and isinstance(file, io.RawIOBase):
            raise BlockingIOError("the destination is a non-blocking file, and takes nothing now")
        if not isinstance(file, io.RawIOBase):
            return
        rest = rest[written:]


def open_stream(
    url: str,
    *,
    timeout: float | None = SILENCE,
    session: aiohttp.ClientSession | None = None,
    guard: Guard | None = None,
) -> AsyncGenerator[bytes, None]:
    """The stream at `url` in chunks, as they come. Close it (`contextlib.aclosing`) if you leave early.

    `timeout` is for how many seconds the producer may be silent (None: for ever). HTTP goes through
    `session` if there is one. Redirects and the environment's proxies are not followed. `guard` judges
    a URL that somebody else has chosen.

    Raises BadRequest at once for a URL that is none; while it is read, ConnectionLost as `stream`, and
    Forbidden for what the guard does not let through.
    """
    urls.check(url, "the stream URL")
    if urls.unix_path(url) is not None:
        return _unix_chunks(url, timeout, guard)
    return _http_chunks(url, timeout, session, guard)


async def _unix_chunks(url: str, timeout: float | None, guard: Guard | None) -> AsyncGenerator[bytes, None]:
    loop = asyncio.get_running_loop()
    with _connected(url, guard) as sock:
        while True:
            try:
                async with asyncio.timeout(timeout):
                    chunk = await loop.sock_recv(sock, CHUNK)
            except TimeoutError:
                raise _silent(url) from None
            except OSError as error:
                raise _broken(url, error) from None
            if not chunk:
                return
            yield chunk
            await asyncio.sleep(0)  # as in _copy


def _connected(url: str, guard: Guard | None) -> socket.socket:
    """A non-blocking socket. A unix socket connects at once or not at all."""
    path = urls.unix_path(url)
    assert path is not None
    try:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    except OSError as error:  # out of descriptors
        raise _unreachable(url, error.strerror) from None
    try:
        try:
            if guard is None:
                sock.connect(path)
            else:
                guard.policy.connect_unix(sock, url, guard.origin, "the stream URL")
        except OSError as error:
            raise _unreachable(url, error.strerror or error) from None
        if streamsocket.is_checked(path):
            try:
                sock.send(streamsocket.BYTE)
            except OSError as error:
                raise _broken(url, error) from None
    except BaseException:
        sock.close()
        raise
    return sock


def decline(url: str) -> None:
    """Have the producer of a unix stream that nobody will read stop, instead of waiting for a reader. Of a
    stream that has its reader, or has ended, nothing is left to decline.
    """
    if urls.unix_path(url) is not None:
        with contextlib.suppress(ConnectionLost):
            _connected(url, None).close()


async def _http_chunks(
    url: str, timeout: float | None, session: aiohttp.ClientSession | None, guard: Guard | None
) -> AsyncGenerator[bytes, None]:
    import aiohttp

    from acomm import httpegress

    if guard is not None:
        guard.policy.check(url, guard.origin, "the stream URL")  # as it stands: aiohttp reads some kindly
    limits = aiohttp.ClientTimeout(total=None, connect=_CONNECT_TIMEOUT, sock_read=timeout)
    async with contextlib.AsyncExitStack() as stack:
        if session is None:
            session = await stack.enter_async_context(
                httpegress.session(guard, timeout=_CONNECT_TIMEOUT, what="the stream URL")
            )
        try:
            reply = await stack.enter_async_context(
                session.get(
                    url, headers={"Accept-Encoding": "identity"}, timeout=limits, allow_redirects=False
                )
            )
            _check_reply(url, reply.status, reply.headers.get("Content-Encoding"))
            async for chunk in reply.content.iter_any():
                yield chunk
        except ConnectionLost:
            raise
        except TimeoutError:
            raise _silent(url) from None
        except aiohttp.ClientPayloadError as error:
            raise _broken(url, error) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _unreachable(url, error) from None


def _check_reply(url: str, status: int, encoding: str | None) -> None:
    if status != 200:
        raise ConnectionLost(f"{printable(url)} answered status {status}")
    if encoding not in (None, "identity"):  # not asked for, and a small one may unfold to any size
        raise ConnectionLost(f"{printable(url)} is compressed ({printable(encoding)})")


def _unreachable(url: str, reason: object) -> ConnectionLost:
    return ConnectionLost(f"cannot reach the stream {printable(url)}: {printable(reason)}")


def _broken(url: str, reason: object) -> ConnectionLost:
    return ConnectionLost(f"the stream {printable(url)} was broken off: {printable(reason)}")


def _silent(url: str) -> ConnectionLost:
    return ConnectionLost(f"nothing came from the stream {printable(url)} in time")


class StreamFile(io.BufferedReader):
    """The stream at `url` as a binary file, for code that may block, such as a task in a worker.

    `timeout` is for how many seconds the producer may be silent (None: for ever). `guard` judges a URL
    that somebody else has chosen. Opening and reading raise what `open_stream` raises. Close it, or use
    it in `with`.
    """

    def __init__(self, url: str, *, timeout: float | None = SILENCE, guard: Guard | None = None) -> None:
        urls.check(url, "the stream URL")
        if urls.unix_path(url) is not None:
            sock = _connected(url, guard)
            sock.settimeout(timeout)
            self._raw: _Raw = _UnixRaw(url, sock)
        else:
            self._raw = _HttpRaw(url, *_http_get(url, timeout, guard))
        super().__init__(self._raw, CHUNK)

    def abort(self) -> None:
        """Leave the stream, from any thread: the producer is told, and a read that waits, or comes later,
        raises ConnectionLost. Close it all the same.
        """
        self._raw.abort()


class _Raw(io.RawIOBase):
    """Receives into buffers; a failure stays one, as the end of what there is must not pass for the
    stream's.
    """

    def __init__(self, url: str, sock: socket.socket) -> None:
        self._url = url
        self._sock = sock
        self._failure: ConnectionLost | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        failure = self._failure
        if failure is None:
            try:
                received = self._receive_into(memoryview(buffer).cast("B"))
                if self._failure is None:  # else it is not the stream's end, but ours
                    return received
            except TimeoutError:
                failure = _silent(self._url)
            except OSError as error:
                failure = _broken(self._url, error)
        self._failure = self._failure or failure
        assert self._failure is not None
        raise self._failure

    def abort(self) -> None:
        self._failure = self._failure or ConnectionLost(
            f"the stream {printable(self._url)} was closed here before it had ended"
        )
        with contextlib.suppress(OSError):  # the other end has closed it, or we have
            self._sock.shutdown(socket.SHUT_RDWR)

    def _receive_into(self, buffer: memoryview) -> int:
        raise NotImplementedError


class _UnixRaw(_Raw):
    def _receive_into(self, buffer: memoryview) -> int:
        return self._sock.recv_into(buffer)

    def close(self) -> None:
        self._sock.close()
        super().close()


class _HttpRaw(_Raw):
    def __init__(
        self, url: str, sock: socket.socket, connection: HTTPConnection, reply: HTTPResponse
    ) -> None:
        super().__init__(url, sock)
        self._connection = connection
        self._reply = reply
        self._left = reply.length

    def _receive_into(self, buffer: memoryview) -> int:
        from http.client import HTTPException

        # `read1` returns what is there, but before Python 3.13 does not know where the body ends.
        size = len(buffer) if self._left is None else min(len(buffer), self._left)
        if not size:
            return 0
        try:
            data = self._reply.read1(size)
        except HTTPException as error:
            raise ConnectionError(error) from None
        if self._left is not None:
            if not data:
                raise ConnectionError(f"{self._left} bytes are missing")
            self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._reply.close()
        self._connection.close()
        super().close()


def _http_get(
    url: str, timeout: float | None, guard: Guard | None
) -> tuple[socket.socket, HTTPConnection, HTTPResponse]:
    from http.client import HTTPConnection, HTTPException, HTTPSConnection
    from urllib.parse import quote, urlsplit

    if guard is not None:
        guard.policy.check(url, guard.origin, "the stream URL")
    parts = urlsplit(url)
    assert parts.hostname is not None  # urls.check has seen to it
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        connection = kind(parts.hostname, parts.port or kind.default_port, timeout=timeout)
    except HTTPException as error:  # a host that it does not like
        raise _unreachable(url, error) from None
    if guard is not None:
        # Where http.client connects is settled here: what the policy has judged is not looked up again.
        connection._create_connection = _guarded_connection(url, guard)  # type: ignore[attr-defined]
    try:
        connection.request("GET", quote(target, safe=_URL_SAFE), headers={"Connection": "close"})
        sock: socket.socket = connection.sock  # which the reply takes over
        reply = connection.getresponse()
        _check_reply(url, reply.status, reply.headers.get("Content-Encoding"))
    except BaseException as error:
        connection.close()
        if isinstance(error, ConnectionLost | Forbidden):
            raise
        if isinstance(error, TimeoutError):
            raise _silent(url) from None
        if isinstance(error, HTTPException | OSError | ValueError):
            raise _unreachable(url, error) from None
        raise
    return sock, connection, reply


def _guarded_connection(url: str, guard: Guard) -> Callable[..., socket.socket]:
    def connect(address: object, timeout: float | None, *rest: object) -> socket.socket:
        failure: OSError | None = None
        for host, port, _ in guard.policy.resolve_sync(url, guard.origin, "the stream URL"):
            try:
                return socket.create_connection((host, port), timeout)
            except OSError as error:
                failure = error
        raise failure or OSError("the host has no address")

    return connect
