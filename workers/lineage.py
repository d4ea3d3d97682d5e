"""Who descends from whom: a mark in the initial environment, which forks and exec both inherit.

A process that leaves its group and session and loses its parent has nothing left that names its origin,
except its initial environment, `/proc/PID/environ`. A fork server's template is started with
`ACOMM_LINEAGE=/<server>.<serial>`, serial 0, after the entries of the fork servers that it is itself in. A
forked worker overwrites its own copy of the serial *in place*, where the kernel shows it; that costs a few
microseconds. A descendant with an emptied environment cannot be told.
"""

from __future__ import annotations

import ctypes
import os
import signal

VARIABLE = "ACOMM_LINEAGE"
_DIGITS = 10


def environment(server: str) -> dict[str, str]:
    """What to add to the environment of the template of `server`."""
    return {VARIABLE: f"{os.environ.get(VARIABLE, '')}/{server}.{0:0{_DIGITS}d}"}


class Mark:
    """The mark of one fork server, within its template and workers."""

    def __init__(self, server: str) -> None:
        self._mark = f"/{server}.".encode()
        self._address = 0

    def locate(self) -> None:
        """Find the mark in memory, once before the forks."""
        try:
            with open("/proc/self/environ", "rb") as file:
                offset = file.read().find(self._mark)
            with open("/proc/self/stat", "rb") as file:
                start = int(file.read().rpartition(b")")[2].split()[47])  # field 50, env_start: proc(5)
        except (OSError, ValueError, IndexError):
            return
        if offset >= 0 and start:
            self._address = start + offset

    def sign(self, serial: int) -> None:
        """Make this process, and what descends from it from now on, the worker `serial`'s."""
        digits = b"%0*d" % (_DIGITS, serial)
        if self._address:
            ctypes.memmove(self._address + len(self._mark), digits, _DIGITS)
        variable = VARIABLE.encode()
        head, mark, tail = os.environb.get(variable, b"").partition(self._mark)
        if mark:
            os.environb[variable] = head + mark + digits + tail[_DIGITS:]

    def owner(self, pid: int) -> int | None:
        """Serial of the worker that `pid` descends from; None if it cannot be told."""
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                environ = file.read()
            start = environ.index(self._mark) + len(self._mark)
            return int(environ[start : start + _DIGITS])
        except (OSError, ValueError):
            return None


def kill_all(server: str) -> None:
    """Kill every process with the mark of `server`, from outside; takes some milliseconds."""
    mark = f"/{server}.".encode()
    for _ in range(3):  # again, for what was forked meanwhile
        if not [pid for pid in os.listdir("/proc") if pid.isdigit() and _kill_if_marked(int(pid), mark)]:
            break


def _kill_if_marked(pid: int, mark: bytes) -> bool:
    try:
        handle = os.pidfd_open(pid)  # before the look, so that the process looked at is the one killed
    except OSError:
        return False
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            marked = mark in file.read()
        if marked:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        return marked
    except OSError:
        return False
    finally:
        os.close(handle)
