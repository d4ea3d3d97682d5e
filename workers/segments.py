"""Segments of shared memory: one process writes them, another maps them, and gives them back.

    writer: Arena.store(parts) --pwrite--> [ledger | segment | segment | ...]  one memfd
                                                |
    reader: Reader.open(place) --mmap-----------+--> views; when the last one is gone, a word in the ledger

One file a direction: the program's, from which all workers read arguments, and one a worker, from which
the program reads results. The parent makes them before it forks, and a descriptor is all that is shared:
they have no name that could be left behind, the kernel frees them with their last holder, and what a dead
worker wrote is still there. No descriptor travels afterwards, so none can be lost with a process, or run
out in a queue. A descriptor by SCM_RIGHTS for each segment needs a socket a worker, and room in it; one
opened through `/proc/PID/fd` is gone when its worker is, though its answer has come.

**Copies.** The writer uses pwrite: it does not hold the GIL, takes no page faults, and memory that cannot be
had is an error, not a SIGBUS. 100 MB take 21 ms into pages that are there and 28 ms into new ones; mapping
them takes 2 ms. So that they are there, segments are used again, and freed after IDLE seconds without use.

**The ledger** has a word for each segment: 0 or the number of the reader that holds it. The reader alone sets
it to 0, by a plain store, no message, when its last view is gone. The writer uses a segment again when its
own side is done with it, too, which for arguments means that no worker has the call, or may get it again.

**Nobody sees what was written for another.** A segment that a dead process held is not used again, but freed;
its range in the file neither, as the file is sparse and has room for ever. What is mapped while its process
forks is not given back, as the child sees it, too: it stays taken until the process ends. In a fork, the
writer refuses and views give nothing back.

**What can be written to.** Both sides see writable memory where the original was writable. A `private` reader
(a worker) gets copies of the pages that it writes to, so arguments are as they were if the call is sent
again. A reader of results writes to the segment itself, which is its own until it gives it back.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, TypeAlias

import msgspec

IDLE = 5.0
"""Seconds after which memory that nobody uses is freed: longer than the pauses of a busy program."""

ALIGNMENT = 64
"""Bytes: a cache line, and what Arrow asks for."""

LEAST = 65536
"""Bytes of file of the smallest segment. Others are powers of two: what is not written takes no memory."""

MAPPED = 524288
"""Bytes from which on mapping is faster than copying."""

MOST_MAPPED = 16384
"""Mappings at a time; further segments are copied. Linux allows a process 65530."""

_LEDGER = 65536
_SEGMENTS = _LEDGER // 8
_PARTS = 1024  # IOV_MAX, of Linux
_LOOK = 64
"""Segments out with readers of which one search looks at: some microseconds."""

_SHARED = mmap.PROT_READ | mmap.PROT_WRITE
_POPULATE_READ = 22  # madvise(2), since Linux 5.14: page tables at once, not fault by fault
_PUNCH_HOLE = 1 | 2  # fallocate(2): FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE

Buffer: TypeAlias = "bytes | bytearray | memoryview[Any]"

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_munmap = _libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_madvise = _libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_fallocate = _libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

_forks = 0
_mappings: set[int] = set()  # addresses


def _about_to_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(before=_about_to_fork)


class Place(msgspec.Struct, array_like=True, frozen=True):
    """Where parts of `sizes` bytes lie, as it travels. `writer` tells which file."""

    writer: int
    index: int
    offset: int
    sizes: tuple[int, ...]


def layout(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where in a segment parts of these sizes begin, and bytes of all: each is aligned."""
    starts = []
    end = 0
    for size in sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        starts.append(start)
        end = start + size
    return starts, end


def new_file() -> int:
    """The descriptor of a new file of segments; close-on-exec. Raises OSError."""
    fd = os.memfd_create("acomm-segments", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, _LEDGER)
        # Who truncated it would kill those that have it mapped, with SIGBUS.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Segment:
    """A range of the file. `size` is what it may take of memory, `since` when it became free."""

    __slots__ = ("capacity", "index", "offset", "since", "size", "spoilt")

    def __init__(self, index: int, offset: int, capacity: int) -> None:
        self.index = index
        self.offset = offset
        self.capacity = capacity
        self.size = 0
        self.since = 0.0
        self.spoilt = False

    def __repr__(self) -> str:
        return f"<Segment {self.index}, {self.size} bytes at {self.offset}>"


