"""Outgoing messages: one connection a message for strangers, a pipelined channel for our own kind.

    post -> Channel (one a URL) -+- granted:  one connection, many frames unacknowledged on it
                                 +- else:     one connection a message, at most PLAIN_CONNECTIONS
                                 +- http(s):  one POST a message

A message that may be extended carries `"acomm": 1`. An acknowledgement that carries it too grants: the
connection stays open, and what follows is written to it without waiting. Acknowledgements come back
in order, so they are matched by position. When a granted connection breaks, what was not acknowledged
is sent again, once; receivers tell repeats by the id.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from acomm import messages, urls
from acomm.errors import AcommError, BadRequest, ConnectionLost, Unreachable, printable
from acomm.framing import DEFAULT_MAX_FRAME, HEADER, Framer, FrameTooLarge
from acomm.listener import encode_payload
from acomm.messages import STORED_TAIL, Request, Response, ok_ack
from acomm.transport import FrameProtocol

if TYPE_CHECKING:
    import aiohttp

    from acomm.egress import Policy
    from acomm.origin import Origin

log = logging.getLogger("acomm.channel")

DEFAULT_TIMEOUT = 30.0
"""Seconds to connect, and again for the acknowledgement to come."""

PLAIN_CONNECTIONS = 64
"""Connections to one peer that takes one message a connection, at a time."""

HTTP_CONNECTIONS = 32
UNPROVEN_HTTP_CONNECTIONS = 8
"""POSTs to one URL at a time: the fewer until it has answered, one more for each answer. A host lends twice
the most of one URL, so that one which takes connections and says nothing leaves as many to the others.
"""

_VERDICT_WAIT = 0.25
"""Seconds that messages wait to learn whether a new peer grants a channel. Our own answer in well under
a millisecond; a peer that takes longer gets a connection a message meanwhile.
"""

_LONGEST_PAUSE = 0.1  # seconds between tries to connect to a peer whose queue of connections is full
_MAX_SENDS = 2
_NOBODY_THERE = (FileNotFoundError, ConnectionRefusedError)
_MAX_REPLY = 1024 * 1024

_plain_acks = {ok_ack(b'""', wire, False) for wire in (2, 3)}
"""What a tracker says to a response, ours and the original's."""

Delivered = Callable[[AcommError | None], None]


class NoAcknowledgement(ConnectionLost):
    """The peer took the connection, and closed it without an acknowledgement."""


class Outgoing:
    """A message on its way. `delivered(error)` is called once: with None when it was acknowledged, else
    with the acknowledgement's error, or ConnectionLost when none came.

    `expected` is how the acknowledgement that we expect begins, byte for byte, which spares decoding it;
    `ack` is the one that came, as it was.
    """

    __slots__ = ("ack", "deadline", "delivered", "expected", "extended", "payload", "sends", "wire")

    def __init__(
        self,
        payload: bytes,
        delivered: Delivered,
        *,
        wire: int,
        extended: bool,
        expected: bytes | None = None,
    ) -> None:
        self.payload = payload
        self.delivered = delivered
        self.wire = wire
        self.extended = extended
        self.expected = expected
        self.ack = b""
        self.sends = 0
        self.deadline = 0.0

    def settle(self, error: AcommError | None) -> None:
        """Tell the sender. What its callback raises is its own affair, and must not hit the others."""
        try:
            self.delivered(error)
        except Exception:
            log.exception("what waited for an acknowledgement failed")


