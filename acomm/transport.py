"""What both ends of a unix connection share: framing on top of asyncio, and writes put together."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from typing import Generic, TypeVar, cast

from acomm.errors import alone
from acomm.framing import HEADER, Framer, FrameTooLarge

T = TypeVar("T")


class Done(Generic[T]):
    """The result of something that has already happened, for callers who await it nevertheless.

    The operations of the original that block in Go are coroutines here. A few of them never have to
    wait; those act at once when called and return this, so that both `await x()` and `x()` are right.
    Its truth value is the result's.
    """

    __slots__ = ("result",)

    def __init__(self, result: T) -> None:
        self.result = result

    def __await__(self) -> Generator[None, None, T]:
        yield from ()  # nothing to wait for; but await takes a generator
        return self.result

    def __bool__(self) -> bool:
        return bool(self.result)

    def __eq__(self, other: object) -> bool:
        return self.result == (other.result if isinstance(other, Done) else other)

    def __hash__(self) -> int:
        return hash(self.result)

    def __repr__(self) -> str:
        return f"Done({self.result!r})"


class FrameProtocol(asyncio.Protocol):
    """A connection that carries messages.

    Subclasses take them in `message_received` and send with `write_message`. What is written in one
    turn of the event loop leaves in one system call, header and body together (Go peers take a split
    header for garbage).

    `owed` is how many messages received have had none sent in return.
    """

    transport: asyncio.Transport

    def __init__(self, max_frame: int) -> None:
        self.framer = Framer(max_frame)
        self.closed = False
        self.peer_finished = False
        self.owed = 0
        self._loop = asyncio.get_running_loop()
        self._output: list[bytes] = []
        self._flush_due = False
        self._receiving = False
        self._drained: asyncio.Event | None = None
        self._deaf = False
        self._finish_when_answered = False
        self._stuck_since: float | None = None
        self._stuck_with = 0

    # -- for subclasses ---------------------------------------------------------------------------

    def message_received(self, message: bytes) -> None:
        raise NotImplementedError

    def framing_failed(self, error: Exception) -> None:
        """The stream cannot be followed any more."""
        self.finish()

    def write_message(self, payload: bytes) -> None:
        """Send `payload` as a length frame, soon."""
        self.owed -= 1
        self._output.append(HEADER.pack(len(payload)))
        self.write_raw(payload)

    def write_raw(self, data: bytes) -> None:
        self._output.append(data)
        if not self._receiving and not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def finish(self) -> None:
        """Close once everything written has left; what still comes is dropped."""
        self._flush()
        self._deaf = True
        if not self.closed:
            self._stuck()
            self.transport.close()

    def finish_after_peer(self) -> None:
        """Send no more and drop what comes, until the peer closes: one that is still writing would meet
        a broken pipe, and not read what we have told it.
        """
        if self.peer_finished or self.closed or self.transport.is_closing():
            self.finish()
        elif not self._deaf:
            self._flush()
            self._deaf = True
            self._stuck()
            self.transport.write_eof()

    def finish_when_answered(self) -> None:
        """`finish` once nothing is owed: a peer that has closed its half still reads its answers."""
        if self.owed > 0:
            self._finish_when_answered = True
            self._stuck()
        else:
            self.finish()

    def keep(self) -> None:
        """Take back `finish_when_answered`, unless the peer has finished."""
        if self._finish_when_answered and not self.peer_finished:
            self._finish_when_answered = False
            self._stuck_since = None if self._drained is None else self._stuck_since

    def abort(self) -> None:
        self._deaf = True
        if not self.closed:
            self.transport.abort()

    async def drain(self) -> None:
        """Wait until the peer has taken most of what was written."""
        self._flush()
        if self._drained is not None:
            await self._drained.wait()

    def stuck_for(self, now: float) -> float:
        """Seconds for which nothing has moved on a connection that we want to be rid of, or whose peer
        leaves what we write unread.
        """
        if self._stuck_since is None:
            return 0.0
        size = self.write_buffer_size
        if size < self._stuck_with:  # it does read, if slowly
            self._stuck_since = now
        self._stuck_with = size
        return now - self._stuck_since

    @property
    def write_buffer_size(self) -> int:
        return 0 if self.closed else self.transport.get_write_buffer_size()

    # -- asyncio's side ---------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        failure: Exception | None = None
        try:
            messages = self.framer.receive(data)
        except FrameTooLarge as error:
            messages, failure = error.messages, alone(error)
        self._deliver(messages, failure)

    def eof_received(self) -> bool:
        self.peer_finished = True
        if self._deaf:
            self.finish()
            return True
        failure: Exception | None = None
        messages: list[bytes] = []
        try:
            messages = self.framer.receive_eof()
        except ValueError as error:
            failure = alone(error)
        self._deliver(messages, failure)
        self.input_ended()
        # True keeps our direction open: the default would lose the answers to a half-closed peer.
        return True

    def input_ended(self) -> None:
        """The peer has finished sending; by default we are finished with it, too."""
        self.finish()

    def _deliver(self, messages: list[bytes], failure: Exception | None) -> None:
        self._receiving = True
        self.owed += len(messages)
        try:
            for message in messages:
                self.message_received(message)
                if self._deaf:
                    return
            if failure is not None:
                self.framing_failed(failure)
        finally:
            self._receiving = False
            self._flush()

    def _flush(self) -> None:
        self._flush_due = False
        if self._output:
            data = b"".join(self._output)
            self._output.clear()
            if not (self.closed or self._deaf or self.transport.is_closing()):
                self.transport.write(data)
        if self._finish_when_answered and self.owed <= 0:
            self._finish_when_answered = False
            self.finish()

    def may_read(self) -> bool:
        """Whether more may come in; asked by `read_or_hold`."""
        return self._drained is None

    def read_or_hold(self) -> None:
        """Read on, or let the peer wait in its own `write`."""
        if self.closed or self.peer_finished or self.transport.is_closing():
            return
        if self.may_read():
            self.transport.resume_reading()
        else:
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        self._drained = asyncio.Event()
        self._stuck()
        self.read_or_hold()

    def resume_writing(self) -> None:
        if self._drained is not None:
            self._drained.set()
            self._drained = None
        if not self._deaf:
            self._stuck_since = None
        self.read_or_hold()

    def _stuck(self) -> None:
        if self._stuck_since is None:
            self._stuck_since = self._loop.time()
            self._stuck_with = self.write_buffer_size

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self._output.clear()
        if self._drained is not None:
            self._drained.set()
            self._drained = None
