"""PoolExecutor: `concurrent.futures.ProcessPoolExecutor`, on this project's pool.

    submit() --pickle--> inbox --wake--> driver's thread: Pool.submit, process_events <==ipc==> workers
       |                                     |
       +---- Future <-----unpickle-----------+

Any thread submits: it pickles the call itself, puts it in the inbox, and wakes the driver only if that
sleeps. The driver takes what has gathered in large steps, since the two share one GIL. While one call goes
on at a time, both ways lead past it: see `workers.driver`.

What differs from the standard library's:

* A worker's death costs the call that it ran, whose future has CallLost: a WorkerLost and a BrokenProcessPool
  in one, so code that catches `BrokenExecutor` still does. The pool goes on. It breaks (BrokenPool, for all
  futures and each further submit) only when workers cannot be started: a failing initializer, or deaths
  over and over before the first call.
* `kill(future)` ends a running call.
* Workers never import the program's `__main__`; see `workers.pickling`.
* `chunksize` is not needed: small calls travel together by themselves, as do the items of a `map`.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

from workers import pickledworker
from workers.buffers import Stored
from workers.calls import Call
from workers.driver import BrokenPool, CallLost, Driver
from workers.exchange import Exchange
from workers.futures import Future
from workers.mapping import MAX_ITEMS, Mapping, Sender
from workers.pickling import Functions, dump
from workers.pool import Pool

__all__ = ["BrokenPool", "CallLost", "Future", "PoolExecutor"]

P = ParamSpec("P")
T = TypeVar("T")


class PoolExecutor(concurrent.futures.Executor):
    """Runs functions in `max_workers` processes (as many as there are CPUs for us, by default).

    They start at the first submit, from a fresh interpreter, and each calls `initializer(*initargs)` first.
    `max_tasks_per_child` calls, and a worker is replaced. With `min_workers` so many start, more while calls
    would wait long, and those go again that have nothing to do. `preload` are modules that are imported once,
    before workers are forked, which saves each of them time and memory. `mp_context` is accepted for programs
    that are written for the standard library's, and has no effect. With `capture`, the receipt of a call that
    is lost or killed tells what it printed; what workers print then comes by a pipe, maybe after the result.

    Large arguments and results lie in shared memory, at most `shared_memory` bytes of it: half is for
    arguments, a worker's equal share of the other half for its results. What finds no room there travels as
    small ones do. By default it is a quarter of the machine's memory; with 0 there is none.

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
        min_workers: int | None = None,
        preload: Iterable[str] = (),
        shared_memory: int | None = None,
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
        if min_workers is not None and not (isinstance(min_workers, int) and 1 <= min_workers <= max_workers):
            raise ValueError(f"min_workers must be 1 to {max_workers}, not {min_workers!r}")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ValueError("max_tasks_per_child must be >= 1")
        if shared_memory is None:
            shared_memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
        if not isinstance(shared_memory, int):
            raise TypeError("shared_memory must be an integer, bytes")
        if shared_memory < 0:
            raise ValueError("shared_memory must be >= 0")
        exchange = Exchange(shared_memory, max_workers) if shared_memory // 2 // max_workers else None
        authkey = bytes(multiprocessing.current_process().authkey)
        setup = dump((initializer, tuple(initargs), authkey, exchange.share if exchange else 0))
        pool = Pool(
            tuple(preload),
            workers=max_workers,
            min_workers=min_workers,
            max_result=2**31,
            target=pickledworker.TARGET,
            setup=setup,
            max_tasks_per_child=max_tasks_per_child,
            capture=capture,
        )
        self._max_tasks = max_tasks_per_child
        self._max_workers = max_workers  # joblib and others look at it
        self._functions = Functions()
        self._arena = exchange.arena if exchange else None
        self._driver = Driver(pool, exchange)
        self._drop = weakref.finalize(self, self._driver.close)
        self._drop.atexit = False

    def __repr__(self) -> str:
        return f"<PoolExecutor {self._max_workers} workers, {self._driver.state}>"

    def __reduce__(self) -> Any:
        raise TypeError("a PoolExecutor cannot be sent to another process")

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue `fn(*args, **kwargs)`. What cannot be pickled is the future's exception. Raises RuntimeError
        after a shutdown, BrokenPool when workers cannot be started.
        """
        driver = self._driver
        future: Future[T] = Future(driver)
        try:
            prepared = self._functions.prepare(fn)
            data = prepared.call(args, kwargs, self._arena)
        except (Exception, SystemExit) as error:
            driver.check()
            future.set_exception(error)
            return future
        if type(data) is bytes:
            future.call = call = Call(prepared.name, data, tag=future)
            driver.submit(call)
        else:
            assert isinstance(data, Stored)
            future.call = call = Call(prepared.name, data.data, tag=future)
            driver.submit_stored(call, data.segment)
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

        Items travel together while they are short, as many as run in about a millisecond, and share nothing
        all the same. A worker's death costs the item that ran; those that had run before it in the same part
        run again. A `chunksize` above 1 is the most that may travel together.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        end = None if timeout is None else time.monotonic() + timeout
        self._driver.check()
        alone = self._max_tasks is not None  # a call is a call
        largest = 1 if alone else chunksize if chunksize > 1 else MAX_ITEMS
        sender = Sender(self._driver, self._functions, fn, self._arena)
        mapping = Mapping(sender, 2 * self._max_workers + 2, largest)
        if sender.failed is not None:
            mapping.give_up(sender.failed)
        calls = zip(*iterables, strict=False)
        mapping.add(itertools.islice(calls, buffersize), begun=False)
        return mapping.results(end, _held(self, calls) if buffersize else calls, buffersize)

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
        self._driver.command(self._driver.kill, future)
        return True

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._driver.close(cancel_futures)
        if wait:
            self._driver.join()


def _held(executor: PoolExecutor, items: Iterator[T]) -> Iterator[T]:
    """The items. An executor to which they are still to be submitted does not shut down for being dropped."""
    yield from items
