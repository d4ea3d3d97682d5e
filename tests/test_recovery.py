"""What earlier supervisors have left: in which order it is taken up, how much at a time, what befalls it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from acomm.messages import Request, Response
from workers import stored as module
from workers.errors import AcommError
from workers.journal import Journal
from workers.journalfile import ACCEPTED, ENDED, Batch, Ending, Entry, JournalFile
from workers.stored import MAX_BOOTS, Left, Recovery, StoredRequests

WAIT = 20.0
ROOT = Path(__file__).parent.parent


def entry(seq: int, *, size: int = 0) -> Entry:
    request = Request("echo", ["x" * size], id=f"r{seq}")
    message = request.encode(3, extended=True)
    return Entry(seq, request.id, b"digest", "echo", message, 3, True, "unix:0", 1e9)


def ending(seq: int) -> Ending:
    return Ending(seq, Response(f"r{seq}", result=seq).encode(3, extended=True), None)


class Kit:
    """A recovery of what `fill` has left. What it begins is in `begun`, in order, and runs until `end`."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "j.db")
        self.begun: list[Left] = []
        self.running: set[str] = set()
        self.most = 0
        self.waiting = 0  # answers on their way
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def fill(self, *rows: Entry, ended: tuple[Ending, ...] = (), boots: dict[int, int] | None = None) -> None:
        file = JournalFile(self.path)
        batch = Batch()
        batch.entries, batch.ended = list(rows), list(ended)
        file.write(batch)
        for seq, count in (boots or {}).items():
            for _ in range(count):
                file.taken_up([seq])
        file.close()

    def start(self, few: int = 1) -> None:
        self.journal = Journal(JournalFile(self.path), self._failed)
        self.journal.start()
        self.stored = StoredRequests(self.journal)
        self.recovery = Recovery(self.stored, self._begin, lambda: self.waiting, few)
        self._task = asyncio.get_running_loop().create_task(self.recovery.run())
        self._task.add_done_callback(lambda _: self._changed.set())

    @staticmethod
    def _failed(text: str) -> None:
        raise AssertionError(text)

    def _begin(self, left: Left) -> None:
        self.begun.append(left)
        if left.response is None:
            self.running.add(left.request.id)
            self.most = max(self.most, len(self.running))
        elif not left.stored:
            self.stored.answer(left.response, self._changed.set)
        self._changed.set()

    def end(self, id: str) -> None:
        """A request has its answer, which its hook has taken."""
        self.running.discard(id)
        self.recovery.ended(id)
        self.stored.delivered(id, None)

    def end_all(self) -> None:
        for id in list(self.running):
            self.end(id)

    @property
    def ids(self) -> list[str]:
        return [left.request.id for left in self.begun]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(WAIT):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def finish(self) -> None:
        """Let all run that is begun, until everything has been."""
        assert self._task is not None
        while not self._task.done():
            self.end_all()
            await self.until(lambda: self._task is None or self._task.done() or self.running)
        await self._task

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            await self.journal.close()


