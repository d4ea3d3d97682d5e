"""The unix sockets: requests come in, and their acknowledgements leave in the same order."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import resource
from collections.abc import Iterable

import msgspec

from acomm.accepted import Accepted
from acomm.acks import ok_ack, salvage, stored_ack
from acomm.connection import Connection
from acomm.listener import UnixListener
from acomm.messages import RESERVED, Request, Response
from acomm.origin import Origin
from acomm.room import Room
from workers import descriptors
from workers.callers import GRACE
from workers.config import HTTP_CONNECTIONS, MAX_CONNECTIONS
from workers.errors import AcommError, BadRequest, ConfigError, UnknownTask, printable
from workers.offering import Service
from workers.provider import Provider

log = logging.getLogger("acomm.supervisor")
_quote = msgspec.json.encode


class UnixDoor:
    """Serves `service` at `config.socket`, and each of its tasks at a socket of its own where the settings
    say so. Raises ConfigError for settings that do not go together.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._config = service.config
        self.room: Room[Connection] = Room(
            self._config.max_connections, self._config.unread_bytes, self._config.share
        )
        self.listener = self._listen(self._config.socket)
        self.provider = Provider.of(self._config, service.registry, self._listen)
        self._graces: dict[Connection, asyncio.TimerHandle] = {}

    def _listen(self, path: str, task: str | None = None) -> UnixListener:
        """A listener for requests: for those for `task` alone, if one is named."""
        config = self._config
        return UnixListener(
            path,
            mode=config.socket_mode,
            allow_uids=config.allow_uid,
            allow_gids=config.allow_gid,
            max_frame=config.max_frame,
            on_message=functools.partial(self._message, only=task) if task else self._message,
            room=self.room,
        )

    @property
    def url(self) -> str:
        """Where requests are sent."""
        return self.listener.url

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return self.listener.connections + (self.provider.connections if self.provider else 0)

    async def start(self) -> None:
        """Listen. Raises AddressInUse, ConfigError; call `stop` then, too."""
        self._limit_connections()
        await self.listener.start()
        self._give_to_group(self._config.socket)
        if self.provider is not None:
            await self.provider.start()
            for path in self.provider.paths:
                self._give_to_group(path)

    def _limit_connections(self) -> None:
        """Take no more than there are descriptors for, so that accepting never fails for want of them."""
        wanted = self._config.max_connections
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        http = 0 if self._config.http is None else HTTP_CONNECTIONS
        taken = descriptors.connections(wanted, limit, workers=self._config.workers, others=http)
        if taken < wanted:
            # Who has not asked for a number wants to hear of it only if it is small.
            asked = wanted != MAX_CONNECTIONS or taken < MAX_CONNECTIONS // 10
            log.log(
                logging.WARNING if asked else logging.DEBUG,
                "at most %d connections are taken, and not %d (max_connections), as only %d descriptors may "
                "be open (ulimit -n)",
                taken,
                wanted,
                limit,
            )
        self.room.limit(taken)

    def _give_to_group(self, path: str) -> None:
        if self._config.socket_mode == 0o660:
            group = self._config.allow_gid[0]
            try:
                os.chown(path, -1, group)
            except OSError as error:
                raise ConfigError(
                    f"cannot give the socket {printable(path)} to group {group}: {error.strerror}"
                ) from None

    def listeners(self) -> list[UnixListener]:
        """All listeners: our own, then the provider's."""
        return [self.listener, *(self.provider.listeners.values() if self.provider else ())]

    async def follow(self, tasks: Iterable[str]) -> None:
        """Serve these tasks from now on; those that it had, if it raises AddressInUse or ConfigError."""
        if self.provider is not None:
            wanted = Provider.of(self._config, tasks, self._listen)
            assert wanted is not None
            for path in await self.provider.follow(wanted):
                self._give_to_group(path)

    def begin_draining(self) -> None:
        """Have coordinators go to others. Our own socket takes connections yet, to refuse their requests."""
        if self.provider is not None:
            self.provider.hide()

    async def stop(self) -> None:
        """Close the sockets and all connections."""
        while self._graces:
            self._graces.popitem()[1].cancel()
        if self.provider is not None:
            await self.provider.stop()
        await self.listener.stop(0)

    # -- requests -----------------------------------------------------------------------------------

    def _message(self, conn: Connection, data: bytes, only: str | None = None) -> None:
        """A message at the socket, or at that of the task `only`: acknowledge or refuse it."""
        raw = conn.raw
        ticket = conn.ticket()
        origin = Origin.unix(conn.peer.uid)
        try:
            request = Request.decode(data, raw=raw)
        except BadRequest as error:
            self._service.refused(error)
            id, wire, extended, hook = salvage(data, raw=raw)
            request = Request("?", id=id, response_hook=hook, wire=wire, extended=extended)
            self._refuse(conn, ticket, request, origin, error)
            return

        def decided(refusal: AcommError | None, accepted: Accepted | None = None, /) -> None:
            if refusal is not None:
                self._refuse(conn, ticket, request, origin, refusal)
            elif not raw:
                ack = self._ack(request, accepted)
                conn.acknowledge(ack, grants=request.extended, ticket=ticket)
                if request.task in self._service.registry.end_with_callers:
                    self._wait_for_answer(conn, request)

        if only is not None and request.task != only:
            refusal = UnknownTask(f"no task but {only} is served at this socket")
            self._service.refused(refusal)
            decided(refusal)
        else:
            self._service.offer(request, origin, decided, message=None if raw else data)

    def _ack(self, request: Request, accepted: Accepted | None) -> bytes:
        ack = ok_ack(_quote(request.id), request.wire, request.extended, accepted)
        if request.extended and self._config.journal is not None and not request.task.startswith(RESERVED):
            ack = stored_ack(ack)
        return ack

    def _wait_for_answer(self, conn: Connection, request: Request) -> None:
        """The call goes with its connection, if that is one that stays until the answer."""
        if not request.extended or request.detached or self._service.is_answered(request.id):
            return
        self._service.callers.add(request.id, conn)
        if conn.closed:
            self._lost(conn)  # while it was decided
        elif conn.on_lost is None:
            conn.on_lost = functools.partial(self._lost, conn)

    def _lost(self, conn: Connection) -> None:
        if conn not in self._graces:
            self._graces[conn] = asyncio.get_running_loop().call_later(GRACE, self._left, conn)

    def _left(self, conn: Connection) -> None:
        del self._graces[conn]
        self._service.caller_left(conn)

    def _refuse(
        self, conn: Connection, ticket: int, request: Request, origin: Origin, error: AcommError
    ) -> None:
        response = Response(request.id, error=error, extended=request.extended)
        if not conn.raw:
            ack = response.encode(request.wire, extended=request.extended)
            conn.acknowledge(ack, grants=request.extended, ticket=ticket)
        elif request.response_hook is not None:
            # Generation 1 has no acknowledgement: its refusal is the answer.
            self._service.tracker.delivery.post(request.response_hook, response, request.wire, origin=origin)