class Channels:
    """All the channels of one owner, by URL and origin. Closing it fails what is still under way.

    `policy` judges where URLs may lead that come with an origin; those without are the program's own.
    `broken(url)`, if set, is called when a peer has ended a connection that it had granted; `storing` has the
    URLs whose peers say on their connection that they store requests. `headers` are what POSTs to a URL carry
    besides, by URL.
    """

    def __init__(self, *, timeout: float = DEFAULT_TIMEOUT, policy: Policy | None = None) -> None:
        self.timeout = timeout
        self.policy = policy
        self.granting: OrderedDict[str, bool] = OrderedDict()
        self.broken: Callable[[str], None] | None = None
        self.storing: set[str] = set()
        self.headers: dict[str, dict[str, str]] = {}
        self._channels: dict[tuple[str, Origin | None], Channel] = {}
        self._http: dict[bool | None, aiohttp.ClientSession] = {}
        self.closed = False

    def __repr__(self) -> str:
        return f"<Channels {len(self._channels)} open>"

    def __len__(self) -> int:
        return len(self._channels)

    def post(self, url: str, message: Outgoing, origin: Origin | None = None) -> None:
        """Send a message; its `delivered` is told how it went. `origin` is whoever chose the URL, None if
        it was this program: what the policy forbids is then not connected to, and `delivered` is told
        Forbidden. Raises BadRequest for a URL that nothing can be sent to. Never blocks.
        """
        if self.closed:
            message.settle(ConnectionLost("the sender is closed"))
            return
        channel = self._channels.get((url, origin))
        if channel is None:
            urls.check(url, "the URL")
            if origin is not None and self.policy is None:
                raise RuntimeError("a URL of another origin needs a policy")
            path = urls.unix_path(url)
            channel = HttpChannel(self, url, origin) if path is None else UnixChannel(self, url, path, origin)
            self._channels[url, origin] = channel
        channel.post(message)

    def connected(self, url: str, origin: Origin | None) -> bool:
        """Whether there is an open connection to `url`, which was judged when it was made."""
        channel = self._channels.get((url, origin))
        return isinstance(channel, UnixChannel) and channel.live is not None

    async def send(self, url: str, payload: Any, wire: int = 3) -> None:
        """Send a payload and wait for its acknowledgement. Raises its error, or ConnectionLost."""
        extended = _may_extend(payload, wire)
        acknowledged: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def delivered(error: AcommError | None) -> None:
            if not acknowledged.done():
                acknowledged.set_result(None) if error is None else acknowledged.set_exception(error)

        data = encode_payload(payload, wire, extended=extended)
        self.post(url, Outgoing(data, delivered, wire=wire, extended=extended))
        await acknowledged

    async def close(self) -> None:
        """Close all connections; what is unacknowledged fails with ConnectionLost."""
        self.closed = True
        for channel in list(self._channels.values()):
            await channel.close()
        self._channels.clear()
        while self._http:
            await self._http.popitem()[1].close()

    def http(self, origin: Origin | None) -> aiohttp.ClientSession:
        """The session for URLs of `origin`: one for all origins that may reach the same."""
        kind = None if origin is None else origin.local
        if kind not in self._http:
            self._http[kind] = self._new_session(origin)
        return self._http[kind]

    def _new_session(self, origin: Origin | None) -> aiohttp.ClientSession:
        from acomm import httpegress
        from acomm.egress import Guard

        if origin is None or self.policy is None:
            guard = None
        else:
            guard = Guard(self.policy, origin)
        return httpegress.session(guard, timeout=self.timeout, limit_per_host=2 * HTTP_CONNECTIONS)

    def idle(self, channel: Channel) -> None:
        """A channel has nothing under way and no connection: forget it, so that short-lived hooks leave
        nothing behind.
        """
        key = channel.url, channel.origin
        if self._channels.get(key) is channel:
            del self._channels[key]

    def learned(self, url: str, granting: bool) -> None:
        """Remember whether the peer at `url` grants channels."""
        self.granting[url] = granting
        self.granting.move_to_end(url)
        if len(self.granting) > 1024:
            self.granting.popitem(last=False)


