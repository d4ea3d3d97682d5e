"""Ctrl-C, put off: for steps that must not be cut short in the main thread, where it is raised."""

from __future__ import annotations

# The C functions: the ones of `signal` look for an enumeration first, which takes ten times as long.
import _signal  # type: ignore[import-not-found]
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

PATIENCE = 1.0
"""Seconds: whatever takes so long is stuck."""

_INTERRUPT = int(signal.SIGINT)


_OTHERS = tuple(
    map(
        int,
        (
            signal.SIGALRM,
            signal.SIGVTALRM,
            signal.SIGPROF,
            signal.SIGTERM,
            signal.SIGHUP,
            signal.SIGQUIT,
            signal.SIGUSR1,
            signal.SIGUSR2,
        ),
    )
)


def others_may_interrupt() -> bool:
    """Whether this thread runs handlers of the program's for other signals, which may raise: timeouts by
    SIGALRM do. They cannot be put off, so what must not be cut short is to be left to other threads.
    """
    if threading.get_ident() != threading.main_thread().ident:
        return False
    return any(callable(handler) for handler in map(_signal.getsignal, _OTHERS))


class Uninterrupted:
    """Within it, the handler of SIGINT does not run; it does at the end, if one came. `noticed` is called
    in its place, and must not raise. One that comes more than PATIENCE after another is not put off.

    In threads that get no signals it does nothing. Takes half a microsecond.
    """

    __slots__ = ("_before", "_came", "_noticed")

    def __init__(self, noticed: Callable[[], object] | None = None) -> None:
        self._before: Any = None
        self._came = 0.0  # when the first one did
        self._noticed = noticed

    def __enter__(self) -> None:
        if threading.get_ident() == threading.main_thread().ident:
            before = _signal.getsignal(_INTERRUPT)
            if callable(before):
                self._before = before
                _signal.signal(_INTERRUPT, self._note)

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            if _signal.getsignal(_INTERRUPT) == self._note:  # another signal's handler may have set its own
                _signal.signal(_INTERRUPT, self._before)
            if self._came:
                self._before(_INTERRUPT, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._came and now - self._came > PATIENCE:
            self._before(number, frame)
        self._came = self._came or now
        if self._noticed is not None:
            self._noticed()
