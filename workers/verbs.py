"""Control verbs: requests to reserved task names, which the supervisor answers by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from acomm.jsontext import parse
from acomm.messages import Request
from acomm.origin import Origin
from workers import failed
from workers.calls import Call
from workers.errors import BadArgs, UnknownTask, printable
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

    def cancel(self, call: Call) -> None:
        """Stop a call, even one that runs."""

    def look(self, call: Call) -> NamedTuple:
        """How far a call is."""


class Verbs:
    """The verbs of a supervisor, by their names."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._failed = FailedRequests(service)
        self._verbs: dict[str, Callable[[Request], Any]] = {
            "acomm.tasks": self._tasks,
            "acomm.stats": self._stats,
            "acomm.cancel": self._cancel,
            "acomm.progress": self._progress,
        }

    def answer(self, request: Request, origin: Origin) -> Any:
        """The result of a verb, as JSON can tell it, or an awaitable of it. Raises UnknownTask, BadArgs."""
        later = self._failed.verbs.get(request.task)
        if later is not None:
            return later(request, origin)
        verb = self._verbs.get(request.task)
        if verb is None:
            known = ", ".join(sorted([*self._verbs, *self._failed.verbs]))
            raise UnknownTask(f"no task {printable(request.task)}; known: {known}")
        return verb(request)

    def _tasks(self, request: Request) -> list[dict[str, Any]]:
        return self._service.registry.schemas()

    def _stats(self, request: Request) -> dict[str, Any]:
        return self._service.stats()

    def _cancel(self, request: Request) -> bool:
        """Cancel the request whose id is the argument: `["id"]`, `{"id": ...}` or `"id"`."""
        ids = _arguments(request)
        if len(ids) != 1 or not isinstance(ids[0], str):
            raise BadArgs("acomm.cancel takes the id of one request")
        call = self._service.under_way(ids[0])
        if call is not None:
            self._service.cancel(call)
        return call is not None

    def _progress(self, request: Request) -> dict[str, Any]:
        """How far the requests are whose ids are the arguments, in a list or one by one; those that are not
        under way are left out.
        """
        ids = _arguments(request)
        if len(ids) == 1 and isinstance(ids[0], list):
            ids = ids[0]
        if len(ids) > MAX_ASKED or not all(isinstance(id, str) for id in ids):
            raise BadArgs(f"acomm.progress takes a list of ids of requests, {MAX_ASKED} at most")
        calls = {id: self._service.under_way(id) for id in ids}
        return {id: self._service.look(call)._asdict() for id, call in calls.items() if call is not None}


def _arguments(request: Request) -> list[Any]:
    """The arguments of a control verb, by position: an object's values in their order, a value by itself."""
    given = None if request.args is None else parse(memoryview(request.args), "args")
    values = list(given.values()) if isinstance(given, dict) else given
    return values if isinstance(values, list) else [values]
