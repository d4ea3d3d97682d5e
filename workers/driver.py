"""The thread that drives the pool of a PoolExecutor, and those that do so in its place.

A pool is touched by one thread at a time. That is the driver's, unless it sleeps and nothing goes on: then

* a submit sends by itself: a hop to the driver's thread and back would only cost time;
* who waits for the only call under way borrows the pool: it waits for the answer itself, and settles the
  call. The driver's thread does not look at the pool meanwhile. Whoever has anything for the driver asks for
  the pool back, as do deadlines, deaths and an interrupt; the borrower returns it, and waits like any other.

Both are safe from Ctrl-C: it is put off while they touch the pool. The main thread of a program with handlers
for other signals, which may raise, does neither. Callbacks of a future run in the driver's thread, unless
they are added in the moment of its end.
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from typing import Any

from workers.calls import Call, Outcome
from workers.errors import AcommError, CallCancelled, WorkerLost
from workers.exchange import Exchange
from workers.futures import Future
from workers.interrupts import Uninterrupted, others_may_interrupt
from workers.pickling import RemoteTraceback, outcome
from workers.pool import Pool
from workers.segments import Place, Reader, Segment

STEP = 1000
"""Calls that the driver takes from its inbox before it looks after the workers again: about a millisecond."""

FAREWELL = 5.0
"""Seconds that workers get to exit at shutdown; they have nothing to do then but their exit functions."""


class CallLost(WorkerLost, BrokenProcessPool):
    """The worker process died while it ran the call; `receipt` tells how. Other calls are not affected."""


class BrokenPool(WorkerLost, BrokenProcessPool):
    """No worker can be started, so nothing runs any more."""


class Driver:
    """The thread that drives `pool`. `command` has a function called there.

    It knows nothing of the PoolExecutor, so that one that is dropped can be collected and shuts down.
    """

    def __init__(self, pool: Pool, exchange: Exchange | None) -> None:
        self._pool = pool
        self._pool.claim = lambda call: call.tag.begin()
        self._pool.exchange = self._exchange = exchange
        self._lent = exchange.lent if exchange else {}  # looked at for every call
        self._trim: float | None = None  # when the driver will see to idle memory
        self._lock = threading.RLock()  # a collection within may drop an executor, which closes its driver
        self._inbox: deque[Any] = deque()  # Calls, and commands as tuples
        self._sleeping = False  # the driver does, and the pool is free to be taken
        self._borrower = 0  # the thread that has the pool, while it waits for a call
        self._recalled = False  # it is asked to give it back
        self._touched = False  # it is within process_events
        self._closing = False
        self._cancel_all = False
        self._none_left = False  # all that had not begun was cancelled
        self._broken: str | None = None
        self._killed: set[Call] = set()
        self._restarts = 0
        self._event = -1
        self._recall = -1
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    @property
    def state(self) -> str:
        return "broken" if self._broken else "shut down" if self._closing else "open"

    # -- any thread

    def check(self) -> None:
        """Raise what a submit raises now."""
        if self._pid != os.getpid():
            raise RuntimeError("this PoolExecutor belongs to the process that forked this one")
        if self._broken is not None:
            raise BrokenPool(self._broken)
        if self._closing:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    def _check_accepted(self) -> None:
        if self._broken is not None:
            raise BrokenPool(self._broken)
        if self._none_left:
            raise CancelledError

    def submit(self, call: Call, accepted: bool = False) -> None:
        """Queue a call. Of what was `accepted` before a shutdown, further ones are taken after it, too, from
        the callback of one that has just ended.
        """
        with self._lock:
            if accepted:
                self._check_accepted()
            elif self._closing or self._thread is None or _exiting or self._pid != os.getpid():
                self.check()
                self._start()
            idle = self._sleeping and not self._inbox and not len(self._pool.dispatcher)
            if idle and not others_may_interrupt():
                with Uninterrupted():
                    self._send_at_once(call)
                return
            if self._sleeping or self._borrower:
                self._wake()  # first, as an interrupt may come in between
            self._inbox.append(call)

    def submit_stored(self, call: Call, segment: Segment, accepted: bool = False) -> None:
        """The same for a call whose arguments lie in shared memory."""
        assert self._exchange is not None
        self._exchange.lend(call, segment)
        try:
            self.submit(call, accepted)
        except (RuntimeError, CancelledError, BrokenPool):  # it is not taken
            self._release(call)
            raise

    def _send_at_once(self, call: Call) -> None:
        """Under the lock, and while the driver sleeps. What ends now, the driver settles."""
        pool = self._pool
        pool.submit(call)
        try:
            ended = pool.process_events()
        except BaseException as error:  # of a signal's handler: what it has cut short, nobody knows
            self._cut_short("submit", call.tag, error)
            self._wake()
            raise
        self._inbox += [(self._settle, outcome) for outcome in ended]
        if self._is_needed():
            self._wake()

    def command(self, function: Callable[[Any], None], argument: Any) -> None:
        if self._pid != os.getpid():
            return  # another thread may have had the lock
        with self._lock:
            if self._sleeping or self._borrower:
                self._wake()
            self._inbox.append((function, argument))

    def cancelled(self, future: Future[Any]) -> None:
        self.command(self._give_up, future)

    def wait_for(self, future: Future[Any], end: float | None) -> None:
        """Drive the pool until `future` is settled or `end` (monotonic) has come, if its call is all that
        goes on. Returns at once, or as soon as anything else does, too: the driver's thread settles it then.
        """
        if not self._sleeping or len(self._pool.dispatcher) != 1 or self._pid != os.getpid():
            return
        if others_may_interrupt():
            return
        ended: list[Outcome] = []
        with Uninterrupted(self._interrupted):
            try:
                if self._borrow():
                    self._drive(end, ended)
            except BaseException as error:
                if self._touched:  # as in `_send_at_once`; to wait is harmless
                    self._cut_short("wait", future, error)
                raise
            finally:
                if self._borrower == threading.get_ident():
                    try:
                        self._give_back(ended)
                    except BaseException:  # of a signal's handler
                        self._give_back(ended)
                        raise
            try:
                for outcome in ended:
                    self._settle(outcome)
            except BaseException:  # of a signal's handler
                for outcome in ended:
                    self.command(self._settle_again, outcome)
                raise

    def _borrow(self) -> bool:
        with self._lock:
            if not self._sleeping or self._inbox or len(self._pool.dispatcher) != 1:
                return False
            self._borrower = threading.get_ident()
            self._sleeping = False
            self._poller.modify(self._pool.fileno(), 0)
            return True

    def _drive(self, end: float | None, ended: list[Outcome]) -> None:
        """Of a thread that has the pool: until the only call has ended, or there is anything else to do."""
        pool = self._pool
        while not ended and pool.next_deadline() is None and not self._changed():
            woken = self._shared_poller.poll(None if end is None else max(0.0, end - time.monotonic()))
            if any(descriptor == self._recall for descriptor, _ in woken):
                self._recalled = True
                break
            if not woken:
                break
            self._touched = True
            ended += pool.process_events()
            self._touched = False

    def _give_back(self, ended: list[Outcome]) -> None:
        """What has ended and is to be settled by the driver's thread leaves the list. If it is cut short, it
        can be called again.
        """
        with self._lock:
            if len(ended) > 1 or (ended and ended[0].call.tag.has_callbacks):
                self._inbox += [(self._settle, outcome) for outcome in ended]
                ended.clear()
            self._poller.modify(self._pool.fileno(), select.EPOLLIN)
            needed = self._recalled or self._is_needed()
            if needed:
                os.eventfd_write(self._event, 1)
            if self._recalled:
                with suppress(BlockingIOError):
                    os.eventfd_read(self._recall)
                self._recalled = False
            self._sleeping, self._borrower = not needed, 0

    def _cut_short(self, what: str, future: Future[Any], error: BaseException) -> None:
        """Leave it to the driver's thread to break the pool; `future`'s outcome may be what was lost."""

        def give_up(why: str) -> None:
            self._break(why)
            self._fail(future, why)

        self._inbox.append((give_up, f"a {what} was cut short by {type(error).__name__}: {error}"))

    def _interrupted(self) -> None:
        """From the handler of a signal: the thread that it interrupts may have the pool."""
        if self._borrower == threading.get_ident():
            os.eventfd_write(self._recall, 1)
            self._recalled = True

    def close(self, cancel_futures: bool = False) -> None:
        """Take nothing more, and end when all that is queued has run or is cancelled."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closing = True
            self._cancel_all |= cancel_futures
            self._none_left |= cancel_futures
            self._wake()
            if self._thread is None and self._exchange is not None:
                self._exchange.close()

    def join(self) -> None:
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join()

    def _wake(self) -> None:
        """Under the lock: the descriptor may be closed, and its number be another's, a moment later. Cut
        short by an interrupt it has done either nothing or enough.
        """
        if self._borrower:
            if not self._recalled:
                os.eventfd_write(self._recall, 1)
                self._recalled = True
        elif self._event >= 0:
            os.eventfd_write(self._event, 1)
            self._sleeping = False

    def _is_needed(self) -> bool:
        """Under the lock, when others have had the pool while the driver sleeps, without a deadline."""
        if self._exchange is not None and (self._exchange.dead or self._exchange.arena.due != self._trim):
            return True
        return (
            self._closing  # it ends with the last call
            or bool(self._inbox)
            or self._changed()
            or self._pool.next_deadline() is not None
        )

    def _changed(self) -> bool:
        """Whether the pool's state is not the one that the driver knows."""
        return self._pool.failure is not None or self._pool.restarts != self._restarts

    def _start(self) -> None:
        """Raises what keeps it from that, such as a want of descriptors. If that leaves nothing to start
        again from, the pool is broken.
        """
        with Uninterrupted(), ExitStack() as made:
            try:
                self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                made.callback(os.close, self._event)
                self._recall = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                made.callback(os.close, self._recall)
                self._poller = select.epoll()
                made.callback(self._poller.close)
                self._shared_poller = select.epoll()
                made.callback(self._shared_poller.close)
                self._poller.register(self._event, select.EPOLLIN)
                self._shared_poller.register(self._recall, select.EPOLLIN)
                self._pool.start()
                made.callback(self._pool.close)
                made.callback(self._never_started)
                self._poller.register(self._pool.fileno(), select.EPOLLIN)
                self._shared_poller.register(self._pool.fileno(), select.EPOLLIN)
                thread = threading.Thread(target=self._run, name="acomm-executor")
                _drivers.add(self)
                thread.start()
                self._thread = thread
            except BaseException:
                self._event = self._recall = -1
                _drivers.discard(self)
                raise
            made.pop_all()

    def _never_started(self) -> None:
        self._broken, self._closing = "it could not be started", True

    # -- the driver's thread

    def _run(self) -> None:
        try:
            while self._busy():
                self._turn()
            self._say_farewell()
        except BaseException as error:
            self._break(f"the driver has failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._pool.close()
            if self._exchange is not None:
                self._exchange.close()
            with self._lock:
                self._closing = True
                self._poller.close()
                self._shared_poller.close()
                os.close(self._event)
                os.close(self._recall)
                self._event = self._recall = -1

    def _busy(self) -> bool:
        if self._broken is not None:
            return False
        return not self._closing or bool(self._inbox) or len(self._pool.dispatcher) > 0

    def _turn(self) -> None:
        self._wait()
        self._take()
        if self._cancel_all:
            self._cancel_all = False
            for call in [item for item in self._inbox if type(item) is Call]:
                call.tag.cancel()
            for call in self._pool.dispatcher.waiting():
                call.tag.cancel()
        for ended in self._pool.process_events():
            self._settle(ended)
        if self._exchange is not None:
            self._tidy(self._exchange)
        if self._pool.failure is not None:
            self._break(f"no worker can be started: {self._pool.failure}")
        elif self._pool.restarts != self._restarts:
            self._restarts = self._pool.restarts
            if not self._pool.ready and not self._pool.healthy:
                why = self._pool.trouble or "workers die over and over before they have run a call"
                self._break(why)

    def _tidy(self, exchange: Exchange) -> None:
        if exchange.dead:
            # Behind what they have answered last, which may be in the inbox.
            self.command(exchange.bury, exchange.dead)
            exchange.dead = []
        if exchange.arena.due is not None:
            exchange.tidy(time.monotonic(), self._pool.dispatcher.holder)

    def _wait(self) -> None:
        due = self._pool.next_deadline()
        if self._exchange is not None:
            self._trim = self._exchange.arena.due
            if self._trim is not None:
                due = self._trim if due is None else min(due, self._trim)
        timeout = -1.0 if due is None else max(0.0, due - time.monotonic())
        with self._lock:
            # Who adds to the inbox from here on sees that we sleep; what was added before, we see.
            if self._inbox or self._cancel_all:
                timeout = 0.0
            self._sleeping = timeout != 0.0
        while True:
            woken = self._poller.poll(timeout)
            with self._lock:  # whoever sends in our place has done so
                if not self._borrower:
                    self._sleeping = False
                    break
            timeout = -1.0  # who has the pool wakes us
        if any(descriptor == self._event for descriptor, _ in woken):
            os.eventfd_read(self._event)

    def _take(self) -> None:
        inbox, submit = self._inbox, self._pool.submit
        for _ in range(STEP):
            if not inbox:
                break
            item = inbox.popleft()
            if type(item) is Call:
                submit(item)
            else:
                item[0](item[1])

    def _settle(self, ended: Outcome) -> None:
        call = ended.call
        future: Future[Any] = call.tag
        if self._lent:
            self._release(call)
        killed = call in self._killed
        self._killed.discard(call)
        if future.call is None:
            return  # the pool is broken, and it has been told
        future.call = None
        if not future.begin():
            future.set_running_or_notify_cancel()  # cancelled: those who wait are told
            return
        if ended.error is None:
            assert ended.result is not None
            result, error = outcome(ended.result, self._find)
            if error is None:
                future.set_result(result)
                return
        else:
            error = self._error(call, ended.error, killed)
        future.set_exception(error)

    def _release(self, call: Call) -> None:
        assert self._exchange is not None
        self._exchange.ended(call, self._pool.dispatcher.holder)

    def _find(self, place: Place) -> Reader:
        assert self._exchange is not None, "workers store results only where we gave them room"
        return self._exchange.find(place)

    def _settle_again(self, ended: Outcome) -> None:
        """Where another thread was cut short in it."""
        future: Future[Any] = ended.call.tag
        if not future.done():
            future.call = ended.call
            self._settle(ended)

    def _error(self, call: Call, error: AcommError, killed: bool) -> BaseException:
        if killed and isinstance(error, CallCancelled):
            return CallCancelled(f"the call of {call.task} was killed", receipt=error.receipt)
        if isinstance(error, WorkerLost):
            lost = CallLost if self._pool.failure is None else BrokenPool
            return lost(error.message, receipt=error.receipt)
        if error.traceback:
            error.__cause__ = RemoteTraceback(error.traceback)
        return error

    def _give_up(self, future: Future[Any]) -> None:
        """A future was cancelled before its call was handed to a worker."""
        call = future.call
        if call is not None and (ended := self._pool.cancel(call.number)) is not None:
            self._settle(ended)

    def kill(self, future: Future[Any]) -> None:
        call = future.call
        if call is not None:
            self._killed.add(call)
            if (ended := self._pool.cancel(call.number)) is not None:
                self._settle(ended)

    def _break(self, why: str) -> None:
        """Nothing runs any more: all futures fail."""
        with self._lock:
            self._broken, self._closing = why, True
        items = list(self._inbox)
        self._inbox.clear()
        for item in items:
            if type(item) is Call:
                self._fail(item.tag, why)
            elif isinstance(item[1], Outcome):
                self._settle(item[1])
        for call in self._pool.dispatcher.unfinished():
            self._fail(call.tag, why)
        self._pool.dispatcher.abandon(WorkerLost(why))

    def _fail(self, future: Future[Any], why: str) -> None:
        """What becomes of a future when the pool is broken."""
        if future.call is not None:
            future.call = None
            if future.begin():
                future.set_exception(BrokenPool(why))
            else:
                future.set_running_or_notify_cancel()

    def _say_farewell(self) -> None:
        if self._broken is not None:
            return
        end = time.monotonic() + FAREWELL
        self._pool.stop_workers()
        while self._pool.alive and (now := time.monotonic()) < end:
            due = min(end, self._pool.next_deadline() or end)
            self._poller.poll(max(0.0, due - now))
            self._pool.process_events()


_drivers: weakref.WeakSet[Driver] = weakref.WeakSet()
_exiting = False


def _finish_all() -> None:
    """The interpreter ends: what is queued runs first, as with the standard library's executors."""
    global _exiting
    _exiting = True
    drivers = list(_drivers)
    for driver in drivers:
        driver.close()
    for driver in drivers:
        driver.join()


# Not atexit: that comes after the threads are joined, and ours would never end.
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_drivers.clear)
