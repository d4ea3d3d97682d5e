"""What is known of a death: the WorkerLost of the call that paid for it, with its receipt."""

from __future__ import annotations

import signal
from typing import Any

from workers.calls import Call
from workers.errors import WorkerLost, printable
from workers.processes import Worker
from workers.scoreboard import Slot


def worker_lost(call: Call, worker: Worker, now: float) -> WorkerLost:
    """The error of `call`, which a dead `worker` ran; `now` is about when that was."""
    status = worker.status or 0
    ran = worker.running.get(
        call.number, Slot(0, now, 0.0, 0.0)
    )  # a stream's call that has just ended pays, too
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
        "attempt": call.attempt - 1,
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
    return WorkerLost(f"worker {worker.pid} {how} while it ran task {call.task}", receipt=receipt)
