"""Which call runs on which worker, and when: decided here, done elsewhere. No I/O, no clock.

    submit --> queued --(credit)--> assigned --> settled (Outcome)
                 ^   \\                |
                 |    backoff <-------+  raised, retries left
                 +--------------------+  the worker died, or is busy for long, with another call

A call that streams stays assigned while it does, has an outcome when that begins and one when it ends,
and is never tried again in between.

A worker holds as many calls as it can run in about WINDOW seconds, by what their tasks took before: one
long call, or hundreds of tiny ones that then travel in one message. A call of unknown cost waits for a
worker that holds nothing, and nothing waits behind it; so does each that streams, as its consumer decides
how long it takes.

Of a task with a concurrency limit workers hold so many calls at most; the others wait in a lane, and no
other task's calls wait for them.

An isolated call gets a worker that has been given nothing. When it is its turn and there is none, an idle
worker makes place: it is spent, and the one that takes its place is kept for such calls. Calls behind pass
meanwhile; but as long as no worker is idle, nobody is handed out, so that one becomes it.

Calls with a key share a run (`workers.sharing`): that is what is queued and assigned, and when it ends, all
of them have its outcome.

Calls that overlap run many at a time in a worker, by count. How these and plain ones share the workers is in
`workers.overlapping`. One that is to end is cancelled in its worker; only if that does not end it within
GRACE, the worker is ended, and the others that it ran are tried again.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from acomm.deadlines import Deadlines
from workers.calls import ABANDONED, OUTGROWN, RETURNED, Answer, Call, Outcome
from workers.errors import AcommError, CallCancelled, CallTimeout, Poisoned, TaskError, WorkerLost
from workers.lanes import Lanes, turn
from workers.memory import megabytes
from workers.overlapping import cost, goes_first, share, unplaced
from workers.places import Places
from workers.sharing import Shared

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

GRACE = 1.0
"""Seconds that a call which is cancelled in its worker has to end: to clean up, not to go on."""

MEMORY_CHECK = 0.05
"""Seconds between looks at the memory of a call whose task limits that: a look costs a thousandth of it, and
within, a call may take some hundred MB more than it may."""

BACKLOG_PART = 1000
"""Waiting calls from which the work in a queue is estimated: a look takes some tenths of a millisecond."""

OVERDUE_CHECK = 0.02
"""Seconds between looks at calls that are given up but may yet start to run."""

_USED, _FRESH = -2.0, -1.0
"""Idle workers come before all others, whatever rounding has left of their loads; those that have been given
nothing yet are the last of them, as isolated calls can use them."""


class Running(NamedTuple):
    """A call that a worker runs now: its number (0: nothing, or others) and since when."""

    call: int
    started: float


class Doom(NamedTuple):
    """A worker to end, and why; without a grace if it takes what others need."""

    worker: int
    error: AcommError
    at_once: bool = False


class Plea(NamedTuple):
    """A call to be cancelled in its worker, which goes on with its others."""

    worker: int
    call: int


class _Worker:
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


class Dispatcher:
    """The table of all calls and workers.

    Every call that is submitted comes back in exactly one Outcome that ends it, from one of `answered`,
    `worker_lost`, `cancel`, `due` or `abandon`; before that, `answered` may say that it streams. Where one of
    them ends a run that several calls share, it returns the outcome of one, and adds those of the others to
    `shared`, which whoever drives this empties. `queued`
    counts the calls that wait for a worker or for their backoff, `assigned` those that workers hold,
    given-up ones included. `spent` lists the workers that have run their `max_tasks` calls (None: any number)
    and are to be replaced, until it is cleared; so does `gauged` those of the calls that `assign` has given
    out whose memory is limited, and counts from now on.
    """

    def __init__(
        self,
        *,
        window: float = WINDOW,
        max_window: int = MAX_WINDOW,
        max_tasks: int | None = None,
        overlap: int = OVERLAP,
    ) -> None:
        self.overlap = overlap
        self.window = window
        self.max_window = max_window
        self.max_tasks = max_tasks
        self.spent: list[int] = []
        self.gauged: list[int] = []
        self.shared: list[Outcome] = []
        self.queued = 0
        self.assigned = 0
        self._workers: dict[int, _Worker] = {}
        self._queues: dict[int, deque[Call]] = {}
        self._order: list[int] = []
        self._lanes = Lanes()
        self._open = self._lanes.open  # looked at for every call
        self._overlapping = Lanes()
        self._sharing = Shared()
        self._places = Places()
        self._stale = 0  # settled calls that are still in a queue
        self._numbers = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._holder: dict[int, _Worker] = {}
        self._predicted: dict[str, float] = {}
        self._deadlines: Deadlines[int] = Deadlines()
        self._limits: Deadlines[int] = Deadlines()
        self._backoff: Deadlines[int] = Deadlines()

    def __repr__(self) -> str:
        return f"<Dispatcher {len(self._workers)} workers, {self.queued} queued, {self.assigned} assigned>"

    def __len__(self) -> int:
        """Calls that have not ended; those that share a run are one."""
        return len(self._calls)

    # -- calls --------------------------------------------------------------------------------------

    def submit(self, call: Call) -> int:
        """Take a call; returns its number. A further attempt has another: cancel by `call.number`."""
        if call.key is not None:
            return self._share(call)
        number = call.number = next(self._numbers)
        self._calls[number] = call
        if call.deadline is not None:
            self._deadlines.set(number, call.deadline)
        self._enqueue(call)
        return number

    def cancel(
        self, number: int, now: float, running: Running, error: AcommError | None = None
    ) -> Outcome | Doom | Plea | None:
        """Give up a call. One that does not run has its outcome at once; for a running one, what is to be
        done with its worker is returned, and the outcome comes later. None: there is nothing to do.
        """
        call = self._calls.get(number) or self._sharing.members.get(number)
        if call is None:
            return None
        error = error or CallCancelled(f"call of task {call.task} was cancelled")
        if call.run is not None:
            if self._sharing.leave(call):
                return self._settle_member(call, None, error)
            call = call.run
            number = call.number
        worker = self._holder.get(number)
        if worker is not None and running.call == number:
            return self._end(worker, call, now, error)
        if worker is not None:
            # It waits in a worker's window. Should it start all the same, and last, `due` finds it.
            self._limits.set(number, now + OVERDUE_CHECK)
            return self._settle(call, None, error)
        self.queued -= 1
        outcome = self._settle(call, None, error)
        if number in self._backoff:
            self._backoff.discard(number)
        elif call.concurrency is not None:
            self._lane(call).remove(call)
        else:
            self._stale += 1
            if self._stale > self.queued:
                self._sweep()
        return outcome

    def abandon(self, error: AcommError) -> list[Outcome]:
        """Give up all that is queued: there will be no worker for it."""
        waiting = self.waiting()
        for lanes in (self._lanes, self._overlapping):
            for call in lanes.waiting():
                lanes.remove(call)
        for call in waiting:
            self._backoff.discard(call.number)
        outcomes = [self._settle(call, None, error) for call in waiting]
        self.queued = 0
        self._sweep()
        return outcomes

    def run(self, number: int) -> int:
        """The number by which workers know a call: that of the run that it shares, if it does."""
        member = self._sharing.members.get(number)
        return number if member is None or member.run is None else member.run.number

    def holder(self, number: int) -> int | None:
        """The worker that holds a call, or the run that it shares."""
        worker = self._holder.get(self.run(number))
        return None if worker is None else worker.id

    def runs_now(self, task: str, key: bytes) -> bool:
        """Whether a call of that key would join a run that a worker has."""
        run = self._sharing.joinable(task, key)
        return run is not None and run.number in self._holder

    def call(self, number: int) -> Call | None:
        """The call of that number, if it has not ended."""
        return self._calls.get(number)

    def unfinished(self) -> list[Call]:
        """All calls that have not ended."""
        return list(self._calls.values())

    def waiting(self) -> list[Call]:
        """The calls that no worker holds."""
        return [call for number, call in self._calls.items() if number not in self._holder]

    def predicted(self, task: str) -> float | None:
        """Seconds that a call of `task` is expected to run; None before the first."""
        return self._predicted.get(task)

    # -- workers ------------------------------------------------------------------------------------

    def worker_ready(self, id: int, now: float) -> None:
        """A worker can take calls."""
        self._workers[id] = worker = _Worker(id, now, -1 if self.max_tasks is None else self.max_tasks)
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

    def worker_lost(
        self, id: int, running: Collection[int], lost: Callable[[Call], WorkerLost]
    ) -> list[Outcome]:
        """A worker is gone. The calls that it ran pay for it, unless we have ended it for one of them; the
        others are queued again, in front and uncounted. One that was to end gets the receipt. `lost` makes
        the error, `running` are the numbers of the calls.
        """
        worker = self._workers.pop(id, None)
        if worker is None:
            return []
        self._places.lose(id)
        outcomes: list[Outcome] = []
        again: list[Call] = []
        for number, call in worker.calls.items():
            self.assigned -= 1
            del self._holder[number]
            self._limits.discard(number)
            if call.concurrency is not None:
                self._lane(call).release(call)
            if call.settled:
                continue
            doom = worker.doomed.get(number) or worker.asked.get(number)
            if doom is not None:
                # Even if it has just ended: its answer is lost, and it is not to run again.
                doom.receipt = {**(lost(call).receipt or {}), **(doom.receipt or {})}
                outcomes.append(self._settle(call, None, doom))
            elif (number not in running or worker.doomed) and not call.streaming:
                # Waited behind, or started in the moment in which we killed the worker for another.
                again.append(call)
            else:
                outcome = self._crashed(call, lost)
                if outcome is None:
                    again.append(call)
                else:
                    outcomes.append(outcome)
        for call in reversed(again):
            self._renumber(call)
            self._enqueue(call, front=True)
        return outcomes

    def _crashed(self, call: Call, lost: Callable[[Call], WorkerLost]) -> Outcome | None:
        """The outcome of a call whose worker died; None if it is to be tried again."""
        if call.crashed < call.crashes and not call.streaming:
            call.crashed += 1
            return None
        error: AcommError = lost(call)
        call.crashed += 1
        if call.crashes and not call.streaming:
            error = Poisoned(f"{error} (worker {call.crashed} that it killed)", receipt=error.receipt)
        return self._settle(call, None, error)

    def answered(self, id: int, answer: Answer, now: float) -> Outcome | None:
        """A worker has answered. None: the call runs again later, or is no longer waited for."""
        worker = self._workers.get(id)
        number, failure = answer.number, answer.failure
        if answer.stream is not None:
            return self._began_to_stream(worker, number, answer.stream)
        if failure is not None and failure.code in (ABANDONED, OUTGROWN):
            if failure.code == ABANDONED:
                self._abandoned(worker, number, now)
            elif worker is not None:
                worker.left = 0
                self._look_spent(worker)
            return None
        call = worker.calls.pop(number, None) if worker else None
        if worker is None or call is None:
            return None
        self.assigned -= 1
        del self._holder[number]
        asked = None
        if call.timeout is not None or call.settled or call.abandoned:
            self._limits.discard(number)
            asked = worker.asked.pop(number, None)
        if call.concurrency is not None:
            self._lane(call).release(call)
        if failure is not None and failure.code == RETURNED and not asked:
            # It was behind one that lasts, and so would be whatever else its worker got.
            worker.load = (worker.load - call.cost if call.overlaps else self.window) if worker.calls else 0.0
            if worker.last:
                self._look_spent(worker)
            elif worker.left >= 0:
                worker.left += 1
            if not call.settled:
                self._renumber(call)
                self._enqueue(call, front=True)
            return None
        worker.load = worker.load - call.cost if worker.calls else 0.0
        worker.heard = now
        if not worker.left and not worker.calls:
            self._look_spent(worker)
        if not call.streaming:
            self._learn(call.task, answer.seconds)
        if call.settled:
            return None
        if failure is None:
            return self._settle(call, answer.result, None)
        doom = worker.doomed.get(number) or asked
        if doom is not None:
            return self._settle(call, None, doom)
        call.failed += 1
        if failure.retriable and call.failed <= call.retries and not call.streaming:
            self._renumber(call)
            self.queued += 1
            self._backoff.set(call.number, now + (call.backoff(call.failed) if call.backoff else 0.0))
            return None
        return self._settle(call, None, failure.error())

    def _look_spent(self, worker: _Worker) -> None:
        """A worker gets nothing more: it is replaced, once it holds nothing."""
        if not worker.calls and not worker.retiring:
            worker.retiring = True
            self.spent.append(worker.id)

    def _began_to_stream(self, worker: _Worker | None, number: int, url: str) -> Outcome | None:
        """A call waits for the consumer of its stream. The caller has its answer now, and it may be partly
        consumed: the request's deadline is met, and there is no second attempt.
        """
        call = worker.calls.get(number) if worker else None
        if worker is None or call is None or call.settled or call.streaming or number in worker.doomed:
            return None
        call.streaming = url
        self._deadlines.discard(number)
        return Outcome(call, None, None, url)

    def _abandoned(self, worker: _Worker | None, number: int, now: float) -> None:
        """A call's stream has lost its consumer, and does not end: `due` will have it killed."""
        call = worker.calls.get(number) if worker else None
        if call is not None:
            call.abandoned = True
            self._limits.set(number, now)

    # -- time ---------------------------------------------------------------------------------------

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

    def _takers(self) -> list[_Worker]:
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

    def _limit(self, call: Call, worker: _Worker, now: float) -> None:
        """A call with limits goes to a worker."""
        assert call.timeout is not None
        limit = call.timeout
        if call.max_memory is not None:
            limit = min(limit, MEMORY_CHECK)
            self.gauged.append(worker.id)
        self._limits.set(call.number, now + limit)

    def _isolate(
        self, call: Call, free: list[tuple[float, int, _Worker]], now: float, batches: dict[int, list[Call]]
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

    def _give_alone(self, call: Call, worker: _Worker, now: float, batches: dict[int, list[Call]]) -> None:
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

    def next_deadline(self) -> float | None:
        """When `due` should be called at the latest; None: no need."""
        if not self._deadlines and not self._limits and not self._backoff:
            return None  # which is asked several times a call
        times = [self._deadlines.next(), self._limits.next(), self._backoff.next()]
        return min((time for time in times if time is not None), default=None)

    def due(
        self,
        now: float,
        running: Callable[[int], Running],
        taken: Callable[[int, int], int] = lambda worker, limit: 0,
    ) -> tuple[list[Outcome], list[Doom | Plea]]:
        """What time brings: backoffs that end, deadlines and limits that pass. `running` tells of a call, by
        the number that workers know, whether its worker runs it, and `taken(worker, limit)` the bytes that a
        worker's call has taken, which need be exact only above a limit.
        """
        for number in self._backoff.expired(now):
            self.queued -= 1
            self._enqueue(self._calls[number])
        outcomes: list[Outcome] = []
        dooms: list[Doom | Plea] = []
        for number in self._deadlines.expired(now):
            call = self._calls.get(number) or self._sharing.members[number]
            error = CallTimeout(f"the request timed out; task {call.task} had not finished")
            run = self.run(number)
            what = self.cancel(number, now, running(run) if run in self._holder else Running(0, 0.0), error)
            if isinstance(what, Outcome):
                outcomes.append(what)
            elif what is not None:
                dooms.append(what)
        for number in self._limits.expired(now):
            doom = self._over_limit(number, now, running, taken)
            if doom is not None:
                dooms.append(doom)
        return outcomes, dooms

    def _over_limit(
        self,
        number: int,
        now: float,
        running: Callable[[int], Running],
        taken: Callable[[int, int], int],
    ) -> Doom | Plea | None:
        """A call's limit may have passed: by the start that its worker noted, not by when we sent it."""
        worker = self._holder[number]
        call = worker.calls[number]
        runs = running(number)
        asked = worker.asked.get(number)
        if asked is not None and runs.call == number:
            return self._doom(worker, number, asked)
        given_up = call.settled or call.abandoned
        limit = OVERDUE_CHECK if given_up or call.timeout is None else call.timeout
        due = runs.started + limit if runs.call == number else now + min(limit, OVERDUE_CHECK)
        if due > now:
            if call.max_memory is not None and not given_up:
                size = taken(worker.id, call.max_memory) if runs.call == number else 0
                if size > call.max_memory:
                    return self._doom(worker, number, _out_of_memory(call, size))._replace(at_once=True)
                due = min(due, now + MEMORY_CHECK)
            self._limits.set(number, due)
            return None
        if call.settled:
            error: AcommError = CallCancelled(f"call of task {call.task} ran though it was given up")
        elif call.abandoned:
            error = CallCancelled(f"the consumer of task {call.task}'s stream has left, and it did not end")
        else:
            error = CallTimeout(f"task {call.task} ran longer than its limit of {limit:g} seconds")
        return self._end(worker, call, now, error)

    def _end(self, worker: _Worker, call: Call, now: float, error: AcommError) -> Doom | Plea | None:
        """End a call that runs. None: its worker has been asked to, and has yet to do so."""
        number = call.number
        if not call.overlaps:
            return self._doom(worker, number, error)
        if number in worker.asked:
            return None
        call.abandoned = True
        worker.asked[number] = error
        self._limits.set(number, now + GRACE)
        return Plea(worker.id, number)

    def _lane(self, call: Call) -> Lanes:
        return self._overlapping if call.overlaps else self._lanes

    def _doom(self, worker: _Worker, number: int, error: AcommError) -> Doom:
        worker.doomed.setdefault(number, error)
        worker.retiring = True
        return Doom(worker.id, error)

    # -- inside -------------------------------------------------------------------------------------

    def _number(self, call: Call) -> None:
        call.number = next(self._numbers)
        self._calls[call.number] = call

    def _renumber(self, call: Call) -> None:
        """A new attempt has a new number, so that late answers of the old one match nothing."""
        self._calls.pop(call.number, None)
        self._deadlines.discard(call.number)
        self._number(call)
        call.rank = 0
        if call.deadline is not None and call.sharers is None:
            self._deadlines.set(call.number, call.deadline)

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

    def _learn(self, task: str, seconds: float) -> None:
        seconds = max(LEAST, seconds)
        known = self._predicted.get(task)
        self._predicted[task] = seconds if known is None else known + (seconds - known) * LEARNING

    def _settle(self, call: Call, result: bytes | None, error: AcommError | None) -> Outcome:
        call.settled = True
        del self._calls[call.number]
        if call.sharers is not None:
            return self._settle_all(call, result, error)
        if call.deadline is not None:
            self._deadlines.discard(call.number)
        return Outcome(call, result, error)

    # -- calls that share a run

    def _share(self, call: Call) -> int:
        """Take a call with a key: it joins the run of that key, or is the first of a new one. A run that
        waits goes where the highest priority of its members belongs, behind the calls that are there.
        """
        call.number = next(self._numbers)
        if call.deadline is not None:
            self._deadlines.set(call.number, call.deadline)
        run, new = self._sharing.join(call)
        if new:
            self._number(run)
            self._enqueue(run)
        elif call.priority > run.priority:
            self._raise(run, call.priority)
        return call.number

    def _raise(self, run: Call, priority: int) -> None:
        if run.number in self._holder or run.number in self._backoff:
            run.priority = priority
            return
        self.queued -= 1
        if run.concurrency is not None:
            self._lane(run).remove(run)
        else:
            self._queues[run.priority].remove(run)  # a search, which few calls pay for
        run.priority, run.rank = priority, 0
        self._enqueue(run)

    def _settle_all(self, run: Call, result: bytes | None, error: AcommError | None) -> Outcome:
        first, *others = self._sharing.end(run)
        self.shared += [self._settle_member(call, result, error) for call in others]
        return self._settle_member(first, result, error)

    def _settle_member(self, call: Call, result: bytes | None, error: AcommError | None) -> Outcome:
        call.settled = True
        if call.deadline is not None:
            self._deadlines.discard(call.number)
        return Outcome(call, result, error)


def _out_of_memory(call: Call, size: int) -> TaskError:
    """As if the task had raised MemoryError, as most that want too much do. No other code says whose fault it
    is: nothing that was sent is too large.
    """
    assert call.max_memory is not None
    text = (
        f"MemoryError: task {call.task} may take {megabytes(call.max_memory)} (max_memory), and has taken "
        f"{megabytes(size)}, so its worker was killed"
    )
    return TaskError(text, type="MemoryError", receipt={"max_memory": call.max_memory, "taken": size})
