"""What a task can know of the call that it runs, and say of it: `context()`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from acomm import within
from workers.calls import Job

if TYPE_CHECKING:
    from acomm.egress import Policy
    from acomm.streamreaders import StreamFile
    from workers.scoreboard import SlotWriter


class _Ended:
    """In place of the slot, which has gone on to another call: a thread of the task may not know."""

    def progress(self, done: float, total: float = 0.0, note: str = "") -> None: ...


_ended = _Ended()


class Context(msgspec.Struct, eq=False, gc=False):
    """The call that a task runs now.

    `cancelled` turns true when the call should end: nobody wants the rest of a stream any more, as its
    consumer has left, or a coroutine is being cancelled. In any other call that is cancelled, SystemExit is
    raised.
    """

    _job: Job
    _slot: SlotWriter | _Ended
    _policy: Policy
    cancelled: bool = False
    _input: StreamFile | None = None
    _answered: bool = False

    def __repr__(self) -> str:
        return f"<Context of {self._job.task}, request {self.request_id!r}, attempt {self.attempt}>"

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
        """When the request times out, on `time.monotonic()`'s clock; None if it does not. For a task that
        streams, the time until its stream begins.
        """
        return self._job.deadline

    @property
    def answer_due(self) -> float | None:
        """The deadline for calls that the task submits: none once its stream has begun, the answer."""
        return None if self._answered else self._job.deadline

    @property
    def stream(self) -> StreamFile:
        """The stream that the request brought (its `stream_url`), as a binary file. It is opened at the
        first use and closed when the call ends. A stream can be read once, so a further attempt may not
        find it any more.

        Raises LookupError when the request brought none; opening and reading raise ConnectionLost when the
        stream cannot be had, or is broken, and Forbidden when it leads where its sender may not.
        """
        if self._input is None:
            self._input = _open_stream(self._job, self._policy)
        return self._input

    def progress(self, done: float, total: float | None = None, note: str = "") -> None:
        """Note how far the call is, and in a few words (about 100 bytes are kept) at what. Costs about 0.2
        microseconds, so call it as often as you like.
        """
        self._slot.progress(done, total or 0.0, note)


def _open_stream(job: Job, policy: Policy) -> StreamFile:
    """Judged once more, by who has sent the request: what its URL leads to may have changed meanwhile."""
    from acomm.egress import Guard
    from acomm.streamreaders import StreamFile  # most tasks read none

    if job.stream is None:
        raise LookupError("the request brought no stream: its sender must set a stream URL")
    return StreamFile(job.stream, guard=None if job.origin is None else Guard(policy, job.origin))


def leave(context: Context) -> None:
    """The call has ended: what was opened for it is closed, and what it has left running is not heard."""
    context._slot = _ended
    if context._input is not None:
        context._input.close()


def answered(context: Context) -> None:
    """The caller has the answer, a stream, and the request's time limit is met."""
    context._answered = True


enter = within.current.set
"""Say what runs from now on. Its time left is that of the calls which it submits, too."""


def context() -> Context:
    """The context of the running call. Raises RuntimeError outside a task in a worker."""
    current = within.current.get()
    if not isinstance(current, Context):
        raise RuntimeError("context() is for code that runs as a task in a worker")
    return current
