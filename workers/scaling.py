"""How many workers there should be, between a fewest and a most. Pure: the time is passed in.

More, when calls would wait for longer than PATIENCE before a worker has time for them: by what their tasks
took before, or because they have waited for so long already, whatever was predicted. Fewer, when some have
had nothing to do for IDLE seconds. The two are far apart, so that it does not go up and down with every
burst: a worker that is there and idle costs some memory, one that is missing costs time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

PATIENCE = 0.1
"""Seconds that calls may wait: some ten times as long as it takes to start a worker."""

IDLE = 10.0
"""Seconds without need after which workers go."""

LOOKS = 20
"""How often it is seen in that time what they do."""


class Load(NamedTuple):
    """What a pool has to do. `workers` are those wanted so far; of these `spare` have nothing to do, or are
    being started and soon will take something. `waiting` calls could begin now if there were more workers,
    and take so many `seconds` in all, as far as that is known.
    """

    workers: int
    spare: int
    waiting: int
    seconds: float


class Scaler:
    """The number of workers of a pool, `least` to `most`."""

    def __init__(self, least: int, most: int, now: float = 0.0) -> None:
        self.least = least
        self.most = most
        self._looked = -math.inf
        self._short_since: float | None = None
        self._spare_since = now
        self._spare = most  # at every look since then

    def __repr__(self) -> str:
        return f"<Scaler {self.least} to {self.most}>"

    def next_look(self, workers: int, queued: int) -> float:
        """When to look at the latest; `inf`: not before there is something to do."""
        if queued and workers < self.most:
            return self._looked + PATIENCE / 4
        if workers > self.least:
            return min(self._spare_since + IDLE, self._looked + IDLE / LOOKS)
        return math.inf

    def look(self, now: float, load: Load) -> int:
        """How many workers there should be. Whoever asks sees to that there are, or asks again."""
        self._looked = now
        if load.waiting and not load.spare:
            self._spare_since, self._spare = now, self.most
            return self._more(now, load)
        self._short_since = None
        # Those that are about to be taken are needed.
        self._spare = min(self._spare, max(0, load.spare - load.waiting))
        if now - self._spare_since < IDLE:
            return load.workers
        fewer = max(self.least, load.workers - self._spare)
        self._spare_since, self._spare = now, self.most
        return min(fewer, load.workers)

    def _more(self, now: float, load: Load) -> int:
        if self._short_since is None:
            self._short_since = now
        wanted = load.workers
        if load.seconds > PATIENCE * load.workers:
            wanted = math.ceil(load.seconds / PATIENCE)
        elif now - self._short_since >= PATIENCE:
            # They were to be done by now, so what was predicted is not to be relied on.
            wanted = 2 * load.workers
        if wanted <= load.workers:
            return load.workers
        self._short_since = None
        return max(load.workers, min(wanted, load.workers + load.waiting, self.most))
