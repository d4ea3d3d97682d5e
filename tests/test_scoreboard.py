"""The scoreboard: what a writer stores is what a reader sees, across processes too."""

import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workers.scoreboard import NOTE_SIZE, SLOT_SIZE, Scoreboard, Slot


@pytest.fixture
def board() -> Iterator[Scoreboard]:
    board = Scoreboard.create(3)
    yield board
    board.close()


def test_a_new_board_is_idle(board: Scoreboard) -> None:
    assert [board.read(slot) for slot in range(3)] == [Slot(0, 0.0, 0.0, 0.0)] * 3
    assert repr(board) == "<Scoreboard 3 slots, 0 running>"


def test_a_call_from_begin_to_end(board: Scoreboard) -> None:
    writer = board.writer(1)
    writer.begin(7, 12.5)
    assert board.read(1) == Slot(7, 12.5, 0.0, 0.0)
    assert repr(board) == "<Scoreboard 3 slots, 1 running>"
    writer.progress(3, 10)
    assert board.read(1) == Slot(7, 12.5, 3.0, 10.0)
    writer.end()
    assert board.read(1).call == 0


def test_progress_does_not_reach_the_next_call(board: Scoreboard) -> None:
    writer = board.writer(0)
    writer.begin(1, 1.0)
    writer.progress(5, 9)
    writer.begin(2, 2.0)
    assert board.read(0) == Slot(2, 2.0, 0.0, 0.0)


def test_a_new_writer_does_not_inherit_progress(board: Scoreboard) -> None:
    board.writer(0).progress(5, 9)
    board.writer(0).begin(1, 1.0)
    assert board.read(0) == Slot(1, 1.0, 0.0, 0.0)


def test_a_note_from_call_to_call(board: Scoreboard) -> None:
    writer = board.writer(1)
    writer.begin(1, 1.0)
    writer.progress(1, 2, "häuser")
    assert board.read(1) == Slot(1, 1.0, 1.0, 2.0, "häuser")
    writer.progress(2, 2, "ha")
    assert board.read(1).note == "ha"
    writer.progress(2, 2)
    assert board.read(1).note == ""
    writer.progress(2, 2, "last")
    writer.begin(2, 2.0)
    assert board.read(1) == Slot(2, 2.0, 0.0, 0.0)
    writer.progress(2, 2, "last")
    assert board.read(1).note == "last"
    board.clear(1)
    assert board.read(1).note == ""
    assert [board.read(slot).note for slot in (0, 2)] == ["", ""]


def test_a_new_writer_does_not_inherit_a_note(board: Scoreboard) -> None:
    board.writer(0).progress(1, 1, "old")
    board.writer(0).begin(1, 1.0)
    assert board.read(0).note == ""


