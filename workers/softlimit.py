"""Soft time limits: an exception in the task, which may clean up or answer with what it has.

A plain function is interrupted by SIGALRM from the process's real timer, as nothing else reaches the main
thread in `time.sleep` or a read. It arrives between two bytecodes, so not within C code that does not
return: the hard limit is for that. A coroutine is cancelled, as what it awaits expects.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any

from workers.errors import SoftTimeout


class _Alarm:
    """The handler of SIGALRM for one call. It raises at most once, and only while the call runs."""

    __slots__ = ("armed", "error")

    def __init__(self, error: SoftTimeout) -> None:
        self.armed = True
        self.error = error

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.armed:
            self.armed = False
            raise self.error


def limited(function: Callable[..., Any], task: str, seconds: float) -> Callable[..., Any]:
    """`function`, in which SoftTimeout is raised after `seconds`. For the main thread."""

    def run(*args: Any, **kwargs: Any) -> Any:
        alarm = _Alarm(_error(task, seconds))
        before = signal.signal(signal.SIGALRM, alarm)
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, seconds)
                return function(*args, **kwargs)
            finally:
                # The alarm may come until here; what undoes our part must then still be done.
                alarm.armed = False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)

    return run


def limited_coroutine(
    function: Callable[..., Coroutine[Any, Any, Any]], task: str, seconds: float
) -> Callable[..., Coroutine[Any, Any, Any]]:
    """`function`, which is cancelled after `seconds`; what comes out is SoftTimeout."""

    async def run(*args: Any, **kwargs: Any) -> Any:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await function(*args, **kwargs)
        except TimeoutError as late:
            if limit.expired():
                raise _error(task, seconds) from late  # which tells where it was
            raise

    return run


def _error(task: str, seconds: float) -> SoftTimeout:
    return SoftTimeout(f"task {task} ran longer than its soft limit of {seconds:g} seconds")