class Arena:
    """The writer's side of a file: at most `limit` bytes of memory. Threads may share it.

    It takes over `fd`. `number`, not 0, is how Places name it. `due` is when, on the monotonic clock, to call
    `trim`; None: not before something is stored, and `on_due` is called when something was.
    """

    def __init__(self, fd: int, limit: int, number: int, on_due: Callable[[], None] | None = None) -> None:
        self.fd = fd
        self.limit = limit
        self.number = number
        self.used = 0  # bytes of memory that segments take, those that are free included
        self.due: float | None = None
        self._on_due = on_due
        self._close = weakref.finalize(self, os.close, fd)
        self._close.atexit = False
        self._pid = os.getpid()
        self._ledger = _ledger(fd)
        self._lock = threading.Lock()
        self._writers = 0  # threads that use the descriptor
        self._free: dict[int, list[Segment]] = {}  # capacity -> the one used last is the last
        self._busy: set[Segment] = set()
        self._out: deque[Segment] = deque()  # its own side is done, the reader may not be
        self._indices = list(range(_SEGMENTS - 1, -1, -1))
        self._end = _LEDGER

    def __repr__(self) -> str:
        free = sum(len(segments) for segments in self._free.values())
        return f"<Arena {self.used} bytes, {len(self._busy)} busy, {len(self._out)} out, {free} free>"

    def store(self, parts: Sequence[Sequence[Buffer]]) -> tuple[Segment, Place] | None:
        """Write parts, each from buffers of bytes that follow each other. The segment is busy until `end`.
        None if there is no room or no memory, or in a fork.
        """
        sizes = tuple(sum(len(buffer) for buffer in part) for part in parts)
        starts, total = layout(sizes)
        if os.getpid() != self._pid:
            return None
        with self._lock:
            was_due = self.due
            segment = self._take(total) if total <= self.limit else None
            if segment is None:
                return None
            self._writers += 1
        if was_due is None and self._on_due is not None:
            self._on_due()
        written = False
        try:
            for start, part in zip(starts, parts, strict=True):
                _write(self.fd, part, segment.offset + start)
            written = True
        except OSError:  # no memory, or a limit to the size of files
            return None
        finally:
            with self._lock:
                self._writers -= 1
                if not written:
                    self._busy.discard(segment)
                    self._drop(segment)
                if self.limit < 0 and not self._writers:
                    self._close()
        return segment, Place(self.number, segment.index, segment.offset, sizes)

    def lend(self, segment: Segment) -> None:
        """A reader is told of it: it is free again when that says so."""
        with self._lock:
            self._ledger[segment.index] = self.number
            self._busy.remove(segment)
            self._out.append(segment)

    def end(self, segment: Segment) -> None:
        """Nobody opens it any more: it is free when a reader that has opened it has given it back."""
        with self._lock:
            if segment in self._busy:
                self._busy.remove(segment)
                self._out.append(segment)

    def mourn(self, reader: int) -> None:
        """The reader of that number is dead."""
        with self._lock:
            for segment in (*self._busy, *self._out):
                if self._ledger[segment.index] == reader:
                    self._ledger[segment.index] = 0
                    segment.spoilt = True

    def trim(self, now: float) -> None:
        """Free the memory of what has not been used for IDLE seconds."""
        with self._lock:
            if self.limit < 0:
                return
            self._collect(now, len(self._out))
            for segment in self._idle():
                if segment.since <= now - IDLE:
                    self._free[segment.capacity].remove(segment)
                    self._drop(segment)
            idle = self._idle()
            if idle:
                self.due = idle[0].since + IDLE
            else:
                self.due = now + IDLE if self._out or self._busy else None

    def abandon(self) -> None:
        """In a fork, where it is nobody's: let go of the file. Another thread may have had the lock."""
        self._close()

    def close(self) -> None:
        """Free all, as far as readers have none of it mapped. Nothing can be stored afterwards."""
        with self._lock:
            self.limit = -1
            self.due = None
            self._busy.clear()
            self._out.clear()
            self._free.clear()
            self._ledger = memoryview(b"").cast("Q")
            if not self._writers:
                self._close()

    # -- under the lock

    def _take(self, size: int) -> Segment | None:
        now = time.monotonic()
        capacity = max(LEAST, 1 << (size - 1).bit_length())
        free = self._free.setdefault(capacity, [])
        if not free:
            self._collect(now, _LOOK)
        if self._lacks(size, free):
            self._collect(now, len(self._out))
            if self._lacks(size, free):
                self._make_room(size, free)
                if self._lacks(size, free):
                    return None
        segment = free.pop() if free else self._new(capacity)
        if segment is None:
            return None
        if size > segment.size:
            self.used += size - segment.size
            segment.size = size
        self._busy.add(segment)
        if self.due is None:
            self.due = now + IDLE
        return segment

    def _lacks(self, size: int, free: list[Segment]) -> bool:
        """Whether `size` bytes are too many, though the last of `free` is used again."""
        return self.used + size - (min(size, free[-1].size) if free else 0) > self.limit

    def _make_room(self, size: int, free: list[Segment]) -> None:
        for segment in self._idle():
            if not (free and segment is free[-1]):
                self._free[segment.capacity].remove(segment)
                self._drop(segment)
                if not self._lacks(size, free):
                    return

    def _idle(self) -> list[Segment]:
        """Those that are free, the ones that have been for longest first."""
        return sorted((s for free in self._free.values() for s in free), key=lambda segment: segment.since)

    def _new(self, capacity: int) -> Segment | None:
        if not self._indices:
            return None
        index = self._indices.pop()
        self._ledger[index] = 0
        segment = Segment(index, self._end, capacity)
        self._end += capacity
        return segment

    def _collect(self, now: float, most: int) -> None:
        """See which of those that are out have come back."""
        ledger, out = self._ledger, self._out
        for _ in range(min(most, len(out))):
            segment = out.popleft()
            if ledger[segment.index]:
                out.append(segment)
            elif segment.spoilt:
                self._drop(segment)
            else:
                segment.since = now
                self._free.setdefault(segment.capacity, []).append(segment)

    def _drop(self, segment: Segment) -> None:
        """Free its memory. The range is not used again: who still maps it, in whatever way, reads zeros."""
        if segment.size and self.limit >= 0:
            _fallocate(self.fd, _PUNCH_HOLE, segment.offset, segment.capacity)
        self.used -= segment.size
        self._indices.append(segment.index)


