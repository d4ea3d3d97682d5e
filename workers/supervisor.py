"""The supervisor: takes requests at its socket, has them run, runs their handlers, answers their hooks.

    unix sockets, HTTP --> offer --> Pool.submit        every refusal is the acknowledgement's
                             |
                             +--> Recent, Tracker.track
    Pool.process_events --> _ended --> Tracker.settle --> handlers --> hook

One event loop does all of it; only handlers run in threads. What is accepted is on the Tracker's table
until its outcome, so that it is answered exactly once, whatever happens to workers meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import functools
import inspect
import logging
import math
import os
import resource
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from acomm import handlers, socketpath, streamsocket
from acomm.accepted import Accepted
from acomm.egress import Policy
from acomm.errors import AcommError
from acomm.messages import RESERVED, Request, Response
from acomm.origin import Origin
from acomm.tracker import HANDLER_WAIT, Tracker
from acomm.urls import unix_path, unix_url
from workers import service, takeover
from workers.admission import Account, Admission
from workers.callers import Callers
from workers.calls import Call, Outcome, StreamPlace
from workers.config import Config
from workers.ending import Graces
from workers.errors import (
    BadRequest,
    Busy,
    CallCancelled,
    ConfigError,
    Conflict,
    Forbidden,
    ShuttingDown,
    UnknownTask,
    printable,
)
from workers.forecast import Forecast
from workers.handlerthreads import HandlerThreads
from workers.journal import Journal
from workers.journalfile import JournalFile, Row
from workers.lanes import UNLIMITED
from workers.pool import CallInfo, Pool, WorkerInfo
from workers.recent import Recent, digest
from workers.registry import Registry, Task
from workers.reloading import Reloader
from workers.stored import Left, Recovery, StoredRequests
from workers.unixdoor import Decided, UnixDoor
from workers.verbs import Verbs

if TYPE_CHECKING:
    from workers.door import Door

log = logging.getLogger("acomm.supervisor")

START_TIMEOUT = 60.0
LAST_POSTS = 1.0
"""Seconds that a stopping supervisor gives its last responses to reach their hooks."""

_AFTER_FAULT = 0.1
"""Seconds of pause after a fault of our own: it may come at once again."""

_SWITCH = 0.0005
"""Seconds after which a thread gives the interpreter to another that waits for it."""

_GAP_LASTS = 0.01
"""Seconds for which an estimate of how fast calls end is good."""

_GIVE_UP_AFTER = 24 * 3600.0
"""Seconds after which a stored answer that its hook does not take is a dead letter."""

_ADMITTED_FOR = 1.0
_MAX_ADMITTED = 4096
"""Seconds, and URLs, for which a URL that the policy has let pass is not looked at again."""

_INTERNAL = "the supervisor failed at this request; its log tells why"

_quote = msgspec.json.encode

Resolve = Callable[[Response], None]


class Examined(NamedTuple):
    """A request that may be done, and its digest: by a `task` of ours, whose call has this `key`, or by the
    service at its task URL. `size` is that of its arguments, which count for `account`.
    """

    request: Request
    content: bytes
    origin: Origin
    account: Account
    size: int
    resolve: Resolve | None = None
    task: Task[..., Any] | None = None
    key: bytes | None = None


class Supervisor:
    """Serves the tasks of `modules` with a pool of worker processes.

        async with Supervisor("app.tasks", workers=2, socket="/run/app/acomm.sock"):
            ...
        Supervisor("app.tasks").run()      # until SIGTERM or SIGINT

    The settings are those of `Config`. Raises ConfigError for what cannot be served, AddressInUse when
    another supervisor is alive at the socket.
    """

    def __init__(self, *modules: str, **settings: Any) -> None:
        config = settings.pop("config", None)
        self.config: Config = config or Config.load({"modules": modules or None, **settings}, environ={})
        if not self.config.modules:
            raise ConfigError("no modules: name at least one that has tasks")
        self.registry = Registry.from_modules(self.config.modules)
        self.pool = Pool(
            self.registry.modules,
            self.registry.paths,
            workers=self.config.workers,
            min_workers=self.config.min_workers,
            # A response is a frame too, and its envelope wants some room.
            max_result=self.config.max_frame - 512,
            place=_place(self.config),
            allow_hook=self.config.allow_hook,
            url=unix_url(os.path.abspath(self.config.socket)),
            max_tasks_per_child=self.config.max_tasks_per_child,
            max_worker_growth=self.config.max_worker_growth,
            graces=Graces(term=self.config.term_grace),
            capture=self.config.capture,
            coroutines=self.config.coroutines,
        )
        self._executor = HandlerThreads()
        self.policy = Policy(self.config.allow_hook)
        self.tracker = Tracker(executor=self._executor, policy=self.policy)
        self.admission = Admission(self.config.max_queued, self.config.max_queued_bytes, self.config.share)
        self._forecast = Forecast()
        self.stored: StoredRequests | None = None
        self._left = False
        self._known_gap: tuple[float | None, float] = (None, 0.0)
        self._recovery: Recovery | None = None
        self._recovering: asyncio.Task[None] | None = None
        self.failed = asyncio.Event()
        self.failure: str | None = None
        self.callers = Callers()
        self.unix = UnixDoor(self)
        self.draining = False
        self.door = self._make_door()
        self._recent = Recent()
        self._calls: dict[str, Call] = {}
        self._forwarded: set[str] = set()
        self._admitted: dict[tuple[str, Origin], float] = {}
        self._streams: dict[str, Call] = {}  # answered, and still under way
        self._stream_ends: Counter[str] = Counter()
        self._verbs = Verbs(self)
        self._errands: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()
        self._drive_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._idle: asyncio.Event | None = None
        self._released = False
        self._started_at = time.monotonic()
        self._reloader = Reloader(self.pool, self.config.modules, self._follow)
        self.leaving = asyncio.Event()
        self._patience: float | None = None
        self._handing_over: takeover.HandOver | None = None
        self._handing: asyncio.Task[None] | None = None
        self.takes_over = False  # set before `start`: take the place of the one that is there
        self.ends_itself = False  # set by who runs it until it is `leaving`

    def __repr__(self) -> str:
        return f"<Supervisor {self.config.socket}, {self.pool!r}>"

    @property
    def url(self) -> str:
        """Where requests are sent."""
        return self.unix.url

    def _make_door(self) -> Door | None:
        if self.config.http is None:
            for name in ("http_url", "http_token_file", "http_no_token", "http_host"):
                if getattr(self.config, name):
                    raise ConfigError(f"{name} is given, but no http: name a HOST:PORT, or leave it out")
            return None
        from workers.door import Door  # HTTP takes long to import, and most do without

        return Door(self)

    # -- life ---------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the workers, then the socket: whoever finds the socket is served. Raises ConfigError,
        AddressInUse.
        """
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        if self.config.journal is not None and not self.takes_over:
            self._open_journal(self.config.journal)
        try:
            self.pool.start()
        except BaseException:
            await self._close_journal()
            raise
        offer: takeover.Offer | None = None
        try:
            await self._workers_ready()
            await self.tracker.start()
            offer = await self._take_over() if self.takes_over else None
            if self.door is not None:
                await self.door.start()
            await self.unix.start()
        except BaseException:
            if offer is not None:
                self._leave_sockets()  # the old one goes on with them
            await self.unix.stop()
            if self.door is not None:
                await self.door.close(0)
            await self.tracker.stop(0)
            await self._close_journal()
            self._release()
            raise
        if offer is not None:
            following = self._loop.create_task(offer.follow(_Ids(self._recent)))
            self._errands.add(following)
            following.add_done_callback(self._errands.discard)
        if self.stored is not None:
            self._recovery = Recovery(
                self.stored, self.take_up, lambda: self.tracker.delivery.pending, self.pool.size
            )
            self._recovering = self._loop.create_task(self._recover(self._recovery))

    async def _take_over(self) -> takeover.Offer | None:
        """Have the sockets of the supervisor that is there, if one is, and open the journal."""
        offer = await takeover.ask(self.config.socket, self.config.journal)
        if offer is not None:
            await offer.agreed()
            self._adopt(offer)
        if self.config.journal is not None:
            self._open_journal(self.config.journal)
        return offer

    def _adopt(self, offer: takeover.Offer) -> None:
        ours = {os.path.abspath(listener.addr): listener for listener in self.unix.listeners()}
        for path, fds in offer.unix.items():
            if path in ours:
                ours[path].adopt(fds)
            else:  # a task that is not served any more
                socketpath.adopt(path, 0o600, fds).release()
        if offer.http is not None:
            if self.door is not None:
                self.door.adopt(offer.http)
            else:
                os.close(offer.http)

    def _leave_sockets(self) -> None:
        for listener in self.unix.listeners():
            listener.give_away()
        if self.door is not None:
            self.door.give_away()

    def _open_journal(self, path: str) -> None:
        file = JournalFile(path, full=self.config.durability == "power")
        journal = Journal(file, self._journal_failed)
        self.stored = StoredRequests(journal)
        self.tracker.delivery.give_up_after = _GIVE_UP_AFTER
        journal.start()
        # Its thread is away from the interpreter for a commit, and else would have to ask for it back for
        # as long as this says.
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH))

    async def _close_journal(self) -> None:
        if self._recovering is not None:
            self._recovering.cancel()
            await asyncio.wait({self._recovering})
        if self.stored is not None:
            await self.stored.journal.close()

    async def _recover(self, recovery: Recovery) -> None:
        try:
            await recovery.run()
        except sqlite3.Error as error:
            self._journal_failed(str(error))
        except Exception:
            log.exception("what earlier supervisors have left could not be taken up")

    async def _workers_ready(self) -> None:
        ready = asyncio.Event()

        def look() -> None:
            self._drive()
            if self.pool.ready >= self.pool.wanted or self.pool.failure or not self.pool.healthy:
                ready.set()

        self._loop.add_reader(self.pool.fileno(), look)
        try:
            await asyncio.wait_for(ready.wait(), START_TIMEOUT)
        except TimeoutError:
            if not self.pool.ready:
                raise ConfigError(f"no worker was ready within {START_TIMEOUT:g} seconds") from None
        if self.pool.failure is not None:
            raise ConfigError(f"the workers cannot start: {self.pool.failure}")
        if not self.pool.healthy:
            raise ConfigError("the workers die while they start; their stderr tells why")
        self._loop.add_reader(self.pool.fileno(), self._drive)

    async def stop(self, drain_timeout: float | None = None) -> None:
        """Refuse new requests, finish those that were accepted within `drain_timeout` seconds (None: as
        configured), answer the rest with `shutting_down`, break off the streams that are left, and end.
        """
        if self._released:
            return
        if drain_timeout is None:
            drain_timeout = self.config.drain_timeout
        await self._end_handing_over()
        self.begin_draining()
        deadline = self._loop.time() + drain_timeout
        assert self._idle is not None
        if self.unfinished and drain_timeout > 0:
            self._idle.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._idle.wait(), drain_timeout)
        await self._leave_stored()
        for id in list(self._calls):
            self._end(id, Response(id, error=ShuttingDown("the supervisor stopped before the task ended")))
        for id in list(self._forwarded):
            error = ShuttingDown("the supervisor stopped before the other service answered")
            self.tracker.settle(Response(id, error=error))
        for id in list(self._streams):
            self._end_stream(id, ShuttingDown("the supervisor stopped before the stream ended"))
        deadline = max(deadline, self._loop.time() + LAST_POSTS)
        await self.tracker.finish(deadline - self._loop.time() - LAST_POSTS / 2)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.tracker.delivery.drained(), LAST_POSTS / 2)
        await self.unix.stop()
        if self.door is not None:
            await self.door.close(LAST_POSTS if drain_timeout else 0.0)
        await self.tracker.stop(0)
        try:
            await self._stop_workers()
        finally:
            try:
                await self._close_journal()
                if self._handing_over is not None:
                    await self._handing_over.bye()
            finally:
                self._release()

    async def _leave_stored(self) -> None:
        """Leave what is stored to the next supervisor; it was no death, and does not count as one."""
        if self.stored is None:
            return
        if self._recovering is not None:
            self._recovering.cancel()
            await asyncio.wait({self._recovering})
        self._left = True
        # Those whose answer waits for its commit, too: it is for the next one to tell.
        for id in [id for id in self.stored if self.tracker.tracked(id) is not None]:
            self.tracker.remove_request(id)
            self.stored.leave(id)
            self._calls.pop(id, None)
            self._forwarded.discard(id)
        if self._recovery is not None and (rows := self._recovery.left()):
            journal = self.stored.journal
            if journal.broken is None:
                with contextlib.suppress(sqlite3.Error):
                    await journal.ask(journal.file.put_back, rows)

    def begin_draining(self) -> None:
        self.draining = True
        self.unix.begin_draining()

    # -- operation ----------------------------------------------------------------------------------

    async def reload(self) -> dict[str, Any]:
        """Serve new code: load the task modules again, and replace the workers one after the other, while
        calls go on. Raises AcommError when the new code cannot be used, and serves the old; the log tells.
        """
        service.notify_reloading()
        try:
            if self.draining:
                raise ShuttingDown("the supervisor is stopping")
            await self._reloader.reload(self.registry)
        except Exception as error:
            if not isinstance(error, AcommError):
                log.exception("the reload failed; the old code is served")
                error = AcommError(_INTERNAL)
            else:
                log.error("the reload failed; the old code is served: %s", printable(error, 2000))
            raise error from None
        finally:
            service.notify("READY=1")
        log.info("reloaded: %d tasks", len(self.registry))
        return {"tasks": list(self.registry), "reloads": self._reloader.reloads}

    async def _follow(self, registry: Registry) -> None:
        await self.unix.follow(registry)
        self.registry = registry

    def drain(self, timeout: float | None) -> dict[str, Any]:
        """Take no more requests, and end when all that was accepted is done and told, or after `timeout`
        seconds (None: however long that takes). What is left now.
        """
        if not self.ends_itself:
            raise BadRequest("this supervisor is part of a program, which has to end it")
        self._patience = timeout
        self.begin_draining()
        self.leaving.set()
        return {"pid": os.getpid(), "unfinished": self.unfinished}

    def hand_over(self, path: str, journal: str | None) -> dict[str, Any]:
        """Give our sockets to the supervisor that listens at `path`, and end when all is done. Raises
        Conflict when it has another journal, or another takes over already.
        """
        if not self.ends_itself:
            raise BadRequest("this supervisor is part of a program, which has to end it")
        if self.draining:
            raise ShuttingDown("the supervisor is stopping")
        if self._handing_over is not None:
            raise Conflict("another supervisor takes over just now")
        takeover.check(self.config.journal, journal)
        self._handing_over = takeover.HandOver(_Old(self))
        errand = self._loop.create_task(self._hand_over(self._handing_over, path))
        self._handing = errand
        return {"pid": os.getpid()}

    async def _hand_over(self, handing: takeover.HandOver, path: str) -> None:
        try:
            await handing.run(path)
        except Exception:
            log.exception("handing over failed")
        if not handing.given:
            self._handing_over = None

    async def _end_handing_over(self) -> None:
        if self._handing is not None and not self._handing.done():
            self._handing.cancel()
            await asyncio.wait({self._handing})
        if self._handing_over is not None:
            await self._handing_over.abandon()

    async def rest(self, gone: asyncio.Event) -> bool:
        """Take no more, and let what runs end within the time for that. False, and we go on, when `gone` is
        set before.
        """
        assert self._idle is not None
        self.draining = True
        self._idle.clear()
        self._look_idle()
        waiting = [asyncio.ensure_future(event.wait()) for event in (self._idle, gone)]
        timeout = self.config.drain_timeout
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for each in waiting:
            each.cancel()
        if gone.is_set():
            self.draining = False
        return not gone.is_set()

    def depart(self, patience: float | None) -> None:
        """End when all is done, or after `patience` seconds."""
        self._patience = patience
        self.draining = True
        self.leaving.set()

    async def finished(self) -> bool:
        """Wait until all that was accepted is done and its hooks know; False if the patience of who has asked
        for that is at its end.
        """
        assert self._idle is not None
        try:
            async with asyncio.timeout(self._patience):
                while self.unfinished or self._errands:
                    if self._errands:
                        await asyncio.wait(self._errands)
                    self._idle.clear()
                    self._look_idle()
                    await self._idle.wait()
                await self.tracker.finish(HANDLER_WAIT)
                await self.tracker.delivery.drained()
        except TimeoutError:
            return False
        return True

    async def _stop_workers(self) -> None:
        """Let the workers exit by themselves; those that still run something are killed with the pool."""
        self.pool.stop_workers()
        gone = asyncio.Event()

        def look() -> None:
            self.pool.process_events()
            if not self.pool.alive:
                gone.set()

        self._loop.add_reader(self.pool.fileno(), look)
        look()
        if not self.pool.dispatcher.assigned:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(gone.wait(), LAST_POSTS)

    def _release(self) -> None:
        self._released = True
        for timer in (self._timer, self._pause):
            if timer is not None:
                timer.cancel()
        self._timer = self._pause = None
        self._loop.remove_reader(self.pool.fileno())
        self.pool.close()
        self._executor.shutdown(wait=False)

    async def __aenter__(self) -> Supervisor:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.stop()

    def run(self, ready: Callable[[Supervisor], None] | None = None, *, until_eof: bool = False) -> None:
        """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once. `ready(self)` is called
        when requests are taken. `until_eof` stops likewise when standard input ends, as it does when the
        program at its other end dies.
        """
        self.ends_itself = True
        service.run(self, (lambda: ready(self)) if ready is not None else lambda: None, until_eof=until_eof)

    # -- requests -----------------------------------------------------------------------------------

    def offer(
        self,
        request: Request,
        origin: Origin,
        decided: Decided,
        resolve: Resolve | None = None,
        message: bytes | None = None,
    ) -> None:
        """Take a request of `origin`: `decided` is told when it was accepted, or why it was refused. What was
        accepted will be answered, at its hook and by `resolve(response)`. `message` is what `Request.decode`
        alone has made the request from, if it was: it need not be encoded again to be stored.
        """
        accepted = None
        try:
            examined = self._examine(request, origin, resolve)
            if examined is not None:
                self.admission.take(examined.account, examined.size)
                # Who waits for the answer itself has been promised nothing until it comes.
                if self.stored is not None and resolve is None:
                    self._store(self.stored, examined, decided, message)
                    return
                accepted = self._standing(examined)
                self._begin(examined)
        except Exception as error:
            if not isinstance(error, AcommError):
                log.exception("a request could not be taken")
                error = AcommError(_INTERNAL)
            self.refused(error)
            decided(error)
        else:
            decided(None, accepted)

    def refused(self, error: AcommError) -> None:
        """Count a refusal."""
        self._counts[error.code] += 1

    def unready(self) -> str | None:
        """Why no work is taken now; None if it is."""
        if self.draining:
            return "draining"
        return None if self.pool.healthy else "unhealthy: the workers die while they start"

    def _examine(self, request: Request, origin: Origin, resolve: Resolve | None) -> Examined | None:
        """What is to be begun for a request; None if that is answered already. Raises the AcommError of its
        refusal, in which case nothing was done.
        """
        self._check_urls(request, origin)
        if request.task.startswith(RESERVED):
            self._answer_verb(request, origin, resolve)
            return None
        content = digest(request)
        now = time.monotonic()
        known = self._recent.known(request.id, now)
        if known is not None:
            self._repeated(request, known == content, origin, resolve)
            return None
        if self.draining:
            raise ShuttingDown("the supervisor is stopping")
        if request.id in self._streams:  # which may outlast what is remembered of it
            raise Conflict(f"the id {printable(request.id)} belongs to a stream that has not ended")
        # Before the arguments are looked into: to say no should cost little.
        account = self.admission.account(origin)
        size = _size(request)
        self.admission.check(account, size, now, functools.partial(self._gap, now))
        if request.task_url is not None and request.task_url != self.url:
            self._check_forward(request, resolve)
            return Examined(request, content, origin, account, size, resolve)
        task, key = self._check_call(request, origin)
        if task.streams and resolve is None and (request.response_hook is None or request.wire == 1):
            raise BadRequest(
                f"task {task.name} streams, and nobody could learn where: "
                "send a response hook, in generation 2 or 3"
            )
        if not self.pool.healthy:
            raise Busy("the workers die while they start; see the supervisor's log", retry_after=10.0)
        return Examined(request, content, origin, account, size, resolve, task, key)

    def _check_call(self, request: Request, origin: Origin) -> tuple[Task[..., Any], bytes | None]:
        """The task of a request, and its call's key. Raises UnknownTask, BadArgs, and for handlers what does
        not let them run here.
        """
        task = self._task(request.task)
        self._check_handlers(request, origin)
        # A stream that a request brings is an argument, too, and nobody else's.
        key = None if task.key is None or request.stream_url else task.call_key(request.args)
        if key is None:
            task.check_args(request.args)
        return task, key

    def _begin(self, examined: Examined) -> None:
        """Have a request done that has been counted. Raises AcommError when it cannot be begun; then it does
        not count any more.
        """
        request, content, origin, account, size, resolve, task, key = examined
        call = None
        try:
            if task is None:
                self._forward(examined)
            else:
                call = _call(request, task, origin, key)
                call.account = account
                self.pool.submit(call)
                self._track(request, origin, resolve)
        except BaseException:
            self.admission.release(account, size)
            raise
        if call is not None:
            self._calls[request.id] = call
            self._counts["accepted"] += 1
            if key is not None and call.run is not None and len(call.run.sharers or ()) > 1:
                self._counts["joined"] += 1
            if not self._drive_due:
                self._drive_due = True
                self._loop.call_soon(self._drive)
        self._recent.begin(request.id, content)

    def _standing(self, examined: Examined) -> Accepted | None:
        """Where a request stands that is to be begun now; None if its sender is not to know, or there is
        nothing to tell.
        """
        request, task = examined.request, examined.task
        if task is None or not request.extended:
            return None
        dispatcher = self.pool.dispatcher
        ahead = dispatcher.ahead(request.priority or task.priority)
        if not ahead and dispatcher.assigned < self.pool.ready:
            return Accepted(0, 0.0)
        if examined.key is not None and dispatcher.runs_now(task.name, examined.key):
            return Accepted(0, 0.0)
        gap = self._gap(time.monotonic(), task.name)
        return Accepted(ahead, None if gap is None else (ahead + 1) * gap)

    def _gap(self, now: float, task: str | None = None) -> float | None:
        """Seconds from one end of a call to the next, None if that is not known; a call of `task` is the
        last.
        """
        gap, until = self._known_gap
        if gap is None or now >= until:  # it is asked for with each request, and does not change so fast
            gap = self._forecast.gap(now, functools.partial(self._predict, task))
            self._known_gap = gap, now + _GAP_LASTS
        return gap

    def _predict(self, task: str | None) -> float | None:
        """The same by the run times of the tasks whose calls wait."""
        dispatcher, workers = self.pool.dispatcher, max(self.pool.ready, 1)
        if dispatcher.queued:
            _, seconds = dispatcher.backlog()
            if seconds:
                return seconds / dispatcher.queued / workers
        seconds_each = None if task is None else dispatcher.predicted(task)
        return None if seconds_each is None else seconds_each / workers

    def _track(self, request: Request, origin: Origin, resolve: Resolve | None = None) -> None:
        self.tracker.track(
            request,
            proxied=True,
            resolve=resolve,
            unpickle=True,
            origin=origin,
            delivered=self._on_delivered(request.id),
        )

    # -- what is stored -----------------------------------------------------------------------------

    def _store(
        self, stored: StoredRequests, examined: Examined, decided: Decided, message: bytes | None
    ) -> None:
        """Have a request stored that has been counted, and begun when it is."""

        def done(outcome: Row | AcommError | None) -> None:
            if outcome is None:
                decided(None, self._standing(examined))
                if not self._left:
                    self._begin_stored(examined)
                return
            self.admission.release(examined.account, examined.size)
            refusal: AcommError | None = None
            if isinstance(outcome, AcommError):
                refusal = outcome
            elif outcome.digest != examined.content:
                refusal = Conflict(f"the id {printable(outcome.id)} was used for another request")
            else:
                self._counts["repeated"] += 1
            if refusal is not None:
                self.refused(refusal)
            self._look_idle()
            decided(refusal)

        stored.store(examined.request, examined.content, examined.origin, done, message)

    def _begin_stored(self, examined: Examined) -> None:
        """Begin what has been acknowledged: what goes wrong now is its answer."""
        request = examined.request
        try:
            self._begin(examined)
        except Exception as error:
            if not isinstance(error, AcommError):
                log.exception("a request could not be begun")
                error = AcommError(_INTERNAL)
            self._answer_unbegun(request, examined.origin, Response.to(request, error=error))

    def _answer_unbegun(self, request: Request, origin: Origin, response: Response) -> None:
        self._track(request, origin)
        self._answer(response)

    def take_up(self, left: Left) -> None:
        """Begin, or answer, what an earlier supervisor has left."""
        request, origin, response = left
        if response is not None:
            self._track(request, origin)
            if response.error is not None and response.error.code == "poisoned":
                self._answer(response)
            else:
                self._told(response)
            return
        task, key = None, None
        if request.task_url is None or request.task_url == self.url:
            try:
                task, key = self._check_call(request, origin)
            except AcommError as error:
                self._answer_unbegun(request, origin, Response.to(request, error=error))
                return
        # It was accepted when there was room for it, and counts now however little there is.
        account, size = self.admission.account(origin), _size(request)
        self.admission.take(account, size)
        self._begin_stored(Examined(request, digest(request), origin, account, size, None, task, key))

    def _on_delivered(self, id: str) -> Callable[[AcommError | None], None] | None:
        return None if self.stored is None else functools.partial(self.stored.delivered, id)

    def _journal_failed(self, text: str) -> None:
        """Nothing can be promised any more, and what was promised is for the next supervisor."""
        log.critical("the journal %s cannot be trusted any more: %s", self.config.journal, text)
        self.failure = (
            f"the journal {self.config.journal} has failed: {text}; what it holds is taken up again"
        )
        self.draining = True
        self.failed.set()

    def _check_urls(self, request: Request, origin: Origin) -> None:
        """Refuse what the policy does not let `origin` name. It is asked again when we connect; here it is
        so that the requester learns of it, and what has passed a moment ago passes.
        """
        for what, url in (
            ("the hook", request.response_hook),
            ("the task URL", request.task_url if request.task_url != self.url else None),
            ("the stream URL", request.stream_url),
        ):
            if url is None or self.tracker.channels.connected(url, origin):
                continue
            now = time.monotonic()
            if self._admitted.get((url, origin), 0.0) < now:
                self.policy.admit(url, origin, what)
                if len(self._admitted) >= _MAX_ADMITTED:
                    self._admitted.clear()
                self._admitted[url, origin] = now + _ADMITTED_FOR

    def _check_forward(self, request: Request, resolve: Resolve | None) -> None:
        """Raises BadRequest for what cannot be passed on to another service."""
        if request.handlers is not None:
            raise BadRequest("a request for another service cannot bring handlers")
        if request.response_hook is None and resolve is None:
            raise BadRequest("a request for another service needs a response hook")
        if unix_path(request.task_url or "") is None and self.tracker.external_proxy_url is None:
            raise BadRequest(
                "a task URL over HTTP needs a supervisor with --http, where the answer can come in"
            )

    def _forward(self, examined: Examined) -> None:
        """Have the service at the request's task URL do it; the answer comes through us."""
        request, account, size, resolve = examined.request, examined.account, examined.size, examined.resolve

        def answered(response: Response) -> None:
            self._forwarded.discard(request.id)
            self.admission.release(account, size)
            self._finished(response)
            if resolve is not None:
                resolve(response)

        timeout = self.config.forward_timeout if request.timeout is None else request.timeout
        self.tracker.forward(
            request,
            timeout,
            origin=examined.origin,
            resolve=answered,
            delivered=self._on_delivered(request.id),
        )
        self._forwarded.add(request.id)
        self._counts["forwarded"] += 1

    def _task(self, name: str) -> Task[..., Any]:
        task = self.registry.get(name)
        if task is not None:
            return task
        near = difflib.get_close_matches(name, self.registry, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownTask(f"no task {printable(name)} is served here{hint}")

    def _check_handlers(self, request: Request, origin: Origin) -> None:
        if request.handlers is None:
            return
        if not origin.local:
            raise Forbidden("handlers are taken from the supervisor's own user only")
        handlers.check_versions(request.handlers.python, request.handlers.dill)

    def _repeated(self, request: Request, same: bool, origin: Origin, resolve: Resolve | None) -> None:
        """An id that was seen before: acknowledged again if it is the same request, else a conflict."""
        answer = self._recent.answer(request.id)
        if not same or (resolve is not None and answer is None):
            raise Conflict(f"the id {printable(request.id)} was used for another request")
        self._counts["repeated"] += 1
        if answer is not None and resolve is not None:
            resolve(answer)
        if answer is not None:
            self.tracker.deliver(request, answer, origin)

    # -- outcomes -----------------------------------------------------------------------------------

    def _drive(self) -> None:
        """Let the pool do what it can, and answer what has ended."""
        self._drive_due = False
        if self._released or self._pause is not None:
            return
        try:
            for outcome in self.pool.process_events():
                self._ended(outcome)
            self._set_timer()
        except Exception:
            self._pool_failed()

    def _pool_failed(self) -> None:
        """The pool has a fault. Answer the calls that had ended when it struck, as their outcomes are lost,
        and go on in a moment.
        """
        log.exception("the pool failed")
        for id in [id for id, call in self._calls.items() if call.settled or call.streaming]:
            self._end(id, Response(id, error=AcommError(_INTERNAL)))
        for id in [id for id, call in self._streams.items() if call.settled]:
            self._end_stream(id, AcommError(_INTERNAL))
        self._loop.remove_reader(self.pool.fileno())
        self._pause = self._loop.call_later(_AFTER_FAULT, self._drive_on)

    def _drive_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self.pool.fileno(), self._drive)
        self._drive()

    def _set_timer(self) -> None:
        when = self.pool.next_deadline()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when is not None:
            self._timer = self._loop.call_later(max(when - time.monotonic(), 0.0), self._drive)

    def _ended(self, outcome: Outcome) -> None:
        request: Request = outcome.call.tag
        if outcome.stream is not None:
            self._began_to_stream(request, outcome.call, outcome.stream)
        elif outcome.call.streaming:
            self._end_stream(request.id, outcome.error)
        else:
            result = None if outcome.result is None else msgspec.Raw(outcome.result)
            self._end(request.id, Response(request.id, result, outcome.error, extended=request.extended))

    def _end(self, id: str, response: Response) -> None:
        call = self._calls.pop(id, None)
        if call is None:
            return
        if id not in self._streams:  # else it has only begun
            self._count_out(call)
        if self.callers.waiting:
            self.callers.ended(id)
        self._answer(response)

    def _count_out(self, call: Call) -> None:
        """A call has ended, and there is room for another."""
        self.admission.release(call.account, 0 if call.args is None else len(call.args))
        self._forecast.ended(time.monotonic(), self.pool.dispatcher.queued > 0)

    def _answer(self, response: Response) -> None:
        """Tell the answer to a request; when it is stored, if that is."""
        if self.stored is None or not self.stored.answer(response, functools.partial(self._told, response)):
            self._told(response)

    def _told(self, response: Response) -> None:
        if self._left and self.stored is not None and self.tracker.tracked(response.id) is None:
            return
        try:
            self._finished(response)
            self.tracker.settle(response)
        except Exception:
            log.exception("the answer to the request %s could not be passed on", printable(response.id))

    def _finished(self, response: Response) -> None:
        """A request has its answer."""
        if self._recovery is not None:
            self._recovery.ended(response.id)
        self._look_idle()
        self._counts["ok" if response.error is None else response.error.code] += 1
        self._recent.finish(response, time.monotonic())

    @property
    def unfinished(self) -> int:
        """What was accepted and has not ended: calls here, those passed on, and streams."""
        journal = 0 if self.stored is None else self.stored.storing + self.stored.answering
        return len(self._calls) + len(self._forwarded) + len(self._streams) + journal

    def _look_idle(self) -> None:
        if not self.unfinished and self._idle is not None:
            self._idle.set()

    # -- streams ------------------------------------------------------------------------------------

    def _began_to_stream(self, request: Request, call: Call, url: str) -> None:
        """A call waits for the consumer of its stream: answer the request, and go on keeping the call."""
        if request.id not in self._calls:
            return
        self._streams[request.id] = call
        format = call.stream_format
        response = Response.to(request, stream_url=url, stream_format=format)
        self._end(request.id, response)

    def _end_stream(self, id: str, error: AcommError | None) -> None:
        """A stream has ended. Its caller has its answer; what went wrong since is for its reader, who sees
        the stream broken, and for the log.
        """
        call = self._streams.pop(id, None)
        if call is None:
            return
        self._count_out(call)
        self._look_idle()
        self._stream_ends["ok" if error is None else error.code] += 1
        if error is not None:
            streamsocket.discard(unix_path(call.streaming) or "")
            level = logging.INFO if isinstance(error, CallCancelled) else logging.ERROR
            what = f"the stream of task {call.task}, request {printable(id)}, ended early"
            log.log(level, "%s: %s [%s]", what, printable(error), error.code)

    # -- control verbs ------------------------------------------------------------------------------

    def _answer_verb(self, request: Request, origin: Origin, resolve: Resolve | None) -> None:
        answer = self._verbs.answer(request, origin)
        if inspect.isawaitable(answer):
            errand = self._loop.create_task(self._answer_later(request, origin, resolve, answer))
            self._errands.add(errand)
            errand.add_done_callback(self._errands.discard)
        else:
            result = msgspec.Raw(_quote(answer))
            self._say(request, origin, resolve, Response(request.id, result, extended=request.extended))

    async def _answer_later(
        self, request: Request, origin: Origin, resolve: Resolve | None, answer: Awaitable[Any]
    ) -> None:
        try:
            response = Response.to(request, msgspec.Raw(_quote(await answer)))
        except AcommError as error:
            response = Response.to(request, error=error)
        except Exception:
            log.exception("the request %s could not be answered", printable(request.task))
            response = Response.to(request, error=AcommError(_INTERNAL))
        self._say(request, origin, resolve, response)

    def _say(self, request: Request, origin: Origin, resolve: Resolve | None, response: Response) -> None:
        if resolve is not None:
            resolve(response)
        if request.response_hook is not None:
            self.tracker.delivery.post(
                request.response_hook, response, request.wire, extended=request.extended, origin=origin
            )

    def under_way(self, id: str) -> Call | None:
        """The call of a request that has not ended."""
        return self._calls.get(id) or self._streams.get(id)

    async def known(self, ids: list[str]) -> list[str]:
        """Those of the requests whose answer is to come, or on its way."""
        now = time.monotonic()
        found = {id for id in ids if self._recent.expected(id, now)}
        if self.stored is not None and (rest := [id for id in ids if id not in found]):
            found.update(await self.stored.undone(rest))
        return list(found)

    def cancel(self, call: Call) -> None:
        """Stop a call, even one that runs."""
        outcome = self.pool.cancel(call.number)
        if outcome is not None:
            self._ended(outcome)
        self._set_timer()

    def caller_left(self, caller: Hashable) -> None:
        """Cancel the calls that ended with `caller`, as nobody else waits for them."""
        for id in self.callers.left(caller):
            call = self._calls.get(id)
            if call is not None:
                self._counts["deserted"] += 1
                self.cancel(call)

    def look(self, call: Call) -> CallInfo:
        """How far a call is."""
        return self.pool.look(call)

    def stats(self) -> dict[str, Any]:
        """The figures of `acomm stats`: counts since the start, what is under way, and the workers."""
        calls, delivery = self.pool.dispatcher, self.tracker.delivery
        return {
            "pid": os.getpid(),
            "socket": self.config.socket,
            "uptime": round(time.monotonic() - self._started_at, 3),
            "state": "draining" if self.draining else "serving" if self.pool.healthy else "unhealthy",
            "counts": dict(self._counts),
            "tracked": self.tracker.num_requests,
            "forwarded": len(self._forwarded),
            "queued": calls.queued,
            "assigned": calls.assigned,
            "streams": {"open": len(self._streams), **self._stream_ends},
            "admission": self.admission.stats(),
            "room": self.unix.room.stats(),
            "connections": self.unix.connections,
            "http": None
            if self.door is None
            else {"url": self.door.url, "connections": self.door.connections},
            "hooks": {
                "delivered": delivery.delivered,
                "pending": delivery.pending,
                "abandoned": delivery.abandoned,
                "pending_bytes": delivery.pending_bytes,
                "troubled": delivery.troubled(),
            },
            "journal": None if self.stored is None else self.stored.stats(),
            "handler_errors": self.tracker.handler_errors,
            "worker_restarts": self.pool.restarts,
            "pool": {"workers": self.pool.wanted, "min": self.pool.least, "max": self.pool.size},
            "workers": [_told(worker) for worker in self.pool.workers()],
            "max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


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

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self.listeners = supervisor.unix.listeners
        self.rest = supervisor.rest

    def http(self) -> Door | None:
        return self._supervisor.door

    def ids(self) -> _Ids | None:
        return None if self._supervisor.stored is not None else _Ids(self._supervisor._recent)

    def depart(self) -> None:
        self._supervisor.depart(None if self._supervisor.stored is None else 0.0)


def _told(worker: WorkerInfo) -> dict[str, Any]:
    return {**worker._asdict(), "calls": [call._asdict() for call in worker.calls]}


def _place(config: Config) -> StreamPlace:
    """Where workers make their streams: where those who may connect to us can reach them."""
    if config.socket_mode == 0o600:
        return StreamPlace(expiry=config.stream_expiry)
    folder = os.path.dirname(os.path.abspath(config.socket))
    group = config.allow_gid[0] if config.socket_mode == 0o660 else None
    return StreamPlace(folder, config.socket_mode, group, config.stream_expiry)


def _size(request: Request) -> int:
    """Bytes of a request's arguments."""
    return 0 if request.args is None else len(memoryview(request.args))


def _call(request: Request, task: Task[..., Any], origin: Origin, key: bytes | None) -> Call:
    retry = task.retry
    in_lane = task.isolated or task.overlaps
    return Call(
        task.name,
        None if request.args is None else bytes(request.args),
        id=request.id,
        tag=request,
        priority=request.priority or task.priority,
        timeout=math.inf if task.timeout is None and task.max_memory is not None else task.timeout,
        concurrency=UNLIMITED if in_lane and task.concurrency is None else task.concurrency,
        overlaps=task.overlaps,
        isolated=task.isolated,
        max_memory=task.max_memory,
        deadline=None if request.timeout is None else time.monotonic() + request.timeout,
        retries=retry.times if retry else 0,
        crashes=retry.crashes if retry else 0,
        backoff=retry.delay if retry else None,
        stream_url=request.stream_url,
        stream_format=task.stream_format,
        origin=origin if task.streams or request.stream_url is not None else None,
        key=key,
    )
