"""The journal's file: accepted requests and their answers in SQLite. No threads; whoever opens it owns it.

    accepted --> ended --> delivered        each a row's state; a tombstone stays of what was delivered, so
       ^           |                        that a repeat is told from a new request
       +-- replay  +-----> undelivered      a dead letter

A row is what its request was, as the JSON of generation 3 with all our keys, and what is not in that: in
which generation it came, and who has sent it. Failed ones keep it, and their answer, until they are purged or
old.

Why statements of many rows: Python's sqlite3 gives up the interpreter lock for each step of a statement and
has to get it back, which beside a busy event loop takes up to a whole switch interval. So it is one step for
many rows.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from acomm.socketpath import check_folder
from workers import journalplace
from workers.errors import ConfigError, printable

SCHEMA = 1
"""The version of the tables below; `user_version` of the file."""

APPLICATION_ID = 0x61636F6D
"""Of SQLite's file header: "acom"."""

ACCEPTED, ENDED, DELIVERED, UNDELIVERED = range(4)
"""The states of a row. ENDED has its answer, which its hook has not acknowledged."""

WINDOW = 24 * 3600.0
"""Seconds for which the id of a delivered request is known."""

KEEP_FAILED = 7 * 24 * 3600.0
"""Seconds for which a failed request is kept, unless it is purged."""

PAGE = 1024
"""Bytes of a page. Ids are random, so each new one changes a page of their index, which is written whole:
with SQLite's 4096 a commit of 256 requests took three to six times as long.
"""

CACHE = 16 * 1024
"""KiB of pages in memory, for the same reason: with SQLite's 2000 each request has pages read twice."""

CHUNKS = (1, 4, 16, 32, 64, 128, 256)
"""Rows of one statement: a few sizes, so that each is prepared once. Fewer rows are filled up with the last
one, which changes nothing: that costs less than another statement.
"""

_READ_AT_ONCE = 16 * 1024 * 1024  # bytes of messages and answers
COMPACTED_AT_ONCE = 500
"""Rows that are looked at by one compaction: some 20 ms if all are old, as each changes a page of the ids'
index.
"""

COMPACT_EVERY = 60.0
"""Seconds from the last old row until such are looked for from the first row on."""


