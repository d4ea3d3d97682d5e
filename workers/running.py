"""What a task can know of the call that it runs: `context()`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from workers.calls import Job

if TYPE_CHECKING:
    from workers.scoreboard import SlotWriter


class Context:
    """The call that a task runs now."""

    __slots__ = ("_job", "_slot")

    def __init__(self, job: Job, slot: SlotWriter) -> None:
        self._job = job
        self._slot = slot

    @property
    def request_id(self) -> str:
        """The id of the request."""
        return self._job.id

    @property
    def attempt(self) -> int:
        """1 for the first attempt, one more for each retry."""
        return self._job.attempt

    @property
    def deadline(self) -> float | None:
        """When the request times out, on `time.monotonic()`'s clock; None if it does not."""
        return self._job.deadline

    def progress(self, done: float, total: float | None = None) -> None:
        """Note how far the call is. Costs about 0.2 microseconds, so call it as often as you like."""
        self._slot.progress(done, total or 0.0)


_current: ContextVar[tuple[Job, SlotWriter] | None] = ContextVar("workers_call", default=None)
enter = _current.set


def context() -> Context:
    """The context of the running call. Raises RuntimeError outside a task in a worker."""
    current = _current.get()
    if current is None:
        raise RuntimeError("context() is for code that runs as a task in a worker")
    return Context(*current)
