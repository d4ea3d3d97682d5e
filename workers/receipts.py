"""What is known of a death: the WorkerLost of the call that paid for it, with its receipt.

All of a receipt is bounded: the texts in it are the last `workers.tails.TAIL` bytes. They are as they were
written, control characters included; whoever prints them escapes those.
"""

from __future__ import annotations

import signal
from typing import Any

from workers.calls import Call
from workers.errors import WorkerLost, printable
from workers.scoreboard import Slot
from workers.tails import DUMP, STDERR, STDOUT, text_since
from workers.workerprocess import Worker


def worker_lost(call: Call, worker: Worker, now: float) -> WorkerLost:
    """The error of `call`, which a dead `worker` ran; `now` is about when that was.

    What the worker printed is what was read since the call began. That is some moments after it was written,
    so the last words of a call just before may be in it, never those of one that had ended earlier.
    Of calls that overlap it is what all of them have printed since.
    """
    status = worker.status or 0
    # A call pays also that has just ended: if it streamed, or the worker was ended for it.
    ran = worker.running.get(call.number, Slot(0, now, 0.0, 0.0))
    if status < 0:
        try:
            how = f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            how = f"was killed by signal {-status}"
    else:
        how = f"exited with status {status}"
    receipt: dict[str, Any] = {
        "pid": worker.pid,
        "task": call.task,
        "attempt": call.attempt,
        "signal": -status if status < 0 else None,
        "exit_status": status if status >= 0 else None,
        "ran_seconds": round(max(now - ran.started, 0.0), 6),
        "max_rss": worker.max_rss,
        "cpu_seconds": round(worker.cpu, 6),
        "calls_before": worker.finished,
    }
    if ran.done or ran.total:
        receipt["progress"] = {"done": ran.done, "total": ran.total}
        if ran.note:
            receipt["progress"]["note"] = printable(ran.note)
    if worker.oom:
        receipt["oom_killer"] = "likely"
        how += ", likely by the kernel for want of memory,"
    for name, stream in (("dump", DUMP), ("stdout", STDOUT), ("stderr", STDERR)):
        if text := text_since(worker.said, stream, ran.started):
            receipt[name] = text
    return WorkerLost(f"worker {worker.pid} {how} while it ran task {call.task}", receipt=receipt)
