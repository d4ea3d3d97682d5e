"""The stream of a generator task: its worker's end of a one-shot socket, for code that blocks.

    main thread      generator --> pending items --flush when there is much--+
                                        |                                    +--> socket --> consumer
    helper thread                       +-----flush when they get old--------+       |
                     tells the task <------------------ hang-up ---------------------+

Small items are sent together: a system call costs as much as making many of them. The helper sends what
the generator has left lying while it computes the next, and watches for the consumer to leave. It cannot
while C code holds the GIL. The protocol is told in `acomm.streams`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator
from typing import Any, Self

from acomm import streamsocket, urls
from acomm.jsontext import encode
from acomm.streamsocket import ACCEPT_PAUSE, CHUNK
from workers.calls import StreamPlace
from workers.errors import CallCancelled, CallTimeout, ConfigError
from workers.forked import end_copy

log = logging.getLogger("acomm.streams")

_LONGEST_POLL = 86_400.0  # seconds; the kernel counts milliseconds in 31 bits

COALESCED = 64 * 1024
"""Bytes of pending items that are sent at once; an item of that size goes by itself."""

OVERHEAD = 64
"""Bytes that an item is taken to cost besides its content, so that empty ones fill memory neither."""

OLD = 0.005
"""Seconds that an item waits for others at most, while the helper gets the GIL."""

GRACE = 1.0
"""Seconds that a call has to end by itself when its consumer has left."""

LINGER = 5.0
"""Seconds that a finished stream waits for a reader's byte. Ours send it when they connect, so it is for
readers that send none and are slow to close; the worker must not wait for those for long."""


LAST_LOOK = 1.0
"""Seconds that a broken stream waits for its reader's byte, which tells that the reader will see the break
behind what was yielded. Without the byte it would still see it, but perhaps before."""


class NoConsumer(CallTimeout):
    """Nobody came for the stream in time."""


class ConsumerLeft(CallCancelled):
    """The consumer left before the end."""


class Producer:
    """A one-shot socket: `accept` waits for its consumer, `send_items` or `send_async_items` sends what a
    generator yields, and `finish` says that this was all. Without that the stream is broken, behind what
    was yielded, when the `with` block ends.

    Besides our own uid and root, `uid` may connect. `on_left` is called when the consumer has left, from
    any thread; `on_abandoned` by the helper when the call has not ended GRACE seconds later.
    """

    def __init__(
        self,
        place: StreamPlace,
        uid: int | None,
        on_left: Callable[[], None],
        on_abandoned: Callable[[], None],
    ) -> None:
        self._pid = os.getpid()
        self._expiry = place.expiry
        self._uids = {0, os.getuid()} | ({uid} if uid is not None else set())
        self._on_left = on_left
        self._on_abandoned = on_abandoned
        self._left = False
        self._noticed = False  # by the generator's side, which then needs no cancelling
        self._ended = threading.Event()
        self._cancel: Callable[[], object] | None = None
        # Whoever sends holds the lock, and takes from the front; the main thread alone adds to the end.
        self._lock = threading.Lock()
        self._pending: list[bytes | memoryview] = []
        self._size = 0  # of what the main thread has added since it last flushed
        self._awake = False  # the helper will look at what is pending by itself
        self._helper = threading.Thread(target=self._help, name="acomm-stream", daemon=True)
        self._made: contextlib.ExitStack | None = None  # what there is from the consumer's coming
        self._bound = streamsocket.bind(place.folder, place.mode)
        if place.group is not None:
            try:
                os.chown(self._bound.path, -1, place.group)
            except OSError as error:
                self._bound.release()
                raise ConfigError(f"cannot give a stream to group {place.group}: {error.strerror}") from None
        self.url = urls.unix_url(self._bound.path)

    # -- the consumer -------------------------------------------------------------------------------

    def accept(self) -> None:
        """Wait for the consumer. Raises NoConsumer if there is none in time."""
        deadline = time.monotonic() + self._expiry
        sock: socket.socket | None = None
        try:
            while sock is None:
                late = self._await_connection(deadline)
                # Also when it is late: if we were stopped for that long, one may have come in time.
                sock = self._accept()
                if late and sock is None:
                    raise NoConsumer(f"nobody came for the stream within {self._expiry:g} seconds")
        finally:
            self._bound.release()
        with contextlib.ExitStack() as made:
            self._sock = made.enter_context(sock)
            self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            made.callback(os.close, self._wake_fd)
            self._poller = made.enter_context(select.epoll())
            self._poller.register(sock, 0)  # nothing but the hang-up, which is always told
            self._poller.register(self._wake_fd, select.EPOLLIN)
            self._helper.start()
            self._made = made.pop_all()

    def _await_connection(self, deadline: float) -> bool:
        """Wait until there is a connection, or for long; whether the deadline has passed."""
        patience = deadline - time.monotonic()
        if patience > 0:
            poller = select.poll()
            poller.register(self._bound.socket, select.POLLIN)
            poller.poll(min(patience, _LONGEST_POLL) * 1000)
        return time.monotonic() >= deadline

    def _accept(self) -> socket.socket | None:
        try:
            sock, _ = self._bound.socket.accept()
        except (BlockingIOError, ConnectionError):
            return None
        except OSError as error:
            log.warning("a stream's consumer cannot be accepted: %s", error.strerror)
            time.sleep(ACCEPT_PAUSE)
            return None
        pid, uid = streamsocket.peer(sock)
        if uid in self._uids:
            sock.setblocking(True)
            return sock
        log.warning("refused a stream to uid %d (pid %d)", uid, pid)
        sock.close()
        return None

    # -- items --------------------------------------------------------------------------------------

    def send_items(self, items: Generator[Any, Any, Any]) -> None:
        """Send what a generator yields, and close it. Raises what it raises, ConsumerLeft, and TypeError for
        an item that JSON cannot express.
        """
        with contextlib.closing(items):
            for number, item in enumerate(items):
                if self._add(number, item):
                    self._flush()

    async def send_async_items(self, items: AsyncGenerator[Any, Any]) -> None:
        """`send_items` for an asynchronous generator, whose event loop goes on while the consumer is slow.
        If the consumer leaves, what it awaits is cancelled.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def cancel() -> None:
            if not self._noticed:
                task.cancel()

        self._cancel = lambda: loop.call_soon_threadsafe(cancel)
        number = 0
        try:
            async with contextlib.aclosing(items):
                if self._left:  # perhaps too early to be cancelled
                    raise self._leave()
                async for item in items:
                    if self._add(number, item) and not self._flush_now():
                        await asyncio.to_thread(self._flush)
                    number += 1
        except asyncio.CancelledError:
            if self._left:
                raise self._leave() from None
            raise
        finally:
            self._cancel = None

    def finish(self) -> None:
        """Send the rest, say that this is all, and read what the consumer has sent: nothing may be left of
        it. Raises ConsumerLeft.
        """
        self._end_if_copy(None)
        self._flush()
        self._stop_helper()
        if self._left:
            raise self._leave()
        sock = self._sock
        try:
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(LINGER)
            received = sock.recv(CHUNK)
            sock.setblocking(False)
            while received:
                received = sock.recv(CHUNK)
        except (TimeoutError, BlockingIOError):
            pass  # a reader that sends nothing and is slow; or there is no more
        except OSError:
            raise self._leave() from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """After an error the stream is broken, behind what was yielded until then."""
        self._end_if_copy(error)
        if self._made is None:
            return
        try:
            if error is not None and not self._left:
                with contextlib.suppress(ConsumerLeft):
                    self._flush()
                    _await_byte(self._sock)
        finally:
            self._stop_helper()
            self._made.close()

    def _end_if_copy(self, error: BaseException | None) -> None:
        """A generator may fork: what is pending is the original's to send."""
        if os.getpid() != self._pid:
            end_copy(error)

    # -- sending ------------------------------------------------------------------------------------

    def _add(self, number: int, item: Any) -> bool:
        """Add an item to what is pending; whether that is enough to be sent."""
        self._end_if_copy(None)
        if self._left:
            raise self._leave()
        if type(item) is bytes:
            data = item
        elif isinstance(item, bytes | bytearray | memoryview):
            data = bytes(item)  # a generator may fill one buffer again and again
        else:
            try:
                data = encode(item, "it") + b"\n"
            except TypeError as error:
                raise TypeError(f"item {number} of the stream cannot be sent: {error}") from error
        self._pending.append(data)
        self._size += len(data) + OVERHEAD
        if self._size >= COALESCED:
            self._size = 0
            return True
        if not self._awake:
            self._awake = True
            os.eventfd_write(self._wake_fd, 1)
        return False

    def _flush(self) -> None:
        """Send all that is pending. Raises ConsumerLeft."""
        with self._lock:
            try:
                self._sock.sendall(self._take())
            except OSError:
                raise self._leave() from None

    def _flush_now(self) -> bool:
        """Send what can be sent without waiting; whether that is all. Raises ConsumerLeft."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            data = memoryview(self._take())
            try:
                sent = self._sock.send(data, socket.MSG_DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                raise self._leave() from None
            if sent < len(data):
                self._pending.insert(0, data[sent:])
            return sent == len(data)
        finally:
            self._lock.release()

    def _take(self) -> bytes | memoryview:
        ready = self._pending[:]
        del self._pending[: len(ready)]  # the main thread may have added one: it does so without the lock
        return ready[0] if len(ready) == 1 else b"".join(ready)

    def _leave(self) -> ConsumerLeft:
        self._left = True
        if threading.current_thread() is not self._helper:
            self._noticed = True
        return ConsumerLeft("the consumer of the stream left before its end")

    # -- the helper ---------------------------------------------------------------------------------

    def _help(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the task's
        sock_fd, wake_fd = self._sock.fileno(), self._wake_fd
        with contextlib.suppress(ConsumerLeft):
            patience: float | None = None
            while True:
                found = {fd for fd, _ in self._poller.poll(patience)}
                if self._ended.is_set():
                    return
                if sock_fd in found:
                    break
                if wake_fd in found:
                    os.eventfd_read(wake_fd)
                    patience = OLD
                    continue
                self._awake = False  # before the look, so that what comes after it wakes us
                if self._pending:
                    self._awake = True
                    self._flush()
                else:
                    patience = None
        self._see_to_the_end()

    def _see_to_the_end(self) -> None:
        """The consumer has left: have the call end, by itself or by force."""
        self._left = True
        self._on_left()
        cancel = self._cancel
        if cancel is not None:
            with contextlib.suppress(RuntimeError):  # the event loop has just been closed
                cancel()
        if not self._ended.wait(GRACE):
            self._on_abandoned()

    def _stop_helper(self) -> None:
        self._ended.set()
        os.eventfd_write(self._wake_fd, 1)
        self._helper.join()


def _await_byte(sock: socket.socket) -> None:
    poller = select.poll()
    poller.register(sock, select.POLLIN)
    poller.poll(LAST_LOOK * 1000)
