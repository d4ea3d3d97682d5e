"""Deadlines of many things, one timer: pure, with the time passed in."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Deadlines(Generic[K]):
    """When which key is due. Most deadlines are dropped before they are reached, so dropping is a
    dictionary's `pop`; the heap forgets later, and never holds more than about twice what is alive.
    """

    def __init__(self) -> None:
        self._due: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._due)

    def __contains__(self, key: K) -> bool:
        return key in self._due

    def set(self, key: K, when: float) -> None:
        number = next(self._count)
        self._due[key] = (when, number)
        heapq.heappush(self._heap, (when, number, key))
        if len(self._heap) > 2 * len(self._due) + 64:
            self._heap = [(due, number, key) for key, (due, number) in self._due.items()]
            heapq.heapify(self._heap)

    def postpone(self, seconds: float) -> None:
        """Move all deadlines."""
        self._due = {key: (when + seconds, number) for key, (when, number) in self._due.items()}
        self._heap = [(when, number, key) for key, (when, number) in self._due.items()]
        heapq.heapify(self._heap)

    def discard(self, key: K) -> None:
        self._due.pop(key, None)

    def when(self, key: K) -> float:
        """The deadline of `key`. Raises KeyError."""
        return self._due[key][0]

    def first(self) -> K | None:
        """The key with the earliest deadline; None if there is none."""
        return None if self.next() is None else self._heap[0][2]

    def next(self) -> float | None:
        """When the next deadline is; None if there is none."""
        heap = self._heap
        while heap:
            when, number, key = heap[0]
            if self._due.get(key) == (when, number):
                return when
            heapq.heappop(heap)
        return None

    def expired(self, now: float) -> list[K]:
        """Take out the keys whose deadline has passed, earliest first."""
        keys: list[K] = []
        while (when := self.next()) is not None and when <= now:
            key = heapq.heappop(self._heap)[2]
            del self._due[key]
            keys.append(key)
        return keys
