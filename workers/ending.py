"""How a worker is ended whose call must stop: asked where it is, asked to stop, killed. No I/O, no clock.

    SIGUSR1 --(dumped, or `dump` seconds)--> SIGTERM --(`term` seconds)--> SIGKILL

The first has faulthandler write the Python stack, which works during C calls too. The second raises in the
task, so that its `finally` blocks run; C code that holds the GIL never hears of it. The third cannot be
refused. A worker that dies on the way gets no more.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import NamedTuple


class Graces(NamedTuple):
    """Seconds: for the stack to be written, which takes about a millisecond, and from SIGTERM to SIGKILL."""

    dump: float = 0.05
    term: float = 0.2


class Ending:
    """The end of one worker. `due` is when to look again at the latest; None when all has been sent."""

    __slots__ = ("_graces", "_last", "due")

    def __init__(self, graces: Graces, now: float) -> None:
        self._graces = graces
        self._last: signal.Signals | None = None
        self.due: float | None = now

    def __repr__(self) -> str:
        return f"<Ending, last sent: {self._last.name if self._last else 'nothing'}>"

    def step(self, now: float, dumped: Callable[[], bool]) -> signal.Signals | None:
        """The signal to send now, if it is time for one; ask again until there is none. `dumped` tells
        whether SIGTERM would not get in the way of the stack any more.
        """
        if self.due is None:
            return None
        if self._last is None:
            self._last, self.due = signal.SIGUSR1, now + self._graces.dump
        elif self._last == signal.SIGUSR1 and (now >= self.due or dumped()):
            self._last, self.due = signal.SIGTERM, now + self._graces.term
        elif self._last == signal.SIGTERM and now >= self.due:
            self._last, self.due = signal.SIGKILL, None
        else:
            return None
        return self._last
