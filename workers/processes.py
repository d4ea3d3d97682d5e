"""The worker processes of a pool: how many there are, their births, deaths and replacements.

Whoever has them polls `fileno()` and calls `events()` when that is readable and `tick()` at
`next_deadline()`; nothing here blocks. It is told what happens through two functions: `on_ready(worker)`, a
process that may be given work, and `on_death(worker)`, one whose status is known.

A worker is ready when it has said so over the pool's socket *and* the fork server has told its pid, and the
kernel says that the one is the other. A dead one is replaced at once, unless deaths follow each other so
early that there is no sense in it (`workers.restarts`).
"""

from __future__ import annotations

import secrets
import select
import signal
import time
from collections.abc import Callable, Sequence

from workers.calls import UNFIT
from workers.ending import Graces
from workers.forkserver import Exited, Failed, Forked, ForkFailed, ForkServer, Gone
from workers.restarts import RestartBudget
from workers.scoreboard import Scoreboard, Slot
from workers.tails import Said

START_TIMEOUT = 60.0
"""Seconds from fork to READY; a worker that takes longer is killed and counted as dead."""

LEAVE_TIMEOUT = 5.0
"""Seconds that a worker whose time is up has to exit by itself: it may have exit handlers, or threads."""


class Worker:
    """A worker process, from the wish for one until its death is settled.

    `status` is None while it lives, then its exit code (below 0: the signal); `running` are the calls that it
    ran when it died, by what the scoreboard said, `said` the last of what it printed, `oom` whether it was
    likely the kernel's OOM killer.
    """

    __slots__ = ("cpu", "ended", "finished", "identity", "killed", "max_rss", "oom", "peer_pid", "pid",
                 "ready", "running", "said", "since", "slot", "status", "stopping", "token")  # fmt: skip

    def __init__(self, token: int, slot: int, now: float) -> None:
        self.token = token
        self.slot = slot
        self.identity = b"w" + secrets.token_bytes(12)  # ZeroMQ reserves those that begin with 0
        self.since = now
        self.pid = 0
        self.peer_pid = 0
        self.ready = False
        self.finished = 0
        self.stopping = False
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


