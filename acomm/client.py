"""connect(): calls to a supervisor, from programs with an event loop and without.

    any thread               the client's own thread, with an event loop
      submit -> _outbox ---> _pump -> _send -> Tracker.post ------> supervisor
                                ^       |
                                +--- Away     while nobody is there to connect to
      Call  <------------------------ _Pending <- response, error

One thread runs an event loop with a Tracker in it; callers of any thread hand it requests, and their
Calls are resolved there. What callers write down while that thread is busy leaves in one batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import msgspec

from acomm import within
from acomm.away import Away
from acomm.calls import Call, Decode
from acomm.errors import (
    AcommError,
    BadRequest,
    Busy,
    CallTimeout,
    ConnectionLost,
    ShuttingDown,
    UnknownTask,
    Unreachable,
)
from acomm.messages import RESERVED, Request, Response
from acomm.orphans import Orphans
from acomm.outgoing import Outgoing
from acomm.socketpath import default_socket
from acomm.streamreaders import decline
from acomm.streamsources import Source
from acomm.submitting import Options, Submitter
from acomm.tokens import find_token
from acomm.tracker import Answer, Tracker
from acomm.unixstreams import UnixStreams
from acomm.urls import check, unix_path, unix_url
from acomm.watch import ProgressWatch

log = logging.getLogger("acomm.client")

WAIT = 5.0
"""Seconds that a call waits for a supervisor that is not there: time for it to restart with its workers."""

_LAST_SOURCES = 1.0
"""Seconds that sources of streams have to be closed when the client is; those that block are left alone."""


def default_url() -> str:
    """`$ACOMM_URL`, else the default socket's URL."""
    return os.environ.get("ACOMM_URL") or unix_url(default_socket())


def connect(
    url: str | None = None,
    *,
    wait: float = WAIT,
    default_timeout: float = 3600.0,
    token: str | None = None,
    token_file: str | os.PathLike[str] | None = None,
) -> Client:
    """A client of the supervisor at `url` (None: `$ACOMM_URL`, else the default socket).

        with connect() as client:
            print(client.call("add", 1, 2))

    Use it in `with` or `async with`, or close it. Nothing is sent before the first call.

    A supervisor that is not there, since it restarts or starts a moment later, is waited for, and so is the
    next one while one stops: a call fails with Unreachable or ShuttingDown after `wait` seconds (0: at once).
    `default_timeout` is for how many seconds a call without a timeout of its own waits for its answer. An
    `http://` URL on this host takes a `token`, or the file that holds it (default: `$ACOMM_TOKEN`).

    Raises BadRequest for a URL that leads nowhere, ConfigError for a token that cannot be used.
    """
    return Client(url, wait=wait, default_timeout=default_timeout, token=token, token_file=token_file)


