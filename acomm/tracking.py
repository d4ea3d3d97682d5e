"""The requests that are on their way, by id, and what happens when their answers come.

A response takes its request off the table, so exactly one outcome reaches the handlers: the response,
or the timeout, whichever is first. Then it is passed on: to whoever waits, and to the request's hook.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TYPE_CHECKING

import msgspec

from acomm import handlers
from acomm.channel import Channels
from acomm.deadlines import Deadlines
from acomm.delivery import Delivery
from acomm.errors import AcommError, CallTimeout, ConfigError, Conflict, ConnectionLost, TaskError, printable
from acomm.messages import Handler, Handlers, Request, Response
from acomm.parcel import Finished, Reload
from acomm.transport import Done
from acomm.urls import unix_path

if TYPE_CHECKING:
    from acomm.origin import Origin
    from acomm.streamproxy import StreamProxy
    from acomm.streamsources import Source
    from acomm.unixstreams import UnixStreams

log = logging.getLogger("acomm.tracker")

_LATE = 0.5
_GRACE = 0.1
"""Seconds. When our timer is later than that, we were stopped (SIGSTOP, a laptop's lid) or starved, and
responses that came in time may lie unread: deadlines then move by what was lost and a moment more.
"""

HANDLER_WAIT = 30.0
"""Seconds that a response's way to its hook waits for the request's handler."""


class TimedOut(CallTimeout):
    """Our own timer's verdict, told apart from a `timeout` that the service answers."""


class Tracked:
    """A request on the table. `resolve` is told the response; `proxied` sends it on to the hook, which
    `origin` has chosen; `pickled` are handlers that came with it and may be unpickled here. `external`:
    its answer may come over HTTP, with this key if it is not empty. `acknowledged`: it was sent by `post`,
    and its service has it. `delivered` and `reload` are those of `Tracker.track`.
    """

    __slots__ = (
        "acknowledged",
        "delivered",
        "external",
        "origin",
        "pickled",
        "proxied",
        "reload",
        "request",
        "resolve",
    )

    def __init__(
        self,
        request: Request,
        proxied: bool,
        resolve: Callable[[Response], None] | None,
        pickled: Handlers | None,
        origin: Origin | None,
        external: str | None,
        delivered: Finished | None,
        reload: Reload | None,
    ) -> None:
        self.request = request
        self.proxied = proxied
        self.resolve = resolve
        self.pickled = pickled
        self.origin = origin
        self.external = external
        self.delivered = delivered
        self.reload = reload
        self.acknowledged = False


class Tracking:
    """The table of a Tracker, and what becomes of the answers: `channels` lead to the hooks."""

    def __init__(self, channels: Channels, *, http_stream_url: str | None, executor: Executor | None) -> None:
        self.channels = channels
        self.delivery = Delivery(channels)
        self.http_stream_url = http_stream_url
        self.handler_errors = 0
        self._executor = executor
        self._table: dict[str, Tracked] = {}
        self._deadlines: Deadlines[str] = Deadlines()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = math.inf  # uvloop's handles do not always know
        self._finishing: set[asyncio.Task[None]] = set()
        self._streams: UnixStreams | None = None
        self._stream_proxy: StreamProxy | None = None
        self._started = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def num_requests(self) -> int:
        """How many requests are tracked."""
        return len(self._table)

    # -- the table ----------------------------------------------------------------------------------

    def track(
        self,
        request: Request,
        timeout: float = math.inf,
        *,
        proxied: bool = False,
        resolve: Callable[[Response], None] | None = None,
        unpickle: bool = False,
        origin: Origin | None = None,
        external: str | None = None,
        delivered: Finished | None = None,
        reload: Reload | None = None,
    ) -> None:
        """As `track_request`, for services: `resolve(response)` is told the response after the handlers
        have run; `proxied` posts it to the request's hook, which was chosen by `origin`; `unpickle` runs
        the request's pickled handlers, for whoever has made sure that its sender may run code here;
        `external` takes the response from `handle_external`, too, from who knows this key if it is not empty.
        `delivered(error)` is told when the response is no longer owed: None when its hook has acknowledged
        (without one: when the handlers have run), else why it was given up. `reload`: as of Delivery.post.
        """
        if not self._started:
            raise RuntimeError("the tracker is not running: start it first")
        if not timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
        if request.id in self._table:
            raise Conflict(f"the request id {printable(request.id)} is already tracked")
        pickled = request.handlers if unpickle else None
        self._table[request.id] = Tracked(
            request, proxied, resolve, pickled, origin, external, delivered, reload
        )
        self._empty.clear()
        if timeout != math.inf:
            when = asyncio.get_running_loop().time() + timeout
            self._deadlines.set(request.id, when)
            if self._timer is None or when < self._timer_due:
                self._set_timer(when)

    def remove_request(self, request: Request | str) -> Done[bool]:
        """Forget a request (or an id); its handlers will not run. Whether it was tracked."""
        id = request if isinstance(request, str) else request.id
        return Done(self._take(id) is not None)

    def tracked(self, id: str) -> Request | None:
        """The request tracked under `id`."""
        entry = self._table.get(id)
        return entry.request if entry is not None else None

    def is_acknowledged(self, id: str) -> bool:
        """Whether the request that `post` has sent under `id` waits only for its response."""
        entry = self._table.get(id)
        return entry is not None and entry.acknowledged

    def _take(self, id: str) -> Tracked | None:
        entry = self._table.pop(id, None)
        if entry is not None:
            self._deadlines.discard(id)
            if not self._table:
                self._empty.set()
        return entry

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(when, self._tick)
        self._timer_due = when

    def _tick(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        late = now - self._timer_due
        if late > _LATE:
            log.warning("this process stood still for %.1f s; deadlines move", late)
            self._deadlines.postpone(late + _GRACE)
        for id in self._deadlines.expired(now):
            self.settle(Response(id, error=TimedOut("no response in time")))
        when = self._deadlines.next()
        if when is not None:
            self._set_timer(when)

    async def _end(self, timeout: float | None) -> None:
        """Wait, at most `timeout` seconds, for what is tracked, and for streams that somebody may come for;
        then close them. What is left gets a ConnectionLost response.
        """
        if self._table and (timeout is None or timeout > 0):
            try:
                await asyncio.wait_for(self._empty.wait(), timeout)
            except TimeoutError:
                log.warning("stopping with %d requests unanswered", len(self._table))
        for id in list(self._table):
            self.settle(Response(id, error=ConnectionLost("the tracker was stopped")))
        await self.finish(HANDLER_WAIT)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._streams is not None:
            # Who has just been told of a stream may not have come for it yet.
            if timeout is None or timeout > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._streams.drained(), timeout)
            await self._streams.close()
            self._streams = None

    async def finish(self, timeout: float) -> None:
        """Wait, at most `timeout` seconds, until the handlers that run now have ended. The answers of those
        that have not are then passed on without them.
        """
        if self._finishing:
            _, late = await asyncio.wait(self._finishing, timeout=timeout)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    # -- responses ----------------------------------------------------------------------------------

    async def handle_response(self, response: Response) -> None:
        """Take the request of `response` off the table and run its handlers; returns when they have
        run. A response to a request that is not tracked is logged and dropped.
        """
        task = self.settle(response)
        if task is not None:
            await asyncio.shield(task)

    def settle(self, response: Response) -> asyncio.Task[None] | None:
        """`handle_response` without waiting: the task that runs the handlers, if there are any."""
        entry = self._take(response.id)
        if entry is None:
            log.debug("no request is tracked for the response %s", printable(response.id))
            return None
        request = entry.request
        if (
            entry.pickled is None
            and (request.on_success if response.error is None else request.on_error) is None
        ):
            self._pass_on(entry, response)
            return None
        task = asyncio.get_running_loop().create_task(self._handle(entry, response))
        self._finishing.add(task)
        task.add_done_callback(self._finishing.discard)
        return task

    async def _handle(self, entry: Tracked, response: Response) -> None:
        running = asyncio.get_running_loop().create_task(self._run_handlers(entry, response))
        try:
            done, _ = await asyncio.wait({running}, timeout=HANDLER_WAIT)
            if not done:
                log.warning("a handler of %s runs for over %g s", printable(entry.request.id), HANDLER_WAIT)
        finally:  # at a cancellation too: see `finish`
            self._pass_on(entry, response)
        if not done:
            await running

    async def _run_handlers(self, entry: Tracked, response: Response) -> None:
        request = entry.request
        for handler in self._handlers_of(entry, response):
            try:
                await handlers.run(handler, request, response, executor=self._executor)
            except Exception:
                self.handler_errors += 1
                log.exception("a handler of task %s failed", printable(request.task))

    def _handlers_of(self, entry: Tracked, response: Response) -> list[Handler]:
        succeeded = response.error is None
        handler = entry.request.on_success if succeeded else entry.request.on_error
        found = [] if handler is None else [handler]
        pickled = entry.pickled and (entry.pickled.success if succeeded else entry.pickled.error)
        if pickled:
            found.append(lambda request, response: handlers.load(pickled)(request, response))
        return found

    def _pass_on(self, entry: Tracked, response: Response) -> None:
        """Tell whoever waits. Never raises: those who settle have others to settle."""
        request = entry.request
        if entry.resolve is not None:
            try:
                entry.resolve(response)
            except Exception:
                log.exception("what waited for the response %s failed", printable(response.id))
        if entry.proxied:
            try:
                self.deliver(request, response, entry.origin, finished=entry.delivered, reload=entry.reload)
            except TypeError as error:
                log.error("the result of task %s cannot be sent: %s", printable(request.task), error)
                answer = Response(request.id, error=TaskError(str(error)))
                self.deliver(request, answer, entry.origin, finished=entry.delivered)
        elif entry.delivered is not None:
            _tell(entry.delivered, request)

    def deliver(
        self,
        request: Request,
        response: Response,
        origin: Origin | None = None,
        *,
        finished: Finished | None = None,
        reload: Reload | None = None,
    ) -> None:
        """Post a response to the request's hook, if it has one; `origin` has chosen it. `finished` and
        `reload` are those of Delivery.post; without a hook nothing is owed, and `finished` is told at once.

        Raises TypeError for a result that JSON cannot express.
        """
        hook = request.response_hook
        if hook is None:
            if finished is not None:
                _tell(finished, request)
            return
        response = self._within_reach(hook, response)
        # Whether to say more is for the one who asked, not for the one who answered.
        self.delivery.post(
            hook,
            response,
            request.wire,
            extended=request.extended,
            origin=origin,
            finished=finished,
            reload=reload,
        )

    def _within_reach(self, hook: str, response: Response) -> Response:
        """The response with a stream that its hook can read: over HTTP no unix socket is."""
        url = response.stream_url
        if url is None or unix_path(url) is None or unix_path(hook) is not None:
            return response
        try:
            return msgspec.structs.replace(response, stream_url=self.proxy_stream_http_url(url))
        except AcommError as error:
            return Response(response.id, error=error, extended=response.extended)

    # -- streams ------------------------------------------------------------------------------------

    def new_stream_unix(self, source: Source, *, expiry: float = 60.0) -> Done[str]:
        """The URL of a new unix socket whose first reader gets everything of `source`: bytes, a file, or an
        iterable or async iterable of bytes. It expires after `expiry` seconds without one. It acts at
        once; awaiting it is optional. Raises Busy.
        """
        if not self._started:
            raise RuntimeError("the tracker is not running: start it first")
        if self._streams is None:
            from acomm.unixstreams import UnixStreams  # most trackers have none

            self._streams = UnixStreams()
        return self._streams.new_stream_unix(source, expiry=expiry)

    @property
    def stream_proxy(self) -> StreamProxy:
        """What serves our streams over HTTP, at `http_stream_url`. Raises ConfigError without one."""
        if self._stream_proxy is None:
            if self.http_stream_url is None:
                raise ConfigError("no stream can be read over HTTP here: the tracker has no http_stream_url")
            from acomm.egress import Guard
            from acomm.origin import PROGRAM
            from acomm.streamproxy import StreamProxy

            policy = self.channels.policy
            guard = None if policy is None else Guard(policy, PROGRAM)
            self._stream_proxy = StreamProxy(self.http_stream_url, guard=guard)
        return self._stream_proxy

    def proxy_stream_http_url(self, url: str) -> str:
        """A URL that gives the stream at `url` over HTTP, once and to whoever has it. Raises ConfigError
        when this tracker serves none, BadRequest for a URL that is none.
        """
        return self.stream_proxy.sign(url)


def _tell(delivered: Finished, request: Request) -> None:
    """The response has nowhere else to go."""
    try:
        delivered(None)
    except Exception:
        log.exception("what waited for the delivery of %s failed", printable(request.id))
