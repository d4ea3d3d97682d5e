"""Streams: what is too large for a message, or not there yet, goes over a socket of its own, as plain bytes.

    new_stream_unix(source) -> url      a unix socket whose first connection gets everything of the source
    stream(dest, url), open_stream(url), StreamFile(url)        the other end
    StreamProxy                         the same over HTTP, for URLs that it has signed

A stream is ended by closing it, and to the reader of a unix socket a writer that died looks the same as
one that has finished. Linux tells them apart in one case: a socket that is closed with something unread
in it gives the other end ECONNRESET, behind the data. So our readers send one byte when they connect. A
producer that is done closes its half and reads that byte before it closes the rest; one that fails or
dies leaves it unread.

A producer that knows nothing of this, such as the original, never reads the byte, and would look broken
always. So sockets that keep to it say so by their file's name, `checked-stream-*`, and only those are
sent the byte. From any other producer, and for a reader that sends nothing, such as the original, a
broken stream ends like a whole one.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import io
import logging
import math
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Protocol

from acomm import socketpath, streamsocket, urls
from acomm.deadlines import Deadlines
from acomm.errors import BadRequest, Busy, ConnectionLost, Forbidden, TooLarge, printable
from acomm.streamsocket import ACCEPT_PAUSE, CHUNK, EXPIRY
from acomm.transport import Done

# aiohttp is for HTTP streams alone, and takes longer to import than all the rest.
if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse

    import aiohttp
    from aiohttp import web

    from acomm.egress import Guard

log = logging.getLogger("acomm.streams")

SILENCE = 300.0
"""Seconds that a reader waits for more by default. A slow source is no fault, and a producer that dies is
noticed at once; this is for hosts that vanish from the network and producers that hang.
"""

STALL = 60.0
"""Seconds that an HTTP reader of a stream may take nothing before it is cut off."""

MAX_OPEN = 1024
"""Streams of one owner that wait or run. Each takes up to four descriptors."""

_READ_AHEAD = 256 * 1024
_OVERHEAD = 64  # bytes that a chunk costs besides its content
_CONNECT_TIMEOUT = 30.0
_LINGER = 30.0
"""Seconds that a finished stream is kept for a reader that has not sent its byte yet."""

_LIFETIME = 3600.0
_NONCE_BYTES = 8
_URL_SAFE = "/?%:@!$&'()*+,;=~[]"
_PLAIN_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}

Chunk = bytes | bytearray | memoryview


class Readable(Protocol):
    """A binary file, or what can be read like one."""

    def read(self, size: int, /) -> bytes | None: ...


class Writable(Protocol):
    """A binary file, or what can be written like one."""

    def write(self, data: bytes, /) -> Any: ...


Source = Chunk | asyncio.StreamReader | AsyncIterable[Chunk] | Readable | Iterable[Chunk]
Dest = asyncio.StreamWriter | Writable | Callable[[bytes], Any]


# -- sources: everything as an asynchronous iterator of bytes ------------------------------------------


class Chunks(Protocol):
    """Everything of a source, as it comes; to be closed in the end."""

    def __aiter__(self) -> AsyncIterator[Chunk]: ...
    async def __anext__(self) -> Chunk: ...
    async def aclose(self) -> None: ...


def chunks_of(source: Any) -> Chunks:
    """What `source` gives, for the running event loop. Raises TypeError for what is no source."""
    if isinstance(source, Chunk):
        return _sliced(memoryview(source).cast("B"))
    if isinstance(source, asyncio.StreamReader):
        return _received(source)
    if isinstance(source, AsyncIterable):
        return _AsyncSource(source)
    check_source(source)
    if callable(getattr(source, "read", None)):
        return _ThreadedSource(_read_chunks(source), source)
    return _ThreadedSource(source, source)


def check_source(source: Any) -> None:
    """Raises TypeError for what is no source of a stream."""
    if isinstance(source, io.TextIOBase | str):
        raise TypeError("a stream carries bytes, and the source gives text")
    if not isinstance(source, AsyncIterable | Iterable) and not callable(getattr(source, "read", None)):
        raise TypeError(f"a stream's source is bytes, a file or an iterable, not {type(source).__name__}")


async def _sliced(data: memoryview) -> AsyncGenerator[Chunk, None]:
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


async def _received(reader: asyncio.StreamReader) -> AsyncGenerator[Chunk, None]:
    while data := await reader.read(CHUNK):
        yield data


def _read_chunks(file: Any) -> Iterator[Chunk]:
    read = getattr(file, "read1", file.read)  # `read` of a buffered pipe waits until all of it is there
    while data := read(CHUNK):
        yield data
    if data is None:
        raise BlockingIOError("the source is a non-blocking file, and has nothing to read now")


def _checked(chunk: Any) -> Chunk:
    if isinstance(chunk, memoryview):
        return chunk.cast("B")
    if not isinstance(chunk, bytes | bytearray):
        raise TypeError(f"a stream's source must yield bytes, not {type(chunk).__name__}")
    return chunk


class _AsyncSource:
    """An asynchronous iterable of the caller's; closing it closes what it iterates over."""

    def __init__(self, source: AsyncIterable[Any]) -> None:
        self._source = source
        self._iterator: AsyncIterator[Any] | None = None

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        if self._iterator is None:
            self._iterator = aiter(self._source)
        return _checked(await anext(self._iterator))

    async def aclose(self) -> None:
        for thing in _distinct(self._iterator, self._source):
            close = getattr(thing, "aclose", None) or getattr(thing, "close", None)
            if close is not None:
                outcome = close()
                if inspect.isawaitable(outcome):
                    await outcome


