"""connect(): calls to a supervisor, from programs with an event loop and without.

One thread runs an event loop with a Tracker in it; callers of any thread hand it requests, and their
Calls are resolved there. What callers write down while that thread is busy leaves in one batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, Protocol, runtime_checkable

import msgspec

from acomm import jsontext
from acomm.errors import AcommError, BadRequest, ConnectionLost
from acomm.messages import Handler, Handlers, Request, Response
from acomm.socketpath import default_socket
from acomm.tracker import Tracker
from acomm.urls import check, unix_url

log = logging.getLogger("acomm.client")

_LAST_ANSWERS = 0.5
"""Seconds to read what a supervisor has said before it went away."""

Decode = Callable[[Any], Any]


@runtime_checkable
class TaskLike(Protocol):
    """A task that is known by more than its name: it writes its arguments and reads its results."""

    name: str

    def encode_args(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes: ...
    def decode_result(self, raw: Any) -> Any: ...


def default_url() -> str:
    """`$ACOMM_URL`, else the default socket's URL."""
    return os.environ.get("ACOMM_URL") or unix_url(default_socket())


def connect(url: str | None = None, **options: Any) -> Client:
    """A client of the supervisor at `url` (None: `$ACOMM_URL`, else the default socket).

        with connect() as client:
            print(client.call("add", 1, 2))

    Use it in `with` or `async with`, or close it. Nothing is sent before the first call.
    """
    return Client(url, **options)


class Call(Future[Any]):
    """A call under way: a `concurrent.futures.Future` that can also be awaited. `id` is the request's."""

    def __init__(self, client: Client, id: str, decode: Decode | None) -> None:
        super().__init__()
        self.id = id
        self._client = client
        self._decode = decode

    def cancel(self) -> bool:
        """Stop waiting, and have the supervisor stop the task, even one that runs. False if it is done."""
        if self.cancelled():
            return True
        if not super().cancel():
            return False
        self._client._cancel_remote(self.id)
        return True

    def __await__(self) -> Generator[Any, None, Any]:
        return asyncio.wrap_future(self).__await__()

    def _resolve(self, response: Response) -> None:
        if response.error is not None:
            self._end(None, response.error)
            return
        try:
            raw = b"null" if response.result is None else memoryview(response.result)
            result = jsontext.parse(raw, "result") if self._decode is None else self._decode(raw)
        except Exception as error:
            self._end(None, error)
        else:
            self._end(result, None)

    def _end(self, result: Any, error: BaseException | None) -> None:
        """Become done. Our own thread runs the callbacks then, and what they raise must not end it."""
        if not self.set_running_or_notify_cancel():
            return
        try:
            self.set_result(result) if error is None else self.set_exception(error)
        except BaseException:  # Future itself catches an Exception; this is a SystemExit
            log.exception("a callback of the call %s failed", self.id)


class Options(msgspec.Struct, frozen=True):
    """What `using` sets for the calls of a client's view."""

    timeout: float | None = None
    priority: int = 0
    handlers: Handlers | None = None


class Submitter:
    """The calls that a client and its views offer."""

    _client: Client
    _options: Options

    def submit(self, task: str | TaskLike, /, *args: Any, **kwargs: Any) -> Call:
        """Send a call; returns at once.

        `task` is a name or a Task. A name takes positional arguments or keywords; a Task, which knows its
        signature, mixes both. Raises TypeError for arguments that do not fit a Task or JSON, RuntimeError
        when the client is closed. What goes wrong later is the Call's error.
        """
        if isinstance(task, str):
            if args and kwargs:
                raise TypeError("a task's name takes positional arguments or keywords, not both")
            given: Any = args or kwargs or None
            encoded = b"null" if given is None else jsontext.encode(given, "args")
            return self._client._submit(task, encoded, self._options, None)
        return self._client._submit(
            task.name, task.encode_args(args, kwargs), self._options, task.decode_result
        )

    def call(self, task: str | TaskLike, /, *args: Any, **kwargs: Any) -> Any:
        """Send a call and wait for its result. Raises the task's error as TaskError, and the others as
        `acomm.errors` has them.
        """
        if threading.current_thread() is self._client._thread:
            raise RuntimeError("a Call's callback cannot wait for a call: its thread brings the answers")
        return self.submit(task, *args, **kwargs).result()

    def using(
        self,
        *,
        timeout: float | None = None,
        priority: int | None = None,
        on_success: Handler | None = None,
        on_error: Handler | None = None,
    ) -> View:
        """A view of this client whose calls have these options.

        `timeout` is in seconds from acceptance. Handlers are pickled here and now, and run in the
        supervisor: an unpicklable one raises HandlerError, which names what is in the way.
        """
        before = self._options
        if timeout is not None and not 0 < timeout < float("inf"):
            raise ValueError(f"timeout must be a positive number of seconds, not {timeout}")
        options = Options(
            before.timeout if timeout is None else timeout,
            before.priority if priority is None else priority,
            Handlers.pack(on_success, on_error) or before.handlers,
        )
        return View(self._client, options)


