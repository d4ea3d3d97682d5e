"""The scoreboard: shared memory, a slot per running call: what runs, since when, how far.

A worker has as many slots in a row as it runs calls at a time: `slot` is the worker's number, `place` one of
its own. One that runs plain calls uses place 0 alone.

    slot: 128 bytes, two cache lines, so that workers do not slow each other down
    +---------+-----------+----------+-----------+-----------+---------------------+
    | call u64| start f64 | done f64 | total f64 | length u8 | note, 95 bytes UTF-8|
    +---------+-----------+----------+-----------+-----------+---------------------+

A worker writes its slot with plain stores, no message and no lock; the supervisor reads it whenever it
likes: for time limits, for the table of what runs, and after a death, when the page outlives the worker.

**Torn reads.** Each field is an aligned 8-byte store and is never seen half written; the slot as a whole
is not atomic. `begin` stores the start before the call number and `end` clears the call number only, and
`read` looks at the call number before and after the rest: so on x86-64, which keeps stores and loads in
order, a call is never seen with an older start, and calls that have just changed are read again. Other
processors may reorder the two stores; Python executes hundreds of instructions between them, so it is
unlikely, but a time limit should be checked twice before it kills. `done` may be newer than `total`, and
of two notes that follow each other some bytes of both may be seen: a note is for people to read.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from typing import Any, NamedTuple

SLOT_SIZE = 128
NOTE_SIZE = 95
"""Bytes of UTF-8 that are kept of a note."""

_WORDS = SLOT_SIZE // 8
_CALL, _STARTED, _DONE, _TOTAL = range(4)
_LENGTH = 4 * 8
_NOTE = _LENGTH + 1

_READ_TRIES = 8
"""A worker that changes calls between each two looks of ours runs calls of a microsecond: any will do."""


class Slot(NamedTuple):
    """A copy of one slot. `call` 0 is idle; `started` is CLOCK_MONOTONIC, the same in all processes."""

    call: int
    started: float
    done: float
    total: float
    note: str = ""


class SlotWriter:
    """The worker's hold on one slot; each method takes some 100 ns, and a new note twice that."""

    __slots__ = ("_call", "_note", "_numbers", "_progressed", "_text")

    def __init__(self, call: memoryview[int], numbers: memoryview[float], text: memoryview[int]) -> None:
        self._call = call
        self._numbers = numbers
        self._text = text
        self._progressed = True
        self._note: str | None = None  # what an earlier writer has left is not known

    def begin(self, call: int, now: float) -> None:
        """`call` (1 to 2**64 - 1) runs since `now`, by `time.monotonic()`."""
        numbers = self._numbers
        if self._progressed:
            numbers[_DONE] = numbers[_TOTAL] = 0.0
            if self._note != "":
                self._text[0] = 0
                self._note = ""
            self._progressed = False
        numbers[_STARTED] = now
        self._call[0] = call

    def end(self) -> None:
        """The call has ended. Its start and progress stay, without a meaning, until the next one."""
        self._call[0] = 0

    def progress(self, done: float, total: float = 0.0, note: str = "") -> None:
        """`done` of `total` units; a total of 0 is unknown. The first NOTE_SIZE bytes of `note` are kept."""
        self._progressed = True
        if note != self._note:
            self._write(note)
        numbers = self._numbers
        numbers[_TOTAL] = total
        numbers[_DONE] = done

    def _write(self, note: str) -> None:
        data = note.encode("utf-8", "replace")
        if len(data) > NOTE_SIZE:
            data = data[:NOTE_SIZE].decode("utf-8", "ignore").encode()  # no half of a character
        text = self._text
        text[0] = 0
        text[1 : 1 + len(data)] = data
        text[0] = len(data)
        self._note = note


