"""The worker processes of a pool: how many there are, their births, deaths and replacements.

Whoever has them polls `fileno()` and calls `events()` when that is readable and `tick()` at
`next_deadline()`; nothing here blocks. It is told what happens through two functions: `on_ready(worker)`, a
process that may be given work, and `on_death(worker)`, one whose status is known.

A worker is ready when it has said so over the pool's socket *and* the fork server has told its pid, and the
kernel says that the one is the other. A dead one is replaced at once, unless deaths follow each other so
early that there is no sense in it (`workers.restarts`).

New code comes with a new generation of them (`workers.generations`). It is on trial until one of its workers
is ready; if it is accepted then, it is what workers are forked from, some more of them than there should be,
as long as past ones are left: whoever has the processes lets a past one finish for each that is ready, and
says so by `succeeded`. A past template is told to exit when its last worker is gone.
"""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable, Sequence

from workers.calls import UNFIT
from workers.ending import Graces
from workers.errors import AcommError, ConfigError, Conflict, ShuttingDown
from workers.forkserver import Event, Exited, Failed, Forked, ForkFailed, Gone
from workers.generations import Generation, dues
from workers.restarts import RestartBudget
from workers.scoreboard import Slot
from workers.workerprocess import Worker

START_TIMEOUT = 60.0
"""Seconds from fork to READY; a worker that takes longer is killed and counted as dead."""

SPARE_PART = 4
"""While workers are replaced by new code's, one of so many is started before its predecessor has left."""

LEAVE_TIMEOUT = 5.0
"""Seconds that a worker whose time is up has to exit by itself: it may have exit handlers, or threads."""

OnTrial = Callable[[AcommError | None], None]
"""Told that a generation on trial has a worker that is ready, or why it has none."""


def _ignore(_: AcommError | None) -> None:
    """Nobody is interested."""