class View(Submitter):
    """A client with options: see `Submitter.using`. It needs no closing of its own."""

    def __init__(self, client: Client, options: Options) -> None:
        self._client = client
        self._options = options


class Client(Submitter):
    """A connection to a supervisor, for any number of threads and event loops. See `connect`."""

    def __init__(self, url: str | None = None, *, default_timeout: float = 3600.0) -> None:
        self.url = url or default_url()
        check(self.url, "the supervisor's URL")
        self._client = self
        self._options = Options()
        self._default_timeout = default_timeout
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._outbox: deque[tuple[Call | None, Request]] = deque()
        self._answers: dict[str, _Answer] = {}
        self._pump_due = False
        self._closed = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<Client {self.url}, {len(self._answers)} calls>"

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
        calls that have no answer by then fail with ConnectionLost.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            loop, thread = self._loop, self._thread
        if loop is not None and thread is not None and self._pid == os.getpid():
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

    def _submit(self, task: str, args: bytes, options: Options, decode: Decode | None) -> Call:
        request = Request(
            task,
            msgspec.Raw(args),
            timeout=options.timeout,
            priority=options.priority,
            handlers=options.handlers,
        )
        request.validate()
        call = Call(self, request.id, decode)
        self._post(call, request)
        return call

    def _cancel_remote(self, id: str) -> None:
        with contextlib.suppress(RuntimeError):  # closed: the supervisor learns nothing more from us
            self._post(None, Request("acomm.cancel", [id]))

    def _post(self, call: Call | None, request: Request) -> None:
        if self._pid != os.getpid():  # before the lock, which another thread may have held at the fork
            raise RuntimeError("the client is another process's: connect() anew after a fork")
        with self._lock:
            if self._closed:
                raise RuntimeError("the client is closed")
            if self._loop is None:
                self._start()
            assert self._loop is not None
            self._outbox.append((call, request))
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
        await self._tracker.start()
        self._ready.set_result(None)
        why = "the client's thread failed"
        try:
            await self._stopped.wait()
            self._pump()
            await self._tracker.acknowledged()
            why = "the client was closed before the answer came"
        finally:
            self._end(why)
            await self._tracker.stop(0)

    def _supervisor_gone(self, url: str) -> None:
        """It ends a connection only when it has answered everything, or dies. Its last answers may be
        unread yet; what has none in a moment has lost it with the supervisor.
        """
        waiting = [id for id in self._answers if self._tracker.is_acknowledged(id)]
        if waiting:
            asyncio.get_running_loop().call_later(_LAST_ANSWERS, self._give_up, waiting)

    def _give_up(self, ids: list[str]) -> None:
        for id in ids:
            answer = self._answers.get(id)
            if answer is not None:
                self._tracker.remove_request(id)
                answer.set_exception(ConnectionLost("the supervisor went away before it answered"))

    def _end(self, why: str) -> None:
        """Whatever the reason, no call is left waiting."""
        with self._lock:
            self._closed = True
            waiting, self._outbox = self._outbox, deque()
        for answer in list(self._answers.values()):
            answer.set_exception(ConnectionLost(why))
        for call, _ in waiting:
            if call is not None:
                call._end(None, ConnectionLost(why))

    def _pump(self) -> None:
        with self._lock:
            self._pump_due = False
            waiting, self._outbox = self._outbox, deque()
        for call, request in waiting:
            answer = _Answer(self._answers, call, request.id)
            try:
                self._tracker.post(self.url, request, answer)
            except AcommError as error:
                answer.set_exception(error)
            except Exception as error:
                log.exception("a request could not be sent")
                answer.set_exception(BadRequest(f"the request could not be sent: {error}"))


class _Answer:
    """What a Tracker resolves: passes on to the Call."""

    __slots__ = ("answers", "call", "id")

    def __init__(self, answers: dict[str, _Answer], call: Call | None, id: str) -> None:
        self.answers = answers
        self.call = call
        self.id = id
        if call is not None:
            answers[id] = self

    def done(self) -> bool:
        return self.call is None

    def set_result(self, response: Response) -> None:
        if (call := self._take()) is not None:
            call._resolve(response)

    def set_exception(self, error: BaseException) -> None:
        if (call := self._take()) is not None:
            call._end(None, error)

    def _take(self) -> Call | None:
        call, self.call = self.call, None
        self.answers.pop(self.id, None)
        return call


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
