"""When the next calls end, by what calls took before: what is told to those who wait, or are turned away.
Pure.

Two things are known. Calls have ended every so many seconds while others waited, which has everything in it
that calls cost. And the tasks of those that wait have taken so many seconds to run, which is known before any
of them has ended. The longer of the two counts: who is told too much waits a moment more than he need, who is
told too little has come in vain.
"""

from __future__ import annotations

from collections.abc import Callable

WINDOW = 0.25
"""Seconds over which ends are counted, at least. Answers come in batches, so shorter ones say nothing."""

LOOK = 0.25
"""Seconds between looks at the calls that wait: a look at a long queue takes some tenths of a millisecond."""


class Forecast:
    """Seconds from one end to the next, while calls wait. `now` is on the monotonic clock."""

    def __init__(self) -> None:
        self._measured: float | None = None
        self._since = 0.0  # the window's beginning
        self._ends = 0
        self._waited = False  # whether others waited at the last end
        self._predicted: float | None = None
        self._look_at = 0.0

    def ended(self, now: float, waiting: bool) -> None:
        """A call has ended; `waiting`: others wait for a worker. Between two ends at which some did, the
        workers had all that they can do.
        """
        if not waiting or not self._waited:
            self._waited = waiting
            self._since = now
            self._ends = 0
            return
        self._ends += 1
        elapsed = now - self._since
        if elapsed >= WINDOW:
            gap = elapsed / self._ends
            self._measured = gap if self._measured is None else (self._measured + gap) / 2
            self._since = now
            self._ends = 0

    def gap(self, now: float, predict: Callable[[], float | None]) -> float | None:
        """Seconds from one end to the next; None if nothing is known. `predict` tells them by the tasks of
        the calls that wait, and is asked now and then.
        """
        if now >= self._look_at:
            self._predicted = predict()
            self._look_at = now + LOOK
        known = [gap for gap in (self._measured, self._predicted) if gap is not None]
        elapsed = now - self._since
        if self._waited and elapsed > WINDOW:
            known.append(elapsed / (self._ends + 1))  # they have become slower, or none has ended yet
        return max(known, default=None)
