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
import logging
import os
import select
import socket
import struct
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, TypeVar

from acomm import socketpath
from acomm.connection import Connection, Peer
from acomm.errors import AddressInUse, BadRequest, Busy, Forbidden
from acomm.framing import DEFAULT_MAX_FRAME
from acomm.room import COME_BACK, PATIENCE, Room
from acomm.transport import Done
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

_MAX_TURNED_AWAY = 32
"""Connections beyond the limit that may yet send their message, to be told in its own spelling that there is
no room. More are told at once.
"""

_MAX_GETSOCKOPT = 1024  # bytes; Python's own limit, enough for 256 groups
_SO_PEERGROUPS = getattr(socket, "SO_PEERGROUPS", 59)


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
        """Let those who connected before our path was gone come in, to be closed by `connected`: asyncio
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

    def connected(self, conn: Connection, sock: socket.socket) -> None:
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
        room, error = self.room, Busy(crowd, retry_after=COME_BACK)
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

    def disconnected(self, conn: Connection) -> None:
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
    "send_conn_data",
    "unmarshal_conn_data",
]
