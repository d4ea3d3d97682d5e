"""The journal's thread: what is told when, and what happens when the file cannot be written."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from workers import journal as module
from workers import stored
from workers.errors import AcommError
from workers.journal import HANDED_OVER, MAX_BATCH, MAX_ERRANDS, Journal
from workers.journalfile import Batch, Ending, Entry, JournalFile, Row
from workers.stored import StoredRequests

WAIT = 20.0


def error(code: int) -> sqlite3.OperationalError:
    made = sqlite3.OperationalError("injected")
    made.sqlite_errorcode = code
    return made


class Faulty(JournalFile):
    """Raises what `faults` says at the next writes; `gate` holds them up."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.faults: list[Exception | None] = []
        self.gate: threading.Event | None = None
        self.writing = threading.Event()
        self.sizes: list[tuple[int, int, int]] = []
        self.brought_in = threading.Event()

    def checkpoint(self) -> None:
        super().checkpoint()
        self.brought_in.set()

    async def entered(self) -> None:
        assert await asyncio.to_thread(self.writing.wait, WAIT)

    def write(self, batch: Batch) -> dict[int, Row]:
        self.writing.set()
        if self.gate is not None:
            assert self.gate.wait(WAIT)
        if self.faults and (fault := self.faults.pop(0)) is not None:
            raise fault
        self.sizes.append((len(batch.entries), len(batch.ended), len(batch.delivered)))
        return super().write(batch)


class Told:
    """Collects what is told, and can be waited for."""

    def __init__(self) -> None:
        self.order: list[tuple[str, Any]] = []
        self._changed = asyncio.Event()

    def __call__(self, name: str) -> Callable[..., None]:
        def told(outcome: Any = None) -> None:
            self.order.append((name, outcome))
            self._changed.set()

        return told

    async def until(self, count: int) -> None:
        async with asyncio.timeout(WAIT):
            while len(self.order) < count:
                self._changed.clear()
                await self._changed.wait()

    def __getitem__(self, name: str) -> Any:
        return dict(self.order)[name]


class Kit:
    def __init__(self, folder: Path) -> None:
        self.file = Faulty(str(folder / "j.db"))
        self.told = Told()
        self.journal = Journal(self.file, self.told("failed"))

    def accept(self, id: str) -> int:
        seq = self.journal.new_seq()
        message = b'{"id":"%b","task":"t","responseHook":null,"args":null}' % id.encode()
        entry = Entry(seq, id, b"d", "t", message, 3, True, "unix:0", 1.0)
        self.journal.accept(entry, self.told(id))
        return seq

    async def asleep(self) -> None:
        """Until its thread sleeps: it says so before, and lets go of the lock when it does."""
        async with asyncio.timeout(WAIT):
            while self.journal._awake:
                await asyncio.sleep(0.001)
        with self.journal._wake:
            pass


@pytest_asyncio.fixture
async def kit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kit]:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(module, "RETRY", 0.001)
    monkeypatch.setattr(module, "IDLE", 0.01)
    monkeypatch.setattr(module, "LOOK", 0.0)
    kit = Kit(tmp_path)
    kit.journal.start()
    yield kit
    await kit.journal.close()


async def test_what_comes_during_a_commit_is_the_next_batch(kit: Kit) -> None:
    kit.file.gate = threading.Event()
    for n in range(1000):
        kit.accept(f"r{n}")
    kit.file.gate.set()
    await kit.told.until(1000)
    assert [name for name, _ in kit.told.order] == [f"r{n}" for n in range(1000)]
    assert all(outcome is None for _, outcome in kit.told.order)
    sizes = [entries for entries, _, _ in kit.file.sizes]
    assert max(sizes) == MAX_BATCH
    assert len(sizes) <= 2 + 1000 // MAX_BATCH


async def test_a_known_id_is_told_its_row(kit: Kit) -> None:
    first = kit.accept("a")
    await kit.told.until(1)
    kit.accept("a")
    await kit.told.until(2)
    assert kit.told.order[1][1].seq == first


