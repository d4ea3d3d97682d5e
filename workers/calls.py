"""What travels between supervisor and workers, and what comes of it: calls, answers, outcomes.

On the ipc socket a message is msgpack: a list of Jobs one way, a list of Answers the other. Both are
arrays, not maps, as thousands of them may ride in one message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from acomm.origin import Origin
from acomm.streamsocket import EXPIRY
from workers.errors import AcommError, from_wire

READY = b"ready"
"""A worker's first message."""

STOP = b"stop"
"""The supervisor's last: finish what you have, then exit."""

CANCEL = b"cancel"
"""Begins a message with numbers of calls that are to be cancelled: `cancelling` makes it."""

UNFIT = 77
"""The exit status of a worker whose like can never be READY."""

RETURNED = "returned"
"""The code of a Failure that is none: the worker gives a call back that it has not begun."""

ABANDONED = "abandoned"
"""Another such: the consumer of the call's stream has left, and the call does not end. Kill it."""

OUTGROWN = "outgrown"
"""Another such, of no call: the worker has more memory than it may keep. Replace it."""


class Job(msgspec.Struct, array_like=True):
    """A call as a worker gets it. `deadline` is on the monotonic clock, which processes share. `stream` is
    the stream URL that the request brought. `origin` is who asked, where it matters: for the stream that
    the request brought, and for the one that the call makes, which he may read besides us and root.
    """

    number: int
    task: str
    args: bytes | None
    id: str
    attempt: int
    deadline: float | None
    stream: str | None = None
    origin: Origin | None = None


class Failure(msgspec.Struct, array_like=True):
    """An error as a worker reports it; always text, as an exception that pickles may not unpickle."""

    code: str
    message: str
    type: str | None = None
    traceback: str | None = None
    retriable: bool = False

    def error(self) -> AcommError:
        return from_wire(self.message, {"code": self.code, "type": self.type, "traceback": self.traceback})


Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
"""How long a call ran. An infinite one would spoil what is predicted of its task for ever."""


class Answer(msgspec.Struct, array_like=True):
    """What a worker says of a call: its result as JSON or its failure, and the seconds it ran.

    A call that streams is answered twice: first with `stream`, the URL, when it waits for its consumer.
    """

    number: int
    seconds: Seconds
    result: bytes | None
    failure: Failure | None = None
    stream: str | None = None

    @property
    def ends(self) -> bool:
        """Whether the worker is done with the call and has run it."""
        if self.failure is None:
            return self.stream is None
        return self.failure.code not in (RETURNED, ABANDONED, OUTGROWN)


class Call(msgspec.Struct, eq=False, weakref=True):
    """A call on the supervisor's side.

    `timeout` is per attempt, `deadline` for everything, on the monotonic clock. `tag` belongs to who
    submitted it. The numbers of a call's attempts differ, so a late answer matches nothing. `stream_url`
    and `origin` are for the Job; `stream_format` is that of its own stream. Workers hold at most
    `concurrency` calls of its task at a time (None: any number). `rank` is what it is queued by instead of
    its number, once it was put back in front. `streaming` is the URL of the call's own stream once it has
    one; `abandoned` is set when that has lost its consumer, and when the call is to be cancelled while it
    runs.

    Of calls that overlap (those of coroutine tasks) a worker runs many at a time. They have a `concurrency`:
    `lanes.UNLIMITED` at least. None is isolated or has a `max_memory`. `sent` is when a worker got one.

    Calls of a task that have the same `key` share a run while it is queued or runs: another Call, in their
    `run`, which has them all in `sharers`, by their numbers. See `workers.sharing`.

    An `isolated` call gets a worker that has run nothing, and that runs nothing after it. It has a
    `concurrency`, too: `lanes.UNLIMITED` at least. One with `max_memory`, the bytes that it may take, has a
    `timeout`, `math.inf` at most.
    """

    task: str
    args: bytes | None
    id: str = ""
    tag: Any = None
    priority: int = 0
    timeout: float | None = None
    deadline: float | None = None
    retries: int = 0
    crashes: int = 0
    backoff: Any = None  # attempt -> seconds
    stream_url: str | None = None
    stream_format: str | None = None
    origin: Origin | None = None
    concurrency: int | None = None
    overlaps: bool = False
    number: int = 0
    rank: int = 0
    failed: int = 0
    crashed: int = 0
    cost: float = 0.0
    settled: bool = False
    streaming: str = ""
    abandoned: bool = False
    key: bytes | None = None
    isolated: bool = False
    max_memory: int | None = None
    run: Call | None = None
    sharers: dict[int, Call] | None = None
    sent: float = 0.0
    account: Any = None  # of whoever submitted it, what it counts for

    @property
    def attempt(self) -> int:
        """1 for the first."""
        return self.failed + self.crashed + 1

    def job(self) -> Job:
        return Job(
            self.number,
            self.task,
            self.args,
            self.id,
            self.attempt,
            self.deadline,
            self.stream_url,
            self.origin,
        )


def cancelling(numbers: Sequence[int]) -> bytes:
    """The message that has a worker cancel some of its calls that overlap, and go on with the others."""
    return CANCEL + msgspec.msgpack.encode(numbers)


def cancelled(message: bytes) -> list[int]:
    """The numbers in such a message."""
    return msgspec.msgpack.decode(message[len(CANCEL) :], type=list[int])


class Outcome(msgspec.Struct, frozen=True, eq=False):
    """How a call ended: exactly one of result (JSON) and error is set.

    A call that streams has two outcomes. The first has `stream` alone, the URL. The second tells how it
    ended: neither result nor error if the stream was taken whole.
    """

    call: Call
    result: bytes | None
    error: AcommError | None
    stream: str | None = None


class StreamPlace(msgspec.Struct, frozen=True):
    """Where a supervisor's workers make their stream sockets, and for how long.

    `folder` None is the private runtime folder; `group` owns the file if it is given; a stream waits
    `expiry` seconds for its consumer.
    """

    folder: str | None = None
    mode: int = 0o600
    group: int | None = None
    expiry: float = EXPIRY
