"""Failed requests and dead letters of a journal: what `acomm failed`, `replay` and `purge` ask for."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from acomm.jsontext import parse
from acomm.messages import Request, Response, error_json
from acomm.origin import Origin
from workers.errors import AcommError, BadArgs, Busy, Forbidden, printable
from workers.journalfile import UNDELIVERED, Row
from workers.keeping import Keeper
from workers.stored import StoredRequests

MOST = 1000
"""Requests that are listed, or purged by their ids, at once."""


class Service(Protocol):
    """What this knows of the supervisor."""

    keeper: Keeper | None


class _List(msgspec.Struct, forbid_unknown_fields=True):
    task: str | None = None
    limit: int = 100
    id: str | None = None


class _Replay(msgspec.Struct, forbid_unknown_fields=True):
    id: str


class _Purge(msgspec.Struct, forbid_unknown_fields=True):
    """`ids`, or those of a `task`, or `all` of them."""

    ids: list[str] = []
    task: str | None = None
    all: bool = False


class FailedRequests:
    """The verbs about the failed requests of `service`. Each raises AcommError; they take an object."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self.verbs: dict[str, Callable[[Request, Origin], Awaitable[Any]]] = {
            "acomm.failed": self._failed,
            "acomm.replay": self._replay,
            "acomm.purge": self._purge,
        }

    def _stored(self, origin: Origin) -> StoredRequests:
        # Arguments and results of everybody's requests are told here.
        if not (origin.local or origin.trusted):
            raise Forbidden("only the supervisor's own user may look at failed requests")
        return self._keeper().stored

    def _keeper(self) -> Keeper:
        if self._service.keeper is None:
            raise BadArgs("this supervisor keeps no failed requests: start it with --journal PATH")
        return self._service.keeper

    async def _failed(self, request: Request, origin: Origin) -> Any:
        """The latest failed requests, or all that is known of one."""
        stored, asked = self._stored(origin), _arguments(request, _List)
        if asked.id is not None:
            return _told(await self._one(stored, asked.id), whole=True)
        if not 0 < asked.limit <= MOST:
            raise BadArgs(f"limit must be 1 to {MOST}, not {asked.limit}")
        rows = await _ask(stored, stored.journal.file.failed, asked.limit, asked.task)
        return [_told(row) for row in rows]

    async def _replay(self, request: Request, origin: Origin) -> bool:
        """Run a failed request again, or deliver again what could not be delivered, under its id."""
        stored, asked = self._stored(origin), _arguments(request, _Replay)
        row = await self._one(stored, asked.id)
        if row.message is None:
            raise BadArgs(f"the arguments of the request {printable(asked.id)} are not kept any more")
        # Those of earlier supervisors may still wait to be taken up, so the file has the last word.
        if asked.id in stored or not await _ask(stored, stored.journal.file.replay, row.seq):
            raise BadArgs(f"the request {printable(asked.id)} is under way; its hook has not answered yet")
        again = await _ask(stored, stored.journal.file.find, asked.id)
        if again is not None and asked.id not in stored and (left := stored.take_up(again)) is not None:
            self._keeper().take_up(left)
        return True

    async def _purge(self, request: Request, origin: Origin) -> int:
        """Forget failed requests; how many."""
        stored, asked = self._stored(origin), _arguments(request, _Purge)
        if (len(asked.ids) > 0) + (asked.task is not None) + asked.all != 1:
            raise BadArgs("acomm.purge takes ids, a task, or all: one of them")
        if len(asked.ids) > MOST:
            raise BadArgs(f"acomm.purge takes {MOST} ids at a time, not {len(asked.ids)}")
        file = stored.journal.file
        if asked.ids:
            rows = [await self._one(stored, id) for id in asked.ids]
            return int(await _ask(stored, file.purge, [row.seq for row in rows]))
        count = 0
        while purged := await _ask(stored, file.purge_some, MOST, asked.task):
            count += purged
        return count

    async def _one(self, stored: StoredRequests, id: str) -> Row:
        row: Row | None = await _ask(stored, stored.journal.file.find, id)
        if row is None or row.code is None:
            raise BadArgs(f"no failed request {printable(id)} is kept here")
        return row


async def _ask(stored: StoredRequests, question: Callable[..., Any], *args: Any) -> Any:
    try:
        return await stored.journal.ask(question, *args)
    except sqlite3.Error as error:
        raise Busy(f"the journal cannot be used: {printable(error)}") from None


def _arguments(request: Request, type: type[Any]) -> Any:
    given = {} if request.args is None else parse(memoryview(request.args), "args")
    if isinstance(given, str):
        given = {"id": given}
    elif isinstance(given, list) and len(given) == 1 and isinstance(given[0], str):
        given = {"id": given[0]}
    try:
        return msgspec.convert(given or {}, type)
    except msgspec.ValidationError as error:
        raise BadArgs(f"{request.task}: {error}") from None


def _told(row: Row, *, whole: bool = False) -> dict[str, Any]:
    """A failed request as JSON can express it; `whole` with its arguments and the error's details."""
    error: AcommError | None = None
    if row.response is not None:
        error = Response.decode(row.response).error
    told: dict[str, Any] = {
        "id": row.id,
        "task": row.task,
        "code": row.code,
        "error": None if error is None else error.message,
        "accepted": row.accepted,
        "ended": row.ended,
        "delivered": row.state != UNDELIVERED,
    }
    if whole:
        request = None if row.message is None else Request.decode(row.message)
        told |= {
            "args": None if request is None else request.args,
            "hook": None if request is None else request.response_hook,
            "origin": row.origin,
            "boots": row.boots,
            "error_info": None if error is None else msgspec.Raw(error_json(error)),
        }
    return told
