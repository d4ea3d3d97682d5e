"""The client of a program that has not made one: one a process."""

from __future__ import annotations

import atexit
import os
import threading

from acomm.client import Client, connect

_default: Client | None = None
_default_lock = threading.Lock()


def default_client() -> Client:
    """The client that `Task.submit` uses, one a process: made when it is first needed, with the URL that
    `default_url` gives then, and made anew after a fork, or when it was closed. It is closed at exit.
    """
    global _default
    with _default_lock:
        if _default is None or not _default.usable:
            if _default is None:
                atexit.register(_close_default)
            _default = connect()
        return _default


def _close_default() -> None:
    if _default is not None:
        _default.close()


def _after_fork() -> None:
    # Another thread may have held the lock, and the client's own thread is not here.
    global _default, _default_lock
    _default = None
    _default_lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
