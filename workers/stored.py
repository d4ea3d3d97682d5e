"""Requests that are kept in the journal: stored before they are acknowledged, answered by what was stored.

    store --> (commit) --> acknowledged, run --> answer --> (commit) --> handlers, hook --> delivered

What an earlier supervisor has left is taken up by `Recovery`.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from acomm.messages import Request, Response
from acomm.origin import Origin
from workers.errors import AcommError, Busy, CallTimeout, Poisoned, printable
from workers.journal import Journal, Stored
from workers.journalfile import ACCEPTED, Ending, Entry, Row, out_of_space

log = logging.getLogger("acomm.journal")

MAX_BOOTS = 3
"""How often a request is taken up again after the death of its supervisor: it may well be the cause."""

IN_FLIGHT = 1000
"""Requests of earlier supervisors that are under way at a time: the rest waits in the file."""

MAX_PENDING = 20_000
"""Answers on their way beyond which no more are read from the file."""

_ASKED_AT_ONCE = 500  # rows that are looked up between two commits
_FULL = 0.5  # seconds between tries to write where there is no space
_CHECK = 0.05  # seconds between looks whether there is room
_NO_FAULT = frozenset({"cancelled"})
"""Errors by which nobody has failed: such requests are not kept."""


class Left(NamedTuple):
    """A request that an earlier supervisor has left: to be run, unless it has its `response`, which is in the
    file if it is `stored`.
    """

    request: Request
    origin: Origin
    response: Response | None
    stored: bool = False


class StoredRequests:
    """The requests in `journal` that are not done with, by their ids. `wall` is the time of day in seconds.

    `storing` counts those that are not committed yet, `answering` the answers.
    """

    def __init__(self, journal: Journal, wall: Callable[[], float] = time.time) -> None:
        self.journal = journal
        self.storing = 0
        self.answering = 0
        self._wall = wall
        self._seqs: dict[str, int] = {}

    def __contains__(self, id: str) -> bool:
        return id in self._seqs

    def __iter__(self) -> Iterator[str]:
        return iter(self._seqs)

    def __len__(self) -> int:
        return len(self._seqs)

    def stats(self) -> dict[str, Any]:
        """The figures of `acomm stats`."""
        journal = self.journal
        return {
            "path": journal.file.path,
            "epoch": journal.file.epoch,
            "state": _state(journal),
            "unfinished": len(self._seqs),
            "commits": journal.commits,
            "rows": journal.rows,
        }

    async def undone(self, ids: list[str]) -> list[str]:
        """Those of the requests that have not been delivered, in the file as well. Raises Busy when that
        cannot be read: nothing is known then, and who asks must not take it for a no.
        """
        found = [id for id in ids if id in self._seqs]
        rest = [id for id in ids if id not in self._seqs]
        try:
            for start in range(0, len(rest), _ASKED_AT_ONCE):
                asked = rest[start : start + _ASKED_AT_ONCE]
                found += await self.journal.ask(self.journal.file.undone, asked)
        except (sqlite3.Error, RuntimeError) as error:
            raise Busy(f"the journal cannot be used: {printable(error)}") from None
        return found

    def store(
        self, request: Request, content: bytes, origin: Origin, stored: Stored, message: bytes | None = None
    ) -> None:
        """Store a request of `origin`; `content` is its digest, and `message` what `Request.decode` made it
        from, if that is all that there is to it. `stored` is told how it went.
        """
        seq = self.journal.new_seq()

        def done(outcome: Row | AcommError | None) -> None:
            self.storing -= 1
            if outcome is None:
                self._seqs[request.id] = seq
            stored(outcome)

        entry = Entry(
            seq,
            request.id,
            content,
            request.task,
            request.encode(3, extended=True) if message is None else message,
            request.wire,
            request.extended,
            origin.text,
            self._wall(),
        )
        self.storing += 1
        self.journal.accept(entry, done)

    def answer(self, response: Response, stored: Callable[[], None], *, owed: bool = True) -> bool:
        """Store the answer to a request, if that is stored; `stored` is called when it may be told. False if
        it may be told at once.

        Where a stream is the answer it is not stored: it ends with its supervisor, so the request runs again
        if that dies before somebody has been told. Nor is a result that is `owed` to nobody: that the request
        is done with is all there is to know, and nothing waits for that to be written.
        """
        seq = self._seqs.get(response.id)
        if seq is None or response.stream_url is not None:
            return False
        if not owed and (response.error is None or response.error.code in _NO_FAULT):
            del self._seqs[response.id]
            self.journal.delivered(seq, soon=True)
            return False

        def done() -> None:
            self.answering -= 1
            stored()

        error = response.error
        code = None if error is None or error.code in _NO_FAULT else error.code
        self.answering += 1
        self.journal.end(Ending(seq, response.encode(3, extended=True), code), done)
        return True

    def delivered(self, id: str, error: AcommError | None) -> None:
        """The hook of a request has its answer, or never will."""
        seq = self._seqs.pop(id, None)
        if seq is None:
            return
        if error is None:
            self.journal.delivered(seq)
        else:
            self.journal.undelivered(seq)

    def leave(self, id: str) -> None:
        """The supervisor ends before a request has: the next one takes it up."""
        self._seqs.pop(id, None)

    def take_up(self, row: Row) -> Left | None:
        """What `row` is about; None, and a dead letter, if that cannot be read."""
        self._seqs[row.id] = row.seq
        try:
            origin = Origin.parse(row.origin)
            request = Request.decode(row.message or b"")
            response = None if row.response is None else Response.decode(row.response)
        except (AcommError, ValueError) as error:
            log.error("the request %s in the journal cannot be read: %s", printable(row.id), error)
            self.delivered(row.id, AcommError("unreadable"))
            return None
        request = msgspec.structs.replace(request, wire=row.wire, extended=bool(row.extended))
        if row.state != ACCEPTED:
            return Left(request, origin, response, stored=True)
        if row.boots >= MAX_BOOTS:
            text = f"{row.boots + 1} supervisors have died while this request was under way"
            return Left(request, origin, Response(row.id, error=Poisoned(text)))
        if request.timeout is not None:
            rest = request.timeout - max(0.0, self._wall() - row.accepted)
            if rest <= 0:
                late = CallTimeout("the request timed out while no supervisor was there")
                return Left(request, origin, Response(row.id, error=late))
            request = msgspec.structs.replace(request, timeout=rest)
        return Left(request, origin, None)


class Recovery:
    """Takes up what earlier supervisors have left, in its order and not all at once.

    `begin(left)` has it run or answered; `pending()` tells how many answers are on their way. Requests that
    were under way when two supervisors died go last and `few` at a time, each counted before it is begun, so
    that one which kills supervisors does not take others with it.
    """

    def __init__(
        self,
        stored: StoredRequests,
        begin: Callable[[Left], None],
        pending: Callable[[], int],
        few: int,
    ) -> None:
        self.taken_up = 0
        self._stored = stored
        self._begin = begin
        self._pending = pending
        self._few = few
        self._under_way: dict[str, int] = {}
        self._room = asyncio.Event()

    def ended(self, id: str) -> None:
        """A request has its answer."""
        if self._under_way.pop(id, None) is not None:
            self._room.set()

    def left(self) -> list[int]:
        """The rows of those that have not ended."""
        return list(self._under_way.values())

    async def run(self) -> None:
        """Take up everything; returns when the last has been begun."""
        journal = self._stored.journal
        file = journal.file
        after, suspects = 0, list[Row]()
        while rows := await journal.ask(file.unfinished, after, IN_FLIGHT // 2, file.last):
            after = rows[-1].seq
            suspects += [row for row in rows if row.boots >= MAX_BOOTS - 1 and row.state == ACCEPTED]
            rows = [row for row in rows if row.boots < MAX_BOOTS - 1 or row.state != ACCEPTED]
            await self._take_up(rows)
            await self._wait(IN_FLIGHT // 2)
            while self._pending() > MAX_PENDING:  # noqa: ASYNC110 - hooks may be down for hours
                await asyncio.sleep(_CHECK)
        for start in range(0, len(suspects), self._few):
            await self._wait(0)
            await self._take_up(suspects[start : start + self._few])
        if self.taken_up:
            log.info("%d requests of earlier supervisors were taken up", self.taken_up)

    async def _take_up(self, rows: list[Row]) -> None:
        journal = self._stored.journal
        seqs = [row.seq for row in rows if row.state == ACCEPTED and row.boots < MAX_BOOTS]
        while seqs:
            try:
                await journal.ask(journal.file.taken_up, seqs)
                break
            except sqlite3.Error as error:
                if not out_of_space(error):
                    raise
            await asyncio.sleep(_FULL)  # requests are refused meanwhile; these have been promised
        for row in rows:
            if row.id in self._stored:
                continue  # it was replayed meanwhile
            left = self._stored.take_up(row)
            if left is None:
                continue
            self.taken_up += 1
            if left.response is None:
                self._under_way[row.id] = row.seq
            try:
                self._begin(left)
            except Exception:  # a fault of ours with one must not keep the others from being taken up
                log.exception("the request %s could not be taken up", printable(row.id))
                self._under_way.pop(row.id, None)
                self._stored.leave(row.id)

    async def _wait(self, most: int) -> None:
        while len(self._under_way) > most:
            self._room.clear()
            await self._room.wait()


def _state(journal: Journal) -> str:
    if journal.broken is not None:
        return "failed"
    return "moved" if journal.moved else "full" if journal.full else "writing"
