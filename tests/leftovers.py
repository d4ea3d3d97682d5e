"""What this process has, and what tests must not leave behind."""

import contextlib
import gc
import os
import threading

import psutil


def state() -> tuple[int, int, int]:
    """Descriptors, threads and children of this process."""
    gc.collect()
    children = psutil.Process().children()
    return len(os.listdir("/proc/self/fd")), threading.active_count(), len(children)


class Leftovers:
    """What was there at first, and what is left of what has come since: descriptors, threads, children."""

    def __init__(self) -> None:
        self._before = _held()

    def found(self) -> list[str]:
        """Those that do not go with the garbage, nor with the end of threads."""
        if not self._new():
            return []
        gc.collect()
        for thread in threading.enumerate():
            if f"thread {thread.name}" not in self._before:
                thread.join(10.0)
        return sorted(self._new())

    def _new(self) -> set[str]:
        return _held() - self._before


def _held() -> set[str]:
    held = {f"thread {thread.name}" for thread in threading.enumerate()}
    for task in os.listdir("/proc/self/task"):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/children") as file:
            held |= {f"child {pid}" for pid in file.read().split()}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            held.add(f"descriptor {fd}: {os.readlink(f'/proc/self/fd/{fd}')}")
    return held


def workers() -> list[psutil.Process]:
    """The worker processes of pools of this process that live now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "acomm-worker":
                found.append(process)
    return found