class Channel:
    """What both kinds share: a URL, the tasks under way, and their end. `limit`: so many at a time."""

    limit = PLAIN_CONNECTIONS

    def __init__(self, owner: Channels, url: str, origin: Origin | None) -> None:
        self.owner = owner
        self.url = url
        self.origin = origin
        self.queue: deque[Outgoing] = deque()
        self.tasks: dict[asyncio.Task[AcommError | None], Outgoing] = {}

    def post(self, message: Outgoing) -> None:
        raise NotImplementedError

    def start(self, message: Outgoing) -> None:
        """Send one message by a task of its own."""
        task = asyncio.get_running_loop().create_task(self._run(message))
        self.tasks[task] = message
        task.add_done_callback(self._finished)

    async def exchange(self, message: Outgoing) -> AcommError | None:
        """Send the message; the error of its acknowledgement. Raises AcommError, OSError."""
        raise NotImplementedError

    async def _run(self, message: Outgoing) -> AcommError | None:
        try:
            return await self.exchange(message)
        except AcommError as error:
            return error
        except TimeoutError:
            return ConnectionLost(f"no acknowledgement from {printable(self.url)} in time")
        except OSError as error:
            return _unreachable(self.url, error, sent=message.sends > 1)
        except Exception as error:
            log.exception("sending to %s failed unexpectedly", printable(self.url))
            return ConnectionLost(f"cannot reach {printable(self.url)}: {type(error).__name__}: {error}")

    def _finished(self, task: asyncio.Task[AcommError | None]) -> None:
        message = self.tasks.pop(task)
        if task.cancelled():
            message.settle(ConnectionLost("the sender was closed before the acknowledgement came"))
        else:
            message.settle(task.result())
        self.more()

    @property
    def under_way(self) -> int:
        """Messages that have been sent, or are being sent, on a connection of their own."""
        return len(self.tasks)

    def more(self) -> None:
        """Something has ended: start what waits, or be forgotten."""
        while self.queue and self.under_way < self.limit:
            self.start(self.queue.popleft())
        self.rest()

    def rest(self) -> None:
        """Be forgotten by the owner if there is nothing to keep."""
        if not self.under_way and not self.queue:
            self.owner.idle(self)

    async def close(self) -> None:
        while self.queue:
            self.queue.popleft().settle(ConnectionLost("the sender was closed"))
        tasks = list(self.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class UnixChannel(Channel):
    """Messages to one unix socket."""

    def __init__(self, owner: Channels, url: str, path: str, origin: Origin | None) -> None:
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
            lost = error if isinstance(error, AcommError) else _unreachable(channel.url, error, sent=sent)
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
            granted, refusal = _ack_error(acks[0])
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
            error = None if taken else _ack_error(message)[1]
            if message.endswith(STORED_TAIL):
                self._channel.note_stored(message)
            try:  # `settle`, without the call: this runs for each message
                outgoing.delivered(error)
            except Exception:
                log.exception("what waited for an acknowledgement failed")
        elif not self._first.done():
            self._channel.note_stored(message)
            granted, error = _ack_error(message)
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


def _unreachable(url: str, error: Exception, *, sent: bool) -> ConnectionLost:
    """Unreachable if nobody is there, unless the message was sent before: on a connection that broke, it may
    have been taken.
    """
    reason = getattr(error, "strerror", None) or error
    kind = Unreachable if isinstance(error, _NOBODY_THERE) and not sent else ConnectionLost
    return kind(f"cannot reach {printable(url)}: {reason}")


def _ack_error(message: bytes) -> tuple[bool, AcommError | None]:
    """Whether an acknowledgement grants a channel, and the error it carries."""
    if message in _plain_acks:
        return False, None
    try:
        ack = Response.decode(message)
    except BadRequest as error:
        return False, ConnectionLost(f"the acknowledgement is not readable: {error}")
    return ack.extended, ack.error


class HttpChannel(Channel):
    """Messages to one HTTP URL, a POST each."""

    limit = UNPROVEN_HTTP_CONNECTIONS

    def post(self, message: Outgoing) -> None:
        self.queue.append(message)
        self.more()

    async def _run(self, message: Outgoing) -> AcommError | None:
        error = await super()._run(message)
        if isinstance(error, ConnectionLost):
            self.limit = UNPROVEN_HTTP_CONNECTIONS
        else:
            self.limit = min(self.limit + 1, HTTP_CONNECTIONS)
        return error

    async def exchange(self, message: Outgoing) -> AcommError | None:
        import aiohttp

        where = printable(self.url)
        if self.origin is not None and self.owner.policy is not None:
            self.owner.policy.check(self.url, self.origin)  # as it stands: aiohttp reads some kindly
        try:
            async with self.owner.http(self.origin).post(
                self.url,
                data=message.payload,
                headers={"Content-Type": "application/json", **self.owner.headers.get(self.url, {})},
                allow_redirects=False,
            ) as reply:
                if message.wire == 1:  # this generation looks at the status alone
                    ok = reply.status == 200
                    return None if ok else ConnectionLost(f"{where} answered status {reply.status}")
                body = await _read_body(reply)
        except aiohttp.ClientError as error:
            connecting = isinstance(error, aiohttp.ClientConnectorError)
            nobody_there = connecting and not isinstance(error, aiohttp.ClientSSLError)
            kind = Unreachable if nobody_there else ConnectionLost
            raise kind(f"cannot reach {where}: {_why_not(error)}") from None
        try:
            ack = Response.decode(body)
        except BadRequest:
            return ConnectionLost(f"{where} answered status {reply.status} without an acknowledgement")
        if ack.error is None and reply.status >= 300:
            return ConnectionLost(f"{where} answered status {reply.status}")
        message.ack = body
        return ack.error


def _why_not(error: aiohttp.ClientError) -> object:
    """What the system says of a connection that failed; aiohttp's words repeat the address."""
    import aiohttp

    if not isinstance(error, aiohttp.ClientConnectorError) or isinstance(error, aiohttp.ClientSSLError):
        return error
    number = error.os_error.errno
    if isinstance(error, aiohttp.ClientConnectorDNSError) or not number or number < 0:
        return error.os_error.strerror or error
    return os.strerror(number)


async def _read_body(reply: aiohttp.ClientResponse) -> bytes:
    """The whole body; `content.read(n)` returns what has come so far. Raises ConnectionLost when it is
    longer than any acknowledgement.
    """
    body = bytearray()
    async for chunk in reply.content.iter_any():
        body += chunk
        if len(body) > _MAX_REPLY:
            raise ConnectionLost(f"the acknowledgement is longer than {_MAX_REPLY} bytes")
    return bytes(body)


def _may_extend(payload: Any, wire: int) -> bool:
    """Whether a message may carry `"acomm": 1`: requests of ours, responses to who asked for it."""
    if wire == 1:
        return False
    return isinstance(payload, Request) or (isinstance(payload, Response) and payload.extended)


async def send(url: str, payload: Any, *, wire: int = 3, timeout: float = DEFAULT_TIMEOUT) -> None:
    """Send a Request, a Response or any JSON value to a `unix://`, `http://` or `https://` URL.

    Returns when it is acknowledged; generation 1 knows no acknowledgement, there it returns when the
    message is written. Raises the acknowledgement's error, ConnectionLost when none came within
    `timeout` seconds, BadRequest for a URL that nothing can be sent to.
    """
    if isinstance(payload, Request) and urls.unix_path(url) is not None:
        # We close the connection behind the acknowledgement, and the answer is for whoever is at the hook.
        payload = msgspec.structs.replace(payload, detached=True)
    channels = Channels(timeout=timeout)
    try:
        await channels.send(url, payload, wire)
    finally:
        await channels.close()


def send_sync(url: str, payload: Any, *, wire: int = 3, timeout: float = DEFAULT_TIMEOUT) -> None:
    """`send` for programs without an event loop. Raises RuntimeError inside one."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(send(url, payload, wire=wire, timeout=timeout))
    else:
        raise RuntimeError("send_sync would block the event loop that it is called in: await send instead")


async def _respond(url: str, payload: Response, wire: int) -> None:
    await send(url, payload, wire=wire)


messages.set_transport(_respond)