class Processes:
    """Worker processes, `wanted` of them and `size` at most, that run `target` with what `settings(worker)`
    gives, forked from a template that has imported `preload`; `paths` go before `sys.path` there, and
    `cleanup` is removed at the end. `fds(worker)` are descriptors that it gets after the scoreboard's.

    `graces` are what a worker gets that is ended for its call; `capture` is ForkServer's.

    `failure` is set when there can be no worker: the modules cannot be imported, or it cannot be set up.
    """

    def __init__(
        self,
        size: int,
        *,
        wanted: int,
        preload: Sequence[str],
        paths: Sequence[str],
        target: str,
        settings: Callable[[Worker], bytes],
        fds: Callable[[Worker], Sequence[int]],
        on_ready: Callable[[Worker], None],
        on_death: Callable[[Worker], None],
        graces: Graces,
        capture: bool,
    ) -> None:
        self.size = size
        self.wanted = wanted
        self.failure: str | None = None
        self.trouble: str | None = None  # why the last fork failed, if none has succeeded since
        self.restarts = 0
        self.starting = 0  # workers that are not ready and not dead
        self._preload = preload
        self._paths = paths
        self._target = target
        self._settings = settings
        self._fds = fds
        self._on_ready = on_ready
        self._on_death = on_death
        self._graces = graces
        self._capture = capture
        self._budget = RestartBudget(max(10, 5 * size))
        self._workers: dict[int, Worker] = {}
        self._by_identity: dict[bytes, Worker] = {}
        self._wanted: dict[int, float] = {}  # slot -> when to fork for it
        self._leaving: dict[int, float] = {}  # the workers that were told to exit, and when to kill them
        self._tokens = 0
        self._stopping = False
        self._relaunch: float | None = None  # when to start a new fork server

    def __repr__(self) -> str:
        return f"<Processes {len(self._workers)} of {self.size}, {self.starting} starting>"

    # -- life ---------------------------------------------------------------------------------------

    def start(self, scoreboard: Scoreboard, cleanup: Sequence[str]) -> None:
        """Launch them; returns at once."""
        self._scoreboard = scoreboard
        self._cleanup = cleanup
        self._poller = select.epoll()
        try:
            self._launch(time.monotonic())
        except BaseException:
            self._poller.close()
            raise

    def close(self) -> None:
        """Kill them all, and their descendants."""
        self._stopping = True
        self._forkserver.close()
        self._poller.close()

    def stop(self) -> None:
        """Replace none any more."""
        self._stopping = True
        self._wanted.clear()
        self._relaunch = None

    # -- who is there -------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """Workers that can take calls."""
        return sum(worker.ready and worker.status is None for worker in self._workers.values())

    @property
    def alive(self) -> int:
        """Those that have not been seen dead."""
        return sum(worker.status is None for worker in self._workers.values())

    @property
    def healthy(self) -> bool:
        """False while they die so early and often that there is no sense in taking work."""
        return self.failure is None and not self._budget.exhausted(time.monotonic())

    def all(self) -> list[Worker]:
        """All that are not forgotten."""
        return list(self._workers.values())

    def get(self, token: int) -> Worker | None:
        """By token."""
        return self._workers.get(token)

    def speaker(self, identity: bytes) -> Worker | None:
        """By its name on the pool's socket."""
        return self._by_identity.get(identity)

    def running(self, worker: Worker) -> list[Slot]:
        """What it runs, or ran when it died."""
        if worker.status is None:
            return self._scoreboard.running(worker.slot)
        return list(worker.running.values())

    def slot_of(self, worker: Worker, call: int) -> Slot | None:
        """The slot of a call, if it runs that, or ran it when it died."""
        if worker.status is None:
            return self._scoreboard.find(worker.slot, call)
        return worker.running.get(call)

    # -- one of them --------------------------------------------------------------------------------

    def greet(self, worker: Worker, peer_pid: int) -> None:
        """It has said READY, over a connection whose other end is `peer_pid`."""
        worker.peer_pid = peer_pid
        self._try_ready(worker)

    def _try_ready(self, worker: Worker) -> None:
        """It has said READY, and the fork server has told its pid: in any order, both must agree."""
        if worker.pid and worker.peer_pid and worker.status is None and not worker.ready:
            if worker.peer_pid != worker.pid:
                worker.peer_pid = 0  # not the child that we started
                return
            worker.ready = True
            self.starting -= 1
            self._on_ready(worker)

    def worked(self, worker: Worker, calls: int) -> None:
        """It has finished `calls`."""
        if not worker.finished:
            self._budget.recovered()
            self.trouble = None
        worker.finished += calls

    def leave(self, worker: Worker, now: float) -> None:
        """It has been told to exit, and is replaced when it has; killed if that takes long."""
        worker.stopping = True
        self._leaving[worker.token] = now + LEAVE_TIMEOUT

    def grow(self, wanted: int, now: float) -> None:
        """Have more of them."""
        taken = {worker.slot for worker in self._workers.values() if worker.status is None}
        free = [slot for slot in range(self.size) if slot not in taken and slot not in self._wanted]
        self.wanted = wanted
        if self._relaunch is None:
            for slot in free[: max(0, wanted - len(taken) - len(self._wanted))]:
                self._fork(slot, now)

    def dismiss(self, worker: Worker, now: float) -> None:
        """As `leave`, and have one less of them from now on."""
        self.wanted -= 1
        self.leave(worker, now)

    def kill(self, worker: Worker) -> bool:
        """Have it killed, with its descendants; False if that has been done or cannot be done yet."""
        if worker.status is not None or not worker.pid or worker.killed:
            return False
        worker.killed = True
        self._forkserver.kill(worker.pid)
        return True

    def end(self, worker: Worker) -> bool:
        """Have it ended in steps, within the graces (`workers.ending`); False as with `kill`."""
        if worker.status is not None or not worker.pid or worker.killed or worker.ended:
            return False
        worker.ended = True
        self._forkserver.end(worker.pid, self._graces)
        return True

    def forget(self, worker: Worker) -> None:
        """Its death is settled."""
        del self._workers[worker.token], self._by_identity[worker.identity]

    # -- births and deaths --------------------------------------------------------------------------

    def _launch(self, now: float) -> None:
        self._forkserver = ForkServer(
            self._preload,
            paths=self._paths,
            target=self._target,
            cleanup=self._cleanup,
            capture=self._capture,
        )
        self._forkserver.start()
        self._poller.register(self._forkserver.fileno(), select.EPOLLIN)
        for slot in range(self.wanted):
            self._fork(slot, now)

    def _fork(self, slot: int, now: float) -> None:
        self._tokens += 1
        worker = Worker(self._tokens, slot, now)
        self._workers[worker.token] = self._by_identity[worker.identity] = worker
        self.starting += 1
        self._scoreboard.clear(slot)
        try:
            fds = [self._scoreboard.fd, *self._fds(worker)]
            self._forkserver.fork(worker.token, self._settings(worker), fds)
        except OSError as error:  # out of descriptors
            self.trouble = f"a worker could not be started: {error.strerror}"
            self._died(worker, 1, now)

    def fileno(self) -> int:
        """Readable when `events` has something to do."""
        return self._poller.fileno()

    def events(self) -> None:
        """See who was born and who has died."""
        now = time.monotonic()
        for event in self._forkserver.events():
            match event:
                case Forked(token, pid):
                    worker = self._workers[token]
                    worker.pid, worker.since = pid, now
                    self._try_ready(worker)
                case Exited(token, _, status):
                    worker = self._workers[token]
                    worker.max_rss, worker.cpu = event.max_rss, event.cpu
                    worker.said, worker.oom = event.said, event.oom
                    self._died(worker, status, now)
                case ForkFailed(token, message):
                    self.trouble = message
                    self._died(self._workers[token], 1, now)
                case Failed(message, _):
                    self.failure = message
                case Gone():
                    self._template_died(now)

    def _template_died(self, now: float) -> None:
        """All workers are dead with it. Start over, within the budget."""
        self._poller.unregister(self._forkserver.fileno())
        self._forkserver.close()
        for worker in self.all():
            if worker.status is None:
                self._bury(worker, -signal.SIGKILL)
        self._wanted.clear()
        self._leaving.clear()
        if self.failure is None and not self._stopping:
            self._relaunch_later(now)

    def _relaunch_later(self, now: float) -> None:
        self._budget.note(now)
        self._relaunch = now + self._budget.pause(now)

    def _died(self, worker: Worker, status: int, now: float) -> None:
        self._bury(worker, status)
        if status == UNFIT and not worker.ready and self.failure is None:
            self.failure = "a worker could not be set up"
        leaving = self._leaving.pop(worker.token, None)
        if self._stopping or self.failure is not None:
            return
        if leaving is None:
            self.restarts += 1
        if self.alive + len(self._wanted) >= self.wanted:
            return
        pause = 0.0
        if not worker.finished and not worker.running:
            if not worker.stopping:
                self._budget.note(now)
            pause = self._budget.pause(now)
        if pause:
            self._wanted[worker.slot] = now + pause
        else:
            self._fork(worker.slot, now)

    def _bury(self, worker: Worker, status: int) -> None:
        worker.running = {slot.call: slot for slot in self._scoreboard.running(worker.slot)}
        worker.status = status
        if not worker.ready:
            self.starting -= 1
        self._on_death(worker)

    # -- time ---------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When, on the monotonic clock, to call `tick` at the latest."""
        if not self.starting and not self._wanted and not self._leaving and self._relaunch is None:
            return None
        times = [*self._wanted.values(), *self._leaving.values()]
        if self._relaunch is not None:
            times.append(self._relaunch)
        if self.starting:
            times += [worker.since + START_TIMEOUT for worker in self._hatching()]
        return min(times, default=None)

    def tick(self, now: float, kill: Callable[[Worker], None]) -> None:
        """Start what is to be started now, and have those killed that take too long."""
        if self._relaunch is not None and self._relaunch <= now:
            self._relaunch = None
            try:
                self._launch(now)
            except OSError:  # out of processes, memory or descriptors
                self._relaunch_later(now)
        if self._wanted:
            for slot in [slot for slot, when in self._wanted.items() if when <= now]:
                del self._wanted[slot]
                self._fork(slot, now)
        if self._leaving:
            for token in [token for token, latest in self._leaving.items() if latest <= now]:
                del self._leaving[token]
                kill(self._workers[token])
        if self.starting:
            for worker in self._hatching():
                if now - worker.since >= START_TIMEOUT:
                    kill(worker)

    def _hatching(self) -> list[Worker]:
        """The workers that run and have not said READY. Loading the modules, before the first fork, may
        take as long as it takes.
        """
        return [
            worker
            for worker in self._workers.values()
            if worker.pid and not worker.ready and not worker.killed and worker.status is None
        ]
