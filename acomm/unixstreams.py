"""Producing: one-shot stream sockets of an event loop. The protocol is told in `acomm.streams`."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import select
import socket
from collections.abc import (
    Callable,
    Iterable,
)

from acomm import socketpath, streamsocket, urls
from acomm.errors import Busy, ConnectionLost, Forbidden
from acomm.streamsocket import ACCEPT_PAUSE, CHUNK, EXPIRY
from acomm.streamsources import Chunks, Source, chunks_of
from acomm.transport import Done

log = logging.getLogger("acomm.streams")

MAX_OPEN = 1024
"""Streams of one owner that wait or run. Each takes up to four descriptors."""

_LINGER = 30.0
"""Seconds that a finished stream is kept for a reader that has not sent its byte yet."""


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
