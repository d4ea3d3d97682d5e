"""UnixListener: accepts connections, knows who is at the other end, hands over whole messages.

Two ways to use it. A service that answers while the peer waits takes connections:

    async with UnixListener(path) as listener:
        async for conn in listener:
            request = await conn.receive(Request)
            await conn.send(Response.to(request, result="hello"))
            listener.done_conn(conn)

A service with thousands of messages a second gives `on_message`, which is called for each one.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import select
import socket
import struct
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, NamedTuple, TypeVar, overload

import msgspec

from acomm import jsontext, socketpath
from acomm.errors import AcommError, AddressInUse, BadRequest, Busy, ConnectionLost, Forbidden
from acomm.framing import DEFAULT_MAX_FRAME
from acomm.messages import Request, Response, salvage
from acomm.room import PATIENCE, SMALL, Room
from acomm.transport import Done, FrameProtocol
from acomm.urls import unix_url

T = TypeVar("T")
log = logging.getLogger("acomm.listener")

DEFAULT_FRAME_TIMEOUT = 30.0
"""Seconds for a message to come whole, and for a new connection to begin one."""

_ACCEPTS_AT_ONCE = 1
"""Connections that asyncio accepts before it does anything else. Without descriptors each of these attempts
would fail, log, and have a timer try as many again, until the loop does nothing else; one attempt a second
is what a single one comes to. The kernel's own queue may be longer. uvloop takes all, and in want of
descriptors cuts them off, for which it keeps one.
"""

_COME_BACK = 1.0
"""Seconds after which who was turned away may find room."""

_MAX_TURNED_AWAY = 32
"""Connections beyond the limit that may yet send their message, to be told in its own spelling that there is
no room. More are told at once.
"""

_MAX_QUEUED = 64
_MAX_GETSOCKOPT = 1024  # bytes; Python's own limit, enough for 256 groups
_SO_PEERGROUPS = getattr(socket, "SO_PEERGROUPS", 59)
_ucred = struct.Struct("iII")


class Peer(NamedTuple):
    """Who is at the other end, by the kernel's word at the time of connecting."""

    uid: int
    gid: int
    pid: int


