"""Many at once: requests of a Tracker (MultiRequest), calls of a Client (gather). Results by name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Mapping
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any

import msgspec

from acomm.errors import CallCancelled, Conflict, printable
from acomm.messages import Request, Response
from acomm.tracker import Tracker
from acomm.transport import Done


class MultiRequest:
    """Requests that are tracked together, by names of the caller's; any number of them.

        multi = MultiRequest(tracker, timeout=10)
        for host in hosts:
            request = await multi.add_request(host, Request("info"))
            try:
                await send(urls[host], request)
            except AcommError:
                multi.remove_request(host)
        responses = await multi.responses()

    `timeout` is in seconds, for each request from when it is added; None is the tracker's default. Use it
    on the tracker's event loop.
    """

    def __init__(self, tracker: Tracker, timeout: float | None = None) -> None:
        self.tracker = tracker
        self.timeout = timeout
        self._responses: dict[str, Response | None] = {}
        # Of those that are unanswered, ids by name and names by id.
        self._ids: dict[str, str] = {}
        self._names: dict[str, str] = {}
        self._none_left = asyncio.Event()
        self._none_left.set()

    def __len__(self) -> int:
        return len(self._responses)

    def __repr__(self) -> str:
        return f"<MultiRequest {len(self)} requests, {len(self._ids)} unanswered>"

    def add_request(self, name: str, request: Request) -> Done[Request]:
        """Track `request` under `name`. The result is what to send: the request with the tracker's hook.

        Its handlers run as always. Raises Conflict when the name or the id is taken, RuntimeError when
        the tracker is not running; the request is then not added.
        """
        if name in self._responses:
            raise Conflict(f"there is a request named {printable(name)} already")
        request = msgspec.structs.replace(request, response_hook=self.tracker.url)
        timeout = self.tracker.default_timeout if self.timeout is None else self.timeout
        self.tracker.track(request, timeout, resolve=partial(self._answered, name))
        self._responses[name] = None
        self._ids[name] = request.id
        self._names[request.id] = name
        self._none_left.clear()
        return Done(request)

    def remove_request(self, name: str | Request, request: Request | None = None) -> Done[bool]:
        """Forget a request that has no response yet, by its name, or by itself: if it could not be sent,
        say. Given both, only if they belong together. Whether there was one.

        Remove requests here and not from the tracker, or `responses` waits for them.
        """
        if isinstance(name, Request):
            request = name
            name = self._names.get(request.id, "")
        id = self._ids.get(name)
        if id is None or (request is not None and request.id != id):
            return Done(False)
        # One that the tracker no longer has is being handled, and its response is about to be ours.
        if not self.tracker.remove_request(id):
            return Done(False)
        del self._responses[name]
        self._no_longer_waits(name)
        return Done(True)

    async def responses(self) -> dict[str, Response]:
        """Wait until each request has its response; all of them by name, in the order of adding.

        A request that got none in time has a Response with a CallTimeout for its error.
        """
        while self._ids:
            await self._none_left.wait()
        return {name: response for name, response in self._responses.items() if response is not None}

    def _answered(self, name: str, response: Response) -> None:
        self._responses[name] = response
        self._no_longer_waits(name)

    def _no_longer_waits(self, name: str) -> None:
        del self._names[self._ids.pop(name)]
        if not self._ids:
            self._none_left.set()


class Gathered(Future[dict[str, Any]]):
    """Calls gathered by name: see `gather`. A future like a Call: wait with `result`, or await it."""

    def __init__(self, calls: Mapping[str, Future[Any]], return_exceptions: bool) -> None:
        super().__init__()
        self._calls = dict(calls)
        self._return_exceptions = return_exceptions
        self._lock = threading.Lock()
        self._unfinished = len(self._calls)
        self._settled = False
        if not self._calls:
            self.set_result({})
        for name, call in self._calls.items():
            call.add_done_callback(partial(self._finished, name))

    def __await__(self) -> Generator[Any, None, dict[str, Any]]:
        return asyncio.wrap_future(self).__await__()

    def cancel(self) -> bool:
        """Cancel all the calls that are not done. False if there is a result already."""
        if not super().cancel():
            return False
        for call in self._calls.values():
            call.cancel()
        return True

    def _finished(self, name: str, call: Future[Any]) -> None:
        """Called by whichever thread ends a call."""
        error = _error_of(name, call)
        failed = error is not None and not self._return_exceptions
        with self._lock:
            self._unfinished -= 1
            if self._settled or (self._unfinished and not failed):
                return
            self._settled = True
        if not self.set_running_or_notify_cancel():
            return
        if failed:
            self.set_exception(error)
        else:
            self.set_result({name: _outcome_of(name, call) for name, call in self._calls.items()})


def _outcome_of(name: str, call: Future[Any]) -> Any:
    error = _error_of(name, call)
    return call.result() if error is None else error


def _error_of(name: str, call: Future[Any]) -> BaseException | None:
    try:
        return call.exception()
    except CancelledError:
        # A CancelledError of asyncio's would say that whoever awaits it was cancelled.
        return CallCancelled(f"the call {printable(name)} was cancelled")


def gather(
    calls: Mapping[str, Future[Any]] | None = None,
    /,
    *,
    return_exceptions: bool = False,
    **named: Future[Any],
) -> Gathered:
    """Wait for several calls together; their results by name, in the order given.

        totals = gather(a=client.submit("add", 1, 2), b=client.submit("add", 3, 4)).result(timeout=10)
        totals = await gather(a=..., b=...)

    A mapping takes names that are no identifiers. As with asyncio.gather, the first error is raised at
    once and leaves the other calls alone, or with `return_exceptions` errors are results like others;
    and cancelling it, or the task that awaits it, cancels the calls. A call that is cancelled otherwise
    counts as failed, with CallCancelled. `result` raises TimeoutError after its `timeout`.
    """
    together = {**(calls or {}), **named}
    for name, call in together.items():
        if not isinstance(call, Future):
            raise TypeError(f"gather takes calls, and {printable(name)} is a {type(call).__name__}")
    return Gathered(together, return_exceptions)