class Scoreboard:
    """Shared memory with `slots` times `places` slots: made by `create` in the supervisor, by `attach` in a
    worker.
    """

    def __init__(self, fd: int, slots: int, places: int = 1, *, owns_fd: bool) -> None:
        self.slots = slots
        self.places = places
        self.fd = fd
        self._owns_fd = owns_fd
        self._map = mmap.mmap(fd, _size(slots * places))
        self._bytes = memoryview(self._map)
        self._integers = self._bytes.cast("Q")
        self._numbers: memoryview[float] = self._bytes.cast("d")
        self._views: list[memoryview[Any]] = [self._numbers, self._integers, self._bytes]

    @classmethod
    def create(cls, slots: int, places: int = 1) -> Scoreboard:
        """Supervisor: a new one, all idle. `fd` is what a worker attaches to; it is close-on-exec."""
        if slots < 1 or places < 1:
            raise ValueError(f"a scoreboard needs at least one slot and place, not {slots} and {places}")
        fd = os.memfd_create("acomm-scoreboard", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, _size(slots * places))
            # A worker that truncated it would kill the supervisor with SIGBUS.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, slots, places, owns_fd=True)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int, slots: int, places: int = 1) -> Scoreboard:
        """Worker: map the scoreboard of an inherited `fd`, which the caller still owns and may close."""
        return cls(fd, slots, places, owns_fd=False)

    def __repr__(self) -> str:
        if not self._views:
            return "<Scoreboard closed>"
        running = sum(len(self.running(slot)) for slot in range(self.slots))
        return f"<Scoreboard {self.slots} slots, {running} running>"

    def read(self, slot: int, place: int = 0) -> Slot:
        """A copy of a slot, as consistent as the module's docstring says."""
        base = self._base(slot, place)
        integers, numbers = self._integers, self._numbers
        for _ in range(_READ_TRIES):
            call = integers[base + _CALL]
            found = Slot(
                call,
                _finite(numbers[base + _STARTED]),
                _finite(numbers[base + _DONE]),
                _finite(numbers[base + _TOTAL]),
                self._note(base * 8),
            )
            if integers[base + _CALL] == call:
                break
        return found

    def running(self, slot: int) -> list[Slot]:
        """What the worker of `slot` runs."""
        places = [place for place, call in enumerate(self._calls(slot)) if call]
        return [found for place in places if (found := self.read(slot, place)).call]

    def find(self, slot: int, call: int) -> Slot | None:
        """The slot of a call, if the worker of `slot` runs it; some microseconds, however many run."""
        try:
            found = self.read(slot, self._calls(slot).index(call))
        except ValueError:
            return None
        return found if found.call == call else None

    def _calls(self, slot: int) -> list[int]:
        """The calls' numbers of all places, in one stroke."""
        base = self._base(slot)
        return self._integers[base : base + self.places * _WORDS : _WORDS].tolist()

    def _note(self, start: int) -> str:
        length = min(self._bytes[start + _LENGTH], NOTE_SIZE)
        if not length:
            return ""
        return bytes(self._bytes[start + _NOTE : start + _NOTE + length]).decode("utf-8", "replace")

    def clear(self, slot: int) -> None:
        """Make `slot` idle, for the next worker. Only when no worker writes it: the old one is dead."""
        base = self._base(slot)
        for first in range(base, base + self.places * _WORDS, _WORDS):
            self._integers[first + _CALL] = 0
            for field in (_STARTED, _DONE, _TOTAL):
                self._numbers[first + field] = 0.0
            self._bytes[first * 8 + _LENGTH] = 0

    def writer(self, slot: int, place: int = 0) -> SlotWriter:
        """Worker: the writer of a slot; one writer a slot at a time."""
        base = self._base(slot, place)
        call, numbers = self._integers[base : base + 1], self._numbers[base : base + _WORDS]
        text = self._bytes[base * 8 + _LENGTH : base * 8 + SLOT_SIZE]
        self._views[:0] = [call, numbers, text]
        return SlotWriter(call, numbers, text)

    def more_writers(self, slot: int) -> list[SlotWriter]:
        """Worker: the writers of all further places, besides `writer(slot)`."""
        return [self.writer(slot, place) for place in range(1, self.places)]

    def close(self) -> None:
        """Unmap it; readers and writers of this object raise ValueError from then on."""
        if not self._views:
            return
        for view in self._views:
            view.release()
        self._views = []
        self._map.close()
        if self._owns_fd:
            os.close(self.fd)

    def _base(self, slot: int, place: int = 0) -> int:
        if not 0 <= slot < self.slots:
            raise IndexError(f"slot {slot} of {self.slots}")
        if not 0 <= place < self.places:
            raise IndexError(f"place {place} of {self.places}")
        return (slot * self.places + place) * _WORDS


def _finite(value: float) -> float:
    """NaN and infinities as 0: JSON has none to tell callers, and no timer can be set by one."""
    return value if math.isfinite(value) else 0.0


def _size(slots: int) -> int:
    return -(-slots * SLOT_SIZE // mmap.PAGESIZE) * mmap.PAGESIZE
