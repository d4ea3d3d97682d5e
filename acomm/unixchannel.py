"""Messages to one unix socket: a connection for each to strangers, one that stays open to our own kind.

A message that may be extended carries `"acomm": 1`. An acknowledgement that carries it too grants: the
connection stays open, and what follows is written to it without waiting. Acknowledgements come back
in order, so they are matched by position. When a granted connection breaks, what was not acknowledged
is sent again, once; receivers tell repeats by the id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from typing import TYPE_CHECKING

from acomm.acks import STORED_TAIL
from acomm.errors import AcommError, ConnectionLost, printable
from acomm.framing import DEFAULT_MAX_FRAME, HEADER, Framer, FrameTooLarge
from acomm.outgoing import Channel, NoAcknowledgement, Outgoing, Owner, ack_error, unreachable
from acomm.transport import FrameProtocol

if TYPE_CHECKING:
    from acomm.origin import Origin

log = logging.getLogger("acomm.channel")

PLAIN_CONNECTIONS = 64
"""Connections to one peer that takes one message a connection, at a time."""

_VERDICT_WAIT = 0.25
"""Seconds that messages wait to learn whether a new peer grants a channel. Our own answer in well under
a millisecond; a peer that takes longer gets a connection a message meanwhile.
"""

_LONGEST_PAUSE = 0.1  # seconds between tries to connect to a peer whose queue of connections is full
_MAX_SENDS = 2


class UnixChannel(Channel):
    """Messages to one unix socket."""

    limit = PLAIN_CONNECTIONS

    def __init__(self, owner: Owner, url: str, path: str, origin: Origin | None) -> None:
        super().__init__(owner, url, origin)
        self.path = path
        self.live: _Pipeline | None = None
        self.exchanges: set[_Exchange] = set()
        self._undecided: asyncio.TimerHandle | None = None

    def post(self, message: Outgoing) -> None:
        if message.extended and self.live is not None:
            self.live.send(message)
        elif self._undecided is not None or self.under_way >= PLAIN_CONNECTIONS:
            self.queue.append(message)
        else:
            if message.extended and self.owner.granting.get(self.url) is not False:
                self._await_verdict()
            self.start(message)

    @property
    def under_way(self) -> int:
        return len(self.tasks) + len(self.exchanges)

    def start(self, message: Outgoing) -> None:
        plain = not message.extended or self.owner.granting.get(self.url) is False
        if message.wire == 1 or not plain or not _Exchange(self, message).begin():
            super().start(message)

    def _await_verdict(self) -> None:
        loop = asyncio.get_running_loop()
        self._undecided = loop.call_later(_VERDICT_WAIT, self.decided)

    def decided(self) -> None:
        if self._undecided is not None:
            self._undecided.cancel()
            self._undecided = None
        self.more()

    def more(self) -> None:
        if self._undecided is not None:
            if self.under_way:
                return
            self._undecided.cancel()
            self._undecided = None
        if self.live is not None:
            waiting, self.queue = self.queue, deque()
            for message in waiting:
                if message.extended:
                    self.live.send(message)
                else:
                    self.queue.append(message)
        super().more()

    async def exchange(self, message: Outgoing) -> AcommError | None:
        message.sends += 1
        connection = await _connect(self)
        try:
            if message.wire == 1:
                async with asyncio.timeout(self.owner.timeout):
                    await connection.send_raw(message.payload)
                return None
            acknowledged = connection.first(message)
            async with asyncio.timeout(self.owner.timeout):
                granted, error = await acknowledged
        except BaseException:
            connection.abort()
            raise
        finally:
            if self.live is not connection:
                connection.finish()
        if message.extended:
            self.owner.learned(self.url, granted)
        self.decided()
        return error

    def adopt(self, connection: _Pipeline) -> None:
        """A peer has granted; keep the connection if there is none yet."""
        if self.live is None and not self.owner.closed:
            self.live = connection

    def note_stored(self, ack: bytes) -> None:
        """Learn of a peer that stores what it takes."""
        if ack.endswith(STORED_TAIL):
            self.owner.storing.add(self.url)

    def broken(self, connection: _Pipeline, unacknowledged: list[Outgoing]) -> None:
        """The granted connection is gone. Send again what it may have lost."""
        if self.live is not connection:
            return
        self.live = None
        for message in unacknowledged:
            if message.sends < _MAX_SENDS and not self.owner.closed:
                self.post(message)
            else:
                message.settle(ConnectionLost(f"{printable(self.url)} closed the connection"))
        self.rest()
        if self.owner.broken is not None:
            self.owner.broken(self.url)
        self.owner.storing.discard(self.url)

    def rest(self) -> None:
        if self.live is None:
            super().rest()

    async def close(self) -> None:
        if self._undecided is not None:
            self._undecided.cancel()
            self._undecided = None
        if self.live is not None:
            live, self.live = self.live, None
            unacknowledged = live.take()
            if unacknowledged:
                live.abort()  # nobody will know any more what becomes of them
            else:
                live.finish()
            for message in unacknowledged:
                message.settle(ConnectionLost("the sender was closed"))
        for exchange in list(self.exchanges):
            exchange.end(ConnectionLost("the sender was closed before the acknowledgement came"))
        await super().close()

    def connect(self) -> socket.socket:
        """A connected socket: a unix socket connects at once or not at all. Raises OSError, of which
        BlockingIOError says that the peer's queue of connections is full, and Forbidden.
        """
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            policy = self.owner.policy
            if self.origin is None or policy is None:
                sock.connect(self.path)
            else:
                policy.connect_unix(sock, self.url, self.origin)
        except BaseException:
            sock.close()
            raise
        return sock


class _Exchange:
    """One message on a connection of its own, and its acknowledgement: what peers of the original's kind get.
    Callbacks on a bare socket, as a task and a transport for each took a fifth of the supervisor's time.
    """

    __slots__ = ("_channel", "_framer", "_loop", "_message", "_rest", "_socket", "_timer")

    def __init__(self, channel: UnixChannel, message: Outgoing) -> None:
        self._channel = channel
        self._message = message
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None  # until it is connected
        self._rest = memoryview(b"")

    def begin(self) -> bool:
        """Connect and write. False when the peer's queue is full: it takes somebody who can wait."""
        channel, message = self._channel, self._message
        try:
            sock = channel.connect()
        except BlockingIOError:
            return False
        except (OSError, AcommError) as error:
            sent = message.sends > 0
            lost = error if isinstance(error, AcommError) else unreachable(channel.url, error, sent=sent)
            channel.exchanges.add(self)
            self._loop.call_soon(self._over, lost)  # whoever posts may not be ready to be told
            return True
        self._socket = sock
        message.sends += 1
        channel.exchanges.add(self)
        self._framer = Framer(DEFAULT_MAX_FRAME)
        self._rest = memoryview(HEADER.pack(len(message.payload)) + message.payload)
        self._timer = self._loop.call_later(channel.owner.timeout, self._late)
        self._loop.add_reader(sock, self._readable, sock)
        self._write(sock)
        if self._rest:
            self._loop.add_writer(sock, self._write, sock)
        return True

    def _write(self, sock: socket.socket) -> None:
        try:
            self._rest = self._rest[sock.send(self._rest) :]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._rest = self._rest[:0]  # it may have refused us before it closed: that is read next
        if not self._rest:
            self._loop.remove_writer(sock)

    def _readable(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(65536)
            acks = self._framer.receive(data)
        except (BlockingIOError, InterruptedError):
            return
        except (OSError, FrameTooLarge) as error:
            reason = getattr(error, "strerror", None) or error
            self.end(NoAcknowledgement(f"the peer broke the connection off without an ack: {reason}"))
            return
        if acks:
            granted, refusal = ack_error(acks[0])
            self._message.ack = acks[0]
            if self._message.extended:
                self._channel.owner.learned(self._channel.url, granted)
            self.end(refusal)
        elif not data:
            self.end(NoAcknowledgement("the peer closed the connection without an ack"))

    def _late(self) -> None:
        self.end(ConnectionLost(f"no acknowledgement from {printable(self._channel.url)} in time"))

    def end(self, error: AcommError | None) -> None:
        """Close the connection, if there is one, and tell the sender."""
        if self._socket is not None:
            self._timer.cancel()
            self._loop.remove_reader(self._socket)
            if self._rest:
                self._loop.remove_writer(self._socket)
            self._socket.close()
        self._over(error)

    def _over(self, error: AcommError | None) -> None:
        if self in self._channel.exchanges:
            self._channel.exchanges.discard(self)
            self._message.settle(error)
            self._channel.more()


class _Pipeline(FrameProtocol):
    """A connection of ours: sends frames, takes their acknowledgements in order."""

    def __init__(self, channel: UnixChannel) -> None:
        super().__init__(DEFAULT_MAX_FRAME)
        self._channel = channel
        self._waiting: deque[Outgoing] = deque()
        self._first_message: Outgoing | None = None
        # From the beginning: a peer that turns us away may do so before anything was written.
        self._first: asyncio.Future[tuple[bool, AcommError | None]] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    def first(self, message: Outgoing) -> asyncio.Future[tuple[bool, AcommError | None]]:
        """Send the first message; the future tells whether the peer grants, and the ack's error."""
        self._first_message = message
        self.write_message(message.payload)
        return self._first

    async def send_raw(self, payload: bytes) -> None:
        """Send a generation 1 message, which ends with the connection. Raises ConnectionLost when the
        peer is gone before it has all of it.
        """
        self.transport.set_write_buffer_limits(0)  # so that `drain` waits for the last byte
        self.write_raw(payload)
        await self.drain()
        if self.closed or self.transport.is_closing():
            raise ConnectionLost("the peer closed the connection before it had the whole message")
        self.finish()

    def send(self, message: Outgoing) -> None:
        message.sends += 1
        message.deadline = self._loop.time() + self._channel.owner.timeout
        self._waiting.append(message)
        self.write_message(message.payload)
        if self._timer is None:
            self._timer = self._loop.call_at(message.deadline, self._overdue)

    def take(self) -> list[Outgoing]:
        waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def message_received(self, message: bytes) -> None:
        if self._waiting:
            outgoing = self._waiting.popleft()
            outgoing.ack = message
            expected = outgoing.expected
            taken = expected is not None and message.startswith(expected)
            error = None if taken else ack_error(message)[1]
            if message.endswith(STORED_TAIL):
                self._channel.note_stored(message)
            try:  # `settle`, without the call: this runs for each message
                outgoing.delivered(error)
            except Exception:
                log.exception("what waited for an acknowledgement failed")
        elif not self._first.done():
            self._channel.note_stored(message)
            granted, error = ack_error(message)
            if self._first_message is not None:
                self._first_message.ack = message
                self._first_message = None
            if granted:
                self._channel.adopt(self)
            self._first.set_result((granted, error))

    def may_read(self) -> bool:
        """Always: only the accepting end may stop reading while its writes are stuck. If both ends did, each
        would wait for the other for ever.
        """
        return True

    def framing_failed(self, error: Exception) -> None:
        self.abort()

    def _overdue(self) -> None:
        self._timer = None
        if not self._waiting:
            return
        deadline = self._waiting[0].deadline
        if deadline > self._loop.time():
            self._timer = self._loop.call_at(deadline, self._overdue)
            return
        # The peer holds the line without answering: sending again would only wait as long again.
        self.abort()
        for message in self.take():
            message.settle(ConnectionLost("no acknowledgement in time"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()
        if not self._first.done():
            self._first.set_exception(NoAcknowledgement("the peer closed the connection without an ack"))
            self._first.exception()  # whoever waited may have given up; it is not lost on anyone
        self._channel.broken(self, self.take())


async def _connect(channel: UnixChannel) -> _Pipeline:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(channel.owner.timeout):
        sock = await _connected_socket(channel)
        try:
            _, protocol = await loop.create_unix_connection(lambda: _Pipeline(channel), sock=sock)
        except BaseException:
            sock.close()
            raise
    return protocol


async def _connected_socket(channel: UnixChannel) -> socket.socket:
    """Connect, waiting while the peer's queue of connections is full.

    The event loops do not: the kernel says EAGAIN then, which asyncio takes for "under way", and
    uvloop for a failure. Else a unix socket connects at once or not at all.
    """
    pause = 0.001
    while True:
        with contextlib.suppress(BlockingIOError):
            return channel.connect()
        await asyncio.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