class Connection(FrameProtocol):
    """One accepted connection. `peer` is its other end; `receive` and `send` carry messages.

    Where `on_message` is used, the connection is closed behind the acknowledgements, as the original
    does, unless one of them granted a channel.
    """

    def __init__(self, listener: UnixListener) -> None:
        super().__init__(listener.max_frame)
        self.peer = Peer(-1, -1, -1)
        self.wire = 3
        self.granted = False
        # Since when a message has been expected or has been incomplete; None while it is not for the
        # peer to move.
        self.waiting_since: float | None = self._loop.time()
        # Told, once, when the connection is gone; not if we have closed it ourselves by `close`.
        self.on_lost: Callable[[], None] | None = None
        self._listener = listener
        self._on_message = listener.on_message
        self._reserved = 0  # bytes in the room, for a message that is not whole
        self.held_since: float | None = None  # it waits for such, and is not read
        self._tickets = 0
        self._turn = 0
        self._held: dict[int, Callable[[], None]] = {}
        self._messages: deque[bytes | Exception] = deque()
        self._arrived: asyncio.Event | None = None
        self._full = False

    @property
    def raw(self) -> bool:
        """Whether the peer speaks generation 1: one message, ended by EOF, and no answer."""
        return bool(self.framer.raw)

    @overload
    async def receive(self, type: type[T]) -> T: ...
    @overload
    async def receive(self, type: None = None) -> bytes: ...
    async def receive(self, type: Any = None) -> Any:
        """The next message, decoded as `type` (Request, Response or any type msgspec knows), or its
        bytes.

        Raises BadRequest when it does not decode, ConnectionLost when the peer sends no more.
        """
        while not self._messages:
            if self.closed or self.peer_finished:
                raise ConnectionLost("the peer closed the connection")
            if self._arrived is None:
                self._arrived = asyncio.Event()
            await self._arrived.wait()
        message = self._messages.popleft()
        if self._full and len(self._messages) <= _MAX_QUEUED // 2:
            self._full = False
            self.read_or_hold()
        if isinstance(message, Exception):
            raise message
        if type is None:
            return message
        if type is Response:
            return Response.decode(message)
        if type is Request:
            request = Request.decode(message, raw=self.raw)
            self.wire = request.wire
            return request
        return jsontext.parse_as(msgspec.json.Decoder(type), message, "message")

    async def send(self, payload: Any, wire: int | None = None) -> None:
        """Send one message: a Request or Response in generation `wire` (by default that of the request
        received here), bytes as they are, or anything that JSON can express.

        Raises ConnectionLost when the peer is gone, BadRequest when it is a generation 1 peer, which
        reads no answer.
        """
        if self.raw:
            raise BadRequest("a generation 1 peer reads no answer on its connection")
        data = encode_payload(payload, wire or self.wire)
        if not self.closed:
            if self.transport.is_closing():
                raise ConnectionLost("the connection is closed")
            self.write_message(data)
            await self.drain()
        if self.closed:
            raise ConnectionLost("the peer closed the connection")

    def hold(self) -> None:
        """Read no more, and never again."""
        self._full = True
        self.read_or_hold()

    def close(self) -> Done[None]:
        """Close once everything sent has left."""
        self.on_lost = None
        self.finish()
        return Done(None)

    # -- the event loop's side ----------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        sock = transport.get_extra_info("socket")
        try:
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size)
            pid, uid, gid = _ucred.unpack(credentials)
            self.peer = Peer(uid, gid, pid)
            self._listener._connected(self, sock)
        except BaseException:
            self.abort()  # the event loop would go on, with a peer that nobody has authorised
            raise

    def message_received(self, message: bytes) -> None:
        if self.waiting_since is not None:
            self._wait_since(None)
        if self._on_message is not None:
            self._on_message(self, message)
        else:
            self._queue(message)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.framer.partial:
            if self.framer.needs > SMALL and not self._deaf:
                self._find_room(self.framer.needs)
                if self.held_since is not None or self._deaf:
                    return
            if self.may_read():
                if self.waiting_since is None:
                    self._wait_since(self._loop.time())
                return
        elif self._reserved:
            self._give_back()
        if self.waiting_since is not None:
            self._wait_since(None)
        if not self.granted and self._listener.on_message is not None:
            self.finish_when_answered()

    def may_read(self) -> bool:
        return self._drained is None and not self._full and self.held_since is None

    def read_or_hold(self) -> None:
        super().read_or_hold()
        # While we do not read, it is not the peer that is late.
        self._wait_since(self._loop.time() if self.may_read() and self.framer.partial else None)

    def framing_failed(self, error: Exception) -> None:
        if self._listener.on_message is not None:
            self.refuse(error if isinstance(error, AcommError) else BadRequest(str(error)))
        else:
            self._queue(error)

    def ticket(self) -> int:
        """A place in the order of acknowledgements, for a message whose own may take a while. Take one for
        each message, or for none.
        """
        self._tickets += 1
        return self._tickets - 1

    def acknowledge(self, ack: bytes, *, grants: bool, ticket: int | None = None) -> None:
        """Send an acknowledgement; one that `grants` keeps the connection open for more messages. One with a
        `ticket` leaves behind those of all earlier tickets.
        """
        if ticket is None:
            self._send_ack(ack, grants)
        else:
            self._in_turn(ticket, functools.partial(self._send_ack, ack, grants))

    def _in_turn(self, ticket: int, send: Callable[[], None]) -> None:
        if ticket != self._turn:
            self._held[ticket] = send
            return
        send()
        self._turn += 1
        while self._held and self._turn in self._held:
            self._held.pop(self._turn)()
            self._turn += 1

    def _send_ack(self, ack: bytes, grants: bool) -> None:
        if grants:
            self.granted = True
            self.keep()
        self.write_message(ack)

    def refuse(self, error: AcommError) -> None:
        """Tell the peer why, as the acknowledgement of a message that cannot be read, and close."""
        if self._turn != self._tickets:
            self._in_turn(self.ticket(), functools.partial(self._refuse, error))
        else:
            self._refuse(error)

    def _refuse(self, error: AcommError) -> None:
        if self.raw:
            self.finish()
        else:
            self.write_message(Response("", error=error).encode(2))
            self.finish_after_peer()

    def _wait_since(self, when: float | None) -> None:
        self.waiting_since = when
        if when is None:
            self._listener.room.moves(self)
        else:
            self._listener.room.waits(self, when)

    def _find_room(self, needs: int) -> None:
        """Have room for the message that has begun, or read on when there is some, or refuse it."""
        if needs <= self._reserved or self.held_since is not None:
            return
        if self.raw:  # which does not tell how long it is going to be
            needs = min(1 << needs.bit_length(), self.framer.max_frame)
        room, uid = self._listener.room, self.peer.uid
        if room.reserve(uid, needs - self._reserved):
            self._reserved = needs
        elif not self._reserved and room.hold(self, uid, needs):
            self.held_since = self._loop.time()
            self.read_or_hold()
        else:
            self.no_room()

    def room_found(self, size: int) -> None:
        """There is room for the message that was held: read on."""
        self._reserved = size
        self.held_since = None
        self.read_or_hold()

    def no_room(self) -> None:
        """Refuse a message for which there was no room for too long, or that need not even wait."""
        room = self._listener.room
        room.refused += 1
        room.forget(self)
        self.held_since = None
        self.read_or_hold()
        self.framing_failed(Busy("too many large messages are on their way in", retry_after=_COME_BACK))

    def _give_back(self) -> None:
        size, self._reserved = self._reserved, 0
        if size:
            for conn in self._listener.room.give_back(self.peer.uid, size):
                conn.room_found(conn.framer.needs)

    def shed(self, error: AcommError) -> None:
        """Make room for somebody else."""
        self._listener.room.leave(self)
        if not self.raw:
            self.write_message(Response("", error=error).encode(2))
        self.finish()
        if self.write_buffer_size:
            self.abort()

    def turn_away(self, error: AcommError, seconds: float) -> None:
        """Refuse its message, whatever that is, if it comes within so many seconds."""

        def refuse(conn: Connection, data: bytes) -> None:
            id, wire, extended, _ = salvage(data, raw=conn.raw)
            if not conn.raw:
                conn.write_message(Response(id, error=error).encode(wire, extended=extended))
            conn.finish()

        self._on_message = refuse
        self._loop.call_later(seconds, self._turned_away, error)

    def _turned_away(self, error: AcommError) -> None:
        if not self.closed:
            self.shed(error)
            self.abort()

    def input_ended(self) -> None:
        if self.waiting_since is not None:
            self._wait_since(None)
        if self._listener.on_message is None:
            self._wake()
        elif self.raw:
            self.close()
        else:
            self.finish_when_answered()

    def _queue(self, message: bytes | Exception) -> None:
        self._messages.append(message)
        if len(self._messages) >= _MAX_QUEUED and not self._full:
            self._full = True
            self.read_or_hold()
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None:
            self._arrived.set()
            self._arrived = None

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._listener.room.forget(self)
        self._give_back()
        self._wake()
        self._listener._disconnected(self)
        lost, self.on_lost = self.on_lost, None
        if lost is not None:
            lost()


