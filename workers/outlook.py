"""Where a request stands that is taken now, and when places become free: what acknowledgements and refusals
tell.
"""

from __future__ import annotations

import functools
import time

from acomm.accepted import Accepted
from workers.examining import Examined
from workers.forecast import Forecast
from workers.pool import Pool

_GAP_LASTS = 0.01
"""Seconds for which an estimate of how fast calls end is good."""


class Outlook:
    """The near future of `pool`'s queue."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._forecast = Forecast()
        self._known_gap: tuple[float | None, float] = (None, 0.0)

    def ended(self) -> None:
        """A call has ended."""
        self._forecast.ended(time.monotonic(), self._pool.dispatcher.queued > 0)

    def standing(self, examined: Examined) -> Accepted | None:
        """Where a request stands that is to be begun now; None if its sender is not to know, or there is
        nothing to tell.
        """
        request, task = examined.request, examined.task
        if task is None or not request.extended:
            return None
        dispatcher = self._pool.dispatcher
        ahead = dispatcher.ahead(request.priority or task.priority)
        if not ahead and dispatcher.assigned < self._pool.ready:
            return Accepted(0, 0.0)
        if examined.key is not None and dispatcher.runs_now(task.name, examined.key):
            return Accepted(0, 0.0)
        gap = self.gap(time.monotonic(), task.name)
        return Accepted(ahead, None if gap is None else (ahead + 1) * gap)

    def gap(self, now: float, task: str | None = None) -> float | None:
        """Seconds from one end of a call to the next, None if that is not known; a call of `task` is the
        last.
        """
        gap, until = self._known_gap
        if gap is None or now >= until:  # it is asked for with each request, and does not change so fast
            gap = self._forecast.gap(now, functools.partial(self._predict, task))
            self._known_gap = gap, now + _GAP_LASTS
        return gap

    def _predict(self, task: str | None) -> float | None:
        """The same by the run times of the tasks whose calls wait."""
        dispatcher, workers = self._pool.dispatcher, max(self._pool.ready, 1)
        if dispatcher.queued:
            _, seconds = dispatcher.backlog()
            if seconds:
                return seconds / dispatcher.queued / workers
        seconds_each = None if task is None else dispatcher.predicted(task)
        return None if seconds_each is None else seconds_each / workers
