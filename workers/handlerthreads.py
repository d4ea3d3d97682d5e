"""Threads for handlers: a few, and none that could keep the supervisor from its work or from its end."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

SIZE = 32
PATIENCE = 30.0
"""Seconds after which a handler that still runs no longer counts: another thread takes its place."""

MOST = 512
"""Threads in all, those of stuck handlers included: beyond that, handlers wait."""


class HandlerThreads(Executor):
    """Runs at most `size` functions at a time, besides those that have run for over `patience` seconds.

    Its threads are daemons, as a handler may never return: a ThreadPoolExecutor's would be joined at the
    process's end.
    """

    def __init__(self, size: int = SIZE, *, patience: float = PATIENCE, most: int = MOST) -> None:
        self._size = size
        self._patience = patience
        self._most = most
        self._changed = threading.Condition()
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._since: dict[int, float] = {}  # of the threads that run something
        self._threads = 0
        self._watch: threading.Timer | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<HandlerThreads {self._threads} threads, {len(self._queue)} waiting>"

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the handlers' threads are shut down")
            self._queue.append((future, partial(fn, *args, **kwargs)))
            self._changed.notify()
            self._grow()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more. What runs is left to itself, whatever `wait` says: it may never end."""
        with self._changed:
            self._closed = True
            if self._watch is not None:
                self._watch.cancel()
            while cancel_futures and self._queue:
                self._queue.popleft()[0].cancel()
            self._changed.notify_all()

    def _grow(self) -> None:
        """Start threads for what waits, as far as the limits allow; else look again when they may."""
        while self._threads - len(self._since) < len(self._queue):
            if self._threads - self._stuck() >= self._size or self._threads >= self._most:
                if self._watch is None:
                    self._watch = threading.Timer(self._patience, self._look_again)
                    self._watch.daemon = True
                    self._watch.start()
                return
            self._threads += 1
            threading.Thread(target=self._run, name=f"handler-{self._threads}", daemon=True).start()

    def _look_again(self) -> None:
        with self._changed:
            self._watch = None
            if not self._closed:
                self._grow()

    def _stuck(self) -> int:
        latest = time.monotonic() - self._patience
        return sum(since <= latest for since in self._since.values())

    def _run(self) -> None:
        me = threading.get_ident()
        while (work := self._next(me)) is not None:
            future, function = work
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function()
            except BaseException as error:
                future.set_exception(error)
                del error  # it holds this frame, which holds the future, which holds it
            else:
                future.set_result(result)
                del result
            del work, future, function  # nothing stays alive for as long as this thread has nothing to do

    def _next(self, me: int) -> tuple[Future[Any], Callable[[], Any]] | None:
        """What to run next; None: end, as there is no more or there are threads enough."""
        with self._changed:
            self._since.pop(me, None)
            while not self._queue:
                if self._closed or self._threads > self._size:
                    self._threads -= 1
                    return None
                self._changed.wait()
            self._since[me] = time.monotonic()
            return self._queue.popleft()