class Processes:
    """Worker processes, `wanted` of them and `size` at most, that run `target` with what `settings(worker)`
    gives, forked from a template that has imported `modules`; `paths` go before `sys.path` there, and
    `cleanup` is removed at the end. `fds(worker)` are descriptors that it gets after the scoreboard's, which
    has `places` in each slot.

    `graces` are what a worker gets that is ended for its call; `capture` is ForkServer's.

    `failure` is set when there can be no worker: the modules cannot be imported, or it cannot be set up.
    """

    def __init__(
        self,
        size: int,
        *,
        wanted: int,
        modules: Sequence[str],
        paths: Sequence[str],
        places: int,
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
        self._modules = modules
        self._paths = paths
        self._places = places
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
        self._wanted: list[float] = []  # when to fork
        self._leaving: dict[int, float] = {}  # the workers that were told to exit, and when to kill them
        self._tokens = 0
        self._stopping = False
        self._relaunch: float | None = None  # when to start a new fork server
        self._trial: Generation | None = None
        self._past: list[Generation] = []
        self._ending: list[Generation] = []
        self._current: Generation | None = None
        self._on_trial: OnTrial = _ignore

    def __repr__(self) -> str:
        return f"<Processes {len(self._workers)} of {self.size}, {self.starting} starting>"

    # -- life ---------------------------------------------------------------------------------------

    def start(self, cleanup: Sequence[str]) -> None:
        """Launch them; returns at once."""
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
        for generation in (generations := self._generations()):
            generation.server.dismiss()  # all at once, as each takes its time
        for generation in generations:
            generation.close()
        self._poller.close()

    def stop(self) -> None:
        """Replace none any more."""
        self._stopping = True
        self._wanted.clear()
        self._relaunch = None
        self._reject(ShuttingDown("the supervisor is stopping"), time.monotonic())

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
            return worker.generation.scoreboard.running(worker.slot)
        return list(worker.running.values())

    def slot_of(self, worker: Worker, call: int) -> Slot | None:
        """The slot of a call, if it runs that, or ran it when it died."""
        if worker.status is None:
            return worker.generation.scoreboard.find(worker.slot, call)
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
            if worker.generation is self._trial:
                self._on_trial(None)
            else:
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
        self.wanted = wanted
        self._fill(now)

    def dismiss(self, worker: Worker, now: float) -> None:
        """As `leave`, and have one less of them from now on."""
        self.wanted -= 1
        self.leave(worker, now)

    def kill(self, worker: Worker) -> bool:
        """Have it killed, with its descendants; False if that has been done or cannot be done yet."""
        if worker.status is not None or not worker.pid or worker.killed:
            return False
        worker.killed = True
        worker.generation.server.kill(worker.pid)
        return True

    def end(self, worker: Worker) -> bool:
        """Have it ended in steps, within the graces (`workers.ending`); False as with `kill`."""
        if worker.status is not None or not worker.pid or worker.killed or worker.ended:
            return False
        worker.ended = True
        worker.generation.server.end(worker.pid, self._graces)
        return True

    def forget(self, worker: Worker) -> None:
        """Its death is settled."""
        del self._workers[worker.token], self._by_identity[worker.identity]

    # -- new code -----------------------------------------------------------------------------------

    def renew(self, modules: Sequence[str], paths: Sequence[str], told: OnTrial, now: float) -> None:
        """Try a new generation, with what `modules` have in them now. `told` learns that its first worker is
        ready, which `accept` or `reject` has to follow, or why there is none; then all is as it was. A trial
        that is under way ends for it.
        """
        self._reject(Conflict("a later reload has taken its place"), now)
        self._on_trial = told
        try:
            self._trial = self._generation(modules, paths, [])
            self._fork(self._trial, now)
        except OSError as error:  # out of processes, memory or descriptors
            self._reject(AcommError(f"no new workers can be started: {error.strerror}"), now)

    def accept(self, now: float) -> bool:
        """The generation on trial is the one to fork from now on; False if it is not ready any more."""
        proven = [
            w for w in self._workers.values() if w.generation is self._trial and w.ready and w.status is None
        ]
        if self._trial is None or not proven:
            return False
        past, self._current, self._trial = self._current, self._trial, None
        self._on_trial = _ignore
        self._modules, self._paths = self._current.modules, self._current.paths
        self._current.server.clean(self._cleanup)
        if past is not None:
            past.server.clean([])
            self._past.append(past)
        self.failure = None
        self._relaunch = None
        for worker in proven:
            self._on_ready(worker)
        self._end_past(now)
        self._fill(now)
        return True

    def reject(self, now: float) -> None:
        """The generation on trial is not wanted."""
        self._on_trial = _ignore
        self._reject(Conflict("it was given up"), now)

    def _reject(self, error: AcommError, now: float) -> None:
        told, self._on_trial = self._on_trial, _ignore
        trial, self._trial = self._trial, None
        if trial is not None:
            self._end(trial, now)
        told(error)

    def outdated(self) -> list[Worker]:
        """Workers of past generations that take calls, if there are enough without one of them."""
        able = [w for w in self._workers.values() if w.ready and w.status is None and not w.stopping]
        able = [w for w in able if not w.succeeded and w.generation is not self._trial]
        if len(able) <= self.wanted:
            return []
        return [worker for worker in able if worker.generation is not self._current]

    def succeed(self, worker: Worker, now: float) -> None:
        """A worker has a successor; it gets nothing more."""
        worker.succeeded = True
        self._fill(now)

    def _end_past(self, now: float) -> None:
        """Have those templates exit that have no workers any more."""
        kept = {worker.generation for worker in self._workers.values() if worker.status is None}
        for generation in [generation for generation in self._past if generation not in kept]:
            self._past.remove(generation)
            self._end(generation, now)

    def _end(self, generation: Generation, now: float) -> None:
        generation.end(now)
        self._ending.append(generation)
        for worker in self.all():
            if worker.generation is generation and worker.status is None:
                self._bury(worker, -signal.SIGKILL)

    # -- births and deaths --------------------------------------------------------------------------

    def _generation(self, modules: Sequence[str], paths: Sequence[str], cleanup: Sequence[str]) -> Generation:
        generation = Generation(
            modules,
            paths,
            slots=self.size,
            places=self._places,
            target=self._target,
            cleanup=cleanup,
            capture=self._capture,
        )
        self._poller.register(generation.server.fileno(), select.EPOLLIN)
        return generation

    def _generations(self) -> list[Generation]:
        """All whose templates have not been seen dead."""
        trial = [] if self._trial is None else [self._trial]
        current = [] if self._current is None else [self._current]
        return [*current, *trial, *self._past, *self._ending]

    def _launch(self, now: float) -> None:
        self._current = self._generation(self._modules, self._paths, self._cleanup)
        self._fill(now)

    def _fill(self, now: float) -> None:
        """Fork those that are missing, and while past ones are left to be succeeded, some more."""
        while self._current is not None and self._missing() > 0:
            if not self._fork(self._current, now):
                break

    def _missing(self) -> int:
        if self._current is None or self._relaunch is not None or self._stopping or self.failure is not None:
            return 0
        there = [
            worker
            for worker in self._workers.values()
            if worker.status is None and not worker.succeeded and worker.generation is not self._trial
        ]
        past = sum(worker.generation is not self._current for worker in there)
        spare = min(past, max(1, self.wanted // SPARE_PART))
        return self.wanted + spare - len(there) - len(self._wanted)

    def _fork(self, generation: Generation, now: float) -> bool:
        """Fork one; False if all slots are taken, so that another one's death has to come first."""
        taken = {w.slot for w in self._workers.values() if w.generation is generation and w.status is None}
        slot = generation.free_slot(taken)
        if slot is None:
            return False
        self._tokens += 1
        worker = Worker(self._tokens, generation, slot, now)
        self._workers[worker.token] = self._by_identity[worker.identity] = worker
        self.starting += 1
        generation.scoreboard.clear(slot)
        try:
            fds = [generation.scoreboard.fd, *self._fds(worker)]
            generation.server.fork(worker.token, self._settings(worker), fds)
        except OSError as error:  # out of descriptors
            self.trouble = f"a worker could not be started: {error.strerror}"
            self._died(worker, 1, now)
        return True

    def fileno(self) -> int:
        """Readable when `events` has something to do."""
        return self._poller.fileno()

    def events(self) -> None:
        """See who was born and who has died."""
        now = time.monotonic()
        for generation in self._generations():
            for event in generation.server.events():
                self._event(generation, event, now)
        if self._past:
            self._end_past(now)

    def _event(self, generation: Generation, event: Event, now: float) -> None:
        match event:
            case Forked(token, pid):
                worker = self._workers.get(token)
                if worker is not None and worker.status is None:
                    worker.pid, worker.since = pid, now
                    self._try_ready(worker)
            case Exited(token, _, status):
                worker = self._workers.get(token)
                if worker is not None and worker.status is None:
                    worker.max_rss, worker.cpu = event.max_rss, event.cpu
                    worker.said, worker.oom = event.said, event.oom
                    self._died(worker, status, now)
            case ForkFailed(token, message):
                self.trouble = message
                worker = self._workers.get(token)
                if worker is not None and worker.status is None:
                    self._died(worker, 1, now)
            case Failed(message, _):
                if generation is self._trial:
                    self._reject(ConfigError(f"the new code does not import: {message}"), now)
                elif generation is self._current:
                    self.failure = message
            case Gone():
                self._template_died(generation, now)

    def _template_died(self, generation: Generation, now: float) -> None:
        """All its workers are dead with it. If they are needed, start over, within the budget."""
        if generation is self._trial:
            self._reject(AcommError("the new template died before a worker was ready"), now)
        self._poller.unregister(generation.server.fileno())
        for worker in self.all():
            if worker.generation is generation and worker.status is None:
                self._leaving.pop(worker.token, None)
                self._bury(worker, -signal.SIGKILL)
        generation.close()
        for others in (self._past, self._ending):
            if generation in others:
                others.remove(generation)
        if generation is self._current:
            self._current = None
            self._wanted.clear()
            if self.failure is None and not self._stopping:
                self._relaunch_later(now)
        else:
            self._fill(now)

    def _relaunch_later(self, now: float) -> None:
        self._budget.note(now)
        self._relaunch = now + self._budget.pause(now)

    def _died(self, worker: Worker, status: int, now: float) -> None:
        self._bury(worker, status)
        if worker.generation is self._trial:
            reason = f"the first new worker died with status {status} before it was ready; see its stderr"
            self._reject(AcommError(reason), now)
            return
        if status == UNFIT and not worker.ready and self.failure is None:
            self.failure = "a worker could not be set up"
        leaving = self._leaving.pop(worker.token, None)
        if self._stopping or self.failure is not None:
            return
        if leaving is None:
            self.restarts += 1
        if self._missing() <= 0:
            return
        pause = 0.0
        if not worker.finished and not worker.running:
            if not worker.stopping:
                self._budget.note(now)
            pause = self._budget.pause(now)
        if pause:
            self._wanted.append(now + pause)
        self._fill(now)

    def _bury(self, worker: Worker, status: int) -> None:
        worker.running = {slot.call: slot for slot in worker.generation.scoreboard.running(worker.slot)}
        worker.status = status
        if not worker.ready:
            self.starting -= 1
        self._on_death(worker)

    # -- time ---------------------------------------------------------------------------------------

    def next_deadline(self) -> float | None:
        """When, on the monotonic clock, to call `tick` at the latest."""
        if not self.starting and not self._wanted and not self._leaving and self._relaunch is None:
            return min(dues(self._ending), default=None) if self._ending else None
        times = [*self._wanted, *self._leaving.values(), *dues(self._ending)]
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
            self._wanted = [when for when in self._wanted if when > now]
            self._fill(now)
        if self._leaving:
            for token in [token for token, latest in self._leaving.items() if latest <= now]:
                del self._leaving[token]
                kill(self._workers[token])
        if self._ending:
            for generation in self._ending:
                if generation.due is not None and generation.due <= now:
                    generation.due = None
                    generation.server.kill_template()
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
