"""Which call runs on which worker, and when: decided here, done elsewhere. No I/O, no clock.

    submit --> queued --(credit)--> assigned --> settled (Outcome)
                 ^   \\                |
                 |    backoff <-------+  raised, retries left
                 +--------------------+  the worker died, or is busy for long, with another call

A call that streams stays assigned while it does, has an outcome when that begins and one when it ends,
and is never tried again in between.

Calls with a key share a run (`workers.sharing`): that is what is queued and assigned, and when it ends, all
of them have its outcome.

Of calls that overlap one that is to end is cancelled in its worker; only if that does not end it within
GRACE, the worker is ended, and the others that it ran are tried again.

Which call goes to which worker is in `workers.assigning`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from typing import NamedTuple

from acomm.deadlines import Deadlines
from workers.assigning import MAX_WINDOW, MEMORY_CHECK, OVERLAP, WINDOW, Assigning, Worker
from workers.calls import ABANDONED, OUTGROWN, RETURNED, Answer, Call, Outcome
from workers.errors import AcommError, CallCancelled, CallTimeout, Poisoned, TaskError, WorkerLost
from workers.memory import megabytes
from workers.sharing import Shared

GRACE = 1.0
"""Seconds that a call which is cancelled in its worker has to end: to clean up, not to go on."""

OVERDUE_CHECK = 0.02
"""Seconds between looks at calls that are given up but may yet start to run."""


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


class Dispatcher(Assigning):
    """The table of all calls and workers.

    Every call that is submitted comes back in exactly one Outcome that ends it, from one of `answered`,
    `worker_lost`, `cancel`, `due` or `abandon`; before that, `answered` may say that it streams. Where one of
    them ends a run that several calls share, it returns the outcome of one, and adds those of the others to
    `shared`, which whoever drives this empties.
    """

    def __init__(
        self,
        *,
        window: float = WINDOW,
        max_window: int = MAX_WINDOW,
        max_tasks: int | None = None,
        overlap: int = OVERLAP,
    ) -> None:
        super().__init__(window, max_window, max_tasks, overlap)
        self.shared: list[Outcome] = []
        self._sharing = Shared()
        self._numbers = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._deadlines: Deadlines[int] = Deadlines()

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

    # -- workers ------------------------------------------------------------------------------------

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

    def _began_to_stream(self, worker: Worker | None, number: int, url: str) -> Outcome | None:
        """A call waits for the consumer of its stream. The caller has its answer now, and it may be partly
        consumed: the request's deadline is met, and there is no second attempt.
        """
        call = worker.calls.get(number) if worker else None
        if worker is None or call is None or call.settled or call.streaming or number in worker.doomed:
            return None
        call.streaming = url
        self._deadlines.discard(number)
        return Outcome(call, None, None, url)

    def _abandoned(self, worker: Worker | None, number: int, now: float) -> None:
        """A call's stream has lost its consumer, and does not end: `due` will have it killed."""
        call = worker.calls.get(number) if worker else None
        if call is not None:
            call.abandoned = True
            self._limits.set(number, now)

    # -- time ---------------------------------------------------------------------------------------

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

    def _end(self, worker: Worker, call: Call, now: float, error: AcommError) -> Doom | Plea | None:
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

    def _doom(self, worker: Worker, number: int, error: AcommError) -> Doom:
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
