"""Requests that are kept in the journal: stored before they are acknowledged, answered by what was stored.

    store --> (commit) --> acknowledged, run --> answer --> (commit) --> handlers, hook --> delivered

What an earlier supervisor has left is taken up by `Recovery`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import msgspec

from acomm.messages import Request, Response
from acomm.origin import Origin
from workers.errors import AcommError, Busy, CallCancelled, CallTimeout, Poisoned, printable
from workers.journal import RETRY, Journal, Stored
from workers.journalfile import ACCEPTED, Ending, Entry, JournalFile, Row, out_of_space

log = logging.getLogger("acomm.journal")

MAX_BOOTS = 3
"""How often a request is taken up again after the death of its supervisor: it may well be the cause."""

IN_FLIGHT = 1000
MAX_BYTES = 64 * 1024 * 1024
"""Requests of earlier supervisors that are under way at a time, and bytes of their messages: the rest
waits in the file.
"""

PAGE = 250
"""Rows that are read at once."""

MAX_PENDING = 20_000
"""Answers on their way beyond which no more are read from the file."""

SUSPECTS_WAIT = 30.0
"""Seconds that those which may have killed supervisors wait for all others to end."""

_ASKED_AT_ONCE = 500  # rows that are looked up between two commits
_BEGUN_AT_ONCE = 100  # some milliseconds' work
_CHECK = 0.05  # seconds between looks whether there is room
_origin = functools.lru_cache(Origin.parse)  # there are few, and many requests of each
_NO_FAULT = frozenset({"cancelled"})
"""Errors by which nobody has failed: such requests are not kept."""

T = TypeVar("T")


class Left(NamedTuple):
    """A request that an earlier supervisor has left, and its digest: to be run, unless it has its `response`,
    which is in the journal if it is `stored`.
    """

    request: Request
    content: bytes
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

    def owes_nobody(self, response: Response) -> bool:
        """The answer to a request is for nobody. If it is no fault it is not stored: that the request is done
        with is all there is to know, and nothing waits for that to be written. Whether that was so.
        """
        if response.error is not None and response.error.code not in _NO_FAULT:
            return False
        if response.stream_url is not None:
            return False
        seq = self._seqs.pop(response.id, None)
        if seq is not None:
            self.journal.delivered(seq, soon=True)
        return True

    def answer(self, response: Response, stored: Callable[[], None]) -> bool:
        """Store the answer to a request, if that is stored; `stored` is called when it may be told. False if
        it may be told at once.

        Where a stream is the answer it is not stored: it ends with its supervisor, so the request runs again
        if that dies before somebody has been told.
        """
        seq = self._seqs.get(response.id)
        if seq is None or response.stream_url is not None:
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
            origin = _origin(row.origin)
            request = Request.decode(row.message or b"")
            response = None if row.response is None else Response.decode(row.response)
        except (AcommError, ValueError) as error:
            log.error("the request %s in the journal cannot be read: %s", printable(row.id), error)
            self.delivered(row.id, AcommError("unreadable"))
            return None
        if request.wire != row.wire or request.extended != bool(row.extended):
            request = msgspec.structs.replace(request, wire=row.wire, extended=bool(row.extended))
        if row.state != ACCEPTED:
            return Left(request, row.digest, origin, response, stored=True)
        if row.boots >= MAX_BOOTS:
            text = f"{row.boots + 1} supervisors have died while this request was under way"
            return Left(request, row.digest, origin, Response(row.id, error=Poisoned(text)))
        if request.timeout is not None:
            rest = request.timeout - max(0.0, self._wall() - row.accepted)
            if rest <= 0:
                late = CallTimeout("the request timed out while no supervisor was there")
                return Left(request, row.digest, origin, Response(row.id, error=late))
            request = msgspec.structs.replace(request, timeout=rest)
        return Left(request, row.digest, origin, None)


class Recovery:
    """Takes up what earlier supervisors have left, in its order and not all at once.

    `begin(left)` has it run or answered; `pending()` tells how many answers are on their way. Requests that
    were under way when two supervisors died go last and `few` at a time, each counted before it is begun, so
    that one which kills supervisors does not take others with it. The others are counted, a page at a time,
    while those before them run.
    """

    def __init__(
        self,
        stored: StoredRequests,
        begin: Callable[[Left], None],
        pending: Callable[[], int],
        few: int,
    ) -> None:
        self.taken_up = 0
        self.patience = SUSPECTS_WAIT
        self._stored = stored
        self._begin = begin
        self._pending = pending
        self._few = few
        self._under_way: dict[str, tuple[int, int]] = {}  # the rows, and the bytes of their messages
        self._bytes = 0
        self._counted: set[int] = set()  # rows that are not begun yet
        self._answered: set[str] = set()  # before it was their turn
        self._most = 0
        self._room = asyncio.Event()

    def ended(self, id: str) -> None:
        """A request has its answer, which may have to be stored yet."""
        found = self._under_way.pop(id, None)
        if found is not None:
            self._bytes -= found[1]
            if self._has_room():
                self._room.set()

    def left(self) -> list[int]:
        """The rows that were counted, and have not ended."""
        return [*(seq for seq, _ in self._under_way.values()), *self._counted]

    async def cancel(self, id: str) -> bool:
        """Answer a request with `cancelled` that waits in the file; False if there is none. Raises
        sqlite3.Error.
        """
        file = self._stored.journal.file
        row = await self._stored.journal.ask(file.find, id)
        if row is None or row.state != ACCEPTED or row.seq > file.last:
            return False
        if id in self._stored or id in self._answered:  # it is not in the file alone any more
            return False
        left = self._stored.take_up(row)
        if left is None:
            return False
        self._answered.add(id)
        if left.response is None:
            error = CallCancelled(f"call of task {row.task} was cancelled")
            left = left._replace(response=Response(id, error=error))
        self._begin(left)
        return True

    async def run(self) -> None:
        """Take up everything; returns when the last has been begun."""
        suspects = list[Row]()
        reading = self._read_on(0)
        try:
            while rows := await reading:
                reading = self._read_on(rows[-1].seq)
                suspects += filter(_suspect, rows)
                rows = [row for row in rows if not _suspect(row)]
                for start in range(0, len(rows), _BEGUN_AT_ONCE):
                    await self._wait(IN_FLIGHT - _BEGUN_AT_ONCE)
                    self._take_up(rows[start : start + _BEGUN_AT_ONCE])
                    await asyncio.sleep(0)  # others want to be served as well
        finally:
            reading.cancel()
        for start in range(0, len(suspects), self._few):
            # Alone, so that a further death counts against the right ones; but others may run for ever.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wait(0), self.patience)
            await self._count(suspects[start : start + self._few])
            self._take_up(suspects[start : start + self._few])
        if self.taken_up:
            log.info("%d requests of earlier supervisors were taken up", self.taken_up)

    def _read_on(self, after: int) -> asyncio.Task[list[Row]]:
        return asyncio.get_running_loop().create_task(self._read(after))

    async def _read(self, after: int) -> list[Row]:
        """The next rows behind `after`. They are counted, but for those that go last."""
        # Hooks may be down for hours, and the disk full.
        while self._pending() + self._stored.answering > MAX_PENDING:  # noqa: ASYNC110
            await asyncio.sleep(_CHECK)
        rows, counted = await self._ask(_page, self._stored.journal.file, after)
        self._counted.update(counted)
        return rows

    async def _ask(self, question: Callable[..., T], *args: Any) -> T:
        """As the journal's `ask`, as often as it takes until the disk has room."""
        while True:
            try:
                return await self._stored.journal.ask(question, *args)
            except sqlite3.Error as error:
                if not out_of_space(error):
                    raise
            await asyncio.sleep(RETRY)

    async def _count(self, suspects: list[Row]) -> None:
        seqs = [row.seq for row in suspects if row.boots < MAX_BOOTS]
        if seqs:  # behind the answers of those before them, which are in the file then
            await self._ask(self._stored.journal.file.taken_up, seqs)
            self._counted.update(seqs)

    def _take_up(self, rows: list[Row]) -> None:
        for row in rows:
            self._counted.discard(row.seq)
            if row.id in self._stored or row.id in self._answered:  # replayed, or cancelled
                continue
            left = self._stored.take_up(row)
            if left is None:
                continue
            self.taken_up += 1
            if left.response is None:
                size = len(row.message or b"")
                self._under_way[row.id] = row.seq, size
                self._bytes += size
            try:
                self._begin(left)
            except Exception:  # a fault of ours with one must not keep the others from being taken up
                log.exception("the request %s could not be taken up", printable(row.id))
                self.ended(row.id)
                self._stored.leave(row.id)

    def _has_room(self) -> bool:
        return len(self._under_way) <= self._most and self._bytes <= MAX_BYTES

    async def _wait(self, most: int) -> None:
        """Wait until no more than `most` are under way, and they are not too large."""
        self._most = most
        while not self._has_room():
            self._room.clear()
            await self._room.wait()


def _page(file: JournalFile, after: int) -> tuple[list[Row], list[int]]:
    """The next rows behind `after`, and which of them were counted."""
    rows = file.unfinished(after, PAGE, file.last)
    counted = [row.seq for row in rows if row.state == ACCEPTED and not _suspect(row)]
    if counted:
        file.taken_up(counted)
    return rows, counted


def _suspect(row: Row) -> bool:
    """Whether it may be what supervisors have died of."""
    return row.state == ACCEPTED and row.boots >= MAX_BOOTS - 1


def _state(journal: Journal) -> str:
    if journal.broken is not None:
        return "failed"
    return "moved" if journal.moved else "full" if journal.full else "writing"
