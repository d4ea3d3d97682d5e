"""A pool as operators and callers see it: what its workers run, since when, and how far that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from workers.calls import Call
from workers.errors import printable
from workers.scoreboard import Slot
from workers.workerprocess import Worker


class CallInfo(NamedTuple):
    """A call under way: "queued", "running" or "streaming", and what it says of its progress."""

    state: str
    task: str
    seconds: float
    done: float
    total: float
    note: str


class WorkerInfo(NamedTuple):
    """A worker as the operator sees it. `task` runs since `seconds` ago; `done` of `total` is its progress,
    `note` its own word on that. Where calls overlap this is the oldest, and `calls` are all.
    """

    pid: int
    state: str
    finished: int
    held: int
    task: str | None
    seconds: float
    done: float
    total: float
    note: str
    calls: tuple[CallInfo, ...] = ()


def under_way(call: Call, slot: Slot | None, now: float) -> CallInfo:
    """A call that has not ended; one without a slot does not run."""
    if slot is None:
        return CallInfo("streaming" if call.streaming else "queued", call.task, 0.0, 0.0, 0.0, "")
    return CallInfo(
        state="streaming" if call.streaming else "running",
        task=call.task,
        seconds=now - slot.started,
        done=slot.done,
        total=slot.total,
        note=printable(slot.note),
    )


def worker_info(worker: Worker, held: int, calls: Sequence[CallInfo]) -> WorkerInfo:
    """A worker that lives, holds so many calls, and runs these."""
    first = max(calls, key=lambda call: call.seconds, default=None)
    return WorkerInfo(
        pid=worker.pid,
        state="starting" if not worker.ready else "stopping" if worker.stopping else "ready",
        finished=worker.finished,
        held=held,
        task=first.task if first else None,
        seconds=first.seconds if first else 0.0,
        done=first.done if first else 0.0,
        total=first.total if first else 0.0,
        note=first.note if first else "",
        calls=tuple(calls),
    )
