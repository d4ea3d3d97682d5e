"""Places that were promised to requests that were turned away: kept for them when they come back.

    keep(id, promise)      told to come back at `until`; a place is free from `since` on, or so
       |
       +--> since ... until ... LATE later: newcomers leave it its place

Without that, who comes back when told finds that a newcomer was quicker, for as long as more requests come
than can be done. Callers may have gone, so a part of all places at most is kept, and what share of them comes
back is learned.

Pure. `now`, and all times, are on the monotonic clock in seconds.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

LATE = 0.5
"""Seconds for which a place is kept for who is late: a timer, the way, a busy machine."""

PART = 4
"""One of so many places is kept, at most."""

MOST = 20_000
"""Promises that are remembered: some 5 MB. Who is turned away beyond has to be lucky."""

_LEARN = 1 / 64


class Promise(NamedTuple):
    """To a request with `size` bytes of arguments."""

    since: float
    until: float
    size: int


class Promises:
    """Of as many places as `requests`, with `size` bytes of room. `returning` is the share of those who come
    back when told.
    """

    def __init__(self, requests: int, size: int) -> None:
        self.returning = 1.0
        self._kept = requests // PART
        self._kept_size = size // PART
        self._all: dict[int, Promise] = {}  # by the hashes of ids, which may be long
        self._coming: list[tuple[float, int]] = []
        self._ends: list[tuple[float, int]] = []
        self._due: dict[int, Promise] = {}
        self._due_size = 0

    def __len__(self) -> int:
        return len(self._all)

    @property
    def due(self) -> int:
        """How many are to come back now."""
        return len(self._due)

    def keep(self, id: str, promise: Promise) -> None:
        """A request was turned away, and told when to come back."""
        key = hash(id)
        self._forget(key)
        if len(self._all) < MOST:
            self._all[key] = promise
            heapq.heappush(self._coming, (promise.since, key))

    def rest(self, id: str, now: float) -> float | None:
        """Seconds until a request that comes early was to come back; None if it was not told to, or is
        due.
        """
        promise = None if self.is_due(id, now) else self._all.get(hash(id))
        return None if promise is None else promise.until - now

    def is_due(self, id: str, now: float) -> bool:
        """Whether a request has come back when it was told to, more or less."""
        self._advance(now)
        return hash(id) in self._due

    def leave_room(self, id: str, requests: int, size: int, now: float) -> bool:
        """Whether a request may have one of the `requests` places that are free. `size` bytes are free when
        it has it.
        """
        if self.is_due(id, now):
            return True
        return requests > min(len(self._due), self._kept) and size >= min(self._due_size, self._kept_size)

    def redeem(self, id: str) -> None:
        """A request has its place."""
        key = hash(id)
        if key in self._due:
            self._learn(1.0)
        self._forget(key)

    def _learn(self, came: float) -> None:
        self.returning += (came - self.returning) * _LEARN

    def _forget(self, key: int) -> None:
        self._all.pop(key, None)
        due = self._due.pop(key, None)
        if due is not None:
            self._due_size -= due.size

    def _advance(self, now: float) -> None:
        coming, ends = self._coming, self._ends
        while coming and coming[0][0] <= now:
            since, key = heapq.heappop(coming)
            promise = self._all.get(key)
            if promise is not None and promise.since == since and key not in self._due:
                self._due[key] = promise
                self._due_size += promise.size
                heapq.heappush(ends, (promise.until + LATE, key))
        while ends and ends[0][0] <= now:
            end, key = heapq.heappop(ends)
            promise = self._due.get(key)
            if promise is not None and promise.until + LATE == end:
                self._forget(key)
                self._learn(0.0)
