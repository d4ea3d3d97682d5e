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
import functools
import logging
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import msgspec

from acomm import streamsocket
from acomm.egress import Policy
from acomm.errors import AcommError, AddressInUse, alone
from acomm.messages import RESERVED, Request, Response
from acomm.origin import Origin
from acomm.tracker import Tracker
from acomm.urls import unix_path, unix_url
from workers import service, successor
from workers.admission import Admission
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
    ShuttingDown,
    printable,
)
from workers.examining import Examined, Examiner, args_size, call_of
from workers.handlerthreads import HandlerThreads
from workers.keeping import Keeper
from workers.offering import Decided, Resolve
from workers.operation import Operation
from workers.outlook import Outlook
from workers.pool import Pool
from workers.poolview import CallInfo, WorkerInfo
from workers.recent import Recent, digest
from workers.registry import Registry
from workers.unixdoor import UnixDoor
from workers.verbs import Verbs

if TYPE_CHECKING:
    from workers.door import Door

log = logging.getLogger("acomm.supervisor")

START_TIMEOUT = 60.0
LAST_POSTS = 1.0
"""Seconds that a stopping supervisor gives its last responses to reach their hooks."""

_AFTER_FAULT = 0.1
"""Seconds of pause after a fault of our own: it may come at once again."""

