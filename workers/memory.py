"""How much memory processes take, as /proc tells; in bytes.

Anonymous memory is meant: what a program has allocated and touched. Files that are mapped and shared memory
are others' as well. A process that was forked counts what it still shares with its parent, so what a call
takes is always a difference to an earlier look at the same process, and of its children only what is their
own counts in the end.
"""

from __future__ import annotations

import ctypes
import os
import resource

PAGE = resource.getpagesize()

_libc = ctypes.CDLL(None)


class Statm:
    """A kept-open `/proc/PID/statm`; a look costs microseconds. Raises OSError when the process is gone."""

    def __init__(self, pid: int | str = "self") -> None:
        self._fd = os.open(f"/proc/{pid}/statm", os.O_RDONLY)

    def _read(self) -> list[bytes]:
        return os.pread(self._fd, 200, 0).split()

    def anonymous(self) -> int:
        """Resident memory that is no file's and not shared memory."""
        fields = self._read()
        return (int(fields[1]) - int(fields[2])) * PAGE if len(fields) > 2 else 0

    def data(self) -> int:
        """Writable private memory, touched or not: what RLIMIT_DATA limits, and the stack."""
        return int(self._read()[5]) * PAGE

    def close(self) -> None:
        os.close(self._fd)


class Gauges:
    """What workers have taken since a start that is noted, their descendants included. For their parent's
    parent: a process that is gone takes nothing, and what has left its worker's family is not found.
    """

    def __init__(self) -> None:
        self._gauges: dict[int, tuple[int, Statm, int]] = {}

    def start(self, token: int, pid: int) -> None:
        """A call begins in the worker `token`, which is the process `pid`."""
        try:
            gauge = self._gauges.get(token)
            statm = Statm(pid) if gauge is None else gauge[1]
            self._gauges[token] = pid, statm, _total(pid, statm)
        except OSError:
            pass  # it is dead, which others find out

    def taken(self, token: int, limit: int) -> int:
        """Bytes since then. Only what is above `limit` is looked at closely: a look costs some 50 µs, a close
        one milliseconds.
        """
        gauge = self._gauges.get(token)
        if gauge is None:
            return 0
        pid, statm, before = gauge
        try:
            taken = _total(pid, statm) - before
            if taken <= limit:
                return max(0, taken)
            return max(0, statm.anonymous() + sum(map(_own, descendants(pid))) - before)
        except OSError:
            return 0

    def forget(self, token: int) -> None:
        gauge = self._gauges.pop(token, None)
        if gauge is not None:
            gauge[1].close()

    def close(self) -> None:
        for token in list(self._gauges):
            self.forget(token)


def _total(pid: int, statm: Statm) -> int:
    return statm.anonymous() + sum(map(_anonymous, descendants(pid)))


def _anonymous(pid: int) -> int:
    try:
        statm = Statm(pid)
    except OSError:
        return 0
    try:
        return statm.anonymous()
    except OSError:
        return 0
    finally:
        statm.close()


def _own(pid: int) -> int:
    """What a process shares with nobody."""
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            fields = [
                line.split() for line in file if line.startswith((b"Private_Clean:", b"Private_Dirty:"))
            ]
    except OSError:
        return 0
    return sum(int(field[1]) for field in fields) * 1024


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    found: list[int] = []
    waiting = [pid]
    while waiting:
        parent = waiting.pop()
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children", "rb") as file:
                    children = [int(child) for child in file.read().split()]
                found += children
                waiting += children
        except OSError:
            continue  # it has ended
    return found


def trim() -> None:
    """Give back to the kernel what the allocator keeps for later; not every libc can."""
    malloc_trim = getattr(_libc, "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def megabytes(size: int) -> str:
    """For messages: "1.5 MB"."""
    return f"{size / 1e6:.1f} MB"