async def test_one_that_fails_when_it_is_told_does_not_keep_others_from_it(
    kit: Kit, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(outcome: Any) -> None:
        raise ValueError("a fault")

    seq = kit.journal.new_seq()
    kit.journal.accept(Entry(seq, "x", b"d", "t", b"{}", 3, True, "unix:0", 1.0), broken)
    kit.accept("a")
    await kit.told.until(1)
    assert "a fault" in caplog.text


async def test_nothing_is_taken_that_no_other_would_find(kit: Kit) -> None:
    """Somebody has deleted the file: it takes what is written, and is gone when we are."""
    seq = kit.accept("a")
    await kit.told.until(1)
    away = f"{kit.file.path}.away"
    os.rename(kit.file.path, away)
    kit.accept("b")
    await kit.told.until(2)
    assert kit.told["b"].code == "busy"
    assert "moved or deleted" in str(kit.told["b"])
    kit.journal.end(Ending(seq, b"answer", None), kit.told("ended"))
    await kit.told.until(3)
    os.rename(away, kit.file.path)
    kit.accept("c")
    await kit.told.until(4)
    assert kit.told["c"] is None


class TestNoSpace:
    async def test_what_is_new_is_refused_and_what_was_promised_is_kept(self, kit: Kit) -> None:
        seq = kit.accept("a")
        await kit.told.until(1)
        kit.file.faults = [error(sqlite3.SQLITE_FULL)] * 3
        kit.journal.end(Ending(seq, b"answer", None), kit.told("ended"))
        kit.accept("b")
        await kit.told.until(3)
        assert dict(kit.told.order).keys() == {"a", "b", "ended"}
        refusal = kit.told["b"]
        if refusal is not None:  # it came with a write that has failed
            assert refusal.code == "busy"
            assert refusal.retry_after == 1.0
        row = await kit.journal.ask(kit.file.find, "a")
        assert row is not None
        assert row.response == b"answer"
        assert not kit.journal.full
        kit.accept("c")
        await kit.told.until(4)
        assert kit.told["c"] is None

    async def test_a_recovery_goes_on_when_there_is_space(
        self, kit: Kit, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stored, "RETRY", 0.001)
        for n in range(3):
            kit.accept(f"r{n}")
        await kit.told.until(3)
        faults = [error(sqlite3.SQLITE_FULL)] * 2
        taken_up = kit.file.taken_up

        def full_at_first(seqs: Sequence[int]) -> None:
            if faults:
                raise faults.pop()
            taken_up(seqs)

        monkeypatch.setattr(kit.file, "taken_up", full_at_first)
        monkeypatch.setattr(kit.file, "last", 3)
        begun: list[str] = []
        recovery = stored.Recovery(
            StoredRequests(kit.journal), lambda left: begun.append(left.request.id), lambda: 0, few=1
        )
        await asyncio.wait_for(recovery.run(), WAIT)
        assert begun == ["r0", "r1", "r2"]

    async def test_a_refused_one_is_not_there(self, kit: Kit) -> None:
        kit.file.faults = [error(sqlite3.SQLITE_FULL)]
        kit.accept("a")
        await kit.told.until(1)
        assert isinstance(kit.told["a"], AcommError)
        assert await kit.journal.ask(kit.file.find, "a") is None

    async def test_nobody_waits_for_it_at_the_end(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o700)
        kit = Kit(tmp_path)
        kit.journal.start()
        first, second = kit.accept("a"), kit.accept("b")
        await kit.told.until(2)
        kit.file.faults = [error(sqlite3.SQLITE_FULL)] * 1_000_000
        kit.journal.end(Ending(first, b"answer", None), kit.told("ended"))
        kit.journal.delivered(second)
        try:
            await asyncio.wait_for(kit.journal.close(), WAIT)
        finally:
            kit.file.faults = []


@pytest.mark.parametrize(
    "code", [sqlite3.SQLITE_IOERR_FSYNC, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_IOERR_READ]
)
async def test_a_failed_fsync_is_the_end(kit: Kit, code: int) -> None:
    """The next one would succeed, and say nothing of what the last has lost."""
    seq = kit.accept("a")
    await kit.told.until(1)
    kit.file.faults = [error(code)]
    kit.journal.end(Ending(seq, b"answer", None), kit.told("ended"))
    await kit.told.until(2)
    assert kit.told.order[1] == ("failed", "injected")
    kit.accept("b")
    await kit.told.until(3)
    assert kit.told["b"].code == "busy"
    assert kit.journal.broken == "injected"
    assert "ended" not in dict(kit.told.order)


async def test_closing_writes_what_is_left(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    kit = Kit(tmp_path)
    kit.journal.start()
    kit.file.gate = threading.Event()
    seqs = [kit.accept(f"r{n}") for n in range(MAX_BATCH + 10)]
    for seq in seqs[:5]:
        kit.journal.delivered(seq)
    kit.file.gate.set()
    await kit.journal.close()
    again = JournalFile(str(tmp_path / "j.db"))
    assert again.count_unfinished() == len(seqs) - 5
    again.close()


async def test_a_question_that_fails_says_so(kit: Kit) -> None:
    def ask() -> None:
        raise sqlite3.OperationalError("no")

    with pytest.raises(sqlite3.OperationalError, match="no"):
        await kit.journal.ask(ask)
    kit.accept("a")
    await kit.told.until(1)


async def test_what_one_turn_brings_is_one_commit(kit: Kit) -> None:
    for _ in range(3):
        for n in range(HANDED_OVER - 1):
            kit.accept(f"{len(kit.told.order)}-{n}")
        await kit.told.until(len(kit.told.order) + HANDED_OVER - 1)
    assert [entries for entries, _, _ in kit.file.sizes] == [HANDED_OVER - 1] * 3


async def test_a_long_turn_does_not_keep_the_thread_waiting(kit: Kit) -> None:
    for n in range(HANDED_OVER):
        kit.accept(f"r{n}")
    assert kit.file.writing.wait(WAIT)  # though the event loop has had no other turn
    kit.file.writing.clear()
    await kit.told.until(HANDED_OVER)
    seqs = [kit.journal.new_seq() for _ in range(HANDED_OVER)]
    for seq in seqs:
        kit.journal.end(Ending(seq, b"answer", None), kit.told("ended"))
    assert kit.file.writing.wait(WAIT)
    await kit.told.until(2 * HANDED_OVER)


async def test_what_is_new_when_the_file_fails_is_refused_as_well(kit: Kit) -> None:
    kit.file.gate = threading.Event()
    kit.file.faults = [error(sqlite3.SQLITE_IOERR_FSYNC)]
    kit.accept("a")
    await kit.file.entered()
    kit.accept("b")  # handed over while the first is written
    await asyncio.sleep(0)
    kit.accept("c")
    kit.file.gate.set()
    end = time.monotonic() + WAIT
    while kit.journal.broken is None and time.monotonic() < end:  # and this turn has not ended
        pass
    await kit.told.until(4)
    assert {kit.told[name].code for name in "abc"} == {"busy"}


async def test_what_is_done_with_is_written_soon_and_together(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE", 2 * WAIT)
    seqs = [kit.accept("a"), kit.accept("b"), kit.accept("c")]
    await kit.told.until(3)
    await kit.asleep()
    kit.file.writing.clear()
    for seq in seqs:
        kit.journal.delivered(seq, soon=True)
        await asyncio.sleep(0)
    await kit.file.entered()
    await kit.asleep()
    assert kit.file.sizes[1:] == [(0, 0, 3)]


async def test_one_that_is_roused_for_nothing_does_not_count_as_awake(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had woken by itself, and had seen to all: what comes next has to wake it."""
    kit.accept("a")
    await kit.told.until(1)
    monkeypatch.setattr(module, "IDLE", 2 * WAIT)
    kit.journal.undelivered(0)  # the next sleep is a long one
    await kit.journal.ask(lambda: None)
    for _ in range(3):
        await kit.asleep()
        kit.journal._rouse()
    await kit.asleep()
    kit.accept("b")
    await kit.told.until(2)


async def test_many_questions_do_not_hold_up_a_commit(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    reached, gate = threading.Event(), threading.Event()
    answered: list[int] = []
    before: list[int] = []
    write = kit.file.write

    def ask(number: int) -> None:
        answered.append(number)
        if number == 1:
            reached.set()
            assert gate.wait(WAIT)

    def noted(batch: Batch) -> dict[int, Row]:
        before.append(len(answered))
        return write(batch)

    monkeypatch.setattr(kit.file, "write", noted)
    asking = [asyncio.ensure_future(kit.journal.ask(ask, number)) for number in range(100)]
    assert await asyncio.to_thread(reached.wait, WAIT)
    kit.accept("a")
    await asyncio.sleep(0)  # it is handed over
    gate.set()
    await kit.told.until(1)
    assert before[0] <= 1 + 2 * MAX_ERRANDS
    await asyncio.gather(*asking)
    assert sorted(answered) == list(range(100))


async def test_old_rows_go_though_there_is_always_something_to_write(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that is asked something every moment has no idle one, and its disk an end."""
    compacted = threading.Event()
    monkeypatch.setattr(module, "IDLE", WAIT)
    monkeypatch.setattr(module, "COMPACT_AFTER", 50)

    def compact() -> None:
        compacted.set()

    monkeypatch.setattr(kit.file, "compact", compact)
    for n in range(200):
        kit.accept(f"r{n}")
        await kit.told.until(n + 1)
    assert compacted.is_set()


async def test_a_log_of_large_messages_is_brought_in_by_its_size(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "IDLE", WAIT)
    monkeypatch.setattr(module, "MAX_LOG", 1000)
    large = b"x" * 200_000
    for n in range(50):
        entry = Entry(kit.journal.new_seq(), f"r{n}", b"d", "t", large, 3, True, "unix:0", 1.0)
        kit.journal.accept(entry, kit.told(f"r{n}"))
        await kit.told.until(n + 1)
    assert kit.file.brought_in.is_set()
    assert os.path.getsize(f"{kit.file.path}-wal") < 15 * len(large)


class TestQuestionsToABrokenOne:
    """Its thread has ended, and whoever waited for that would never stop."""

    async def test_during_the_write_that_breaks_it(self, kit: Kit) -> None:
        kit.file.gate = threading.Event()
        kit.file.faults = [error(sqlite3.SQLITE_IOERR_FSYNC)]
        kit.accept("a")
        await kit.file.entered()
        asking = asyncio.ensure_future(kit.journal.ask(kit.file.find, "a"))
        await asyncio.sleep(0)
        kit.file.gate.set()
        with pytest.raises(sqlite3.Error, match="the journal has failed"):
            await asyncio.wait_for(asking, WAIT)

    async def test_afterwards(self, kit: Kit) -> None:
        kit.file.faults = [error(sqlite3.SQLITE_IOERR_FSYNC)]
        kit.accept("a")
        await kit.told.until(2)
        with pytest.raises(sqlite3.Error, match="the journal has failed"):
            await asyncio.wait_for(kit.journal.ask(kit.file.find, "a"), WAIT)
        with pytest.raises(AcommError) as caught:
            await asyncio.wait_for(StoredRequests(kit.journal).undone(["a"]), WAIT)
        assert caught.value.code == "busy"

    async def test_a_fault_of_ours_breaks_it_and_leaves_nobody_waiting(self, kit: Kit) -> None:
        kit.file.gate = threading.Event()
        kit.file.faults = [TypeError("a fault")]
        kit.accept("a")
        await kit.file.entered()
        kit.accept("b")
        asking = asyncio.ensure_future(kit.journal.ask(kit.file.find, "a"))
        await asyncio.sleep(0)
        kit.file.gate.set()
        await kit.told.until(3)
        assert [kit.told[name].code for name in "ab"] == ["busy", "busy"]
        with pytest.raises(sqlite3.Error, match="TypeError: a fault"):
            await asyncio.wait_for(asking, WAIT)


async def test_the_log_is_brought_into_the_file_when_there_is_time(kit: Kit) -> None:
    kit.accept("a")
    await kit.told.until(1)
    assert await asyncio.to_thread(kit.file.brought_in.wait, WAIT)
