"""One accepted connection: its messages in, its acknowledgements out in order, and how it ends."""

from __future__ import annotations

import asyncio
import functools
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar, overload

import msgspec

from acomm import jsontext
from acomm.acks import salvage
from acomm.errors import AcommError, BadRequest, Busy, ConnectionLost
from acomm.messages import Request, Response, encode_payload
from acomm.room import COME_BACK, SMALL, Room
from acomm.transport import Done, FrameProtocol

T = TypeVar("T")

_MAX_QUEUED = 64
_ucred = struct.Struct("iII")


class Peer(NamedTuple):
    """Who is at the other end, by the kernel's word at the time of connecting."""

    uid: int
    gid: int
    pid: int


class Listener(Protocol):
    """What a connection knows of the one that accepted it."""

    max_frame: int
    on_message: Callable[[Connection, bytes], None] | None
    room: Room[Connection]

    def connected(self, conn: Connection, sock: socket.socket) -> None:
        """Its peer is known: let it in, or refuse it."""

    def disconnected(self, conn: Connection) -> None:
        """It is gone."""


class Connection(FrameProtocol):
    """One accepted connection. `peer` is its other end; `receive` and `send` carry messages.

    Where `on_message` is used, the connection is closed behind the acknowledgements, as the original
    does, unless one of them granted a channel.
    """

    def __init__(self, listener: Listener) -> None:
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
            self._listener.connected(self, sock)
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
        self.framing_failed(Busy("too many large messages are on their way in", retry_after=COME_BACK))

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
        self._listener.disconnected(self)
        lost, self.on_lost = self.on_lost, None
        if lost is not None:
            lost()
