"""PoolExecutor: `concurrent.futures.ProcessPoolExecutor`, on this project's pool.

    submit() --pickle--> inbox --wake--> engine thread: Pool.submit, process_events <==ipc==> workers
       |                                     |
       +---- Future <-----unpickle-----------+

Any thread submits: it pickles the call itself, puts it in the inbox, and wakes the engine only if that
sleeps. The engine takes what has gathered in large steps, since the two share one GIL. It alone touches the
pool. It knows nothing of the PoolExecutor, so that one that is dropped can be collected and shuts down.

What differs from the standard library's:

* A worker's death costs the call that it ran, whose future has CallLost: a WorkerLost and a BrokenProcessPool
  in one, so code that catches `BrokenExecutor` still does. The pool goes on. It breaks (BrokenPool, for all
  futures and each further submit) only when workers cannot be started: a failing initializer, or deaths
  over and over before the first call.
* `kill(future)` ends a running call.
* Workers never import the program's `__main__`; see `workers.pickling`.
* `chunksize` is accepted and not needed: small calls travel together by themselves.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, ParamSpec, TypeVar

from workers import pickledworker
from workers.calls import Call, Outcome
from workers.errors import AcommError, CallCancelled, WorkerLost
from workers.futures import Future
from workers.pickling import Functions, RemoteTraceback, dump, outcome
from workers.pool import Pool

__all__ = ["BrokenPool", "CallLost", "Future", "PoolExecutor"]

P = ParamSpec("P")
T = TypeVar("T")

STEP = 1000
"""Calls that the engine takes from its inbox before it looks after the workers again: about a millisecond."""

FAREWELL = 5.0
"""Seconds that workers get to exit at shutdown; they have nothing to do then but their exit functions."""


class CallLost(WorkerLost, BrokenProcessPool):
    """The worker process died while it ran the call; `receipt` tells how. Other calls are not affected."""


class BrokenPool(WorkerLost, BrokenProcessPool):
    """No worker can be started, so nothing runs any more."""


class PoolExecutor(concurrent.futures.Executor):
    """Runs functions in `max_workers` processes (as many as there are CPUs for us, by default).

    They start at the first submit, from a fresh interpreter, and each calls `initializer(*initargs)` first.
    `max_tasks_per_child` calls, and a worker is replaced. `preload` are modules that are imported once,
    before workers are forked, which saves each of them time and memory. `mp_context` is accepted for programs
    that are written for the standard library's, and has no effect. With `capture`, the receipt of a call that
    is lost or killed tells what it printed; what workers print then comes by a pipe, maybe after the result.

    Raises ValueError and TypeError for what makes no sense, RuntimeError in a worker of such a pool.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: object = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        preload: Iterable[str] = (),
        capture: bool = False,
    ) -> None:
        if pickledworker.within:
            raise RuntimeError("a worker of a PoolExecutor cannot have a PoolExecutor of its own")
        if max_workers is None:
            max_workers = len(os.sched_getaffinity(0))
        if max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        authkey = bytes(multiprocessing.current_process().authkey)
        setup = dump((initializer, tuple(initargs), authkey))
        pool = Pool(
            tuple(preload),
            workers=max_workers,
            max_result=2**31,
            target=pickledworker.TARGET,
            setup=setup,
            max_tasks_per_child=max_tasks_per_child,
            capture=capture,
        )
        self._max_workers = max_workers  # joblib and others look at it
        self._functions = Functions()
        self._engine = _Engine(pool)
        self._drop = weakref.finalize(self, self._engine.close)
        self._drop.atexit = False

    def __repr__(self) -> str:
        return f"<PoolExecutor {self._max_workers} workers, {self._engine.state}>"

    def __reduce__(self) -> Any:
        raise TypeError("a PoolExecutor cannot be sent to another process")

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue `fn(*args, **kwargs)`. What cannot be pickled is the future's exception. Raises RuntimeError
        after a shutdown, BrokenPool when workers cannot be started.
        """
        engine = self._engine
        future: Future[T] = Future(engine.on_cancel)
        try:
            prepared = self._functions.prepare(fn)
            data = prepared.call(args, kwargs)
        except (Exception, SystemExit) as error:
            engine.check()
            future.set_exception(error)
            return future
        future.call = call = Call(prepared.name, data, tag=future)
        engine.submit(call)
        return future

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[T]:
        """The results of `fn` over the iterables, in order. All is submitted at once, or with `buffersize`,
        so many ahead of the iteration, which raises TimeoutError `timeout` seconds after this call.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        end = None if timeout is None else time.monotonic() + timeout
        calls = zip(*iterables, strict=False)
        first = calls if buffersize is None else itertools.islice(calls, buffersize)
        futures = deque(self.submit(fn, *args) for args in first)
        return _results(weakref.ref(self), futures, fn, calls if buffersize else iter(()), end)

    def kill(self, future: concurrent.futures.Future[Any]) -> bool:
        """End the call of `future`: one that waits is cancelled, one that runs is ended with its worker, and
        its future then has CallCancelled, unless it ends first. False if it has ended already.
        """
        if not isinstance(future, Future):
            raise TypeError(f"a future of this PoolExecutor is expected, not {type(future).__name__}")
        if future.cancel():
            return True
        if future.call is None:
            return False
        self._engine.command(self._engine.kill, future)
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._engine.close(cancel_futures)
        if wait:
            self._engine.join()


