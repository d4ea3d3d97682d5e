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

ENDS = 64
"""Ends that are counted, at least: few say little of how fast they come, as calls differ."""

LONGEST_WINDOW = 2.0
"""Seconds after which fewer ends have to do."""

_WEIGHT = 0.25  # of a window among those before

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
        if elapsed >= LONGEST_WINDOW or (elapsed >= WINDOW and self._ends >= ENDS):
            gap = elapsed / self._ends
            before = gap if self._measured is None else self._measured
            self._measured = before + (gap - before) * _WEIGHT
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
            lately = elapsed / (self._ends + 1)
            # They have become slower, or none has ended yet; less than that is chance.
            if self._measured is None or elapsed > LONGEST_WINDOW or lately > 4 * self._measured:
                known.append(lately)
        return max(known, default=None)
