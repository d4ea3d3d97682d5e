"""Stream: an answer that comes in parts, read once, by programs with an event loop and without."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from typing import Any

from acomm import jsontext, urls
from acomm.errors import ConnectionLost, TooLarge, printable
from acomm.streamreaders import SILENCE, StreamFile, decline, open_stream

MAX_ITEM = 64 * 1024 * 1024
"""Bytes of one item; what a message may have by default, too."""

_CHUNK = 128 * 1024

Decode = Callable[[memoryview], Any]


class Stream:
    """What a call has answered with a stream: iterate over it, in a `for` or an `async for`, once.

        with client.call("lines_of", path) as stream:
            for item in stream:
                ...

    With the `format` "lines" it gives items, decoded from a line of JSON each; with any other the bytes as
    they come. `read` gives the bytes in any case. A stream that its producer could not finish raises
    ConnectionLost; nothing passes for the end that is none.

    Leaving early, by `close` or the end of a loop or `with`, ends the connection, which stops the task.
    `timeout` is for how many seconds the producer may be silent (None: for ever); set it before reading.
    `result` is what the answer has carried besides, which is nothing for a task of ours. `on_close(read)` is
    called once, by whichever thread closes it: whether it was read at all.
    """

    def __init__(
        self,
        url: str,
        *,
        format: str | None = None,
        decode: Decode | None = None,
        result: Any = None,
        timeout: float | None = SILENCE,
        on_close: Callable[[bool], None] | None = None,
    ) -> None:
        urls.check(url, "the stream URL")
        self.url = url
        self.format = format
        self.result = result
        self.timeout = timeout
        self._decode = decode or _plain
        self._on_close = on_close
        self._lock = threading.Lock()
        self._reader: str | None = None  # how it is read, once it is
        self._closed = False
        self._ended = False
        self._file: StreamFile | None = None
        self._cut: Callable[[], None] | None = None  # of the event loop that reads it
        self._cleanup: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "closed" if self._closed else "unread" if self._reader is None else "being read"
        return f"<Stream {self.url}, {self.format or 'bytes'}, {state}>"

    @property
    def closed(self) -> bool:
        """Whether it has been read to its end, or was closed."""
        return self._closed

    def close(self) -> None:
        """Leave the stream, from any thread; whoever reads it gets ConnectionLost. Its task stops, even if
        nothing was read yet. Closing again does nothing.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            read, file, cut = self._reader is not None, self._file, self._cut
        if not read:
            decline(self.url)
        if file is not None:
            file.abort()  # a thread that waits in it would keep it from being closed
            file.close()
        if cut is not None:
            with contextlib.suppress(RuntimeError):  # that event loop has ended
                cut()
        if self._on_close is not None:
            self._on_close(read)

    async def aclose(self) -> None:
        """`close`, and wait until an event loop that has read from it has let go."""
        self.close()
        await asyncio.sleep(0)
        if self._cleanup is not None:
            await asyncio.wait({self._cleanup})

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    # -- programs that may wait -------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        self._begin("iterated over")
        return self._items()

    def _items(self) -> Iterator[Any]:
        try:
            file = self._open()
            if self.format == "lines":
                while line := self._got(file.readline, MAX_ITEM + 1):
                    yield self._item(line)
            else:
                while chunk := self._got(file.read1, _CHUNK):
                    yield chunk
        finally:
            self.close()

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes, fewer only at the end; all that is left by default. It may wait, so an event
        loop should iterate instead. Raises ConnectionLost.
        """
        if self._ended:
            return b""
        if self._file is None:
            self._begin("read")
        elif self._reader != "read":
            raise RuntimeError(f"the stream is {self._reader} already, and is read once")
        try:
            data = self._got(self._open().read, size)
        except BaseException:
            self.close()
            raise
        if size != 0 and (size < 0 or len(data) < size):
            self._ended = True
            self.close()
        return data

    def _begin(self, how: str) -> None:
        with self._lock:
            if self._reader is not None:
                raise RuntimeError(f"the stream was {self._reader} already, and is read once")
            if self._closed:
                raise RuntimeError("the stream was closed before it was read")
            self._reader = how

    def _open(self) -> StreamFile:
        if self._file is None:
            file = StreamFile(self.url, timeout=self.timeout)
            with self._lock:
                self._file = file
                closed = self._closed
            if closed:
                file.close()
                raise self._closed_here()
        return self._file

    def _got(self, read: Callable[[int], bytes], size: int) -> bytes:
        try:
            return read(size)
        except ValueError:  # of a file that was closed
            if not self._closed:
                raise
            raise self._closed_here() from None

    def _item(self, line: bytes | bytearray) -> Any:
        if len(line) > MAX_ITEM:
            raise TooLarge(f"an item of the stream {printable(self.url)} is longer than {MAX_ITEM} bytes")
        if not line.endswith(b"\n"):
            raise ConnectionLost(f"the stream {printable(self.url)} ended in the middle of an item")
        return self._decode(memoryview(line)[:-1])

    def _closed_here(self) -> ConnectionLost:
        return ConnectionLost(f"the stream {printable(self.url)} was closed here before it had ended")

    # -- programs with an event loop --------------------------------------------------------------------

    def __aiter__(self) -> AsyncGenerator[Any, None]:
        self._begin("iterated over")
        return self._aitems()

    async def _aitems(self) -> AsyncGenerator[Any, None]:
        async with aclosing(self._chunks()) as chunks:
            if self.format != "lines":
                async for chunk in chunks:
                    yield chunk
                return
            rest = bytearray()
            async for chunk in chunks:
                whole, newline, begun = chunk.rpartition(b"\n")
                if newline:
                    rest += whole
                    for line in rest.split(b"\n"):
                        if self._closed:
                            raise self._closed_here()
                        yield self._item(line + newline)
                    rest.clear()
                rest += begun
                if len(rest) > MAX_ITEM:
                    self._item(rest)
            if rest:
                self._item(rest)

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        loop = asyncio.get_running_loop()
        try:
            async with aclosing(open_stream(self.url, timeout=self.timeout)) as chunks:
                while True:
                    async with asyncio.timeout(None) as wait:
                        self._cut_by(loop, wait, chunks)
                        chunk = await anext(chunks, b"")
                    if not chunk:
                        return
                    yield chunk
        except TimeoutError:
            raise self._closed_here() from None
        finally:
            self._cut = None
            self.close()

    def _cut_by(
        self, loop: asyncio.AbstractEventLoop, wait: asyncio.Timeout, chunks: AsyncGenerator[bytes, None]
    ) -> None:
        """Have `close` end what is waited for now, or if nothing is, the connection."""

        def cut_here() -> None:
            try:
                wait.reschedule(loop.time())
            except RuntimeError:  # it is over
                self._cleanup = loop.create_task(_aclose(chunks))

        def cut() -> None:
            loop.call_soon_threadsafe(cut_here)

        with self._lock:
            if self._closed:
                raise self._closed_here()
            self._cut = cut


async def _aclose(chunks: AsyncGenerator[bytes, None]) -> None:
    with contextlib.suppress(RuntimeError):  # its reader is closing it
        await chunks.aclose()


def _plain(item: memoryview) -> Any:
    return jsontext.parse(item, "an item of the stream")
