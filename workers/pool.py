"""The engine: worker processes, the socket to them, and the dispatcher, behind one descriptor.

    submit(call) --> Dispatcher --assign--> ROUTER ==ipc==> DEALER  worker 1..N
                        ^                     |                     (forked by the fork server)
    process_events() <--+---- answers --------+
                        +---- deaths, time -- fork server, scoreboard

Whoever drives it polls `fileno()`, calls `process_events()` when that is readable, at `next_deadline()`
and after submitting, and gets the outcomes. Nothing here blocks, has a thread, or knows an event loop.

When a worker dies, its answers may still be on their way through the socket's buffers. A new worker is
forked at once, but the death is settled only when ZeroMQ says that the peer's pipe is at its end: then
everything that it said has been read.
"""

from __future__ import annotations

import contextlib
import functools
import math
import select
import time
from collections.abc import Callable, Sequence

import msgspec

from workers.assigning import OVERLAP
from workers.calls import READY, RETURNED, STOP, Answer, Call, Failure, Outcome, StreamPlace, cancelling
from workers.dispatcher import Dispatcher, Doom, Plea, Running
from workers.ending import Graces
from workers.errors import ConfigError, WorkerLost
from workers.exchange import Exchange
from workers.memory import Gauges
from workers.poolview import CallInfo, WorkerInfo, under_way, worker_info
from workers.processes import OnTrial, Processes
from workers.receipts import worker_lost
from workers.router import Router
from workers.scaling import Load, Scaler
from workers.scoreboard import Slot
from workers.workerloop import Settings
from workers.workerprocess import Worker

_LAST_WORDS = 0.5
"""Seconds to wait for a dead worker's pipe to end; it takes a few milliseconds under load."""

_POLL_LAST_WORDS = 0.001

_BURST = 0.01
"""Seconds after which `process_events` returns what it has, though there is more: its driver has others
to serve."""

_LATE = 0.05
"""Seconds behind a deadline from which on we count as having been stopped."""

_CATCH_UP = 0.02
"""Seconds that answers get to arrive after a stop, before deadlines that passed meanwhile are looked at."""

_answers = msgspec.msgpack.Decoder(list[Answer])
_encode = msgspec.msgpack.Encoder().encode


