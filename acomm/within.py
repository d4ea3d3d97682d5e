"""The time that the work at hand has left, which calls that are made for it do not exceed.

A worker says here what it runs; a client asks when a call is submitted. It is a context variable, so it is
right in each of many coroutines, in the asyncio tasks that they start and in `asyncio.to_thread`. Any other
thread begins without: there nothing is known of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol


class Work(Protocol):
    """What somebody waits for."""

    @property
    def answer_due(self) -> float | None:
        """When they stop waiting, on `time.monotonic()`'s clock; None if they do not, or have the answer."""


# What else the value is, only those know who set it.
current: ContextVar[Any] = ContextVar("acomm_work", default=None)
_detached: ContextVar[bool] = ContextVar("acomm_detached", default=False)


def limit() -> float | None:
    """When the work ends that a call submitted now is a part of, on `time.monotonic()`'s clock; None if it
    is a part of none, or of one without a limit.
    """
    work: Work | None = current.get()
    if work is None:
        return None
    return None if _detached.get() else work.answer_due


@contextmanager
def detached() -> Iterator[None]:
    """Calls that are submitted within are no part of the work at hand: they get the time that they ask for.

    with detached():
        clean_up.submit(folder)  # may run on when the task's own time is over
    """
    token = _detached.set(True)
    try:
        yield
    finally:
        _detached.reset(token)
