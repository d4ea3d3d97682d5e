"""A supervisor in operation: new code without a pause, the way out, and the handing over to another."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Protocol

from acomm import socketpath
from acomm.errors import AcommError
from acomm.tracker import Tracker
from acomm.tracking import HANDLER_WAIT
from workers import service as process
from workers import successor, takeover
from workers.config import Config
from workers.errors import BadRequest, Conflict, ShuttingDown, printable
from workers.pool import Pool
from workers.recent import Recent
from workers.registry import Registry
from workers.reloading import Reloader
from workers.unixdoor import UnixDoor

log = logging.getLogger("acomm.supervisor")


class HTTPDoor(takeover.Listening, Protocol):
    """What this knows of the HTTP door."""

    def adopt(self, fd: int) -> None:
        """Listen at a socket that another has bound."""


class Service(Protocol):
    """What this knows of the supervisor. `errands` are under way for requests that it answers by itself."""

    config: Config
    pool: Pool
    tracker: Tracker
    recent: Recent
    unix: UnixDoor
    errands: set[asyncio.Task[None]]
    draining: bool
    ends_itself: bool

    @property
    def door(self) -> HTTPDoor | None: ...
    @property
    def registry(self) -> Registry: ...
    @property
    def unfinished(self) -> int: ...

    def begin_draining(self) -> None:
        """Take no more requests."""

    async def idle(self) -> None:
        """Wait until nothing is unfinished."""

    async def follow(self, registry: Registry) -> None:
        """Serve other tasks from now on."""


class Operation:
    """Of `service`. `leaving` is set when it is to end once it has `finished`."""

    def __init__(self, service: Service) -> None:
        self.leaving = asyncio.Event()
        self._service = service
        self._reloader = Reloader(service.pool, service.config.modules, service.follow)
        self._patience: float | None = None
        self._handing_over: takeover.HandOver | None = None
        self._handing: asyncio.Task[None] | None = None

    # -- new code -----------------------------------------------------------------------------------

    async def reload(self) -> dict[str, Any]:
        """Serve new code: load the task modules again, and replace the workers one after the other, while
        calls go on. Raises AcommError when the new code cannot be used, and serves the old; the log tells.
        """
        process.notify_reloading()
        try:
            if self._service.draining:
                raise ShuttingDown("the supervisor is stopping")
            await self._reloader.reload(self._service.registry)
        except AcommError as error:
            log.error("the reload failed; the old code is served: %s", printable(error, 2000))
            raise error from None
        except Exception:
            log.exception("the reload failed; the old code is served")
            raise AcommError("the supervisor failed at the reload; its log tells why") from None
        finally:
            process.notify("READY=1")
        registry = self._service.registry
        log.info("reloaded: %d tasks", len(registry))
        return {"tasks": list(registry), "reloads": self._reloader.reloads}

    # -- the way out --------------------------------------------------------------------------------

    def drain(self, timeout: float | None) -> dict[str, Any]:
        """Take no more requests, and end when all that was accepted is done and told, or after `timeout`
        seconds (None: however long that takes). What is left now.
        """
        if not self._service.ends_itself:
            raise BadRequest("this supervisor is part of a program, which has to end it")
        self._depart(timeout)
        self._service.begin_draining()
        return {"pid": os.getpid(), "unfinished": self._service.unfinished}

    def _depart(self, patience: float | None) -> None:
        """End when all is done, or after `patience` seconds."""
        self._patience = patience
        self._service.draining = True
        self.leaving.set()

    async def finished(self) -> bool:
        """Wait until all that was accepted is done and its hooks know; False if the patience of who has asked
        for that is at its end.
        """
        service = self._service
        try:
            async with asyncio.timeout(self._patience):
                while service.unfinished or service.errands:
                    if service.errands:
                        await asyncio.wait(service.errands)
                    await service.idle()
                await service.tracker.finish(HANDLER_WAIT)
                await service.tracker.delivery.drained()
        except TimeoutError:
            return False
        return True

    # -- we give ------------------------------------------------------------------------------------

    def hand_over(self, path: str, journal: str | None) -> dict[str, Any]:
        """Give our sockets to the supervisor that listens at `path`, and end when all is done. Raises
        Conflict when it has another journal, or another takes over already.
        """
        service = self._service
        if not service.ends_itself:
            raise BadRequest("this supervisor is part of a program, which has to end it")
        if service.draining:
            raise ShuttingDown("the supervisor is stopping")
        if self._handing_over is not None:
            raise Conflict("another supervisor takes over just now")
        takeover.check(service.config.journal, journal)
        self._handing_over = takeover.HandOver(_Old(service, self._rest, self._depart))
        self._handing = asyncio.get_running_loop().create_task(self._hand_over(self._handing_over, path))
        return {"pid": os.getpid()}

    async def _hand_over(self, handing: takeover.HandOver, path: str) -> None:
        try:
            await handing.run(path)
        except Exception:
            log.exception("handing over failed")
        if not handing.given:
            self._handing_over = None

    async def _rest(self, gone: asyncio.Event) -> bool:
        """Take no more, and let what runs end within the time for that. False, and we go on, when `gone` is
        set before.
        """
        service = self._service
        service.draining = True
        waiting = [asyncio.ensure_future(service.idle()), asyncio.ensure_future(gone.wait())]
        timeout = service.config.drain_timeout
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()
        if gone.is_set():
            service.draining = False
        return not gone.is_set()

    async def end_handing_over(self) -> None:
        """We end: break off a handing over."""
        if self._handing is not None and not self._handing.done():
            self._handing.cancel()
            await asyncio.wait({self._handing})
        if self._handing_over is not None:
            await self._handing_over.abandon()

    async def bye(self) -> None:
        """Tell who has taken over that all that we had is done, or in a journal that we have closed."""
        if self._handing_over is not None:
            await self._handing_over.bye()

    # -- we take ------------------------------------------------------------------------------------

    async def take_over(self) -> successor.Offer | None:
        """Have the sockets of the supervisor that is there, if one is."""
        config = self._service.config
        offer = await successor.ask(config.socket, config.journal)
        if offer is not None:
            await offer.agreed()
            self._adopt(offer)
        return offer

    def _adopt(self, offer: successor.Offer) -> None:
        ours = {os.path.abspath(listener.addr): listener for listener in self._service.unix.listeners()}
        for path, fds in offer.unix.items():
            if path in ours:
                ours[path].adopt(fds)
            else:  # a task that is not served any more
                socketpath.adopt(path, 0o600, fds).release()
        if offer.http is not None:
            if self._service.door is not None:
                self._service.door.adopt(offer.http)
            else:
                os.close(offer.http)

    def leave_sockets(self) -> None:
        """Leave the sockets to who has given them: we cannot start."""
        for listener in self._service.unix.listeners():
            listener.give_away()
        if self._service.door is not None:
            self._service.door.give_away()

    def follow(self, offer: successor.Offer) -> None:
        """We serve: learn what the one before us has taken, until it is done."""
        errands = self._service.errands
        following = asyncio.get_running_loop().create_task(offer.follow(_Ids(self._service.recent)))
        errands.add(following)
        following.add_done_callback(errands.discard)


class _Ids:
    """The ids that we know, for who takes over from us, and from who was before us."""

    def __init__(self, recent: Recent) -> None:
        self._recent = recent

    def export(self) -> list[tuple[str, bytes]]:
        return self._recent.export()

    def inherit(self, ids: Iterable[tuple[str, bytes]]) -> None:
        self._recent.inherit(ids)

    def inheritance_ended(self, done: bool) -> None:
        self._recent.inheritance_ended(time.monotonic(), done=done)


class _Old:
    """We, for who takes over from us."""

    def __init__(
        self,
        service: Service,
        rest: Callable[[asyncio.Event], Awaitable[bool]],
        depart: Callable[[float | None], None],
    ) -> None:
        self._service = service
        self._depart = depart
        self.listeners = service.unix.listeners
        self.rest = rest

    def http(self) -> HTTPDoor | None:
        return self._service.door

    def ids(self) -> _Ids | None:
        return None if self._service.config.journal is not None else _Ids(self._service.recent)

    def depart(self) -> None:
        self._depart(None if self._service.config.journal is None else 0.0)
