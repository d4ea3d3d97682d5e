"""Sources of streams that go along with calls: made in one thread or event loop, read by another."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterable, AsyncIterator, Coroutine
from typing import Any

from acomm.streamsources import Chunk, Chunks, Source, check_source, chunks_of


class SentStream:
    """A source that calls take along: bytes for any number of calls, anything else for one.

    Raises TypeError for what is no source.
    """

    def __init__(self, source: Source) -> None:
        check_source(source)
        self._source: Source | None = source
        self._lock = threading.Lock()

    def take(self) -> Source:
        """The source for one call, by the thread that makes it. Raises RuntimeError when none is left."""
        with self._lock:
            source = self._source
            if source is None:
                raise RuntimeError("the stream went along with another call: give each one of its own")
            if isinstance(source, bytes | bytearray | memoryview):
                return source
            self._source = None
        if not isinstance(source, AsyncIterable):
            return source
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return source  # the program has no event loop, so it belongs to none
        return _FromLoop(source, loop)


class _FromLoop:
    """An asynchronous source that belongs to the caller's event loop, read from the client's."""

    def __init__(self, source: Source, loop: asyncio.AbstractEventLoop) -> None:
        self._source = source
        self._loop = loop
        self._chunks: Chunks | None = None
        self._turn = asyncio.Lock()  # a generator that is left while it runs cannot be closed yet

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        chunk: Chunk | None = await self._there(self._next())
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        if not self._loop.is_closed():
            await self._there(self._close())

    async def _there(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError:
            coroutine.close()
            raise RuntimeError("the event loop of the stream's source has ended") from None
        return await asyncio.wrap_future(future)

    # -- in the source's event loop -----------------------------------------------------------------

    async def _next(self) -> Chunk | None:
        async with self._turn:
            return await anext(self._opened(), None)

    async def _close(self) -> None:
        async with self._turn:
            await self._opened().aclose()

    def _opened(self) -> Chunks:
        if self._chunks is None:
            self._chunks = chunks_of(self._source)
        return self._chunks
