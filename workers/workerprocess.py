"""One worker process, as the program that has started it knows it. Data alone; what becomes of it is for
`workers.processes`.
"""

from __future__ import annotations

import secrets

from workers.generations import Generation
from workers.scoreboard import Slot
from workers.tails import Said


class Worker:
    """A worker process, from the wish for one until its death is settled.

    `status` is None while it lives, then its exit code (below 0: the signal); `running` are the calls that it
    ran when it died, by what the scoreboard said, `said` the last of what it printed, `oom` whether it was
    likely the kernel's OOM killer.
    """

    __slots__ = ("cpu", "ended", "finished", "generation", "identity", "killed", "max_rss", "oom", "peer_pid",
                 "pid", "ready", "running", "said", "since", "slot", "status", "stopping", "succeeded",
                 "token")  # fmt: skip

    def __init__(self, token: int, generation: Generation, slot: int, now: float) -> None:
        self.token = token
        self.generation = generation
        self.slot = slot
        self.identity = b"w" + secrets.token_bytes(12)  # ZeroMQ reserves those that begin with 0
        self.since = now
        self.pid = 0
        self.peer_pid = 0
        self.ready = False
        self.finished = 0
        self.stopping = False
        self.succeeded = False  # by one of a newer generation: it only finishes what it has
        self.killed = False
        self.ended = False
        self.status: int | None = None
        self.running: dict[int, Slot] = {}
        self.max_rss = 0
        self.cpu = 0.0
        self.said: tuple[Said, ...] = ()
        self.oom = False

    def __repr__(self) -> str:
        return f"<Worker {self.pid} of slot {self.slot}, status {self.status}>"