def _results(
    executor: weakref.ref[PoolExecutor],
    futures: deque[Future[T]],
    fn: Callable[..., T],
    more: Iterator[tuple[Any, ...]],
    end: float | None,
) -> Iterator[T]:
    try:
        while futures:
            if (pool := executor()) is not None and (args := next(more, None)) is not None:
                futures.append(pool.submit(fn, *args))
            del pool
            future = futures[0]
            result = future.result(None if end is None else end - time.monotonic())
            del futures[0], future
            yield result
    finally:
        for future in futures:
            future.cancel()


class _Engine:
    """The thread that drives the pool. `command` has a function called there."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._pool.claim = lambda call: call.tag.begin()
        self.on_cancel = self._cancelled  # one bound method for all futures
        self._lock = threading.RLock()  # a collection within may drop an executor, which closes its engine
        self._inbox: deque[Any] = deque()  # Calls, and commands as tuples
        self._sleeping = False
        self._closing = False
        self._cancel_all = False
        self._broken: str | None = None
        self._killed: set[Call] = set()
        self._restarts = 0
        self._event = -1
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

    def submit(self, call: Call) -> None:
        with self._lock:
            if self._closing or self._thread is None or _exiting or self._pid != os.getpid():
                self.check()
                self._start()
            if self._sleeping and not self._inbox and not len(self._pool.dispatcher):
                self._send_at_once(call)
                return
            self._inbox.append(call)
            if self._sleeping:
                self._wake()

    def _send_at_once(self, call: Call) -> None:
        """Nothing is under way and the engine waits: a hop to its thread would only cost time.

        Under the lock, and while it sleeps: the pool is ours then. What ends now, the engine settles.
        """
        pool = self._pool
        pool.submit(call)
        try:
            ended = pool.process_events()
        except BaseException as error:  # a KeyboardInterrupt: what it has cut short, nobody knows
            self._inbox.append((self._break, f"a submit was cut short by {type(error).__name__}"))
            self._wake()
            raise
        changed = pool.failure is not None or pool.restarts != self._restarts
        if ended or changed or pool.next_deadline() is not None:
            self._inbox += [(self._settle, outcome) for outcome in ended]
            self._wake()

    def command(self, function: Callable[[Any], None], argument: Any) -> None:
        with self._lock:
            self._inbox.append((function, argument))
            if self._sleeping:
                self._wake()

    def _cancelled(self, future: Future[Any]) -> None:
        self.command(self._give_up, future)

    def close(self, cancel_futures: bool = False) -> None:
        """Take nothing more, and end when all that is queued has run or is cancelled."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closing = True
            self._cancel_all |= cancel_futures
            self._wake()

    def join(self) -> None:
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join()

    def _wake(self) -> None:
        """Under the lock: the descriptor may be closed, and its number be another's, a moment later."""
        self._sleeping = False
        if self._event >= 0:
            os.eventfd_write(self._event, 1)

    def _start(self) -> None:
        self._pool.start()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = select.epoll()
        self._poller.register(self._event, select.EPOLLIN)
        self._poller.register(self._pool.fileno(), select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="acomm-executor")
        _engines.add(self)
        self._thread.start()

    # -- the engine's thread

    def _run(self) -> None:
        try:
            while self._busy():
                self._turn()
            self._say_farewell()
        except BaseException as error:
            self._break(f"the engine has failed: {type(error).__name__}: {error}")
            raise
        finally:
            self._pool.close()
            with self._lock:
                self._closing = True
                self._poller.close()
                os.close(self._event)
                self._event = -1

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
        if self._pool.failure is not None:
            self._break(f"no worker can be started: {self._pool.failure}")
        elif self._pool.restarts != self._restarts:
            self._restarts = self._pool.restarts
            if not self._pool.ready and not self._pool.healthy:
                self._break("workers die over and over before they have run a call")

    def _wait(self) -> None:
        due = self._pool.next_deadline()
        timeout = -1.0 if due is None else max(0.0, due - time.monotonic())
        with self._lock:
            # Who adds to the inbox from here on sees that we sleep; what was added before, we see.
            if self._inbox or self._cancel_all:
                timeout = 0.0
            self._sleeping = timeout != 0.0
        woken = self._poller.poll(timeout)
        with self._lock:  # whoever sends in our place has done so
            self._sleeping = False
        if any(descriptor == self._event for descriptor, _ in woken):
            os.eventfd_read(self._event)

    def _take(self) -> None:
        inbox, submit = self._inbox, self._pool.submit
        for _ in range(min(len(inbox), STEP)):
            item = inbox.popleft()
            if type(item) is Call:
                submit(item)
            else:
                item[0](item[1])

    def _settle(self, ended: Outcome) -> None:
        call = ended.call
        future: Future[Any] = call.tag
        if future.call is None:
            return  # the pool is broken, and it has been told
        future.call = None
        if not future.begin():
            future.set_running_or_notify_cancel()  # cancelled: those who wait are told
            return
        if ended.error is None:
            assert ended.result is not None
            result, error = outcome(ended.result)
            if error is None:
                future.set_result(result)
                return
        else:
            error = self._error(call, ended.error)
        future.set_exception(error)

    def _error(self, call: Call, error: AcommError) -> BaseException:
        killed = call in self._killed
        self._killed.discard(call)
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
        calls = [item for item in self._inbox if type(item) is Call]
        self._inbox.clear()
        for call in [*calls, *self._pool.dispatcher.unfinished()]:
            future: Future[Any] = call.tag
            future.call = None
            if future.begin():
                future.set_exception(BrokenPool(why))
            else:
                future.set_running_or_notify_cancel()
        self._pool.dispatcher.abandon(WorkerLost(why))

    def _say_farewell(self) -> None:
        if self._broken is not None:
            return
        end = time.monotonic() + FAREWELL
        self._pool.stop_workers()
        while self._pool.alive and (now := time.monotonic()) < end:
            due = min(end, self._pool.next_deadline() or end)
            self._poller.poll(max(0.0, due - now))
            self._pool.process_events()


_engines: weakref.WeakSet[_Engine] = weakref.WeakSet()
_exiting = False


def _finish_all() -> None:
    """The interpreter ends: what is queued runs first, as with the standard library's executors."""
    global _exiting
    _exiting = True
    engines = list(_engines)
    for engine in engines:
        engine.close()
    for engine in engines:
        engine.join()


# Not atexit: that comes after the threads are joined, and ours would never end.
threading._register_atexit(_finish_all)  # type: ignore[attr-defined]
os.register_at_fork(after_in_child=_engines.clear)
