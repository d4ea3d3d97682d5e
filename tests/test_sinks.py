"""Passing on what workers print: all of it to whoever reads, and nobody is held up by one who does not."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.sinks import BACKLOG, LIMIT, PATIENCE, Sink, open_sink


class Reader:
    """Takes so many bytes, then none."""

    def __init__(self, room: int = 0) -> None:
        self.room = room
        self.read = b""

    def write(self, data: bytes | memoryview) -> int:
        if not self.room:
            raise BlockingIOError
        taken = bytes(data[: self.room])
        self.room -= len(taken)
        self.read += taken
        return len(taken)


@given(st.lists(st.tuples(st.binary(max_size=100), st.integers(0, 200)), max_size=30))
def test_a_slow_reader_gets_all(steps: list[tuple[bytes, int]]) -> None:
    reader = Reader()
    sink = Sink(0, reader.write)
    for data, room in steps:
        reader.room = room
        sink.add(data, 0.0)
    reader.room = 10**6
    sink.pump(0.0, writable=True)
    assert reader.read == b"".join(data for data, _ in steps)
    assert not sink.waiting and sink.due is None


def test_those_who_print_wait_for_a_slow_reader_and_not_for_a_stuck_one() -> None:
    reader = Reader(10)
    sink = Sink(0, reader.write)
    sink.add(b"x" * BACKLOG, 1.0)
    assert sink.waiting and not sink.full and sink.due == 1.0 + PATIENCE
    sink.add(b"y" * BACKLOG, 1.5)
    assert sink.full and sink.due == 1.0 + PATIENCE
    sink.pump(1.0 + PATIENCE)
    assert not sink.full and sink.due is None and sink.lost == 2 * BACKLOG - 10
    sink.add(b"more", 9.0)
    assert sink.lost == 2 * BACKLOG - 6 and sink.waiting
    reader.room = 10**6
    sink.pump(9.0, writable=True)
    lost = 2 * BACKLOG - 6
    assert (
        reader.read == b"x" * 10 + b"\n[acomm: %d bytes of output were dropped, as nobody read them]\n" % lost
    )
    sink.add(b"heard again", 9.1)
    assert reader.read.endswith(b"heard again") and not sink.waiting


def test_what_waits_is_bounded() -> None:
    sink = Sink(0, Reader().write)
    for _ in range(100):
        sink.add(b"x" * BACKLOG, 0.0)
    assert sink.lost >= 100 * BACKLOG - LIMIT - BACKLOG
    assert len(sink._backlog) <= LIMIT + BACKLOG
    assert sink.full and sink.due == PATIENCE  # those who print do not wait for ever
    sink.pump(PATIENCE)
    assert not sink.full and sink.lost == 100 * BACKLOG


@pytest.mark.parametrize("error", [BrokenPipeError(), ConnectionResetError()])
def test_a_reader_that_has_gone_is_forgotten(error: OSError) -> None:
    def write(data: bytes | memoryview) -> int:
        raise error

    sink = Sink(0, write)
    sink.add(b"x", 0.0)
    assert not sink.waiting and not sink.full
    sink.add(b"x", 0.0)
    assert not sink.waiting


def test_a_full_disk_costs_what_did_not_fit() -> None:
    reader = Reader(100)
    full = [True]

    def write(data: bytes | memoryview) -> int:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return reader.write(data)

    sink = Sink(0, write)
    sink.add(b"lost", 0.0)
    full[0] = False
    sink.add(b"kept", 0.0)
    assert reader.read == b"kept"


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read_end, write_end = os.pipe()
    yield read_end, write_end
    os.close(read_end)
    os.close(write_end)


def test_a_pipe_keeps_its_own_settings(pipe: tuple[int, int]) -> None:
    read_end, write_end = pipe
    sink = open_sink(write_end)
    assert sink.fd != write_end
    assert not fcntl.fcntl(write_end, fcntl.F_GETFL) & os.O_NONBLOCK
    size = 4 * BACKLOG
    sink.add(b"x" * size, 0.0)  # more than fits: it does not block
    assert sink.full
    got = 0
    while sink.waiting:
        got += len(os.read(read_end, size))
        sink.pump(0.0, writable=True)
    while got < size:
        got += len(os.read(read_end, size))
    assert got == size
    sink.close()


def test_a_pipe_that_cannot_be_opened_anew(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = pipe

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    sink = open_sink(write_end)
    monkeypatch.undo()
    assert sink.fd == write_end
    sink.add(b"x" * 4 * BACKLOG, 0.0)
    assert sink.full
    sink.add(b"", 2 * PATIENCE)
    assert sink.lost and len(os.read(read_end, 10**6)) >= BACKLOG // 2


def test_a_terminal_takes_what_it_takes() -> None:
    master, slave = os.openpty()
    sink = open_sink(slave)
    sink.add(b"x" * 4 * BACKLOG, 0.0)
    assert sink.full  # nobody reads it, and we are still here
    assert os.read(master, 5) == b"xxxxx"
    sink.close()
    for fd in (master, slave):
        os.close(fd)


def test_a_socket_does_not_block() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sink = open_sink(theirs.fileno())
        sink.add(b"x" * 16 * BACKLOG, 0.0)
        assert sink.waiting and ours.recv(3) == b"xxx"
        sink.close()


def test_a_file_is_written_where_all_write(tmp_path: Path) -> None:
    with open(tmp_path / "log", "w+b", buffering=0) as file:
        file.write(b"before ")
        open_sink(file.fileno()).add(b"ours ", 0.0)
        file.write(b"behind")
    assert (tmp_path / "log").read_bytes() == b"before ours behind"


def test_no_descriptor_no_output() -> None:
    sink = open_sink(os.sysconf("SC_OPEN_MAX") - 1)
    sink.add(b"x", 0.0)
    assert not sink.waiting


def test_what_is_left_is_written_at_the_end(pipe: tuple[int, int]) -> None:
    _, write_end = pipe
    reader = Reader(3)
    sink = Sink(write_end, reader.write)
    sink.add(b"abcdef", 0.0)
    reader.room = 100
    sink.flush(1.0)
    assert reader.read == b"abcdef"
    sink = open_sink(write_end)
    sink.add(b"x" * 4 * BACKLOG, 0.0)
    sink.flush(0.01)  # nobody reads
    sink.close()