class Client(Submitter):
    """A connection to a supervisor, for any number of threads and event loops. See `connect`."""

    def __init__(
        self,
        url: str | None = None,
        *,
        wait: float = WAIT,
        default_timeout: float = 3600.0,
        token: str | None = None,
        token_file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.url = url or default_url()
        check(self.url, "the supervisor's URL")
        if not 0 <= wait < float("inf"):
            raise ValueError(f"wait must be a number of seconds, 0 or more, not {wait}")
        self._token = find_token(self.url, token, token_file)
        super().__init__(self, Options())
        self._wait = wait
        self._default_timeout = default_timeout
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._outbox: deque[_Pending] = deque()
        self._answers: dict[str, _Pending] = {}
        self._pump_due = False
        self._closed = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<Client {self.url}, {len(self._answers)} calls>"

    @property
    def usable(self) -> bool:
        """Whether calls can be submitted: it is this process's own, and has not been closed."""
        return not self._closed and self._pid == os.getpid()

    def tasks(self) -> list[dict[str, Any]]:
        """The tasks that the supervisor serves, with the JSON Schema of their arguments."""
        found: list[dict[str, Any]] = self.call("acomm.tasks")
        return found

    def stats(self) -> dict[str, Any]:
        """The supervisor's figures."""
        found: dict[str, Any] = self.call("acomm.stats")
        return found

    def cancel(self, id: str) -> bool:
        """Stop the call with that request id, even a running one. Whether there was one."""
        return bool(self.call("acomm.cancel", id))

    def close(self) -> None:
        """End the client: wait until what was submitted is acknowledged, so that the supervisor has it;
        calls that have no answer by then fail with ConnectionLost, and streams that they send break off.
        Streams that were received go on.
        """
        if self._pid != os.getpid():  # a fork's copy, as in `_post`
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is not None and thread is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(self._stopped.set)
            if thread is not threading.current_thread():
                thread.join()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await asyncio.to_thread(self.close)

    # -- any thread ---------------------------------------------------------------------------------

    def send(
        self, task: str, args: bytes, options: Options, decode: Decode | None, decode_item: Decode | None
    ) -> Call:
        """Send a call whose arguments are JSON text; returns at once. See `submit`. Within a task its time is
        at most what the task's own request has left.
        """
        request = Request(
            task,
            msgspec.Raw(args),
            timeout=options.timeout,
            priority=options.priority,
            handlers=options.handlers,
        )
        request.validate()
        call = Call(self, request.id, task, decode, decode_item)
        source = None if options.stream is None else options.stream.take()
        pending = _Pending(self, call, request, source, options.patience)
        due = within.limit()
        if due is not None:
            asked = self._default_timeout if options.timeout is None else options.timeout
            if due - time.monotonic() < asked:
                pending.due = due
        self._post(pending)
        return call

    def in_own_thread(self) -> bool:
        """Whether the caller is the client's own thread, which brings the answers."""
        return threading.current_thread() is self._thread

    def stop_remote(self, id: str) -> None:
        """Have the supervisor stop a call; its answer is of no interest."""
        with contextlib.suppress(RuntimeError):  # closed: the supervisor learns nothing more from us
            self._post(_Pending(self, None, Request("acomm.cancel", [id])))

    def watch(self, call: Call) -> None:
        """Keep the progress of `call` fresh while it runs."""
        loop = self._loop
        if loop is not None and self.usable and call.id not in self._watch:
            with contextlib.suppress(RuntimeError):  # it ends just now
                loop.call_soon_threadsafe(self._watch.add, call)

    def _post(self, pending: _Pending) -> None:
        if self._pid != os.getpid():  # before the lock, which another thread may have held at the fork
            raise RuntimeError("the client is another process's: connect() anew after a fork")
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if self._loop is None:
                self._start()
            assert self._loop is not None
            self._outbox.append(pending)
            if not self._pump_due:
                self._pump_due = True
                self._loop.call_soon_threadsafe(self._pump)

    def _start(self) -> None:
        self._stopped = asyncio.Event()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="acomm-client", daemon=True)
        self._thread.start()
        try:
            self._ready.result()
        except BaseException:
            self._loop = self._thread = None
            raise

    # -- the client's own thread --------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_new_loop) as runner:
                self._loop = runner.get_loop()
                runner.run(self._serve())
        except BaseException as error:
            if self._ready.done():
                log.exception("the client's thread failed")
            else:
                self._ready.set_exception(error)

    async def _serve(self) -> None:
        self._tracker = Tracker(default_timeout=self._default_timeout)
        self._tracker.channels.broken = self._supervisor_gone
        if self._token is not None:
            self._tracker.channels.headers[self.url] = {"Authorization": f"Bearer {self._token}"}
        self._streams = UnixStreams()
        self._away: Away[_Pending] = Away(
            self.url,
            self._wait,
            self._send,
            _Pending.give_up,
            lambda: self._tracker.channels.connected(self.url, None),
        )
        self._coming_back: set[asyncio.Task[None]] = set()
        self._watch = ProgressWatch(self._ask)
        self._orphans = Orphans(
            self.url,
            self._wait,
            self._ask,
            lambda id: id in self._answers and self._tracker.is_acknowledged(id),
            self._give_up,
        )
        await self._tracker.start()
        self._ready.set_result(None)
        why = "the client's thread failed"
        try:
            await self._stopped.wait()
            self._pump()
            await self._all_acknowledged()
            why = "the client was closed before the answer came"
        finally:
            self._watch.close()
            self._away.close()
            self._orphans.close()
            self._end(why)
            await self._streams.close(_LAST_SOURCES)
            await self._tracker.stop(0)

    async def _all_acknowledged(self) -> None:
        await self._tracker.acknowledged()
        while self._away or self._coming_back:
            if self._coming_back:
                await asyncio.wait(self._coming_back)
            await self._away.settled()
            await self._tracker.acknowledged()

    def _supervisor_gone(self, url: str) -> None:
        """It dies, or ends, or another takes its place: what it has acknowledged is asked for."""
        self._watch.supervisor_changed()
        waiting = [id for id in self._answers if self._tracker.is_acknowledged(id)]
        self._orphans.add(waiting, stored=url in self._tracker.channels.storing)

    def _give_up(self, id: str) -> None:
        pending = self._answers.get(id)
        if pending is not None:
            self._tracker.remove_request(id)
            pending.fail(ConnectionLost("the supervisor went away before it answered"))

    def _end(self, why: str) -> None:
        """Whatever the reason, no call is left waiting."""
        with self._lock:
            self._closed = True
            waiting, self._outbox = self._outbox, deque()
        for pending in [*self._answers.values(), *waiting]:
            pending.fail(ConnectionLost(why))

    def _pump(self) -> None:
        with self._lock:
            self._pump_due = False
            waiting, self._outbox = self._outbox, deque()
        for pending in waiting:
            if pending.call is not None:
                self._answers[pending.request.id] = pending
            if pending.source is None or self._offer_stream(pending, pending.source):
                self._send(pending)

    def _offer_stream(self, pending: _Pending, source: Source) -> bool:
        """Give the request the URL of its stream, which waits until the task is run, however long that takes:
        see `_Pending.settled`.
        """
        pending.source = None
        try:
            url = self._streams.new_stream_unix(source, expiry=float("inf")).result
        except Exception as error:
            pending.fail(error)
            return False
        pending.request = msgspec.structs.replace(pending.request, stream_url=url)
        return True

    def _send(self, pending: _Pending) -> None:
        if pending.call is not None and (pending.call.done() or self._away.join(pending)):
            if pending.call.done():
                pending.settled()
            return
        if pending.due is None or pending.hurry(pending.due - time.monotonic()):
            accepted = None if pending.call is None else pending.call.note_accepted
            self._ask(pending.request, pending, accepted)

    def _come_back(self, pending: _Pending, error: Busy) -> bool:
        """Send again when there is to be room; False if that is too late."""
        assert self._loop is not None
        now = self._loop.time()
        if pending.patient_until is None:
            pending.patient_until = now + pending.patience
        if error.retry_after is None or now + error.retry_after > pending.patient_until:
            return False
        coming = self._loop.create_task(self._send_later(pending, error.retry_after))
        self._coming_back.add(coming)
        coming.add_done_callback(self._coming_back.discard)
        return True

    async def _send_later(self, pending: _Pending, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._send(pending)

    def _ask(self, request: Request, answer: Answer, accepted: Callable[[bytes], None] | None = None) -> None:
        # The original's providers run their task whatever name is asked for, with whatever arguments.
        if request.task.startswith(RESERVED) and unix_path(self.url) is not None:
            ours = self._tracker.channels.granting.get(self.url)
            if ours is None:
                self._ask_when_known(request, answer)
                return
            if not ours:
                answer.set_exception(UnknownTask(f"no supervisor of this kind is at {self.url}"))
                return
        try:
            self._tracker.post(self.url, request, answer, accepted=accepted)
        except AcommError as error:
            answer.set_exception(error)
        except Exception as error:
            log.exception("a request could not be sent")
            answer.set_exception(BadRequest(f"the request could not be sent: {error}"))

    def _ask_when_known(self, request: Request, answer: Answer) -> None:
        """Learn first whether a supervisor of ours is there: a request without a task is run by nobody, and
        only ours grants a channel with its refusal.
        """

        def told(error: AcommError | None) -> None:
            if isinstance(error, ConnectionLost):
                answer.set_exception(error)
            else:
                self._tracker.channels.granting.setdefault(self.url, False)
                self._ask(request, answer)

        probe = Request("").encode(extended=True)
        self._tracker.channels.post(self.url, Outgoing(probe, told, wire=3, extended=True))


class _Pending:
    """A request until it is answered, which a Tracker resolves; its outcome is the Call's. `call` is None for
    one whose answer nobody wants. `due` is when the work ends that it is a part of, on the monotonic clock.
    """

    __slots__ = ("call", "client", "due", "patience", "patient_until", "request", "source", "until")

    def __init__(
        self,
        client: Client,
        call: Call | None,
        request: Request,
        source: Source | None = None,
        patience: float = 0.0,
    ) -> None:
        self.client = client
        self.call = call
        self.request = request
        self.source = source
        self.patience = patience
        self.patient_until: float | None = None
        self.until: float | None = None
        self.due: float | None = None

    def done(self) -> bool:
        return self.call is None

    def hurry(self, left: float) -> bool:
        """Give the request the seconds that are left. False, and it has failed, if there are none: it is not
        sent then.
        """
        if left <= 0:
            self.fail(CallTimeout("the task that submits this call has no time left for it"))
            return False
        self.request = msgspec.structs.replace(self.request, timeout=left)
        return True

    def set_result(self, response: Response) -> None:
        # Behind a stream there is a task that runs on, and may read ours.
        streaming = response.stream_url is not None and response.error is None
        if (call := self.settled(keep_stream=streaming)) is not None:
            call.resolve(response)

    def set_exception(self, error: BaseException) -> None:
        # As the acknowledgement's error, ShuttingDown says that nothing was done, too.
        if isinstance(error, Unreachable | ShuttingDown) and self.call is not None:
            self.client._away.add(self, error)
        elif self.patience and isinstance(error, Busy) and self.client._come_back(self, error):
            return
        else:
            self.fail(error)

    def give_up(self, error: AcommError) -> None:
        self.fail(type(error)(f"{error} (for {self.client._wait:g} s)") if self.client._wait else error)

    def fail(self, error: BaseException) -> None:
        if (call := self.settled()) is not None:
            call.end(None, error)

    def settled(self, *, keep_stream: bool = False) -> Call | None:
        """No longer under way; the call, if it has not been told yet. A stream that nobody has come for is
        of no use any more.
        """
        call, self.call = self.call, None
        self.client._answers.pop(self.request.id, None)
        if self.request.stream_url is not None:
            if keep_stream and call is not None:
                call.sent_stream = self.request.stream_url
            else:
                decline(self.request.stream_url)
        return call


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