class Reader:
    """The reader's side of a file, whose descriptor stays its caller's; `number`, not 0, is who reads.

    If `private`, writes to what is opened are seen by nobody else.
    """

    def __init__(self, fd: int, number: int, *, private: bool) -> None:
        self._fd = fd
        self._number = number
        self._private = private
        self._flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
        self._ledger = _ledger(fd)

    def open(self, place: Place) -> list[memoryview[int]]:
        """The parts. When the last view of any of them is gone, the segment is given back. Raises OSError."""
        forks = _forks
        starts, total = layout(place.sizes)
        self._ledger[place.index] = self._number
        mapped = None
        if total >= MAPPED and len(_mappings) < MOST_MAPPED:
            mapped = self._map(place.offset, total)
        if mapped is None:
            try:
                whole = memoryview(self._copy(place.offset, total))
            finally:
                self.give_back(place.index)
        else:
            address = ctypes.addressof(mapped)
            whole = memoryview(mapped).cast("B")[:total]
            _mappings.add(address)
            back = weakref.finalize(mapped, _unmap, address, total, self, place.index, forks)
            back.atexit = False
        return [whole[start : start + size] for start, size in zip(starts, place.sizes, strict=True)]

    def _map(self, offset: int, size: int) -> ctypes.Array[ctypes.c_ubyte] | None:
        try:
            mapped = _map(self._fd, offset, size, self._flags)
        except OSError:  # a limit to address space, or to mappings
            return None
        if self._private:
            _madvise(ctypes.addressof(mapped), size, _POPULATE_READ)  # only a matter of speed
        return mapped

    def _copy(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        view = memoryview(data)
        done = 0
        while done < size:
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if not count:
                raise OSError("a segment of shared memory is shorter than it should be")
            done += count
        return data

    def give_back(self, index: int) -> None:
        """It is not read, or not any more."""
        self._ledger[index] = 0


def _unmap(address: int, size: int, reader: Reader, index: int, forks: int) -> None:
    _munmap(address, size)
    _mappings.discard(address)
    if forks == _forks:
        reader.give_back(index)


def _map(fd: int, offset: int, size: int, flags: int) -> ctypes.Array[ctypes.c_ubyte]:
    """Map a range, with an object on which all views of it depend. An `mmap` would keep a descriptor of its
    own, of which there may be few. Whoever calls sees to its end. Raises OSError.
    """
    address = _mmap(None, size, _SHARED, flags, fd, offset)
    if address is None or address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    # It may be taken for larger than it is, so that there are few types: look at `size` bytes of it.
    return _array(size.bit_length()).from_address(address)


@cache
def _array(bits: int) -> type[ctypes.Array[ctypes.c_ubyte]]:
    return ctypes.c_ubyte * (1 << bits)


def _ledger(fd: int) -> memoryview[int]:
    mapped = _map(fd, 0, _LEDGER, mmap.MAP_SHARED)
    weakref.finalize(mapped, _munmap, ctypes.addressof(mapped), _LEDGER).atexit = False
    return memoryview(mapped).cast("B")[:_LEDGER].cast("Q")


def _write(fd: int, buffers: Sequence[Buffer], offset: int) -> None:
    for first in range(0, len(buffers), _PARTS):
        batch: list[Buffer] = list(buffers[first : first + _PARTS])
        while batch:
            count = os.pwritev(fd, batch, offset)
            offset += count
            while batch and count >= len(batch[0]):
                count -= len(batch.pop(0))
            if count:
                batch[0] = memoryview(batch[0])[count:]
