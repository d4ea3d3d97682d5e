"""Which of the calls that wait goes to which worker now. No I/O, no clock.

A worker holds as many calls as it can run in about WINDOW seconds, by what their tasks took before: one
long call, or hundreds of tiny ones that then travel in one message. A call of unknown cost waits for a
worker that holds nothing, and nothing waits behind it; so does each that streams, as its consumer decides
how long it takes.

Of a task with a concurrency limit workers hold so many calls at most; the others wait in a lane, and no
other task's calls wait for them.

An isolated call gets a worker that has been given nothing. When it is its turn and there is none, an idle
worker makes place: it is spent, and the one that takes its place is kept for such calls. Calls behind pass
meanwhile; but as long as no worker is idle, nobody is handed out, so that one becomes it.

Calls that overlap run many at a time in a worker, by count. How these and plain ones share the workers is in
`workers.overlapping`.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Collection, Iterator

from acomm.deadlines import Deadlines
from workers.calls import Call
from workers.errors import AcommError
from workers.lanes import Lanes, turn
from workers.overlapping import cost, goes_first, share, unplaced
from workers.places import Places

WINDOW = 0.002
"""Seconds of predicted work that a worker may hold: longer than a round trip to the supervisor, so that a
worker does not idle; short enough that nobody minds waiting for it.
"""

MAX_WINDOW = 512
"""Calls that a worker may hold: beyond this a larger message saves nothing more."""

STUCK = 0.005
"""Seconds without an answer after which a worker with work gets no more: its prediction was wrong."""

LEARNING = 1 / 16
"""Weight of the newest run time: a single preempted call of a tiny task must not close its window."""

LEAST = 1e-6
"""Seconds that a call is taken to cost at least: nothing is free, and nothing joins a full window."""

OVERLAP = 100
"""Calls that overlap a worker may hold: they mostly wait, and a death costs all that run."""

MEMORY_CHECK = 0.05
"""Seconds between looks at the memory of a call whose task limits that: a look costs a thousandth of it, and
within, a call may take some hundred MB more than it may."""

BACKLOG_PART = 1000
"""Waiting calls from which the work in a queue is estimated: a look takes some tenths of a millisecond."""

_USED, _FRESH = -2.0, -1.0
"""Idle workers come before all others, whatever rounding has left of their loads; those that have been given
nothing yet are the last of them, as isolated calls can use them."""


class Worker:
    """A worker as far as it matters who gets what: what it holds, and may yet be given."""

    __slots__ = ("asked", "calls", "doomed", "heard", "id", "idle", "last", "left", "load", "overlaps",
                 "retiring")  # fmt: skip

    def __init__(self, id: int, now: float, left: int) -> None:
        self.id = id
        self.left = left  # calls that it may yet be given; below 0: any number
        self.calls: dict[int, Call] = {}
        self.load = 0.0
        self.last = False  # what it holds is the last that it gets, even if it gives some of it back
        self.idle = _FRESH  # what its load counts for while it holds nothing
        self.heard = now
        self.overlaps = False  # of which kind its calls are, if it has any
        self.asked: dict[int, AcommError] = {}  # calls that it is to cancel
        self.doomed: dict[int, AcommError] = {}  # calls for which it is being killed
        self.retiring = False


class Assigning:
    """The calls that wait, and the workers: who gets what.

    `queued` counts the calls that wait for a worker or for their backoff, `assigned` those that workers hold,
    given-up ones included. `spent` lists the workers that have run their `max_tasks` calls (None: any number)
    and are to be replaced, until it is cleared; so does `gauged` those of the calls that `assign` has given
    out whose memory is limited, and counts from now on.
    """

    def __init__(self, window: float, max_window: int, max_tasks: int | None, overlap: int) -> None:
        self.overlap = overlap
        self.window = window
        self.max_window = max_window
        self.max_tasks = max_tasks
        self.spent: list[int] = []
        self.gauged: list[int] = []
        self.queued = 0
        self.assigned = 0
        self._workers: dict[int, Worker] = {}
        self._queues: dict[int, deque[Call]] = {}
        self._order: list[int] = []
        self._lanes = Lanes()
        self._open = self._lanes.open  # looked at for every call
        self._overlapping = Lanes()
        self._places = Places()
        self._stale = 0  # settled calls that are still in a queue
        self._holder: dict[int, Worker] = {}
        self._predicted: dict[str, float] = {}
        self._limits: Deadlines[int] = Deadlines()
        self._backoff: Deadlines[int] = Deadlines()

    # -- workers ------------------------------------------------------------------------------------

    def worker_ready(self, id: int, now: float) -> None:
        """A worker can take calls."""
        self._workers[id] = worker = Worker(id, now, -1 if self.max_tasks is None else self.max_tasks)
        if self._places.fill(id):
            worker.left = 0

    def retire(self, id: int) -> None:
        """Give a worker nothing more."""
        if id in self._workers:
            self._workers[id].retiring = True
            self._places.lose(id)

    def wind_up(self, ids: Collection[int]) -> int | None:
        """Let one of these workers finish what it holds, and then be `spent`: the one that holds least. None:
        all of them end anyway.
        """
        able = [worker for id in ids if (worker := self._workers.get(id)) and not worker.retiring]
        if not able:
            return None
        worker = min(able, key=lambda worker: (len(worker.calls), worker.load, worker.id))
        worker.last = True
        worker.left = 0
        self._places.lose(worker.id)
        self._look_spent(worker)
        return worker.id

    def dismiss(self, most: int) -> list[int]:
        """Give nothing more to workers that hold nothing, `most` of them; which ones."""
        idle = [worker for worker in self._workers.values() if not worker.calls and not worker.retiring]
        idle.sort(key=lambda worker: (worker.idle, -worker.id))
        chosen = [worker.id for worker in idle if worker.id not in self._places.kept][:most]
        for id in chosen:
            self.retire(id)
        return chosen

    @property
    def idle(self) -> int:
        """Workers that hold nothing and may be given something of what waits: while calls that overlap do
        for want of room, it is not the one that they leave alone.
        """
        idle = sum(not worker.calls and not worker.retiring for worker in self._workers.values())
        return idle - 1 if idle and self._overlapping.open and self._unplaced() else idle

    def backlog(self) -> tuple[int, float]:
        """How many calls another worker could take now, and the seconds that they will run, as far as that
        can be predicted. Of a long queue a part is looked at. Of calls that overlap those count that find no
        room in a worker, as many as it holds for one.
        """
        live = (call for queue in self._queues.values() for call in queue if not call.settled)
        part = [self._predicted.get(call.task, 0.0) for call in itertools.islice(live, BACKLOG_PART)]
        count = sum(map(len, self._queues.values())) - self._stale
        limited = self._lanes.startable(BACKLOG_PART)
        seconds = sum(part) / len(part) * count if part else 0.0
        count += len(limited)
        seconds += sum(self._predicted.get(call.task, 0.0) for call in limited)
        if self._overlapping.open and (unplaced := self._unplaced()):
            count += math.ceil(len(unplaced) / self.overlap)
            seconds += sum(self._predicted.get(call.task, 0.0) for call in unplaced) / self.overlap
        return count, seconds

    def ahead(self, priority: int) -> int:
        """How many calls wait for a worker that come before a new one of that priority."""
        waiting = self.queued - len(self._backoff)
        order = self._order
        if len(order) > 1 or (order and order[0] < priority):
            waiting -= sum(len(queue) for other, queue in self._queues.items() if other < priority)
        for lanes in (self._lanes, self._overlapping):
            if lanes:
                waiting -= lanes.below(priority)
        return max(waiting, 0)  # given-up calls may still be in a queue

    def _unplaced(self) -> list[Call]:
        """Calls that overlap and that no worker has room for."""
        calls = self._overlapping.startable(BACKLOG_PART)
        return unplaced(calls, self._takers(), self.overlap, self._cost)

    def load(self, id: int) -> int:
        """How many calls a worker holds."""
        worker = self._workers.get(id)
        return len(worker.calls) if worker else 0

    def _look_spent(self, worker: Worker) -> None:
        """A worker gets nothing more: it is replaced, once it holds nothing."""
        if not worker.calls and not worker.retiring:
            worker.retiring = True
            self.spent.append(worker.id)

    # -- who gets what ------------------------------------------------------------------------------

    def assign(self, now: float) -> Iterator[tuple[int, list[Call]]]:
        """Hand out queued calls as credit allows: what to send to which worker."""
        if not self.queued:
            if self._stale:
                self._sweep()
            return iter(())
        batches: dict[int, list[Call]] = {}
        if self._places.kept:
            self._use_kept(now, batches)
        if self._overlapping.open:
            self._assign_both(now, batches)
        else:
            self._assign_plain(now, batches)
        return iter(batches.items())

    def _assign_both(self, now: float, batches: dict[int, list[Call]]) -> None:
        if goes_first(self._overlapping, self._front(), self._takers(), self.overlap, self._cost):
            if self._assign_overlapping(now, batches):
                self._assign_plain(now, batches)
            # Else the next worker that falls idle is for those that overlap.
        else:
            self._assign_plain(now, batches)
            self._assign_overlapping(now, batches)

    def _takers(self) -> list[Worker]:
        """The workers that may be given something."""
        return [worker for worker in self._workers.values() if worker.left and not worker.retiring]

    def _assign_overlapping(self, now: float, batches: dict[int, list[Call]]) -> bool:
        """Hand out calls that overlap; whether any has found a worker."""
        lanes, plain, found = self._overlapping, self._first_plain(), False
        for worker, call in share(lanes, plain, self._takers(), self.overlap, now, self._cost):
            found = True
            self._take_front(call)
            call.sent = now
            call.cost = self._cost(call)
            worker.overlaps = True
            worker.idle = _USED
            worker.load += call.cost
            worker.calls[call.number] = call
            worker.left -= 1
            self._holder[call.number] = worker
            self.assigned += 1
            if call.timeout is not None:
                self._limit(call, worker, now)
            batches.setdefault(worker.id, []).append(call)
        return found

    def _first_plain(self) -> Call | None:
        """The first plain call that waits for a worker. Isolated ones let others pass for which place is
        being made.
        """
        call = self._front()
        if call is None or not call.isolated:
            return call
        if self._places.made < self._lanes.count_isolated(self._next_turn(), len(self._workers)):
            return call
        self._lanes.put_isolated_aside()
        call = self._front()
        self._lanes.take_back()
        return call

    def _cost(self, call: Call) -> float:
        """What a call that overlaps adds to the load of a worker."""
        return cost(self._predicted.get(call.task))

    def _assign_plain(self, now: float, batches: dict[int, list[Call]]) -> None:
        free = [
            (worker.load if worker.calls else worker.idle, worker.id, worker)
            for worker in self._workers.values()
            if worker.left
            and not worker.retiring
            and (not worker.calls or (not worker.overlaps and now - worker.heard < STUCK))
        ]
        heapq.heapify(free)
        isolated = bool(self._open) and self._lanes.first_isolated() is not None
        # What is looked up for every call is looked up once.
        front, predict, holder = self._front, self._predicted.get, self._holder
        window, max_window = self.window, self.max_window
        while (call := front()) is not None and (free or isolated):
            if isolated and call.isolated:
                self._isolate(call, free, now, batches)
                continue
            if not free:
                break
            load, id, worker = free[0]
            cost = predict(call.task)
            fits = cost is not None and load + cost <= window and len(worker.calls) < max_window
            if worker.calls and not fits:
                if len(worker.calls) < max_window:
                    break  # the least loaded has no room for this one, so nobody has
                heapq.heappop(free)
                continue
            self._take_front(call)
            if not worker.calls:
                worker.heard = now
                worker.idle = _USED
                worker.overlaps = False
            number = call.number
            call.cost = cost = window if cost is None else cost
            worker.load += cost
            worker.calls[number] = call
            holder[number] = worker
            self.assigned += 1
            if call.timeout is not None:
                self._limit(call, worker, now)
            batches.setdefault(id, []).append(call)
            worker.left -= 1
            if worker.left:
                heapq.heapreplace(free, (worker.load, id, worker))
            else:
                heapq.heappop(free)
        if self._lanes.aside:
            self._lanes.take_back()

    def _limit(self, call: Call, worker: Worker, now: float) -> None:
        """A call with limits goes to a worker."""
        assert call.timeout is not None
        limit = call.timeout
        if call.max_memory is not None:
            limit = min(limit, MEMORY_CHECK)
            self.gauged.append(worker.id)
        self._limits.set(call.number, now + limit)

    def _isolate(
        self, call: Call, free: list[tuple[float, int, Worker]], now: float, batches: dict[int, list[Call]]
    ) -> None:
        """It is the turn of an isolated call."""
        fresh = [entry for entry in free if entry[2].idle == _FRESH and not entry[2].calls]
        if fresh:
            free.remove(fresh[0])
            heapq.heapify(free)
            self._give_alone(call, fresh[0][2], now, batches)
            return
        isolated = self._lanes.count_isolated(self._next_turn(), len(self._workers))
        while self._places.made < isolated and free and not free[0][2].calls:
            worker = heapq.heappop(free)[2]
            worker.retiring = True
            self.spent.append(worker.id)
            self._places.make()
        if self._places.made < isolated:
            free.clear()
        self._lanes.put_isolated_aside()

    def _use_kept(self, now: float, batches: dict[int, list[Call]]) -> None:
        while self._places.kept and (call := self._lanes.first_isolated()) is not None:
            self._give_alone(call, self._workers[self._places.take()], now, batches)
        for id in self._places.release():
            self._workers[id].left = -1 if self.max_tasks is None else self.max_tasks

    def _give_alone(self, call: Call, worker: Worker, now: float, batches: dict[int, list[Call]]) -> None:
        """A fresh worker gets an isolated call, and nothing after it."""
        self._take_front(call)
        worker.heard = now
        worker.idle = _USED
        worker.overlaps = False
        worker.left = 0
        call.cost = self._predicted.get(call.task, self.window)
        worker.load = call.cost
        worker.calls[call.number] = call
        self._holder[call.number] = worker
        self.assigned += 1
        if call.timeout is not None:
            self._limit(call, worker, now)
        batches[worker.id] = [call]

    def _next_turn(self) -> tuple[int, int] | None:
        """When it is the turn of the calls in the queues."""
        for priority in self._order:
            for call in self._queues[priority]:
                if not call.settled:
                    return turn(call)
        return None

    # -- what waits ---------------------------------------------------------------------------------

    def _lane(self, call: Call) -> Lanes:
        return self._overlapping if call.overlaps else self._lanes

    def _enqueue(self, call: Call, *, front: bool = False) -> None:
        self.queued += 1
        if front:
            call.rank = -call.number  # the last one that comes in front is the foremost
        if call.concurrency is not None:
            self._lane(call).add(call, front=front)
            return
        queue = self._queues.get(call.priority)
        if queue is None:
            queue = self._queues[call.priority] = deque()
            self._order = sorted(self._queues, reverse=True)
        queue.appendleft(call) if front else queue.append(call)

    def _front(self) -> Call | None:
        """The call that is next; given-up ones are dropped on the way, and queues that end."""
        while self._order:
            queue = self._queues[self._order[0]]
            while queue:
                call = queue[0]
                if not call.settled:
                    if self._open:
                        return min(call, self._lanes.first(), key=turn)
                    return call
                queue.popleft()
                self._stale -= 1
            del self._queues[self._order.pop(0)]
        return self._lanes.first() if self._lanes.open else None

    def _take_front(self, call: Call) -> None:
        self.queued -= 1
        if call.concurrency is None:
            self._queues[call.priority].popleft()
        else:
            self._lane(call).take(call)

    def _sweep(self) -> None:
        """Drop the settled calls from the queues: a queue that nobody takes from must not keep them."""
        kept = {p: deque(call for call in queue if not call.settled) for p, queue in self._queues.items()}
        self._queues = {priority: queue for priority, queue in kept.items() if queue}
        self._order = sorted(self._queues, reverse=True)
        self._stale = 0

    # -- what calls cost ----------------------------------------------------------------------------

    def predicted(self, task: str) -> float | None:
        """Seconds that a call of `task` is expected to run; None before the first."""
        return self._predicted.get(task)

    def _learn(self, task: str, seconds: float) -> None:
        seconds = max(LEAST, seconds)
        known = self._predicted.get(task)
        self._predicted[task] = seconds if known is None else known + (seconds - known) * LEARNING
