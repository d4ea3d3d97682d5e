"""The Future of a PoolExecutor: the standard library's in every respect, for a third of its price.

Most of what a Future costs is its Condition (about 3 of 3.5 microseconds, and 1 kB), which is for those who
wait. Here it is made when somebody asks for it: `result` of a call that has not ended, `wait`,
`as_completed`. Until then one lock for all futures guards the changes of state; it is held for some
bytecodes, and never while code of others runs. From then on the standard library's methods do the work.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

PENDING, RUNNING = "PENDING", "RUNNING"
CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED = "CANCELLED", "CANCELLED_AND_NOTIFIED", "FINISHED"
_OVER = (CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED)

_log = logging.getLogger("concurrent.futures")
_lock = threading.RLock()  # as a collection may run code that has a future of its own to cancel


def _new_lock() -> None:
    """In a fork: another thread may have held it, and is not there to let go."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_new_lock)


class Owner(Protocol):
    """Who runs the call of a future."""

    def cancelled(self, future: Future[Any]) -> None:
        """It was cancelled before it began."""

    def wait_for(self, future: Future[Any], end: float | None) -> None:
        """Somebody waits for it, until `end` (monotonic). May use the time for it; need not."""


class Future(concurrent.futures.Future[T]):
    """A call of a PoolExecutor. Its `owner` is told when it is cancelled before it began, and may help those
    who wait for it.

    It is RUNNING from when its call is handed to a worker, which may hold some calls before it runs them.
    """

    __slots__ = ("_callbacks", "_exception", "_made", "_result", "_state", "_waiting", "call", "owner")

    def __init__(self, owner: Owner | None = None) -> None:
        # Not the base's, which would make what we save.
        self._state = PENDING
        self._result: Any = None
        self._exception: BaseException | None = None
        self._made: threading.Condition | None = None
        self._waiting: list[Any] | None = None
        self._callbacks: list[Callable[[Any], object]] | None = None
        self.call: Any = None
        self.owner = owner

    # -- what the base, `wait` and `as_completed` expect to find

    @property
    def _condition(self) -> threading.Condition:  # type: ignore[override]
        if self._made is None:
            with _lock:
                if self._made is None:
                    self._made = threading.Condition()
        return self._made

    @property
    def _waiters(self) -> list[Any]:  # touched only by holders of the condition
        if self._waiting is None:
            self._waiting = []
        return self._waiting

    @_waiters.setter
    def _waiters(self, waiters: list[Any]) -> None:
        self._waiting = waiters

    @property
    def _done_callbacks(self) -> list[Callable[[Any], object]]:
        if self._callbacks is None:
            self._callbacks = []
        return self._callbacks

    # -- the caller's side

    def done(self) -> bool:
        return self._state in _OVER

    def running(self) -> bool:
        return self._state == RUNNING

    def cancelled(self) -> bool:
        return self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)

    def result(self, timeout: float | None = None) -> T:
        # A state is set after what belongs to it, so one that reads FINISHED is.
        if self._state != FINISHED:
            timeout = self._get_help(timeout)
            if self._state != FINISHED:
                return super().result(timeout)
        if self._exception is not None:
            try:
                raise self._exception
            finally:
                self = None  # type: ignore[assignment]  # the traceback would hold us, and we the exception
        return self._result  # type: ignore[no-any-return]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        if self._state != FINISHED:
            timeout = self._get_help(timeout)
        return self._exception if self._state == FINISHED else super().exception(timeout)

    def _get_help(self, timeout: float | None) -> float | None:
        """What is left of `timeout` after the owner's help."""
        if self.owner is None or self._state in _OVER or self._callbacks:
            return timeout
        if timeout is None:
            self.owner.wait_for(self, None)
            return None
        if timeout > 0:
            end = time.monotonic() + timeout
            self.owner.wait_for(self, end)
            timeout = max(0.0, end - time.monotonic())
        return timeout

    @property
    def has_callbacks(self) -> bool:
        return bool(self._callbacks)

    def add_done_callback(self, fn: Callable[[concurrent.futures.Future[T]], object]) -> None:
        with _lock:
            if self._made is None and self._state not in _OVER:
                self._done_callbacks.append(fn)
                return
        super().add_done_callback(fn)

    def cancel(self) -> bool:
        with _lock:
            condition = self._made
            if condition is None:
                if self._state != PENDING:
                    return self._state != RUNNING and self._state != FINISHED
                self._state = CANCELLED
        if condition is not None:
            with condition:
                with _lock:
                    if self._state != PENDING:
                        return self._state != RUNNING and self._state != FINISHED
                    self._state = CANCELLED
                condition.notify_all()
        self._call_back()
        if self.owner is not None:
            self.owner.cancelled(self)
        return True

    # -- the executor's side

    def set_running_or_notify_cancel(self) -> bool:
        with _lock:
            if self._made is None and self._state in (PENDING, CANCELLED):
                pending = self._state == PENDING
                self._state = RUNNING if pending else CANCELLED_AND_NOTIFIED
                return pending
        return super().set_running_or_notify_cancel()

    def begin(self) -> bool:
        """Its call is handed to a worker, for the first time or again; False if it was cancelled."""
        return self._state == RUNNING or (self._state == PENDING and self._start())

    def _start(self) -> bool:
        # Unlike `set_running_or_notify_cancel` it leaves a cancelled one alone, which is told of elsewhere.
        condition = self._made
        if condition is not None:
            with condition, _lock:
                return self._take()
        with _lock:
            return self._take()

    def _take(self) -> bool:
        if self._state == PENDING:
            self._state = RUNNING
        return self._state == RUNNING

    def set_result(self, result: T) -> None:
        with _lock:
            fast = self._made is None and self._state not in _OVER
            if fast:
                self._result = result
                self._state = FINISHED
        if not fast:
            super().set_result(result)
        elif self._callbacks:
            self._call_back()

    def set_exception(self, exception: BaseException | None) -> None:
        with _lock:
            fast = self._made is None and self._state not in _OVER
            if fast:
                self._exception = exception
                self._state = FINISHED
        if not fast:
            super().set_exception(exception)
        elif self._callbacks:
            self._call_back()

    def _call_back(self) -> None:
        for callback in self._callbacks or ():
            try:
                callback(self)
            except Exception:
                _log.exception("exception calling callback for %r", self)