_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE requests (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    digest BLOB NOT NULL,
    state INTEGER NOT NULL,
    task TEXT NOT NULL,
    message BLOB,
    wire INTEGER NOT NULL,
    extended INTEGER NOT NULL,
    origin TEXT NOT NULL,
    accepted REAL NOT NULL,
    boots INTEGER NOT NULL DEFAULT 0,
    response BLOB,
    code TEXT,
    ended REAL
);
CREATE INDEX unfinished ON requests (seq) WHERE state < 2;
CREATE INDEX failed ON requests (seq) WHERE code IS NOT NULL;
"""

_COLUMNS = (
    "seq, id, digest, state, task, message, wire, extended, origin, accepted, boots, response, code, ended"
)
_SLIM = _COLUMNS.replace("message", "NULL").replace("response", "NULL")
"""Without what may be large: anybody may ask for the row of an id, and for the same one many times."""

_LISTED = _COLUMNS.replace("message", "NULL").replace(
    "response", "iif(length(response) > 65536, NULL, response)"
)


class Entry(NamedTuple):
    """A request to be stored. `accepted` is seconds since the epoch, `origin` what `Origin.parse` reads."""

    seq: int
    id: str
    digest: bytes
    task: str
    message: bytes
    wire: int
    extended: bool
    origin: str
    accepted: float


class Row(NamedTuple):
    """A stored request. `message` and `response` are None when they have been blanked; `code` is the error's
    of a failed one; `boots` counts how often it was taken up again after its supervisor had died.
    """

    seq: int
    id: str
    digest: bytes
    state: int
    task: str
    message: bytes | None
    wire: int
    extended: int
    origin: str
    accepted: float
    boots: int
    response: bytes | None
    code: str | None
    ended: float | None


class Ending(NamedTuple):
    """An answer to be stored: a response as generation 3's JSON, and its error's code if it has failed."""

    seq: int
    response: bytes
    code: str | None


class Batch:
    """What one transaction writes."""

    __slots__ = ("delivered", "ended", "entries", "undelivered")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.ended: list[Ending] = []
        self.delivered: list[int] = []
        self.undelivered: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.entries or self.ended or self.delivered or self.undelivered)

    def is_one_statement(self) -> bool:
        """Whether it is of one kind, and not too much for a statement."""
        sizes = [len(rows) for rows in (self.entries, self.ended, self.delivered, self.undelivered) if rows]
        return len(sizes) == 1 and sizes[0] <= CHUNKS[-1]


class JournalFile:
    """The open file. `epoch` is how often it has been opened, `last` its highest row then; `identity` is 16
    secret bytes, by which other services know its supervisors.
    """

    def __init__(self, path: str, *, full: bool = True, wall: Callable[[], float] | None = None) -> None:
        """Open or make the file at `path`, for us alone. `full`: a commit survives the loss of power, else
        only that of the process. Raises ConfigError, which says how to go on, for a file that is not ours,
        newer, damaged, in use, or on another host.
        """
        self.path = os.path.abspath(path)
        self._wall = wall or _time_of_day()
        self._compacted = 0  # the row up to which old ones are gone
        self._compacted_at = 0.0
        check_folder(os.path.dirname(self.path))
        journalplace.check_local(self.path)
        self._lock = journalplace.lock(self.path)
        self._held: int | None = None
        try:
            self._held = journalplace.make_private(self.path)
            with self._readable():
                self._db = sqlite3.connect(
                    self.path, isolation_level=None, check_same_thread=False, cached_statements=64
                )
                try:
                    self._set_up(full)
                except BaseException:
                    self._db.close()
                    raise
        except BaseException:
            self._let_go()
            raise

    def __repr__(self) -> str:
        return f"<JournalFile {self.path}, epoch {self.epoch}>"

    def _set_up(self, full: bool) -> None:
        db = self._db
        application, version = self._pragma("application_id"), self._pragma("user_version")
        tables = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if tables and application != APPLICATION_ID:
            raise ConfigError(f"{printable(self.path)} is another program's database: name another file")
        if version > SCHEMA:
            raise ConfigError(
                f"the journal {printable(self.path)} was written by a newer acomm (schema {version}; we "
                f"know {SCHEMA}): use that one, or move the file away to begin a new journal"
            )
        if not tables:
            db.execute(f"PRAGMA page_size = {PAGE}")
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise ConfigError(
                f"no WAL can be kept beside {printable(self.path)}: name a file on another disk"
            )
        self._synchronous = f"PRAGMA synchronous = {'FULL' if full else 'NORMAL'}"
        db.execute(self._synchronous)
        db.execute("PRAGMA wal_autocheckpoint = 0")  # `checkpoint` does it when there is time
        db.execute("PRAGMA journal_size_limit = 268435456")
        db.execute("PRAGMA temp_store = MEMORY")
        db.execute(f"PRAGMA cache_size = -{CACHE}")
        db.execute("BEGIN IMMEDIATE")
        if not tables:
            for statement in _TABLES.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {SCHEMA}")
            db.execute("INSERT INTO meta VALUES ('epoch', 0)")
        db.execute("INSERT OR IGNORE INTO meta VALUES ('identity', ?)", (os.urandom(16),))
        db.execute("UPDATE meta SET value = value + 1 WHERE key = 'epoch'")
        self.epoch: int = db.execute("SELECT value FROM meta WHERE key = 'epoch'").fetchone()[0]
        self.identity: bytes = db.execute("SELECT value FROM meta WHERE key = 'identity'").fetchone()[0]
        self.last: int = db.execute("SELECT coalesce(max(seq), 0) FROM requests").fetchone()[0]
        db.execute("COMMIT")
        self._places = self._look()

    def _pragma(self, name: str) -> int:
        value: int = self._db.execute(f"PRAGMA {name}").fetchone()[0]
        return value

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if _primary(error) == sqlite3.SQLITE_NOTADB:
                text = f"{printable(self.path)} is no journal: name another file"
            elif _primary(error) == sqlite3.SQLITE_CORRUPT:
                text = (
                    f"the journal {printable(self.path)} is damaged ({error}): move it away to begin a new "
                    "one; `sqlite3 FILE .recover` shows what can still be read of it"
                )
            elif out_of_space(error):
                text = f"no space for the journal {printable(self.path)}"
            else:
                text = f"cannot use the journal {printable(self.path)}: {error}"
            raise ConfigError(text) from None

    def close(self) -> None:
        """Close it and give it free. What is committed is in the file."""
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self.abandon()

    def abandon(self) -> None:
        """Close without touching the file: it has failed."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()
        self._let_go()

    def _let_go(self) -> None:
        # Behind SQLite, whose own locks on the file end when any descriptor of it is closed.
        if self._held is not None:
            os.close(self._held)
        os.close(self._lock)

    def in_place(self) -> bool:
        """Whether who opens the path finds what we write: one that was deleted or replaced takes it, too."""
        try:
            return self._look() == self._places
        except OSError:
            return False

    def _look(self) -> list[tuple[int, int]]:
        found = [os.stat(path) for path in (self.path, f"{self.path}-wal")]
        return [(info.st_dev, info.st_ino) for info in found]

    # -- writing ------------------------------------------------------------------------------------

    def write(self, batch: Batch) -> dict[int, Row]:
        """Commit a batch. Returns, by the sequence number of an entry that was not stored as its id is known,
        the row that has the id. Raises sqlite3.Error; nothing is written then.
        """
        if batch.is_one_statement():  # which is a transaction by itself
            return self._write_all(batch)
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            known = self._write_all(batch)
            db.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        return known

    def _write_all(self, batch: Batch) -> dict[int, Row]:
        db = self._db
        known = self._insert(batch.entries) if batch.entries else {}
        now = self._wall()
        for ends in _chunks(batch.ended):
            db.execute(_update_ended(len(ends)), [now, *chain.from_iterable(ends)])
        for seqs in _chunks(batch.delivered):
            db.execute(_update_delivered(len(seqs)), [now, *seqs])
        for seqs in _chunks(batch.undelivered):
            db.execute(_update_undelivered(len(seqs)), [now, *seqs])
        return known

    def _roll_back(self) -> None:
        if self._db.in_transaction:
            with contextlib.suppress(sqlite3.Error):  # some errors have rolled back already
                self._db.execute("ROLLBACK")

    def _insert(self, entries: Sequence[Entry]) -> dict[int, Row]:
        db = self._db
        known: dict[int, Row] = {}
        for chunk in _chunks(entries):
            done = db.execute(_insert(len(chunk)), list(chain.from_iterable(chunk)))
            if done.rowcount == len(entries):
                continue  # all of them, as far as they are in one chunk
            if done.rowcount == len({entry.seq for entry in chunk}):
                continue
            seqs = [entry.seq for entry in chunk]
            stored = {
                seq for (seq,) in db.execute(f"SELECT seq FROM requests WHERE seq IN ({_marks(seqs)})", seqs)
            }
            for entry in chunk:
                if entry.seq not in stored:
                    row = self.find(entry.id, _SLIM)
                    assert row is not None
                    known[entry.seq] = row
        return known

    def taken_up(self, seqs: Sequence[int]) -> None:
        """Count that rows are taken up again, before they are. That outlives our process and need not outlive
        more, so nobody waits for the disk.
        """
        self._db.execute("PRAGMA synchronous = NORMAL")
        try:
            self._change(f"UPDATE requests SET boots = boots + 1 WHERE seq IN ({_marks(seqs)})", seqs)
        finally:
            self._db.execute(self._synchronous)

    def put_back(self, seqs: Sequence[int]) -> None:
        """Rows were taken up, and then left in order: that does not count, and earlier deaths do."""
        for chunk in _chunks(seqs):
            self._change(
                f"UPDATE requests SET boots = max(boots - 1, 0) WHERE seq IN ({_marks(chunk)})", chunk
            )

    def replay(self, seq: int) -> int:
        """Have a failed request run, or its answer delivered, once more; 0 if it is under way already."""
        return self._change(
            "UPDATE requests SET boots = 0, accepted = ?, state = iif(code = 'undelivered' AND "
            "response IS NOT NULL, 1, 0), code = NULL, response = iif(code = 'undelivered', response, NULL) "
            "WHERE seq = ? AND state >= 2",
            (self._wall(), seq),
        )

    def purge(self, seqs: Sequence[int]) -> int:
        """Forget failed requests but for their ids; how many there were."""
        return self._change(
            "UPDATE requests SET message = NULL, response = NULL, code = NULL, state = 2"
            f" WHERE code IS NOT NULL AND state >= 2 AND seq IN ({_marks(seqs)})",
            seqs,
        )

    def purge_some(self, limit: int, task: str | None = None) -> int:
        """The same for so many of those that are done, of all or of a task; again while there are any."""
        return self._change(
            "UPDATE requests SET message = NULL, response = NULL, code = NULL, state = 2 WHERE seq IN "
            "(SELECT seq FROM requests WHERE code IS NOT NULL AND state >= 2 AND (? IS NULL OR task = ?) "
            "LIMIT ?)",
            (task, task, limit),
        )

    def _change(self, statement: str, values: Sequence[Any]) -> int:
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            count = db.execute(statement, values).rowcount
            db.execute("COMMIT")
        except BaseException:
            self._roll_back()
            raise
        return count

    def compact(self) -> int | None:
        """Delete those of some rows that are too old to be of use; how many, None if there were no more to
        look at. Each call goes on where the last one ended, as what is kept must not keep what is behind it;
        after the last old row there is a pause.
        """
        now, after = self._wall(), self._compacted
        if not after and 0 <= now - self._compacted_at < COMPACT_EVERY:
            return None
        db = self._db
        count, upto = db.execute(
            "SELECT count(*), max(seq) FROM (SELECT seq FROM requests WHERE seq > ? ORDER BY seq LIMIT ?)",
            (after, COMPACTED_AT_ONCE),
        ).fetchone()
        more = False
        if count == COMPACTED_AT_ONCE:
            (accepted,) = db.execute("SELECT accepted FROM requests WHERE seq = ?", (upto,)).fetchone()
            more = accepted < now - WINDOW
        deleted = self._change(
            "DELETE FROM requests WHERE seq > ? AND seq <= ? "
            "AND state >= 2 AND ended < iif(code IS NULL, ?, ?)",
            (after, upto, now - WINDOW, now - KEEP_FAILED),
        )
        self._compacted, self._compacted_at = upto if more else 0, now
        return deleted

    def checkpoint(self) -> None:
        """Bring what was committed from the log into the file proper. Takes as long as there is of it."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    # -- reading ------------------------------------------------------------------------------------

    def find(self, id: str, columns: str = _COLUMNS) -> Row | None:
        """The row of a request."""
        found = self._db.execute(f"SELECT {columns} FROM requests WHERE id = ?", (id,)).fetchone()
        return None if found is None else Row(*found)

    def response(self, id: str) -> bytes | None:
        """The stored answer to a request."""
        found = self._db.execute("SELECT response FROM requests WHERE id = ?", (id,)).fetchone()
        return None if found is None else found[0]

    def undone(self, ids: Sequence[str]) -> list[str]:
        """Those of the requests that have not been delivered."""
        rows = [self.find(id, _SLIM) for id in ids]
        return [row.id for row in rows if row is not None and row.state in (ACCEPTED, ENDED)]

    def unfinished(self, after: int, limit: int, upto: int) -> list[Row]:
        """The first rows behind `after`, and up to `upto`, that have not been delivered, in their order: at
        most `limit`, and fewer when they are large.
        """
        cursor = self._db.execute(
            f"SELECT {_COLUMNS} FROM requests INDEXED BY unfinished WHERE state < 2 AND seq > ? AND seq <= ? "
            "ORDER BY seq LIMIT ?",
            (after, upto, limit),
        )
        rows, size = list[Row](), 0
        with contextlib.closing(cursor):
            for row in map(Row._make, cursor):
                rows.append(row)
                size += len(row.message or b"") + len(row.response or b"")
                if size >= _READ_AT_ONCE:
                    break
        return rows

    def count_unfinished(self) -> int:
        """How many rows have not been delivered."""
        count: int = self._db.execute(
            "SELECT count(*) FROM requests INDEXED BY unfinished WHERE state < 2"
        ).fetchone()[0]
        return count

    def failed(self, limit: int, task: str | None = None) -> list[Row]:
        """The latest failed requests, the last first, without their messages and large answers."""
        rows = self._db.execute(
            f"SELECT {_LISTED} FROM requests WHERE code IS NOT NULL AND (:task IS NULL OR task = :task) "
            "ORDER BY seq DESC LIMIT :most",
            {"task": task, "most": limit},
        ).fetchall()
        return [Row(*row) for row in rows]


def out_of_space(error: sqlite3.Error) -> bool:
    """Whether a write has failed in a way that may pass: nothing is written, and later it may be."""
    code = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_BUSY) or code in (
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_SHMSIZE,
        sqlite3.SQLITE_CANTOPEN,
    )


def _primary(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _chunks(rows: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(rows), CHUNKS[-1]):
        some = list(rows[start : start + CHUNKS[-1]])
        size = CHUNKS[bisect_left(CHUNKS, len(some))]
        yield some + some[-1:] * (size - len(some))


def _marks(values: Sequence[Any]) -> str:
    return ",".join("?" * len(values))


def _insert(count: int) -> str:
    return (
        "INSERT INTO requests (seq, id, digest, state, task, message, wire, extended, origin, accepted) "
        "VALUES " + ",".join(["(?,?,?,0,?,?,?,?,?,?)"] * count) + " ON CONFLICT DO NOTHING"
    )


def _update_ended(count: int) -> str:
    return (
        "UPDATE requests SET state = 1, response = v.column2, code = v.column3, ended = ? FROM (VALUES "
        + ",".join(["(?,?,?)"] * count)
        + ") AS v WHERE requests.seq = v.column1"
    )


def _update_delivered(count: int) -> str:
    return (
        "UPDATE requests SET state = 2, ended = ?, message = iif(code IS NULL, NULL, message), "
        f"response = iif(code IS NULL, NULL, response) WHERE seq IN ({','.join('?' * count)})"
    )


def _update_undelivered(count: int) -> str:
    return (
        "UPDATE requests SET state = 3, ended = ?, code = coalesce(code, 'undelivered') "
        f"WHERE seq IN ({','.join('?' * count)})"
    )


def _time_of_day() -> Callable[[], float]:
    """The time of day now, and from now on what has passed since: whoever sets the clock must not have ids
    forgotten that are of a moment ago.
    """
    began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return lambda: began + time.clock_gettime(time.CLOCK_BOOTTIME)
