"""Calls that may have to let others pass while they wait: of tasks of which only so many may run at a time,
and of those that need a worker of their own. Pure.

They do not stand in the dispatcher's queues: a task at its limit would be in the way of the others there, or
have to be passed over again and again. Here each such task has a lane of its own, and a lane at its limit is
not looked at, however many calls wait in it.
"""

from __future__ import annotations

import bisect
import itertools
import sys
from collections import OrderedDict
from collections.abc import Iterator

from workers.calls import Call

UNLIMITED = sys.maxsize
"""The `concurrency` of a call that waits in a lane, but not for others of its task."""


class _Lane:
    """The calls of one task. Workers hold `held` of them: the given-up ones too, as they may run."""

    __slots__ = ("held", "isolated", "order", "queues")

    def __init__(self, isolated: bool) -> None:
        self.held = 0
        self.isolated = isolated
        self.queues: dict[int, OrderedDict[int, Call]] = {}  # by priority; ordered, so that any may leave
        self.order: list[int] = []  # the priorities, negated: the highest is first

    def first(self) -> Call:
        return next(iter(self.queues[-self.order[0]].values()))

    def room(self) -> int:
        """How many of those that wait may run now."""
        return (self.first().concurrency or 0) - self.held

    def __iter__(self) -> Iterator[Call]:
        """Those that wait, the next one first."""
        for priority in self.order:
            yield from self.queues[-priority].values()

    def add(self, call: Call, *, front: bool) -> None:
        queue = self.queues.get(call.priority)
        if queue is None:
            queue = self.queues[call.priority] = OrderedDict()
            bisect.insort(self.order, -call.priority)
        queue[call.number] = call
        if front:
            queue.move_to_end(call.number, last=False)

    def remove(self, call: Call) -> None:
        queue = self.queues[call.priority]
        del queue[call.number]
        if not queue:
            del self.queues[call.priority]
            self.order.remove(-call.priority)


class Lanes:
    """The waiting calls that have a `concurrency`. `open` is true while one of them may run; those that are
    isolated can be put aside and taken back, for others to pass.

    What all operations cost does not depend on how many calls wait; `first` looks at each task that has both
    waiting calls and room for one.
    """

    def __init__(self) -> None:
        self.open: dict[str, _Lane] = {}
        self._lanes: dict[str, _Lane] = {}  # those that are not empty
        self.aside: dict[str, _Lane] = {}

    def __len__(self) -> int:
        """Tasks that have calls that wait or run."""
        return len(self._lanes)

    def waiting(self) -> list[Call]:
        """All calls that wait."""
        return [call for lane in self._lanes.values() for call in lane]

    def add(self, call: Call, *, front: bool = False) -> None:
        """A call waits, behind those of its priority or in front of them."""
        lane = self._lanes.get(call.task)
        if lane is None:
            lane = self._lanes[call.task] = _Lane(call.isolated)
        lane.add(call, front=front)
        self._changed(call, lane)

    def remove(self, call: Call) -> None:
        """A call waits no more, and does not run."""
        lane = self._lanes[call.task]
        lane.remove(call)
        self._changed(call, lane)

    def first(self) -> Call:
        """Of the calls that may run now, that of the highest priority, and of those the oldest. Only while
        `open`.
        """
        return min((lane.first() for lane in self.open.values()), key=turn)

    def first_isolated(self) -> Call | None:
        """As `first`, of the isolated ones; None if there is none that may run."""
        return min((lane.first() for lane in self.open.values() if lane.isolated), key=turn, default=None)

    def startable(self, most: int) -> list[Call]:
        """The calls that may run now, `most` of each task."""
        return [
            call for lane in self.open.values() for call in itertools.islice(lane, min(most, lane.room()))
        ]

    def below(self, priority: int) -> int:
        """How many calls of a lower priority wait."""
        return sum(
            len(queue)
            for lane in self._lanes.values()
            for other, queue in lane.queues.items()
            if other < priority
        )

    def count_isolated(self, before: tuple[int, int] | None, most: int) -> int:
        """How many isolated calls may run now whose turn comes `before` another; `most` are counted."""
        count = 0
        for lane in self.open.values():
            if lane.isolated:
                calls = itertools.islice(lane, min(most, lane.room()))
                count += sum(before is None or turn(call) < before for call in calls)
        return min(count, most)

    def put_isolated_aside(self) -> None:
        self.aside = {task: lane for task, lane in self.open.items() if lane.isolated}
        for task in self.aside:
            del self.open[task]

    def take_back(self) -> None:
        self.open.update(self.aside)
        self.aside = {}

    def take(self, call: Call) -> None:
        """A worker gets a call that waits."""
        lane = self._lanes[call.task]
        lane.held += 1
        lane.remove(call)
        self._changed(call, lane)

    def release(self, call: Call) -> None:
        """A worker no longer holds a call."""
        lane = self._lanes[call.task]
        lane.held -= 1
        self._changed(call, lane)

    def _changed(self, call: Call, lane: _Lane) -> None:
        if lane.order and call.concurrency is not None and lane.held < call.concurrency:
            self.open[call.task] = lane
        else:
            self.open.pop(call.task, None)
            if not lane.order and not lane.held:
                del self._lanes[call.task]


def turn(call: Call) -> tuple[int, int]:
    """What waiting calls are ordered by: their priority, then their age."""
    return -call.priority, call.rank or call.number