class _ThreadedSource:
    """A source that may block, read by a daemon thread of its own: one thread, as generators may hold
    what is bound to theirs; a daemon, as what never comes must not keep the program from ending.

    The thread is at most _READ_AHEAD bytes and a chunk ahead. What it has read goes on together, so a
    generator of short lines costs no wake-up for each. `owner` is closed with the iterable.
    """

    def __init__(self, iterable: Iterable[Any], owner: Any) -> None:
        self._iterable = iterable
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._context = contextvars.copy_context()
        self._thread: threading.Thread | None = None
        self._closed = asyncio.Event()
        # Under the condition's lock:
        self._changed = threading.Condition()
        self._ready: deque[bytes] = deque()
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._stopped = False  # nobody wants more
        self._ended = False
        self._failure: BaseException | None = None

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        self._start()
        while True:
            with self._changed:
                if self._ready:
                    data = self._ready[0] if len(self._ready) == 1 else b"".join(self._ready)
                    self._ready.clear()
                    self._size = 0
                    self._changed.notify()
                    return data
                if self._ended:
                    break
                self._waiter = waiter = self._loop.create_future()
            await waiter
        if self._failure is None:
            raise StopAsyncIteration
        # Not as it is: a StopAsyncIteration, say, would pass for the end.
        raise RuntimeError(f"the source raised {type(self._failure).__name__}") from self._failure

    async def aclose(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._start()  # closing may block, too
        await self._closed.wait()

    def _start(self) -> None:
        if self._thread is None:
            thread = threading.Thread(
                target=self._context.run, args=(self._run,), name="acomm-stream", daemon=True
            )
            thread.start()
            self._thread = thread

    # -- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        iterator: Iterator[Any] | None = None
        failure: BaseException | None = None
        try:
            if not self._stopped:
                iterator = iter(self._iterable)
                self._read(iterator)
        except BaseException as error:
            failure = error
        with self._changed:
            self._failure = failure
            self._ended = True
            self._wake()
        for thing in _distinct(iterator, self._iterable, self._owner):
            try:
                close = getattr(thing, "close", None)
                if close is not None:
                    close()
            except BaseException:
                log.exception("a stream's source could not be closed")
        with contextlib.suppress(RuntimeError):  # the event loop is closed, nobody waits
            self._loop.call_soon_threadsafe(self._closed.set)

    def _read(self, iterator: Iterator[Any]) -> None:
        for chunk in iterator:
            chunk = _checked(chunk)
            with self._changed:
                # A source may fill one buffer again and again, and it is further than its consumer.
                self._ready.append(bytes(chunk))
                self._size += len(chunk) + _OVERHEAD
                self._wake()
                while self._size >= _READ_AHEAD and not self._stopped:
                    self._changed.wait()
                if self._stopped:
                    return

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            with contextlib.suppress(RuntimeError):  # as above
                self._loop.call_soon_threadsafe(_resolve, waiter)


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _distinct(*things: Any) -> Iterator[Any]:
    """The things that are not None, each once."""
    yield from {id(thing): thing for thing in things if thing is not None}.values()


# -- producing ----------------------------------------------------------------------------------------


class UnixStreams:
    """The one-shot stream sockets of one owner.

    The sockets are made in `folder` (None: the runtime folder) with `mode`. Besides our own uid and root
    those in `allow_uids` may connect. At most `max_open` streams wait or run at a time.

    `len()` is how many those are. Of the others, `finished` were taken whole, `expired` had no consumer
    in time, `abandoned` had one that left early, and `broken` are those whose source failed, or which
    were cut off by `close`.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        mode: int = 0o600,
        allow_uids: Iterable[int] = (),
        max_open: int = MAX_OPEN,
    ) -> None:
        self.folder = None if folder is None else os.fspath(folder)
        self.mode = mode
        self.max_open = max_open
        self.uids = frozenset({0, os.getuid(), *allow_uids})
        self.finished = 0
        self.expired = 0
        self.abandoned = 0
        self.broken = 0
        self._streams: set[_UnixStream] = set()
        self._closed = False
        self._none_open = asyncio.Event()
        self._none_open.set()

    def __len__(self) -> int:
        return len(self._streams)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return (
            f"<UnixStreams {len(self)} open, {self.finished} finished, {self.expired} expired, "
            f"{self.abandoned} abandoned, {self.broken} broken>"
        )

    def new_stream_unix(self, source: Source, *, expiry: float = EXPIRY) -> Done[str]:
        """The URL of a new unix socket whose first connection gets everything of `source`.

        `source` is bytes, a binary file, an iterable or asynchronous iterable of bytes, or an
        asyncio.StreamReader. Files and plain iterables are read in a thread of the stream's own, and
        nothing before the consumer is there; then as fast as it reads, so that memory stays constant.
        A source that raises breaks the stream. In the end the source is closed: also when the consumer
        leaves, and when there is none within `expiry` seconds.

        A consumer learns that a stream is broken if it is a reader of ours. One that just reads until
        the end, as the original does, cannot be told: it sees a shorter stream.

        It acts at once, on the running event loop; awaiting it is optional.

        Raises TypeError for what is no source, Busy when there are too many streams, ConfigError when
        the folder is not fit. The source is then still the caller's to close.
        """
        if self._closed:
            raise RuntimeError("the streams were closed")
        if not expiry > 0:
            raise ValueError(f"expiry must be a positive number of seconds, not {expiry}")
        if len(self) >= self.max_open:
            raise Busy(f"there are {len(self)} open streams already", retry_after=1.0)
        chunks = chunks_of(source)
        bound = streamsocket.bind(self.folder, self.mode)
        self._none_open.clear()
        stream = _UnixStream(self, bound, chunks, expiry)
        self._streams.add(stream)
        return Done(stream.url)

    def expire(self, url: str) -> None:
        """Wait no longer for the consumer of the stream at `url`; one that has come gets all of it."""
        for stream in self._streams:
            if stream.url == url:
                stream.expire()

    async def drained(self) -> None:
        """Wait until no stream is open."""
        await self._none_open.wait()

    async def close(self, timeout: float = 5.0) -> None:
        """End all streams: those under way are broken off, those that wait expire. Sources that are
        not closed after `timeout` seconds, since they block, are left to themselves.
        """
        self._closed = True
        for stream in list(self._streams):
            stream.expire()
        await asyncio.sleep(0)  # a task that is cancelled before it has begun cleans nothing up
        tasks = {task for stream in self._streams if (task := stream.stop()) is not None}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=timeout)
            if late:
                log.warning("%d sources of streams do not let themselves be closed", len(late))

    def _ended(self, stream: _UnixStream) -> None:
        self._streams.discard(stream)
        if not self._streams:
            self._none_open.set()


class _ConsumerLeft(Exception):
    pass


class _UnixStream:
    """One stream: waits for its consumer, serves it, closes the source."""

    def __init__(
        self, owner: UnixStreams, bound: socketpath.BoundSocket, chunks: Chunks, expiry: float
    ) -> None:
        self._owner = owner
        self._bound = bound
        self.url = urls.unix_url(bound.path)
        self._chunks = chunks
        self._loop = asyncio.get_running_loop()
        self._waiting = True
        self._serving = False
        self._left = False
        self._task: asyncio.Task[None] | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._timer = None if math.isinf(expiry) else self._loop.call_later(expiry, self._time_out)
        self._listen()

    # -- waiting: callbacks, as a task that is cancelled may lose what it has just accepted ---------------

    def _listen(self) -> None:
        if self._waiting:
            self._loop.add_reader(self._bound.socket.fileno(), self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self._bound.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:
            log.warning("a stream's consumer cannot be accepted: %s", error.strerror)
            self._loop.remove_reader(self._bound.socket.fileno())
            self._pause = self._loop.call_later(ACCEPT_PAUSE, self._listen)
            return
        pid, uid = streamsocket.peer(sock)
        if uid not in self._owner.uids:
            log.warning("refused a stream to uid %d (pid %d)", uid, pid)
            sock.close()
            return
        self._no_more_waiting()
        sock.setblocking(False)
        self._serving = True
        self._task = self._loop.create_task(self._serve(sock))

    def _time_out(self) -> None:
        self._accept()  # if we were stopped for that long, a consumer that came in time may be here
        self.expire()

    def expire(self) -> None:
        """Wait for a consumer no longer."""
        if self._waiting:
            self._no_more_waiting()
            self._owner.expired += 1
            self._task = self._loop.create_task(self._close_source())

    def _no_more_waiting(self) -> None:
        self._waiting = False
        if self._timer is not None:
            self._timer.cancel()
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._bound.socket.fileno())
        self._bound.release()

    # -- serving ------------------------------------------------------------------------------------------

    def stop(self) -> asyncio.Task[None] | None:
        """Break off; the task that still has to close the source."""
        if self._serving and self._task is not None:
            self._task.cancel()
        return self._task

    async def _serve(self, sock: socket.socket) -> None:
        try:
            with _Hangup(sock, self._consumer_left):
                await self._copy(sock)
            await self._see_off(sock)
            self._owner.finished += 1
        except _ConsumerLeft:
            self._owner.abandoned += 1
        except asyncio.CancelledError:  # this task is ours alone, so it may end here
            if self._left:
                self._owner.abandoned += 1
            else:
                self._owner.broken += 1
        except (ConnectionLost, Forbidden) as error:  # it is somebody else's stream that we pass on
            self._owner.broken += 1
            log.warning("a stream broke: %s", error)
        except (Exception, SystemExit) as error:  # a source that exits must not take the event loop along
            self._owner.broken += 1
            log.error("a stream broke", exc_info=error)
        finally:
            self._serving = False
            sock.close()
        await self._close_source()

    async def _copy(self, sock: socket.socket) -> None:
        while True:
            try:
                chunk = await anext(self._chunks)
            except StopAsyncIteration:
                return
            try:
                await self._loop.sock_sendall(sock, chunk)
            except OSError:
                raise _ConsumerLeft from None
            await asyncio.sleep(0)  # neither end need ever wait, and then nobody else would have a turn

    async def _see_off(self, sock: socket.socket) -> None:
        """Say that this is all, and read what the consumer has sent: nothing may be left of it."""
        try:
            sock.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_LINGER):
                received = await self._loop.sock_recv(sock, CHUNK)
                while received:
                    received = sock.recv(CHUNK)
        except (TimeoutError, BlockingIOError):
            pass  # a reader that sends nothing and is slow; or there is no more
        except OSError:
            raise _ConsumerLeft from None

    def _consumer_left(self) -> None:
        if self._serving and not self._left and self._task is not None:
            self._left = True
            self._task.cancel()

    async def _close_source(self) -> None:
        try:
            await self._chunks.aclose()
        except asyncio.CancelledError:
            pass  # our own task, and there is nothing more to do
        except (Exception, SystemExit):
            log.exception("a stream's source could not be closed")
        finally:
            self._owner._ended(self)


class _Hangup:
    """Calls back when the other end of a unix socket has been closed, so that a slow source is not kept
    for nobody.

    Event loops wait for something to read, and there always is: the consumer's byte. An epoll that is
    asked for nothing reports a hang-up all the same, and can be waited for itself.
    """

    def __init__(self, sock: socket.socket, callback: Callable[[], None]) -> None:
        self._sock = sock
        self._callback = callback
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> None:
        self._epoll = select.epoll()
        self._epoll.register(self._sock.fileno(), 0)
        self._loop.add_reader(self._epoll.fileno(), self._callback)

    def __exit__(self, *exc: object) -> None:
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()


# -- reading ------------------------------------------------------------------------------------------


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


# -- the proxy ----------------------------------------------------------------------------------------


class StreamProxy:
    """Serves streams to HTTP readers: those alone whose URL it has signed, and each once.

    `base_url` is where `serve` is mounted, as readers reach it. With one `secret` (bytes, at least 16)
    several processes of one host can share the work, though then "once" holds for each of them;
    by default it is a new one. `clock` is monotonic, in seconds. `guard` judges once more where a URL
    leads when it is used.

        proxy = StreamProxy("http://host:8080/stream")
        application.router.add_get("/stream", proxy.serve)
        Response(id, stream_url=proxy.sign(url))

    Run the application with `handler_cancellation=True`, or a reader that leaves is noticed only when
    there is more to send. One that takes nothing for `stall` seconds is cut off.
    """

    def __init__(
        self,
        base_url: str,
        secret: bytes | None = None,
        *,
        timeout: float | None = SILENCE,
        stall: float = STALL,
        clock: Callable[[], float] = time.monotonic,
        guard: Guard | None = None,
    ) -> None:
        urls.check(base_url, "the stream proxy's URL")
        if urls.scheme_of(base_url) not in ("http", "https"):
            raise BadRequest(f"the stream proxy's URL must be an HTTP one, not {printable(base_url)}")
        if secret is not None and len(secret) < 16:
            raise ValueError("the stream proxy's secret must have at least 16 bytes")
        self.base_url = base_url
        self.timeout = timeout
        self.stall = stall
        self._secret = os.urandom(32) if secret is None else secret
        self._clock = clock
        self._guard = guard
        self._used: Deadlines[str] = Deadlines()

    def sign(self, url: str, *, lifetime: float = _LIFETIME) -> str:
        """An HTTP URL that gives the stream at `url` to the first who asks, within `lifetime` seconds.

        Raises BadRequest for a URL that no stream can be at.
        """
        from urllib.parse import urlencode

        urls.check(url, "the stream URL")
        if not 0 < lifetime < math.inf:  # what was used is remembered until it expires
            raise ValueError(f"lifetime must be a positive number of seconds, not {lifetime}")
        signed = {
            "addr": url,
            "expires": f"{self._clock() + lifetime:.3f}",
            "nonce": os.urandom(_NONCE_BYTES).hex(),
        }
        query = urlencode(signed | {"sig": self._signature(*signed.values())})
        proxied = f"{self.base_url}{'&' if '?' in self.base_url else '?'}{query}"
        urls.check(proxied, "the signed URL")
        return proxied

    def verify(self, query: Mapping[str, str]) -> str:
        """The URL that the query of a signed one is for. It has then been used.

        Raises Forbidden for a query that is not signed, was changed, has expired, or was used before.
        """
        import hmac

        signed = [query.get(key, "") for key in ("addr", "expires", "nonce")]
        signature = self._signature(*signed)
        if not hmac.compare_digest(signature.encode(), query.get("sig", "").encode("utf-8", "replace")):
            raise Forbidden("the stream's URL is not signed by this service")
        now, expires = self._clock(), float(signed[1])
        if expires <= now:
            raise Forbidden("the stream's URL has expired")
        self._used.expired(now)
        if signature in self._used:
            raise Forbidden("the stream's URL was used before")
        self._used.set(signature, expires)
        return signed[0]

    def _signature(self, *parts: str) -> str:
        import hmac

        # None of ours has a line feed in it, so nothing else joins to the same text.
        text = "\n".join(parts).encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, text, "sha256").hexdigest()

    async def serve(
        self, request: web.BaseRequest, headers: Mapping[str, str] = _PLAIN_HEADERS
    ) -> web.StreamResponse:
        """Answer a request for a signed URL, as a handler of aiohttp's. `headers` go with every answer.

        403 for a URL that is not ours; 502 when the stream fails before its first byte. When it fails
        later the connection is reset, so that no reader takes what it has for the whole.
        """
        from aiohttp import web

        if request.method != "GET":  # HEAD must not use the stream up
            allowed = {**headers, "Allow": "GET"}
            return web.Response(status=405, headers=allowed, text="a stream can only be read\n")
        try:
            url = self.verify(request.query)
        except Forbidden as error:
            return web.Response(status=403, headers=headers, text=f"{error}\n")
        async with aclosing(open_stream(url, timeout=self.timeout, guard=self._guard)) as chunks:
            try:
                first = await anext(chunks, b"")
            except (ConnectionLost, Forbidden) as error:
                log.warning("a stream cannot be proxied: %s", error)
                return web.Response(status=502, headers=headers, text="the stream cannot be read\n")
            headers = {"Content-Type": "application/octet-stream", **headers}
            return await pass_on(request, first, chunks, headers=headers, stall=self.stall)


async def pass_on(
    request: web.BaseRequest,
    first: bytes,
    rest: AsyncIterator[bytes],
    *,
    headers: Mapping[str, str],
    stall: float = STALL,
) -> web.StreamResponse:
    """Answer an HTTP request with `first` and the chunks of `rest`. When those break off, or when the
    reader takes nothing for `stall` seconds, the connection is reset.
    """
    from aiohttp import web

    response = web.StreamResponse(headers=headers)
    await response.prepare(request)
    try:
        if first:
            await _write_within(response, first, stall)
        async for chunk in rest:
            await _write_within(response, chunk, stall)
    except ConnectionLost as error:
        log.warning("a proxied stream broke: %s", error)
        _reset(request)
    except TimeoutError:
        log.warning("the reader of a proxied stream has taken nothing for %g seconds", stall)
        _reset(request)
    except ConnectionError:
        pass  # the reader has left
    return response


async def _write_within(response: web.StreamResponse, chunk: bytes, seconds: float) -> None:
    async with asyncio.timeout(seconds):
        await response.write(chunk)


def _reset(request: web.BaseRequest) -> None:
    """End the connection by a reset: HTTP/1.0 readers, proxies among them, take any other end for clean."""
    if request.transport is not None:
        sock = request.transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
