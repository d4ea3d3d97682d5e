"""The sources of streams: bytes, files and iterables, all as asynchronous iterators of bytes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import io
import logging
import threading
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Iterable,
    Iterator,
)
from typing import Any, Protocol

from acomm.streamsocket import CHUNK

log = logging.getLogger("acomm.streams")

_READ_AHEAD = 256 * 1024
_OVERHEAD = 64  # bytes that a chunk costs besides its content

Chunk = bytes | bytearray | memoryview


class Readable(Protocol):
    """A binary file, or what can be read like one."""

    def read(self, size: int, /) -> bytes | None: ...


Source = Chunk | asyncio.StreamReader | AsyncIterable[Chunk] | Readable | Iterable[Chunk]


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
