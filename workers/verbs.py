"""Control verbs: requests to reserved task names, which the supervisor answers by itself."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol

import msgspec

from acomm.jsontext import parse
from acomm.messages import Request, Response
from acomm.origin import Origin
from acomm.tracker import Tracker
from workers import failed, takeover
from workers.calls import Call
from workers.errors import AcommError, BadArgs, Forbidden, UnknownTask, printable
from workers.failed import FailedRequests
from workers.offering import Resolve
from workers.operation import Operation
from workers.registry import Registry

log = logging.getLogger("acomm.supervisor")
_quote = msgspec.json.encode

MAX_ASKED = 10_000
"""Calls whose progress is told at once: some ten milliseconds' work."""


class Service(failed.Service, Protocol):
    """What the verbs are about. `errands` are the answers that take their time."""

    tracker: Tracker
    errands: set[asyncio.Task[None]]

    @property
    def registry(self) -> Registry: ...

    def stats(self) -> dict[str, Any]: ...

    def under_way(self, id: str) -> Call | None:
        """The call of a request that has not ended."""

    async def known(self, ids: list[str]) -> list[str]:
        """Those of the requests whose answer is to come, or on its way."""

    async def cancel_stored(self, id: str) -> bool:
        """Cancel a request that has no call yet; whether there is one."""

    def cancel(self, call: Call) -> None:
        """Stop a call, even one that runs."""

    def look(self, call: Call) -> NamedTuple:
        """How far a call is."""


class Verbs:
    """The verbs of a supervisor, by their names."""

    def __init__(self, service: Service, operation: Operation) -> None:
        self._service = service
        self._operation = operation
        self._failed = FailedRequests(service)
        self._verbs: dict[str, Callable[[Request, Origin], Any]] = {
            "acomm.tasks": self._tasks,
            "acomm.stats": self._stats,
            "acomm.cancel": self._cancel,
            "acomm.progress": self._progress,
            "acomm.known": self._known,
            "acomm.reload": self._reload,
            "acomm.drain": self._drain,
            "acomm.takeover": self._takeover,
        }

    def answer(self, request: Request, origin: Origin, resolve: Resolve | None) -> None:
        """Answer a request to a verb at its hook, and by `resolve`; later, if it takes its time. Raises
        UnknownTask, BadArgs, Forbidden.
        """
        verb = self._failed.verbs.get(request.task) or self._verbs.get(request.task)
        if verb is None:
            known = ", ".join(sorted([*self._verbs, *self._failed.verbs]))
            raise UnknownTask(f"no task {printable(request.task)}; known: {known}")
        answer = verb(request, origin)
        if inspect.isawaitable(answer):
            errands = self._service.errands
            errand = asyncio.get_running_loop().create_task(self._later(request, origin, resolve, answer))
            errands.add(errand)
            errand.add_done_callback(errands.discard)
        else:
            self._say(request, origin, resolve, Response.to(request, msgspec.Raw(_quote(answer))))

    async def _later(
        self, request: Request, origin: Origin, resolve: Resolve | None, answer: Awaitable[Any]
    ) -> None:
        try:
            response = Response.to(request, msgspec.Raw(_quote(await answer)))
        except AcommError as error:
            response = Response.to(request, error=error)
        except Exception:
            log.exception("the request %s could not be answered", printable(request.task))
            text = "the supervisor failed at this request; its log tells why"
            response = Response.to(request, error=AcommError(text))
        self._say(request, origin, resolve, response)

    def _say(self, request: Request, origin: Origin, resolve: Resolve | None, response: Response) -> None:
        if resolve is not None:
            resolve(response)
        if request.response_hook is not None:
            self._service.tracker.delivery.post(
                request.response_hook, response, request.wire, extended=request.extended, origin=origin
            )

    def _tasks(self, request: Request, origin: Origin) -> list[dict[str, Any]]:
        return self._service.registry.schemas()

    def _stats(self, request: Request, origin: Origin) -> dict[str, Any]:
        return self._service.stats()

    def _cancel(self, request: Request, origin: Origin) -> bool | Awaitable[bool]:
        """Cancel the request whose id is the argument: `["id"]`, `{"id": ...}` or `"id"`."""
        ids = _arguments(request)
        if len(ids) != 1 or not isinstance(ids[0], str):
            raise BadArgs("acomm.cancel takes the id of one request")
        call = self._service.under_way(ids[0])
        if call is None:
            return self._service.cancel_stored(ids[0])
        self._service.cancel(call)
        return True

    def _progress(self, request: Request, origin: Origin) -> dict[str, Any]:
        """How far the requests are whose ids are the arguments, in a list or one by one; those that are not
        under way are left out.
        """
        ids = _ids(request)
        calls = {id: self._service.under_way(id) for id in ids}
        return {id: self._service.look(call)._asdict() for id, call in calls.items() if call is not None}

    def _known(self, request: Request, origin: Origin) -> Awaitable[list[str]]:
        """Which of the requests, given as for `acomm.progress`, have an answer to come or on its way."""
        return self._service.known(_ids(request))

    def _reload(self, request: Request, origin: Origin) -> Awaitable[dict[str, Any]]:
        """Load the tasks anew; the answer comes when new workers serve, or with the error of the new code."""
        _only_for_us(request, origin)
        return self._operation.reload()

    def _drain(self, request: Request, origin: Origin) -> dict[str, Any]:
        """Take no more and end when all is done, or after the argument's seconds, if it is not null."""
        _only_for_us(request, origin)
        given = _arguments(request)
        timeout = given[0] if given else None
        known = timeout is None or (isinstance(timeout, int | float) and not isinstance(timeout, bool))
        if len(given) > 1 or not known or (timeout is not None and not 0 <= timeout <= 1e9):
            raise BadArgs("acomm.drain takes the seconds to wait at most, or nothing")
        return self._operation.drain(timeout)

    def _takeover(self, request: Request, origin: Origin) -> dict[str, Any]:
        """Hand over to the supervisor that listens at the first argument; the second is its journal."""
        _only_for_us(request, origin)
        return self._operation.hand_over(*takeover.asked(_arguments(request)))


def _only_for_us(request: Request, origin: Origin) -> None:
    if not origin.local:
        raise Forbidden(f"{request.task} is for the supervisor's own user and root, over its unix socket")


def _ids(request: Request) -> list[str]:
    ids = _arguments(request)
    if len(ids) == 1 and isinstance(ids[0], list):
        ids = ids[0]
    if len(ids) > MAX_ASKED or not all(isinstance(id, str) for id in ids):
        raise BadArgs(f"{request.task} takes a list of ids of requests, {MAX_ASKED} at most")
    return ids


def _arguments(request: Request) -> list[Any]:
    """The arguments of a control verb, by position: an object's values in their order, a value by itself."""
    given = None if request.args is None else parse(memoryview(request.args), "args")
    values = list(given.values()) if isinstance(given, dict) else given
    return values if isinstance(values, list) else [values]
