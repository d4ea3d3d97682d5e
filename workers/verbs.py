"""Control verbs: requests to reserved task names, which the supervisor answers by itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple, Protocol

from acomm.jsontext import parse
from acomm.messages import Request
from acomm.origin import Origin
from workers import failed, takeover
from workers.calls import Call
from workers.errors import BadArgs, Forbidden, UnknownTask, printable
from workers.failed import FailedRequests
from workers.registry import Registry

MAX_ASKED = 10_000
"""Calls whose progress is told at once: some ten milliseconds' work."""


class Service(failed.Service, Protocol):
    """What the verbs are about."""

    registry: Registry

    def stats(self) -> dict[str, Any]: ...

    def under_way(self, id: str) -> Call | None:
        """The call of a request that has not ended."""

    async def known(self, ids: list[str]) -> list[str]:
        """Those of the requests whose answer is to come, or on its way."""

    def cancel(self, call: Call) -> None:
        """Stop a call, even one that runs."""

    def look(self, call: Call) -> NamedTuple:
        """How far a call is."""

    async def reload(self) -> dict[str, Any]:
        """Load the tasks anew."""

    def hand_over(self, path: str, journal: str | None) -> dict[str, Any]:
        """Give our sockets to who listens at `path`."""

    def drain(self, timeout: float | None) -> dict[str, Any]:
        """Take no more, and end when all is done."""


class Verbs:
    """The verbs of a supervisor, by their names."""

    def __init__(self, service: Service) -> None:
        self._service = service
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

    def answer(self, request: Request, origin: Origin) -> Any:
        """The result of a verb that `origin` asks for, which JSON can express, or an awaitable of it.
        Raises UnknownTask, BadArgs, Forbidden.
        """
        verb = self._failed.verbs.get(request.task) or self._verbs.get(request.task)
        if verb is None:
            known = ", ".join(sorted([*self._verbs, *self._failed.verbs]))
            raise UnknownTask(f"no task {printable(request.task)}; known: {known}")
        return verb(request, origin)

    def _tasks(self, request: Request, origin: Origin) -> list[dict[str, Any]]:
        return self._service.registry.schemas()

    def _stats(self, request: Request, origin: Origin) -> dict[str, Any]:
        return self._service.stats()

    def _cancel(self, request: Request, origin: Origin) -> bool:
        """Cancel the request whose id is the argument: `["id"]`, `{"id": ...}` or `"id"`."""
        ids = _arguments(request)
        if len(ids) != 1 or not isinstance(ids[0], str):
            raise BadArgs("acomm.cancel takes the id of one request")
        call = self._service.under_way(ids[0])
        if call is not None:
            self._service.cancel(call)
        return call is not None

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
        return self._service.reload()

    def _drain(self, request: Request, origin: Origin) -> dict[str, Any]:
        """Take no more and end when all is done, or after the argument's seconds, if it is not null."""
        _only_for_us(request, origin)
        given = _arguments(request)
        timeout = given[0] if given else None
        known = timeout is None or (isinstance(timeout, int | float) and not isinstance(timeout, bool))
        if len(given) > 1 or not known or (timeout is not None and not 0 <= timeout <= 1e9):
            raise BadArgs("acomm.drain takes the seconds to wait at most, or nothing")
        return self._service.drain(timeout)

    def _takeover(self, request: Request, origin: Origin) -> dict[str, Any]:
        """Hand over to the supervisor that listens at the first argument; the second is its journal."""
        _only_for_us(request, origin)
        return self._service.hand_over(*takeover.asked(_arguments(request)))


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