_INTERNAL = "the supervisor failed at this request; its log tells why"


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
        registry = Registry.from_modules(self.config.modules)
        self.pool = Pool(
            registry.modules,
            registry.paths,
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
        self.outlook = Outlook(self.pool)
        self.keeper: Keeper | None = None
        self.failed = asyncio.Event()
        self.failure: str | None = None
        self.callers = Callers()
        self.examiner = Examiner(registry, self.policy, self.tracker)
        self.unix = UnixDoor(self)
        self.examiner.url = self.url
        self.draining = False
        self.door = self._make_door()
        self.recent = Recent()
        self.errands: set[asyncio.Task[None]] = set()
        self.takes_over = False  # set before `start`: take the place of the one that is there
        self.ends_itself = False  # set by who runs it until it is `leaving`
        self._operation = Operation(self)
        self._verbs = Verbs(self, self._operation)
        self._calls: dict[str, Call] = {}
        self._forwarded: set[str] = set()
        self._streams: dict[str, Call] = {}  # answered, and still under way
        self._stream_ends: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._drive_due = False
        self._timer: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._idle: asyncio.Event | None = None
        self._released = False
        self._started_at = time.monotonic()

    def __repr__(self) -> str:
        return f"<Supervisor {self.config.socket}, {self.pool!r}>"

    @property
    def url(self) -> str:
        """Where requests are sent."""
        return self.unix.url

    @property
    def registry(self) -> Registry:
        """The tasks that are served."""
        return self.examiner.registry

    async def follow(self, registry: Registry) -> None:
        """Serve these tasks from now on. Raises AddressInUse, ConfigError; those before are served then."""
        await self.unix.follow(registry)
        self.examiner.registry = registry

    @property
    def leaving(self) -> asyncio.Event:
        """Set when somebody has asked us to end once we have `finished`."""
        return self._operation.leaving

    async def finished(self) -> bool:
        """See `Operation.finished`."""
        return await self._operation.finished()

    async def reload(self) -> dict[str, Any]:
        """See `Operation.reload`."""
        return await self._operation.reload()

    def cannot_go_on(self, why: str) -> None:
        """End: nothing can be promised any more."""
        self.failure = why
        self.draining = True
        self.failed.set()

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
        if not self.takes_over:
            self._open_journal()
        try:
            self.pool.start()
        except BaseException:
            await self._close_journal()
            raise
        offer: successor.Offer | None = None
        try:
            await self._workers_ready()
            if self.takes_over:
                offer = await self._operation.take_over()
                self._open_journal()
            await self._start_tracker()
            if self.door is not None:
                await self.door.start()
            await self.unix.start()
        except BaseException:
            if offer is not None:
                self._operation.leave_sockets()  # the old one goes on with them
            await self.unix.stop()
            if self.door is not None:
                await self.door.close(0)
            await self.tracker.stop(0)
            await self._close_journal()
            self._release()
            raise
        if offer is not None:
            self._operation.follow(offer)
        if self.keeper is not None:
            self.keeper.recover()

    def _open_journal(self) -> None:
        path = self.config.journal
        if path is not None:
            full = self.config.durability == "power"
            self.keeper = Keeper(self, path, full=full, few=self.pool.size)
            self.keeper.start()

    async def _start_tracker(self) -> None:
        """Behind a takeover: the socket for answers belongs to who has the journal."""
        if self.keeper is None:
            await self.tracker.start()
            return
        self.tracker.be(self.keeper.journal.file.identity)
        try:
            await self.tracker.start()
        except AddressInUse as error:
            raise AddressInUse(
                f"{error}, and one of the two journals is a copy of the other: stop it, or begin a new one"
            ) from None

    async def _close_journal(self) -> None:
        if self.keeper is not None:
            await self.keeper.close()

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
        await self._operation.end_handing_over()
        self.begin_draining()
        deadline = self._loop.time() + drain_timeout
        if self.unfinished and drain_timeout > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.idle(), drain_timeout)
        if self.keeper is not None:
            await self.keeper.leave()
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
                await self._operation.bye()
            finally:
                self._release()

    def begin_draining(self) -> None:
        self.draining = True
        self.unix.begin_draining()

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
                # Who waits for the answer itself has been promised nothing until it comes.
                if self.keeper is not None and resolve is None:
                    self._store(self.keeper, examined, decided, message)
                    return
                accepted = self.outlook.standing(examined)
                self.admission.take(examined.account, examined.size)
                self._begin(examined)
        except Exception as error:
            if not isinstance(error, AcommError):
                log.exception("a request could not be taken")
                error = AcommError(_INTERNAL)
            self.refused(error)
            decided(alone(error))  # else it would lead to `decided`, and that to who keeps the error
        else:
            decided(None, accepted)

    def _store(self, keeper: Keeper, examined: Examined, decided: Decided, message: bytes | None) -> None:
        self.admission.take(examined.account, examined.size)
        try:
            keeper.store(examined, decided, message)
        except BaseException:
            self.admission.release(examined.account, examined.size)
            raise

    def is_answered(self, id: str) -> bool:
        """Whether a request has had its answer just now, so that there is none to wait for."""
        return self.recent.answer(id) is not None

    def refused(self, error: AcommError) -> None:
        """Count a refusal."""
        self._counts[error.code] += 1

    def repeated(self) -> None:
        """Count a request that was taken before."""
        self._counts["repeated"] += 1

    def unready(self) -> str | None:
        """Why no work is taken now; None if it is."""
        if self.draining:
            return "draining"
        return None if self.pool.healthy else "unhealthy: the workers die while they start"

    def _examine(self, request: Request, origin: Origin, resolve: Resolve | None) -> Examined | None:
        """What is to be begun for a request; None if that is answered already. Raises the AcommError of its
        refusal, in which case nothing was done.
        """
        self.examiner.check_urls(request, origin)
        if request.task.startswith(RESERVED):
            self._verbs.answer(request, origin, resolve)
            return None
        content = digest(request)
        now = time.monotonic()
        known = self.recent.known(request.id, now)
        if known is not None:
            self._repeated(request, known == content, origin, resolve)
            return None
        if self.draining:
            raise ShuttingDown("the supervisor is stopping")
        if request.id in self._streams:  # which may outlast what is remembered of it
            raise Conflict(f"the id {printable(request.id)} belongs to a stream that has not ended")
        # Before the arguments are looked into: to say no should cost little.
        account = self.admission.account(origin)
        size = args_size(request)
        self.admission.check(account, size, now, functools.partial(self.outlook.gap, now), request.id)
        if not self.examiner.is_ours(request):
            self.examiner.check_forward(request, resolved=resolve is not None)
            return Examined(request, content, origin, account, size, resolve)
        task, key = self.examiner.check_call(request, origin)
        if task.streams and resolve is None and (request.response_hook is None or request.wire == 1):
            raise BadRequest(
                f"task {task.name} streams, and nobody could learn where: "
                "send a response hook, in generation 2 or 3"
            )
        if not self.pool.healthy:
            raise Busy("the workers die while they start; see the supervisor's log", retry_after=10.0)
        return Examined(request, content, origin, account, size, resolve, task, key)

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
                call = call_of(request, task, origin, key)
                call.account = account
                self.pool.submit(call)
                self.track(request, origin, resolve)
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
        self.recent.begin(request.id, content)

    def begin(self, examined: Examined) -> AcommError | None:
        """Have a request done that has been counted. Why it cannot be begun, in which case it does not count
        any more.
        """
        try:
            self._begin(examined)
        except AcommError as error:
            return error
        except Exception:
            log.exception("a request could not be begun")
            return AcommError(_INTERNAL)
        return None

    def track(self, request: Request, origin: Origin, resolve: Resolve | None = None) -> None:
        """Put a request on the table of those that are to be answered."""
        self.tracker.track(
            request,
            proxied=True,
            resolve=resolve,
            unpickle=True,
            origin=origin,
            delivered=None if self.keeper is None else self.keeper.on_delivered(request.id),
            reload=None if self.keeper is None else self.keeper.reload(request),
        )

    def _forward(self, examined: Examined) -> None:
        """Have the service at the request's task URL do it; the answer comes through us."""
        request, account, size, resolve = examined.request, examined.account, examined.size, examined.resolve
        stored = self.keeper is not None and request.id in self.keeper.stored

        def answered(response: Response) -> None:
            self._forwarded.discard(request.id)
            self.admission.release(account, size)
            if (
                stored
            ):  # and its answer is, before it is told: the other service may say something else next time
                self.track(request, examined.origin)
                self.answer(response)
                return
            self._finished(response)
            if resolve is not None:
                resolve(response)

        timeout = self.config.forward_timeout if request.timeout is None else request.timeout
        self.tracker.forward(
            request,
            timeout,
            origin=examined.origin,
            resolve=answered,
            proxied=not stored,
        )
        self._forwarded.add(request.id)
        self._counts["forwarded"] += 1

    def _repeated(self, request: Request, same: bool, origin: Origin, resolve: Resolve | None) -> None:
        """An id that was seen before: acknowledged again if it is the same request, else a conflict."""
        answer = self.recent.answer(request.id)
        if not same or (resolve is not None and answer is None):
            raise Conflict(f"the id {printable(request.id)} was used for another request")
        self.repeated()
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
        self.answer(response)

    def _count_out(self, call: Call) -> None:
        """A call has ended, and there is room for another."""
        self.admission.release(call.account, 0 if call.args is None else len(call.args))
        self.outlook.ended()

    def answer(self, response: Response) -> None:
        """Tell the answer to a request; when it is stored, if that is."""
        if self.keeper is None or not self.keeper.answer(response):
            self.told(response)

    def told(self, response: Response) -> None:
        """Tell the answer to a request now."""
        try:
            self._finished(response)
            self.tracker.settle(response)
        except Exception:
            log.exception("the answer to the request %s could not be passed on", printable(response.id))

    def _finished(self, response: Response) -> None:
        """A request has its answer."""
        self.look_idle()
        self._counts["ok" if response.error is None else response.error.code] += 1
        self.recent.finish(response, time.monotonic())

    def leave(self, id: str) -> None:
        """Forget a request, whose answer is for another supervisor to give."""
        self.tracker.remove_request(id)
        self._calls.pop(id, None)
        self._forwarded.discard(id)

    @property
    def unfinished(self) -> int:
        """What was accepted and has not ended: calls here, those passed on, and streams."""
        commits = 0 if self.keeper is None else self.keeper.unfinished
        return len(self._calls) + len(self._forwarded) + len(self._streams) + commits

    def look_idle(self) -> None:
        """Something has ended."""
        if not self.unfinished and self._idle is not None:
            self._idle.set()

    async def idle(self) -> None:
        """Wait until nothing is unfinished."""
        assert self._idle is not None
        self._idle.clear()
        self.look_idle()
        await self._idle.wait()

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
        self.look_idle()
        self._stream_ends["ok" if error is None else error.code] += 1
        if error is not None:
            streamsocket.discard(unix_path(call.streaming) or "")
            level = logging.INFO if isinstance(error, CallCancelled) else logging.ERROR
            what = f"the stream of task {call.task}, request {printable(id)}, ended early"
            log.log(level, "%s: %s [%s]", what, printable(error), error.code)

    # -- control verbs ------------------------------------------------------------------------------

    def under_way(self, id: str) -> Call | None:
        """The call of a request that has not ended."""
        return self._calls.get(id) or self._streams.get(id)

    async def known(self, ids: list[str]) -> list[str]:
        """Those of the requests whose answer is to come, or on its way."""
        now = time.monotonic()
        found = {id for id in ids if self.recent.expected(id, now)}
        if self.keeper is not None and (rest := [id for id in ids if id not in found]):
            found.update(await self.keeper.stored.undone(rest))
        return list(found)

    async def cancel_stored(self, id: str) -> bool:
        """Cancel a request that has no call yet; whether there is one."""
        if self.keeper is not None and await self.keeper.cancel(id):
            return True
        call = self.under_way(id)  # since a moment ago
        if call is not None:
            self.cancel(call)
        return call is not None

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
            "journal": None if self.keeper is None else self.keeper.stored.stats(),
            "handler_errors": self.tracker.handler_errors,
            "worker_restarts": self.pool.restarts,
            "pool": {"workers": self.pool.wanted, "min": self.pool.least, "max": self.pool.size},
            "workers": [_worker(worker) for worker in self.pool.workers()],
            "max_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }


def _worker(worker: WorkerInfo) -> dict[str, Any]:
    return {**worker._asdict(), "calls": [call._asdict() for call in worker.calls]}


def _place(config: Config) -> StreamPlace:
    """Where workers make their streams: where those who may connect to us can reach them."""
    if config.socket_mode == 0o600:
        return StreamPlace(expiry=config.stream_expiry)
    folder = os.path.dirname(os.path.abspath(config.socket))
    group = config.allow_gid[0] if config.socket_mode == 0o660 else None
    return StreamPlace(folder, config.socket_mode, group, config.stream_expiry)