class _Listening(socket.socket):
    """A socket whose queue stays long: asyncio would shorten it to as many as it accepts at once, and who
    does not wait for room in it would be refused.
    """

    def listen(self, backlog: int = socketpath.BACKLOG, /) -> None:
        super().listen(socketpath.BACKLOG)


class UnixListener:
    """Listens at a unix socket.

    `path` None takes a new private path. After `accept_limit` connections (0: no limit) it accepts no
    more. The socket file gets `mode`. Peers are accepted by the uid that the kernel tells: our own,
    root, those in `allow_uids`, and members of `allow_gids`.

    `on_message(conn, message)` is called for each message in place of queueing connections for
    `next_conn`. It owes each message of a peer that is not `raw` one `conn.write_message`, at once or
    later (by `conn.ticket` in their order, if that may not be the order in which they are known); a peer that
    has closed its half is kept until it has all of them.

    `room` says how many connections there may be, and how much may be unfinished; several listeners can have
    it in common. Beyond that a connection that has kept us waiting for longest goes, or the new one is told
    Busy.

    A message that is not whole after `frame_timeout` seconds, or a peer that for so long reads nothing
    of what it was sent, ends the connection.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        accept_limit: int = 0,
        mode: int = 0o600,
        allow_uids: Iterable[int] | None = None,
        allow_gids: Iterable[int] = (),
        max_frame: int = DEFAULT_MAX_FRAME,
        frame_timeout: float = DEFAULT_FRAME_TIMEOUT,
        on_message: Callable[[Connection, bytes], None] | None = None,
        room: Room[Connection] | None = None,
    ) -> None:
        if accept_limit < 0:
            raise ValueError(f"accept_limit must be 0 (no limit) or more, not {accept_limit}")
        self.path = os.fspath(path) if path is not None else None
        self.accept_limit = accept_limit
        self.mode = mode
        self.max_frame = max_frame
        self.frame_timeout = frame_timeout
        self.on_message = on_message
        self.room: Room[Connection] = Room() if room is None else room
        self._turned_away: set[Connection] = set()
        self._uids = {0, os.getuid(), *(allow_uids or ())}
        self._gids = frozenset(allow_gids)
        self._bound: socketpath.BoundSocket | None = None
        self._server: asyncio.Server | None = None
        self._accepted = 0
        self._open: set[Connection] = set()
        self._taken: set[Connection] = set()
        self._waiting: asyncio.Queue[Connection | None] = asyncio.Queue()
        self._none_taken = asyncio.Event()
        self._none_taken.set()
        self._all_done = asyncio.Event()
        self._all_done.set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._stopped = False
        self._given = False

    @property
    def addr(self) -> str:
        """The socket's path."""
        if self.path is None:
            raise RuntimeError("the listener has no address before it is started")
        return self.path

    @property
    def url(self) -> str:
        """The socket's `unix://` URL."""
        return unix_url(self.addr)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._open)

    async def start(self) -> None:
        """Begin to listen. Raises AddressInUse or ConfigError."""
        if self._server is not None:
            raise RuntimeError("the listener is already started")
        if self._bound is None:
            path = self.path or socketpath.private_path("listener")
            self._bound = socketpath.bind(path, self.mode)
        self.path = self._bound.path
        self._stopped = self._given = False
        self._accepted = 0
        self._waiting = asyncio.Queue()
        try:
            await self.accept()
        except BaseException:
            self._bound.release()
            self._bound = None
            raise
        self._sweep()

    def adopt(self, fds: tuple[int, int]) -> None:
        """Have `start` listen at a socket that another process has given us: `fds` of its listener."""
        assert self.path is not None
        self._bound = socketpath.adopt(os.path.abspath(self.path), self.mode, fds)

    @property
    def fds(self) -> tuple[int, int]:
        """What another process needs to listen in our place."""
        assert self._bound is not None
        return self._bound.fds

    async def accept(self) -> None:
        """Take connections, as `start` does, again after `pause`."""
        assert self._bound is not None
        # A copy, which the server closes with itself; the socket's file is never its affair.
        sock = _Listening(fileno=os.dup(self._bound.socket.fileno()))
        loop = asyncio.get_running_loop()
        # asyncio accepts so many at a time; to uvloop it is the length of the kernel's queue alone.
        at_once = _ACCEPTS_AT_ONCE if isinstance(loop, asyncio.SelectorEventLoop) else socketpath.BACKLOG
        more: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
        try:
            self._server = await loop.create_unix_server(
                lambda: Connection(self), sock=sock, backlog=at_once, **more
            )
        except BaseException:
            sock.close()
            raise

    async def pause(self) -> None:
        """Take no more connections; who knocks waits in the kernel's queue."""
        server, self._server = self._server, None
        if server is not None:
            await stop_accepting(server)

    def give_away(self) -> None:
        """The socket is another process's now, which has its `fds`; our connections go on."""
        self._stopped = self._given = True
        bound, self._bound = self._bound, None
        if bound is not None:
            bound.forget()

    def hold(self) -> list[Connection]:
        """Read no more from connections that are kept open for more messages. They are returned, for
        `Connection.close` when what was read of them is safe.
        """
        kept = [conn for conn in self._open if conn.granted]
        for conn in kept:
            conn.hold()
        return kept

    def hide(self) -> None:
        """Remove the socket's file: nobody new finds it, who has connected is served."""
        if self._bound is not None:
            self._bound.hide()

    async def stop(self, timeout: float | None = None) -> None:
        """Accept no more and wait, at most `timeout` seconds (None: as long as it takes), until those
        who took connections by `next_conn` are done with them; then close what is left.
        """
        self._stop_accepting()
        if self._sweeper is not None:
            self._sweeper.cancel()
        await self._close_server()
        if self._taken and timeout != 0:
            try:
                await asyncio.wait_for(self._none_taken.wait(), timeout)
            except TimeoutError:
                log.warning("stopping with %d connections not done", len(self._taken))
        for conn in list(self._open):
            conn.close()
        if self._open:
            try:
                await asyncio.wait_for(self._all_done.wait(), 1.0)
            except TimeoutError:  # a peer that does not read what we have written
                for conn in list(self._open):
                    conn.abort()
                await self._all_done.wait()

    async def next_conn(self) -> Connection | None:
        """The next connection; None when the listener has stopped, or reached its accept limit."""
        conn = await self._waiting.get()
        if conn is None:
            self._waiting.put_nowait(None)  # for whoever else waits
        elif not conn.closed:
            self._taken.add(conn)
            self._none_taken.clear()
        return conn

    def done_conn(self, conn: Connection) -> Done[None]:
        """Say that a connection from `next_conn` is finished with; it is closed."""
        conn.close()
        return Done(None)

    async def __aenter__(self) -> UnixListener:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop(0)

    async def __aiter__(self) -> AsyncIterator[Connection]:
        while (conn := await self.next_conn()) is not None:
            yield conn

    def _stop_accepting(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self.hide()
        self._waiting.put_nowait(None)

    async def _close_server(self) -> None:
        """Let those who connected before our path was gone come in, to be closed by `_connected`: asyncio
        loses what it has accepted when its server is closed at that moment.
        """
        if self._server is None or self._bound is None:
            bound, self._bound = self._bound, None
            if bound is not None:  # paused, or never begun
                bound.release()
            return
        server, self._server = self._server, None
        try:
            knocking = select.poll()
            knocking.register(self._bound.socket, select.POLLIN)
            for _ in range(socketpath.BACKLOG // _ACCEPTS_AT_ONCE):
                if not knocking.poll(0):
                    break
                await asyncio.sleep(0)
            for _ in range(3):  # the turns of the loop from accepting to `connection_made`
                await asyncio.sleep(0)
        finally:
            server.close()
            bound, self._bound = self._bound, None
            if bound is not None:
                bound.release()

    # -- called by connections ----------------------------------------------------------------------

    def _connected(self, conn: Connection, sock: socket.socket) -> None:
        self._open.add(conn)
        self._all_done.clear()
        self.room.enter(conn, conn.peer.uid, conn._loop.time())
        if self._stopped and not self._given:
            conn.close()
            return
        if not self._may_connect(conn.peer, sock):
            log.warning("refused a connection of uid %d (pid %d)", conn.peer.uid, conn.peer.pid)
            conn.refuse(Forbidden(f"uid {conn.peer.uid} may not use this socket"))
            return
        if (crowd := self.room.crowded(conn.peer.uid)) is not None and not self._make_place(conn, crowd):
            return
        self._accepted += 1
        if self.on_message is None:
            self._waiting.put_nowait(conn)
        if self._accepted == self.accept_limit:
            self._stop_accepting()

    def _make_place(self, conn: Connection, crowd: str) -> bool:
        """There are too many connections: whether this one may stay, as another has gone."""
        room, error = self.room, Busy(crowd, retry_after=_COME_BACK)
        slow = room.slowest(conn.peer.uid, conn._loop.time())
        if slow is not None:
            room.shed += 1
            slow.shed(error)
            return True
        room.refused += 1
        room.leave(conn)
        if len(self._turned_away) < _MAX_TURNED_AWAY and self.on_message is not None:
            self._turned_away.add(conn)
            conn.turn_away(error, PATIENCE)
        else:
            conn.shed(error)
        return False

    def _disconnected(self, conn: Connection) -> None:
        self.room.leave(conn)
        self._turned_away.discard(conn)
        self._open.discard(conn)
        self._taken.discard(conn)
        if not self._taken:
            self._none_taken.set()
        if not self._open:
            self._all_done.set()

    def _may_connect(self, peer: Peer, sock: socket.socket) -> bool:
        if peer.uid in self._uids:
            return True
        if not self._gids:
            return False
        if peer.gid in self._gids:
            return True
        try:
            groups = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_GETSOCKOPT)
        except OSError:  # it has more groups than fit
            return False
        return any(gid in self._gids for (gid,) in struct.iter_unpack("I", groups))

    def _sweep(self) -> None:
        """Close connections that do not move: a message that does not come whole, answers unread."""
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(max(self.frame_timeout / 4, 0.01), self._sweep)
        now = loop.time()
        for conn in list(self._open):
            if conn.stuck_for(now) > self.frame_timeout:
                conn.abort()
            elif conn.held_since is not None and now - conn.held_since > self.frame_timeout:
                conn.no_room()
            elif conn.waiting_since is not None and now - conn.waiting_since > self.frame_timeout:
                conn._wait_since(None)
                conn.framing_failed(BadRequest(f"no whole message in {self.frame_timeout:g} seconds"))
                conn.finish()


async def stop_accepting(server: asyncio.Server) -> None:
    """Close `server`, without losing those that have been accepted and have no transport yet: asyncio drops
    them if it is closed at that moment.
    """
    loop = asyncio.get_running_loop()
    if isinstance(loop, asyncio.SelectorEventLoop):  # uvloop accepts and connects in one step
        for sock in server.sockets:
            loop.remove_reader(sock.fileno())
    for _ in range(3):
        await asyncio.sleep(0)
    server.close()


def encode_payload(payload: Any, wire: int, *, extended: bool = False) -> bytes:
    """The bytes of a message: Request and Response in generation `wire`, bytes as they are, any other
    value as JSON. Raises TypeError, and ValueError for what is `null` as JSON: it kills a Go peer.
    """
    if isinstance(payload, Request | Response):
        return payload.encode(wire, extended=extended)
    if isinstance(payload, bytes | bytearray | memoryview):
        return bytes(payload)
    data = jsontext.encode(payload, "payload")
    if data.strip() == b"null":
        raise ValueError("a message cannot be null: it would kill a Go peer")
    return data


async def unmarshal_conn_data(conn: Connection, type: type[T]) -> T:
    """Read one message from `conn` as `type`: the original's UnmarshalConnData."""
    return await conn.receive(type)


async def send_conn_data(conn: Connection, payload: Any) -> None:
    """Write one message to `conn`: the original's SendConnData."""
    await conn.send(payload)


__all__ = [
    "AddressInUse",
    "Connection",
    "Peer",
    "UnixListener",
    "encode_payload",
    "send_conn_data",
    "unmarshal_conn_data",
]
