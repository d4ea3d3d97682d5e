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


def workers() -> list[psutil.Process]:
    """The worker processes of pools of this process that live now."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "acomm-worker":
                found.append(process)
    return found
