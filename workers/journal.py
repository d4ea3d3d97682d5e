"""The journal: what was accepted outlives the supervisor. One thread writes, many requests share a commit.

    accept(entry, stored) --+                        +--> stored(...)      each on the event loop,
    end(ending, stored) ----+--> [one transaction] --+--> stored(...)      after the commit
    delivered(seq) ---------+

Whatever comes during a commit is the next batch; there is no timer. What a full disk keeps from being
written is refused where it was not yet promised, and tried again where it was. A failed fsync is the end:
nobody knows what of the file is on the disk, and the next commit would succeed all the same (`broken`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from workers.errors import AcommError, Busy, printable
from workers.journalfile import COMPACTED_AT_ONCE, Batch, Ending, Entry, JournalFile, Row, out_of_space

log = logging.getLogger("acomm.journal")

MAX_BATCH = 256
"""Requests that share a commit: more would only wait longer for it."""

HANDED_OVER = 128
"""Requests that the thread is given before the event loop's turn has ended. Given one by one it would take a
few at a time, and each time have the event loop wait for the interpreter; at the end alone, both would wait
for each other.
"""

SOON = 0.01
"""Seconds within which it is written that a request is done with which would else run again if we died."""

LOOK = 0.02
"""Seconds between looks whether the file is where it was: each costs two trips for the interpreter lock."""

MAX_ERRANDS = 4
"""Questions that are answered between two commits: each may take some milliseconds, and anybody may ask."""

RETRY = 0.25
"""Seconds between tries to write what could not be written and has been promised."""

IDLE = 0.5
"""Seconds without anything to write after which there is time for housekeeping."""

MAX_LOG = 100_000
"""Rows written after which the log is brought into the file even if there is no time: 200 MB or so, and a
pause of some tenths of a second, so not often.
"""

ROW = 2048
"""Bytes of a message or answer that count as one row more: a log of large ones would fill the disk."""

COMPACT_AFTER = COMPACTED_AT_ONCE
"""Rows written after which old ones are deleted even if there is no time, or the file would grow as long as
there is something to do. A request has two, so more are looked at than come.
"""

_MOVED = "the file of the supervisor's journal was moved or deleted"
_FAILED = "the journal has failed; the supervisor stops"
_UNTOLD = "what waited for the journal failed"

T = TypeVar("T")
Stored = Callable[[Row | AcommError | None], None]
"""Told of an entry: None, it is stored; the row that has its id; or why it could not be stored."""


class Journal:
    """Writes to `file` from a thread of its own, and tells on the event loop that was running at `start`.

    `failed(text)` is called there, once, when the file cannot be trusted any more.
    """

    def __init__(self, file: JournalFile, failed: Callable[[str], None]) -> None:
        self.file = file
        self.broken: str | None = None
        self.commits = 0
        self.rows = 0
        self.full = False  # the last try has found no space
        self.moved = False  # the next supervisor would not find what we write
        self._failed = failed
        self._seqs = itertools.count(file.last + 1)
        self._wake = threading.Condition()
        # What this turn of the event loop has brought, and what the thread was given.
        self._new_entries: list[tuple[Entry, Stored]] = []
        self._new_ended: list[tuple[Ending, Callable[[], None]]] = []
        self._turn_ends = False  # it is called then
        self._entries: list[tuple[Entry, Stored]] = []
        self._ended: list[tuple[Ending, Callable[[], None]]] = []
        self._delivered: list[int] = []
        self._soon = False  # those need not wait for more
        self._soon_called = False
        self._undelivered: list[int] = []
        self._errands: list[Callable[[], None]] = []
        self._look_at = 0.0
        self._closing = False
        self._awake = False
        self._since_checkpoint = 0
        self._since_compaction = 0
        self._thread = threading.Thread(target=self._run, name="acomm-journal", daemon=True)

    def __repr__(self) -> str:
        return f"<Journal {self.file.path}, {self.commits} commits>"

    def start(self) -> None:
        """Begin to write; call it on the event loop that is to be told."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def close(self) -> None:
        """Write what is left, and close the file."""
        self._hand_over()
        self._closing = True
        self._rouse()
        if self._thread.ident is not None:
            await self._loop.run_in_executor(None, self._thread.join)
        if self.broken is None:
            self.file.close()
        else:
            self.file.abandon()

    def new_seq(self) -> int:
        """The number of the next row."""
        return next(self._seqs)

    # -- what is to be written ----------------------------------------------------------------------

    def accept(self, entry: Entry, stored: Stored) -> None:
        """Store a request; it may be acknowledged and run when `stored` says so."""
        self._new_entries.append((entry, stored))
        self._more(len(self._new_entries))

    def end(self, ending: Ending, stored: Callable[[], None]) -> None:
        """Store an answer; it may be told when `stored` says so."""
        self._new_ended.append((ending, stored))
        self._more(len(self._new_ended))

    def delivered(self, seq: int, *, soon: bool = False) -> None:
        """A request's answer has arrived, or nobody is to have it: it need not be kept. Written when there is
        time; `soon`: within SOON, as the request would run again if we died before.
        """
        self._delivered.append(seq)
        if len(self._delivered) >= MAX_BATCH:
            if not self._awake:
                self._rouse()
        elif soon and not self._soon_called:
            self._soon_called = True
            self._loop.call_later(SOON, self._deliver_now)

    def undelivered(self, seq: int) -> None:
        """A request's answer is given up."""
        self._undelivered.append(seq)
        if not self._awake:
            self._rouse()

    async def ask(self, question: Callable[..., T], *args: Any) -> T:
        """`question(*args)`, a method of the file's, in the thread that has it, behind what is written.
        Raises sqlite3.Error, also when the file is `broken`.
        """
        answer: asyncio.Future[T] = self._loop.create_future()

        def told(value: T | None, error: BaseException | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(value)  # type: ignore[arg-type]
            else:
                answer.set_exception(error)

        def errand() -> None:
            value: T | None = None
            fault: BaseException | None = None
            try:
                if self.broken is not None:
                    raise sqlite3.OperationalError(f"the journal has failed: {self.broken}")
                value = question(*args)
            except Exception as error:
                fault = error
            self._tell(told, value, fault)

        if self._closing:
            raise RuntimeError("the journal is closed")
        self._hand_over()
        self._errands.append(errand)
        if self.broken is None:
            self._rouse()
        else:  # the thread has ended, or is about to and may have seen it; once is enough
            errand()
        return await answer

    def _more(self, new: int) -> None:
        """Hand over what is new, so many of a kind, now or when the event loop's turn ends."""
        if new >= HANDED_OVER:
            self._hand_over()
        elif not self._turn_ends:
            self._turn_ends = True
            self._loop.call_soon(self._turn_ended)

    def _turn_ended(self) -> None:
        self._turn_ends = False
        self._hand_over()

    def _hand_over(self) -> None:
        """Give the thread what is new."""
        if not (self._new_entries or self._new_ended):
            return
        with self._wake:
            broken = self.broken is not None
            if not broken:
                self._entries += self._new_entries
                self._ended += self._new_ended
        refused = self._new_entries
        self._new_entries, self._new_ended = [], []
        if broken:  # answers are for the next supervisor to give
            self._refused([stored for _, stored in refused], Busy(_FAILED))
        elif not self._awake:
            self._rouse()

    def _deliver_now(self) -> None:
        self._soon_called = False
        if self._delivered:
            self._soon = True
            if not self._awake:
                self._rouse()

    def _rouse(self) -> None:
        """Have the thread look: it sleeps, or is about to. Whoever appends first and then looks whether it is
        awake is seen by one that says that it sleeps first, and then looks whether there is something. From
        here on it counts as awake, though it may yet wait for the interpreter: once is enough. Not if it has
        woken by itself meanwhile, has seen to all, and sleeps again: it would sleep on, and count as awake.
        """
        with self._wake:
            if self._has_work():
                self._awake = True
                self._wake.notify()

    # -- the thread ---------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._step():
                pass
        except Exception as error:  # a fault of ours: as bad as one of the disk's
            log.exception("the journal failed")
            self._break(f"{type(error).__name__}: {error}")

    def _step(self) -> bool:
        """Write one batch, or see to the house; whether to go on."""
        idle = not self._has_work() and not self._sleep()
        closing = self._closing  # before what there is: nothing comes after it
        # Others append meanwhile, and to these lists, so they are emptied and not replaced.
        entries = _take(self._entries, MAX_BATCH)
        ended = _take(self._ended)
        undelivered = _take(self._undelivered)
        # Nobody waits for these, and a batch of one kind is written with one trip for the interpreter lock.
        # At the end they go with the others: what cannot be written then is tried once, and not for ever.
        delivered: list[int] = []
        if closing or len(self._delivered) >= MAX_BATCH or not (entries or ended or undelivered):
            self._soon = False  # before they are taken: what comes then is not in this batch
            delivered = _take(self._delivered)
        errands = _take(self._errands, None if closing else MAX_ERRANDS)
        last = closing and not self._entries and not self._delivered
        batch = Batch()
        batch.entries = [entry for entry, _ in entries]
        batch.ended = [ending for ending, _ in ended]
        batch.delivered, batch.undelivered = delivered, undelivered
        if entries and not self._in_place():
            self._tell(self._refused, [stored for _, stored in entries], Busy(f"{_MOVED}: restart it"))
            batch.entries, entries = [], []
        if batch and not self._write(batch, entries, ended):
            # What has been promised comes first, next time.
            self._ended[:0] = ended
            self._delivered[:0] = delivered
            if delivered:
                self._soon = True
            self._undelivered[:0] = undelivered
            last = last or self.broken is not None
            if not last:
                time.sleep(RETRY)
        for errand in errands:
            errand()
        if self.broken is None:
            self._keep_house(idle)
        return not last and self.broken is None

    def _in_place(self) -> bool:
        """Whether what is stored will be found. Answers of what was stored are told as long as we live."""
        now = time.monotonic()
        if now < self._look_at:
            return not self.moved
        self._look_at = now + LOOK
        in_place = self.file.in_place()
        if in_place == self.moved:
            self.moved = not in_place
            text = f"{_MOVED}; requests are refused" if self.moved else "the journal's file is back"
            log.error("%s (%s)", text, self.file.path)
        return in_place

    def _sleep(self) -> bool:
        """Wait for something to do; whether there is."""
        with self._wake:
            self._awake = False
            found = self._wake.wait_for(self._has_work, IDLE)
            self._awake = True
        return found

    def _has_work(self) -> bool:
        return bool(
            self._entries
            or self._ended
            or self._undelivered
            or self._errands
            or self._closing
            or self._soon
            or len(self._delivered) >= MAX_BATCH
        )

    def _write(
        self,
        batch: Batch,
        entries: list[tuple[Entry, Stored]],
        ended: list[tuple[Ending, Callable[[], None]]],
    ) -> bool:
        try:
            known = self.file.write(batch)
        except Exception as error:
            if not isinstance(error, sqlite3.Error):  # a fault of ours: as bad as one of the disk's
                log.exception("the journal failed")
                self._break(f"{type(error).__name__}: {error}")
                refusal: AcommError = Busy(_FAILED)
            elif not out_of_space(error):
                self._break(str(error))
                refusal = Busy(_FAILED)
            else:
                if not self.full:
                    log.error("the journal cannot be written (%s); requests are refused meanwhile", error)
                self.full = True
                refusal = Busy(f"the journal cannot be written: {printable(error)}", retry_after=1.0)
            self._tell(self._refused, [stored for _, stored in entries], refusal)
            return False
        if self.full:
            log.warning("the journal can be written again")
            self.full = False
        self.commits += 1
        rows = len(batch.entries) + len(batch.ended)
        self.rows += rows
        size = sum([len(entry.message) for entry in batch.entries])
        size += sum([len(ending.response) for ending in batch.ended])
        self._since_checkpoint += rows + size // ROW
        self._since_compaction += rows
        self._tell(self._stored, entries, known, ended)
        return True

    @staticmethod
    def _refused(waiting: list[Stored], refusal: AcommError) -> None:
        for stored in waiting:
            try:
                stored(refusal)
            except Exception:
                log.exception(_UNTOLD)

    @staticmethod
    def _stored(
        entries: list[tuple[Entry, Stored]],
        known: dict[int, Row],
        ended: list[tuple[Ending, Callable[[], None]]],
    ) -> None:
        # What one is told must not keep the others from being told. Both loops are run for each request.
        for entry, stored in entries:
            try:
                stored(known.get(entry.seq) if known else None)
            except Exception:
                log.exception(_UNTOLD)
        for _, done in ended:
            try:
                done()
            except Exception:
                log.exception(_UNTOLD)

    def _keep_house(self, idle: bool) -> None:
        try:
            if idle or self._since_compaction >= COMPACT_AFTER:
                self._since_compaction = 0
                while (deleted := self.file.compact()) is not None:
                    self._since_checkpoint += deleted
                    if not idle or self._has_work():
                        break
            if self._since_checkpoint > (0 if idle else MAX_LOG):
                self.file.checkpoint()
                self._since_checkpoint = 0
        except sqlite3.Error as error:
            if not out_of_space(error):
                self._break(str(error))

    def _break(self, text: str) -> None:
        """The file is not to be trusted: nothing more is written."""
        with self._wake:  # what is handed over from now on is refused there
            self.broken = text
            waiting = [stored for _, stored in _take(self._entries)]
        self._tell(self._refused, waiting, Busy(_FAILED))
        self._tell(self._failed, text)
        for errand in _take(self._errands):
            errand()

    def _tell(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: nobody is there to be told
            log.debug("nobody waits for the journal any more")


def _take(waiting: list[T], most: int | None = None) -> list[T]:
    """What waits, `most` of it; others may append meanwhile."""
    taken = waiting[:most]
    del waiting[: len(taken)]
    return taken