@pytest_asyncio.fixture
async def kit(tmp_path: Path) -> AsyncIterator[Kit]:
    tmp_path.chmod(0o700)
    kit = Kit(tmp_path)
    yield kit
    await kit.stop()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages, and little under way, so that the rest waits in the file."""
    for name, value in {"PAGE": 5, "IN_FLIGHT": 4, "_BEGUN_AT_ONCE": 2}.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("small")
async def test_each_is_taken_up_once_in_order_and_few_at_a_time(kit: Kit) -> None:
    kit.fill(*(entry(seq) for seq in range(1, 42)))
    kit.start()
    await kit.until(lambda: len(kit.running) == 4)
    await kit.finish()
    assert kit.ids == [f"r{seq}" for seq in range(1, 42)]
    assert kit.most == 4
    assert kit.recovery.taken_up == 41


async def test_large_ones_wait_for_each_other(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 10_000)
    monkeypatch.setattr(module, "_BEGUN_AT_ONCE", 1)
    kit.fill(*(entry(seq, size=4000) for seq in range(1, 12)))
    kit.start()
    await kit.until(lambda: len(kit.running) == 3)
    await kit.finish()
    assert kit.most == 3
    assert len(kit.begun) == 11


@pytest.mark.usefixtures("small")
async def test_answers_are_not_read_while_many_are_on_their_way(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PENDING", 7)
    monkeypatch.setattr(module, "_CHECK", 0.001)
    kit.fill(*(entry(seq) for seq in range(1, 31)), ended=tuple(ending(seq) for seq in range(1, 31)))
    kit.start()
    kit.waiting = 8
    await asyncio.sleep(0)
    assert not kit.begun
    kit.waiting = 7
    await kit.finish()
    assert [left.response.result_as(int) for left in kit.begun if left.response] == [*range(1, 31)]


@pytest.mark.usefixtures("small")
async def test_those_that_may_be_deadly_go_last_and_few_at_a_time(kit: Kit) -> None:
    deadly = MAX_BOOTS - 1
    kit.fill(*(entry(seq) for seq in range(1, 11)), boots={2: deadly, 3: deadly, 4: MAX_BOOTS, 5: 1})
    kit.start(few=1)
    harmless = ["r1", *(f"r{seq}" for seq in range(5, 11))]
    while len(kit.begun) < len(harmless):
        kit.end_all()
        await kit.until(lambda: kit.running)
    assert kit.ids == harmless
    kit.end_all()
    await kit.until(lambda: kit.running)
    assert kit.running == {"r2"}, "the next one waits"
    await kit.finish()
    assert kit.ids[-3:] == ["r2", "r3", "r4"]
    poisoned = kit.begun[-1].response
    assert poisoned is not None
    assert isinstance(poisoned.error, AcommError)
    assert poisoned.error.code == "poisoned"


@pytest.mark.usefixtures("small")
async def test_those_do_not_wait_for_what_never_ends(kit: Kit) -> None:
    kit.fill(entry(1), entry(2), boots={2: MAX_BOOTS - 1})
    kit.start()
    kit.recovery.patience = 0.01
    await kit.until(lambda: kit.ids == ["r1", "r2"])
    assert kit.running == {"r1", "r2"}


@pytest.mark.usefixtures("small")
async def test_what_was_counted_and_has_not_ended_is_known_at_a_stop(kit: Kit) -> None:
    kit.fill(*(entry(seq) for seq in range(1, 31)))
    kit.start()
    await kit.until(lambda: len(kit.running) == 4)
    # Those behind them are read, and counted, meanwhile.
    await kit.journal.ask(lambda: None)
    left = kit.recovery.left()
    rows = await kit.journal.ask(kit.journal.file.unfinished, 0, 100, 100)
    assert sorted(left) == [row.seq for row in rows if row.boots]
    assert len(left) > len(kit.running)


@pytest.mark.usefixtures("small")
async def test_a_full_disk_is_waited_for(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY", 0.001)
    kit.fill(*(entry(seq) for seq in range(1, 31)))
    full = sqlite3.OperationalError("database or disk is full")
    full.sqlite_errorcode = sqlite3.SQLITE_FULL
    faults = [None, full, full, None, full]
    count = JournalFile.taken_up

    def taken_up(file: JournalFile, seqs: Sequence[int]) -> None:
        if faults and (fault := faults.pop(0)) is not None:
            raise fault
        count(file, seqs)

    monkeypatch.setattr(JournalFile, "taken_up", taken_up)
    kit.start()
    await kit.until(lambda: kit.running)
    await kit.finish()
    assert kit.ids == [f"r{seq}" for seq in range(1, 31)]
    assert not faults


class TestCancel:
    @pytest.mark.usefixtures("small")
    async def test_what_waits_in_the_file_is_answered_at_once_and_never_begun(self, kit: Kit) -> None:
        kit.fill(*(entry(seq) for seq in range(1, 31)))
        kit.start()
        await kit.until(lambda: len(kit.running) == 4)
        read_ahead, far_behind = "r6", "r29"
        for id in (read_ahead, far_behind):
            assert await kit.recovery.cancel(id)
            response = kit.begun[-1].response
            assert response is not None
            assert (response.id, str(response.error)) == (id, "call of task echo was cancelled")
            assert not await kit.recovery.cancel(id), "it is answered"
            kit.stored.delivered(id, None)
        await kit.finish()
        assert sorted(kit.ids) == sorted(f"r{seq}" for seq in range(1, 31))

    @pytest.mark.usefixtures("small")
    async def test_it_is_in_the_file_before_it_is_told(self, kit: Kit) -> None:
        kit.fill(*(entry(seq) for seq in range(1, 31)))
        kit.start()
        await kit.until(lambda: len(kit.running) == 4)
        assert await kit.recovery.cancel("r20")
        await kit.until(lambda: not kit.stored.answering)
        row = await kit.journal.ask(kit.journal.file.find, "r20")
        assert row is not None
        assert row.state == ENDED
        assert b"was cancelled" in (row.response or b"")

    @pytest.mark.usefixtures("small")
    async def test_what_does_not_wait_there_is_left_alone(self, kit: Kit) -> None:
        kit.fill(*(entry(seq) for seq in range(1, 31)), ended=(ending(30),))
        kit.start()
        await kit.until(lambda: len(kit.running) == 4)
        for id in ("r1", "r30", "nothing"):  # begun; answered, in the file; unknown
            assert not await kit.recovery.cancel(id)
        assert len(kit.begun) == 4


@pytest.mark.usefixtures("small")
async def test_what_is_replayed_meanwhile_is_not_taken_up_twice(kit: Kit) -> None:
    kit.fill(*(entry(seq) for seq in range(1, 31)))
    kit.start()
    await kit.until(lambda: len(kit.running) == 4)
    row = await kit.journal.ask(kit.journal.file.find, "r30")
    assert row is not None
    assert row.state == ACCEPTED
    assert kit.stored.take_up(row) is not None  # as `acomm.replay` does
    await kit.finish()
    assert kit.ids == [f"r{seq}" for seq in range(1, 30)]


@pytest.mark.process
def test_all_of_many_are_answered_once_and_new_ones_meanwhile() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "bench"), "recovery", "--rows", "20000"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=110, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all answered, each once" in done.stdout