class Pool:
    """Runs calls in `workers` processes which have imported `modules`; with `min_workers`, in so many, and up
    to `workers` while there is work for them.

    `paths` go before `sys.path` there. A result over `max_result` bytes is a `too_large` error. Streams are
    made at `place`, and `allow_hook` widens where those may lead that requests bring. `url` is where tasks
    send what they submit themselves (None: where any program would). A worker is replaced when it has run
    `max_tasks_per_child` calls, or when its memory has grown by `max_worker_growth` bytes (None: never). Of
    calls that overlap, those of coroutine tasks, it runs `coroutines` at a time. One whose call has passed
    its limit, or is cancelled, gets `graces` to end. With `capture`, receipts tell what workers printed,
    which a template passes on. `target` is what a worker runs, and `setup` is for workers of another kind
    than ours.

    `claim`, if set, is asked of each call whenever it is handed to a worker: False gives it up. `exchange`,
    if set before the start, gives the workers descriptors of shared memory, and is told whose is free.

    `failure` is set when the modules cannot be imported in a worker: nothing runs any more then, and all
    calls end with WorkerLost.
    """

    def __init__(
        self,
        modules: Sequence[str],
        paths: Sequence[str] = (),
        *,
        workers: int,
        min_workers: int | None = None,
        max_result: int = 2**26,
        place: StreamPlace | None = None,
        allow_hook: Sequence[str] = (),
        url: str | None = None,
        max_tasks_per_child: int | None = None,
        max_worker_growth: int | None = None,
        coroutines: int = OVERLAP,
        target: str = "workers.worker:main",
        setup: bytes = b"",
        graces: Graces | None = None,
        capture: bool = True,
    ) -> None:
        if workers < 1:
            raise ConfigError(f"a pool needs at least one worker, not {workers}")
        self.least = workers if min_workers is None else min_workers
        if not 1 <= self.least <= workers:
            raise ConfigError(f"a pool of {workers} workers has 1 at least, and not {self.least}")
        if max_tasks_per_child is not None and max_tasks_per_child < 1:
            raise ConfigError(f"a worker needs at least one call to run, not {max_tasks_per_child}")
        if max_worker_growth is not None and max_worker_growth < 1:
            raise ConfigError(f"a worker needs some memory to grow by, not {max_worker_growth} bytes")
        if coroutines < 1:
            raise ConfigError(f"a worker needs at least one coroutine to run, not {coroutines}")
        self.coroutines = coroutines
        self.modules = tuple(modules)
        self.paths = tuple(paths)
        self.size = workers
        self.max_result = max_result
        self.place = place or StreamPlace()
        self.allow_hook = tuple(allow_hook)
        self.url = url
        self.target = target
        self.setup = setup
        self.claim: Callable[[Call], bool] | None = None
        self.exchange: Exchange | None = None
        self.dispatcher = Dispatcher(max_tasks=max_tasks_per_child, overlap=coroutines)
        self._processes = Processes(
            workers,
            wanted=self.least,
            modules=self.modules,
            paths=self.paths,
            places=coroutines,
            target=target,
            settings=self._settings,
            fds=self._fds,
            on_ready=self._worker_ready,
            on_death=self._worker_died,
            graces=graces or Graces(),
            capture=capture,
        )
        self.max_worker_growth = max_worker_growth
        self._gauges = Gauges()
        self._scaler = Scaler(self.least, workers, time.monotonic()) if self.least < workers else None
        self._dead: dict[int, tuple[Worker, float]] = {}
        self._stopping = False
        self._catch_up: float | None = None
        self._unfinished = False
        self._resources = contextlib.ExitStack()

    def __repr__(self) -> str:
        calls = self.dispatcher
        return f"<Pool {self.ready} workers, {calls.queued} queued, {calls.assigned} assigned>"

    # -- life ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Launch the processes; returns at once. `ready` counts those that can take calls. Raises OSError,
        and can then be called again.
        """
        with contextlib.ExitStack() as made:
            self._router = Router()
            made.callback(self._router.close)
            self._poller = select.epoll()
            made.callback(self._poller.close)
            self._poller.register(self._router.fileno(), select.EPOLLIN)
            self._processes.start([self._router.folder])
            made.callback(self._gauges.close)
            made.callback(self._processes.close)
            self._poller.register(self._processes.fileno(), select.EPOLLIN)
            self._resources = made.pop_all()

    def close(self) -> None:
        """Kill all workers and their descendants, and remove what was made. Calls without an outcome are
        forgotten.
        """
        self._stopping = True
        self._resources.close()

    def stop_workers(self) -> None:
        """Let the workers finish what they hold and exit; none is replaced. What is queued stays queued."""
        self._stopping = True
        self._processes.stop()
        for worker in self._processes.all():
            worker.stopping = True
            self.dispatcher.retire(worker.token)
            if worker.ready:
                self._send(worker, STOP)
            else:
                self._kill(worker)

    def renew(self, modules: Sequence[str], paths: Sequence[str], told: OnTrial) -> None:
        """Load `modules` as they are now, for workers that take the places of those that there are. `told` is
        told when a first one is ready, which `accept` or `reject` must follow, or why there is none.
        """
        self._processes.renew(modules, paths, told, time.monotonic())

    def accept(self) -> bool:
        """Go on with the new workers: for each, an old one ends when it has finished what it holds. False if
        there are none any more.
        """
        return self._processes.accept(time.monotonic())

    def reject(self) -> None:
        """Go on with the old workers."""
        self._processes.reject(time.monotonic())

    @property
    def failure(self) -> str | None:
        """Why there can be no worker; None if there can."""
        return self._processes.failure

    @property
    def restarts(self) -> int:
        """Workers that have died and were replaced."""
        return self._processes.restarts

    @property
    def wanted(self) -> int:
        """Workers that there should be now."""
        return self._processes.wanted

    @property
    def ready(self) -> int:
        """Workers that can take calls."""
        return self._processes.ready

    @property
    def alive(self) -> int:
        """Worker processes that have not been seen dead."""
        return self._processes.alive

    @property
    def trouble(self) -> str | None:
        """Why processes could not be forked lately, such as a want of descriptors."""
        return self._processes.trouble

    @property
    def healthy(self) -> bool:
        """False while workers die so early and often that there is no sense in taking work."""
        return self._processes.healthy

    def workers(self) -> list[WorkerInfo]:
        """All worker processes, for operators."""
        now = time.monotonic()
        return [self._info(worker, now) for worker in self._processes.all() if worker.status is None]

    def _info(self, worker: Worker, now: float) -> WorkerInfo:
        """Of what it runs, without the calls that are given up."""
        slots = self._processes.running(worker)
        calls = [(self.dispatcher.call(slot.call), slot) for slot in slots]
        running = [under_way(call, slot, now) for call, slot in calls if call is not None]
        return worker_info(worker, self.dispatcher.load(worker.token), running)

    def look(self, call: Call) -> CallInfo:
        """How far a call is that has not ended."""
        call = call.run or call
        return under_way(call, self._slot_of(call.number), time.monotonic())

    def _slot_of(self, number: int) -> Slot | None:
        """The slot of a call that runs, or of the run that it shares."""
        number = self.dispatcher.run(number)
        holder = self.dispatcher.holder(number)
        worker = None if holder is None else self._processes.get(holder)
        return None if worker is None else self._processes.slot_of(worker, number)

    # -- the engine's three verbs -------------------------------------------------------------------

    def submit(self, call: Call) -> int:
        """Queue a call; it is sent at the next `process_events`. Returns its number."""
        return self.dispatcher.submit(call)

    def cancel(self, number: int) -> Outcome | None:
        """Give up a call. The worker of a running one is ended, but if it overlaps others it is cancelled
        there; its outcome comes later.
        """
        now = time.monotonic()
        what = self.dispatcher.cancel(number, now, self._running_of(number))
        if isinstance(what, Outcome):
            return what
        if what is not None:
            self._carry_out(what)
        return None

    def fileno(self) -> int:
        """Readable when `process_events` has something to do."""
        return self._poller.fileno()

    def next_deadline(self) -> float | None:
        """When, on the monotonic clock, to call `process_events` at the latest."""
        if self._unfinished or self._router.sent:
            return 0.0
        first = self._next_due()
        other = self._processes.next_deadline()
        if first is None or (other is not None and other < first):
            first = other
        if self._dead:
            words = time.monotonic() + _POLL_LAST_WORDS
            first = words if first is None else min(first, words)
        if self._scaler is not None and (look := self._next_look(self._scaler)) < math.inf:
            first = look if first is None else min(first, look)
        return first

    def _next_due(self) -> float | None:
        due = self.dispatcher.next_deadline()
        return due if due is None or self._catch_up is None else max(due, self._catch_up)

    def process_events(self) -> list[Outcome]:
        """Do all that can be done now; returns the calls that have ended."""
        outcomes: list[Outcome] = []
        router = self._router
        self._unfinished = False
        for descriptor, _ in self._poller.poll(0):
            if descriptor == self._processes.fileno():
                self._processes.events()
        now = begun = time.monotonic()
        while True:
            router.sent = False
            self._receive(now, outcomes)
            if self._dead:
                self._settle_deaths(now, outcomes)
            self._tick(now, outcomes)
            if self._catch_up is None:
                batches = self.dispatcher.assign(now)
                if self.dispatcher.gauged:
                    self._gauge()
                for token, calls in batches:
                    if self.claim is not None:
                        calls = self._claimed(token, calls, now, outcomes)
                    if calls:
                        self._send_to(token, _encode([call.job() for call in calls]))
            if self.dispatcher.spent:
                self._replace_spent(now)
            if self._scaler is not None and now >= self._next_look(self._scaler):
                self._scale(self._scaler, now)
            if self.dispatcher.shared:
                outcomes += self.dispatcher.shared
                self.dispatcher.shared.clear()
            # A send may have eaten the descriptor's edge, so ask the socket itself before leaving.
            if not router.sent or not router.readable():
                router.sent = False
                return outcomes
            now = time.monotonic()
            if now - begun > _BURST:
                self._unfinished = True
                return outcomes

    def _claimed(self, token: int, calls: list[Call], now: float, outcomes: list[Outcome]) -> list[Call]:
        """The calls that are still wanted; a worker never hears of the others."""
        assert self.claim is not None
        wanted = []
        for call in calls:
            if self.claim(call):
                wanted.append(call)
                continue
            number = call.number
            outcome = self.dispatcher.cancel(number, now, Running(0, 0.0))
            if isinstance(outcome, Outcome):
                outcomes.append(outcome)
            self.dispatcher.answered(token, Answer(number, 0.0, None, Failure(RETURNED, "")), now)
        return wanted

    # -- the socket ---------------------------------------------------------------------------------

    def _receive(self, now: float, outcomes: list[Outcome]) -> None:
        router = self._router
        while router.readable():
            if self._processes.starting:
                # To know who has sent it costs, so it is asked for while it matters.
                self._message(*router.receive_from(), now, outcomes)
            else:
                identity, message = router.receive()
                self._message(identity, message, 0, now, outcomes)

    def _message(
        self, identity: bytes, message: bytes, peer_pid: int, now: float, outcomes: list[Outcome]
    ) -> None:
        worker = self._processes.speaker(identity)
        if worker is None:
            return
        if not worker.ready:
            if message == READY:
                self._processes.greet(worker, peer_pid)
            return
        try:
            answers = _answers.decode(message)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            self._kill(worker)  # it has lost its mind; the fork server will tell of its death
            return
        self._processes.worked(worker, len(answers))
        for answer in answers:
            outcome = self.dispatcher.answered(worker.token, answer, now)
            if outcome is not None:
                outcomes.append(outcome)
            elif self.exchange is not None and answer.result is not None:
                self.exchange.unclaimed(answer.result)
            if answer.result is None and not answer.ends:
                worker.finished -= 1

    def _worker_ready(self, worker: Worker) -> None:
        if self._stopping:
            self._send(worker, STOP)
        else:
            now = time.monotonic()
            self.dispatcher.worker_ready(worker.token, now)
            outdated = {old.token: old for old in self._processes.outdated()}
            if outdated and (token := self.dispatcher.wind_up(outdated)) is not None:
                self._processes.succeed(outdated[token], now)

    def _send_to(self, token: int, message: bytes) -> None:
        worker = self._processes.get(token)
        assert worker is not None, "the dispatcher has no worker that is settled"
        self._send(worker, message)

    def _send(self, worker: Worker, message: bytes) -> None:
        if not self._router.send(worker.identity, message):
            # It is dead, or as good as dead; the fork server will say so, and what it held is settled.
            self._kill(worker)

    def _replace_spent(self, now: float) -> None:
        """Let workers exit that have run what they may; others take their places when they have."""
        for token in self.dispatcher.spent:
            worker = self._processes.get(token)
            if worker is not None and worker.status is None:
                self._processes.leave(worker, now)
                self._send(worker, STOP)
        self.dispatcher.spent.clear()

    # -- processes ----------------------------------------------------------------------------------

    def _next_look(self, scaler: Scaler) -> float:
        return math.inf if self._stopping else scaler.next_look(self.wanted, self.dispatcher.queued)

    def _scale(self, scaler: Scaler, now: float) -> None:
        """Have as many workers as there is work for."""
        waiting, seconds = self.dispatcher.backlog()
        spare = self.dispatcher.idle + self._processes.starting
        wanted = scaler.look(now, Load(self.wanted, spare, waiting, seconds))
        if wanted > self.wanted and self.healthy:
            self._processes.grow(wanted, now)
        elif wanted < self.wanted:
            for token in self.dispatcher.dismiss(self.wanted - wanted):
                worker = self._processes.get(token)
                if worker is not None and worker.status is None:
                    self._processes.dismiss(worker, now)
                    self._send(worker, STOP)

    def _gauge(self) -> None:
        """What workers have now is not the calls' that they are about to get."""
        for token in self.dispatcher.gauged:
            worker = self._processes.get(token)
            if worker is not None and worker.status is None:
                self._gauges.start(token, worker.pid)
        self.dispatcher.gauged.clear()

    def _settings(self, worker: Worker) -> bytes:
        settings = Settings(
            endpoint=self._router.endpoint,
            identity=worker.identity,
            slot=worker.slot,
            slots=self.size,
            places=self.coroutines,
            modules=worker.generation.modules,
            paths=worker.generation.paths,
            max_result=self.max_result,
            place=self.place,
            allow_hook=self.allow_hook,
            url=self.url,
            setup=self.setup,
            max_growth=self.max_worker_growth,
        )
        return _encode(settings)

    def _fds(self, worker: Worker) -> list[int]:
        return [] if self.exchange is None else self.exchange.fds(worker.identity)

    def _worker_died(self, worker: Worker) -> None:
        """What it held is settled when its last words have been read."""
        self.dispatcher.retire(worker.token)
        self._gauges.forget(worker.token)
        self._dead[worker.token] = (worker, time.monotonic() + _LAST_WORDS)

    def _settle_deaths(self, now: float, outcomes: list[Outcome]) -> None:
        silent = [
            w
            for w, latest in self._dead.values()
            if now >= latest or not self._router.is_connected(w.identity)
        ]
        if silent:
            # What came in between the last look and the end of the pipe.
            self._receive(now, outcomes)
        for worker in silent:
            del self._dead[worker.token]
            self._processes.forget(worker)
            if self.exchange is not None:
                self.exchange.died(worker.identity)
            lost = functools.partial(worker_lost, worker=worker, now=now)
            outcomes += self.dispatcher.worker_lost(worker.token, worker.running, lost)

    # -- time ---------------------------------------------------------------------------------------

    def _tick(self, now: float, outcomes: list[Outcome]) -> None:
        if self._is_due(now):
            ended, dooms = self.dispatcher.due(now, self._running_of, self._gauges.taken)
            outcomes += ended
            for doom in dooms:
                self._carry_out(doom)
        self._processes.tick(now, self._kill)
        if self.failure is not None and self.dispatcher.queued:
            outcomes += self.dispatcher.abandon(WorkerLost(f"no worker can be started: {self.failure}"))

    def _is_due(self, now: float) -> bool:
        """Whether to look at what time brings. After a stop of this process not at once, as its timers
        then fire before answers are seen that came in time.
        """
        due = self.dispatcher.next_deadline()
        if due is None or due > now:
            self._catch_up = None
            return False
        if self._catch_up is None and now - due > _LATE:
            self._catch_up = now + _CATCH_UP
        if self._catch_up is not None and now < self._catch_up:
            return False
        self._catch_up = None
        return True

    def _running_of(self, number: int) -> Running:
        slot = self._slot_of(number)
        if slot is None:
            return Running(0, 0.0)
        # Whatever a worker writes there, no limit is so far away that no timer can be set for it.
        return Running(slot.call, min(slot.started, time.monotonic()))

    def _carry_out(self, doom: Doom | Plea) -> None:
        worker = self._processes.get(doom.worker)
        if worker is None:
            return
        if isinstance(doom, Plea):
            self._send(worker, cancelling([doom.call]))
        else:
            worker.stopping = True
            if doom.at_once:
                self._kill(worker)
            elif self._processes.end(worker):
                self.dispatcher.retire(worker.token)

    def _kill(self, worker: Worker) -> None:
        if self._processes.kill(worker):
            self.dispatcher.retire(worker.token)