@pytest.mark.parametrize("size", [NOTE_SIZE - 1, NOTE_SIZE, NOTE_SIZE + 1, 10_000])
@pytest.mark.parametrize("letter", ["a", "é", "€", "\N{SNAKE}"])
def test_a_note_is_cut_between_characters(board: Scoreboard, size: int, letter: str) -> None:
    width = len(letter.encode())
    board.writer(2).progress(1, 1, letter * (size // width))
    assert board.read(2).note == letter * min(size // width, NOTE_SIZE // width)


def test_a_note_of_what_is_no_text_or_of_noise_harms_nobody(board: Scoreboard) -> None:
    board.writer(0).progress(1, 1, "a\ud800b")
    assert board.read(0).note == "a?b"
    os.pwrite(board.fd, b"\xff" * (SLOT_SIZE - 32), 32)
    assert board.read(0).note == "\ufffd" * NOTE_SIZE


def test_slots_are_apart_and_whole_cache_lines(board: Scoreboard) -> None:
    for slot in range(3):
        board.writer(slot).begin(2**64 - 1 - slot, float(slot))
        board.writer(slot).progress(1e300, -1)
    assert [board.read(slot).call for slot in range(3)] == [2**64 - 1 - slot for slot in range(3)]
    board.clear(1)
    assert [bool(board.read(slot).call) for slot in range(3)] == [True, False, True]
    assert board.read(1) == Slot(0, 0.0, 0.0, 0.0)
    assert SLOT_SIZE % 64 == 0
    raw = os.pread(board.fd, SLOT_SIZE, 2 * SLOT_SIZE)
    assert struct.unpack("=Qddd96x", raw) == (2**64 - 3, 2.0, 1e300, -1.0)


def test_the_start_is_stored_before_the_call(board: Scoreboard) -> None:
    seen: list[Slot] = []

    class Number:
        """It is looked at when it is stored: a moment at which to see what a reader would see."""

        def __index__(self) -> int:
            seen.append(board.read(0))
            return 9

    writer = board.writer(0)
    writer.begin(1, 1.0)
    writer.progress(5, 9)
    writer.end()
    writer.begin(Number(), 2.0)  # type: ignore[arg-type]
    assert set(seen) == {Slot(0, 2.0, 0.0, 0.0)}
    assert board.read(0) == Slot(9, 2.0, 0.0, 0.0)


@pytest.mark.parametrize("slot", [-1, 3])
def test_slots_out_of_range_are_refused(board: Scoreboard, slot: int) -> None:
    for method in (board.read, board.clear, board.writer):
        with pytest.raises(IndexError):
            method(slot)


def test_a_board_needs_a_slot() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Scoreboard.create(0)


def test_more_slots_than_a_page() -> None:
    count = mmap.PAGESIZE // SLOT_SIZE + 1
    board = Scoreboard.create(count)
    board.writer(count - 1).begin(5, 1.0)
    assert board.read(count - 1).call == 5
    board.close()


def test_nobody_can_truncate_it(board: Scoreboard) -> None:
    with pytest.raises(PermissionError):
        os.ftruncate(board.fd, 0)


def test_close_gives_everything_back() -> None:
    before = os.listdir("/proc/self/fd")
    board = Scoreboard.create(1)
    attached = Scoreboard.attach(board.fd, 1)
    writer = attached.writer(0)
    writer.begin(1, 1.0)
    attached.close()
    attached.close()
    assert board.read(0).call == 1
    board.close()
    assert os.listdir("/proc/self/fd") == before
    with pytest.raises(ValueError, match="released"):
        writer.end()
    with pytest.raises(ValueError, match="released"):
        board.read(0)
    assert repr(board) == "<Scoreboard closed>"


@pytest.mark.process
def test_a_dead_worker_leaves_its_slot(board: Scoreboard) -> None:
    code = (
        "import os, sys; from workers.scoreboard import Scoreboard\n"
        "board = Scoreboard.attach(int(sys.argv[1]), 3); os.close(int(sys.argv[1]))\n"
        "writer = board.writer(2); writer.begin(42, 1.5); writer.progress(1, 4); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, str(board.fd)]
    assert subprocess.run(command, pass_fds=[board.fd], cwd=root, check=False).returncode == -9
    assert board.read(2) == Slot(42, 1.5, 1.0, 4.0)


@pytest.mark.process
def test_a_reader_never_sees_a_call_with_another_start(board: Scoreboard) -> None:
    code = (
        "import sys; from workers.scoreboard import Scoreboard\n"
        "writer = Scoreboard.attach(int(sys.argv[1]), 3).writer(0)\n"
        "for call in range(1, 300_000):\n"
        "    writer.begin(call, float(call)); writer.end()\n"
        "writer.begin(2**63, float(2**63))"
    )
    command = [sys.executable, "-c", code, str(board.fd)]
    with subprocess.Popen(command, pass_fds=[board.fd], cwd=Path(__file__).parent.parent) as worker:
        found = board.read(0)
        while found.call != 2**63 and (worker.poll() is None or board.read(0).call == 2**63):
            if found.call:
                assert found.started >= found.call
            found = board.read(0)
    assert worker.returncode == 0


def test_a_worker_has_as_many_places_as_it_runs_calls() -> None:
    board = Scoreboard.create(2, 3)
    try:
        first, *others = board.writer(1), *board.more_writers(1)
        assert len(others) == 2
        for number, writer in enumerate([first, *others], 7):
            writer.begin(number, float(number))
            writer.progress(number, 10, f"note {number}")
        assert [slot.call for slot in board.running(1)] == [7, 8, 9] and board.running(0) == []
        assert board.find(1, 8) == Slot(8, 8.0, 8.0, 10.0, "note 8")
        assert board.find(0, 8) is None and board.find(1, 10) is None
        assert repr(board) == "<Scoreboard 2 slots, 3 running>"
        first.end()
        assert [slot.call for slot in board.running(1)] == [8, 9]
        board.clear(1)
        assert board.running(1) == [] and board.read(1, 2) == Slot(0, 0.0, 0.0, 0.0)
        with pytest.raises(IndexError, match="place 3 of 3"):
            board.read(1, 3)
    finally:
        board.close()
