"""The child process's loop: takes calls from its socket, has them run, answers in batches.

It speaks first (`READY`), runs what it is sent one by one, and marks in its slot of the scoreboard what
it runs. Answers wait for each other only while the calls are tiny, never behind one that is expected to
last. If one lasts all the same, a helper thread sends the finished answers and gives back the calls that
wait behind it; it cannot while C code holds the GIL.

What a call is, `workers.worker` and `workers.pickledworker` know. This imports little, as that is in every
worker, and in the time until the first one is there.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any, Protocol

import msgspec
import zmq

from workers import memory
from workers.calls import CANCEL, OUTGROWN, READY, RETURNED, STOP, Answer, Failure, Job, StreamPlace
from workers.failures import own_files
from workers.forked import Terminated, end_copy
from workers.scoreboard import Scoreboard, SlotWriter

HOLD = 0.0002
"""Seconds that a finished answer may wait for others: sending one costs about a tenth of it."""

RELIEF = 0.005
"""Seconds that a call runs before others, finished or not begun, stop waiting for it; as long as the
supervisor waits before it sends elsewhere."""

_LINGER_MS = 2000

_jobs = msgspec.msgpack.Decoder(list[Job])
_encode = msgspec.msgpack.Encoder().encode

own_files.add(__file__)


class Settings(msgspec.Struct):
    """What the supervisor tells a new worker."""

    endpoint: str
    identity: bytes
    slot: int
    slots: int
    places: int
    modules: tuple[str, ...]
    paths: tuple[str, ...]
    max_result: int
    place: StreamPlace
    allow_hook: tuple[str, ...] = ()
    url: str | None = None
    setup: bytes = b""  # for workers of another kind
    max_growth: int | None = None


def serve(
    settings: Settings, fds: list[int], make: Callable[[zmq.Socket[bytes], SlotWriter], WorkerLoop]
) -> None:
    """Connect, say READY, and run the worker that `make` makes until it is told to stop."""
    scoreboard = Scoreboard.attach(fds[0], settings.slots, settings.places)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, settings.identity)
    socket.setsockopt(zmq.SNDHWM, 0)  # credit is the limit; a full queue would drop or block
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.connect(settings.endpoint)
    try:
        worker = make(socket, scoreboard.writer(settings.slot))
        if settings.max_growth is not None:
            worker.limit_growth(settings.max_growth)
        worker.more_slots = lambda: scoreboard.more_writers(settings.slot)
        signal.signal(signal.SIGTERM, worker.terminate)
        socket.send(READY)
        worker.run()
    finally:
        socket.close()
        context.term()


class Known(Protocol):
    """What is known of a task: for how many seconds it is expected to run, unless it streams."""

    expected: float
    streams: bool

    def learn(self, seconds: float) -> None: ...


class WorkerLoop:
    """Runs calls until it is told to stop. `find` has what is known of a call's task."""

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        slot: SlotWriter,
        max_result: int,
        find: Callable[[str], Any],
    ) -> None:
        self._socket = socket
        self._slot = slot
        self._max_result = max_result
        self._find: Callable[[str], Known | None] = find
        self._pid = os.getpid()
        self.more_slots: Callable[[], list[SlotWriter]] = list  # for calls that overlap, besides the one
        self._jobs: deque[Job] = deque()
        self._stopping = False
        self._terminated = False
        # The helper uses the socket only under the lock and while `_begun`, the start of what runs, is not
        # 0: outside of a batch it is the main thread's alone.
        self._lock = threading.Lock()
        self._answers: list[Answer] = []
        self._begun = 0.0
        self._batch = threading.Event()
        self._outgrown: Callable[[], bool] | None = None

    # -- what kinds of workers differ in

    def _answer(self, job: Job, known: Any) -> Answer:
        """Run a call, whatever it does. Raises Terminated alone."""
        raise NotImplementedError

    def _run_batch(self, batch: list[Job]) -> None:
        self._run_all(batch)

    def _stops_at_once(self) -> bool:
        """Whether SIGTERM is to raise Terminated now, in what runs."""
        return True

    def _close(self) -> None:
        """It is over."""

    # -- the loop

    def limit_growth(self, most: int) -> None:
        """Ask to be replaced when this process has grown by more than `most` bytes."""
        statm = memory.Statm()
        limit = statm.anonymous() + most

        def outgrown() -> bool:
            if statm.anonymous() <= limit:
                return False
            memory.trim()  # what is free may only not have been given back
            return statm.anonymous() > limit

        self._outgrown = outgrown

    def run(self) -> None:
        """Serve until STOP."""
        threading.Thread(target=self._relieve, name="acomm-relief", daemon=True).start()
        try:
            while not self._stopping and (message := self._socket.recv()) != STOP:
                if not message.startswith(CANCEL):  # else what is to be cancelled has ended
                    self._run_batch(_jobs.decode(message))
                    self._look_grown()
        except Terminated:
            with self._lock:
                self._begun = 0.0  # the helper leaves the socket alone
                self._flush()
            raise
        finally:
            self._stopping = True
            self._batch.set()
            self._close()

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: what runs must stop now, and nothing else is begun. Raised once: a task that cleans up is
        not interrupted again.
        """
        if not self._terminated:
            self._terminated = self._stopping = True
            self._jobs.clear()
            if self._stops_at_once():
                raise Terminated

    def _look_grown(self) -> None:
        """Between batches: ask, once, to be replaced if this process has grown too much."""
        if self._outgrown is not None and self._outgrown():
            self._outgrown = None
            self._socket.send(_encode([Answer(0, 0.0, None, Failure(OUTGROWN, ""))]))

    def _run_all(self, batch: list[Job]) -> None:
        jobs = self._jobs
        jobs.extend(batch)
        if len(jobs) > 1:
            self._batch.set()
        held_since = now = time.monotonic()
        while jobs:
            try:
                job = jobs.popleft()
            except IndexError:  # the helper was faster
                break
            runnable = self._find(job.task)
            if self._answers and (now - held_since > HOLD or runnable is None or runnable.expected > HOLD):
                with self._lock:
                    self._flush()
                held_since = now = time.monotonic()
            self._begun = now
            self._slot.begin(job.number, now)
            answer = self._answer(job, runnable)
            if os.getpid() != self._pid:
                end_copy(None)
            started, now = now, time.monotonic()
            answer.seconds = now - started
            if runnable is not None and not runnable.streams:
                runnable.learn(answer.seconds)
            self._answers.append(answer)
        with self._lock:
            self._begun = 0.0
            self._flush()
        # Only now: if we die in answering, as without descriptors, the call that left us so pays for it.
        self._slot.end()

    def _flush(self) -> None:
        ready = self._answers[:]
        if ready:
            self._socket.send(_encode(ready))
            del self._answers[: len(ready)]  # the main thread may have added one: it does so without the lock

    # -- the helper

    def _relieve(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the task's
        while self._batch.wait() and not self._stopping:
            self._batch.clear()
            begun = self._begun
            time.sleep(RELIEF)
            with self._lock:
                if self._begun:
                    self._batch.set()
                    if self._begun == begun:
                        self._give_back()

    def _give_back(self) -> None:
        """Send what is finished, and return what has not begun, the last first."""
        jobs = self._jobs
        with suppress(zmq.Again):
            while (message := self._socket.recv(zmq.NOBLOCK)) != STOP:
                if not message.startswith(CANCEL):
                    jobs.extend(_jobs.decode(message))
            self._stopping = True
        with suppress(IndexError):
            while True:
                self._answers.append(Answer(jobs.pop().number, 0.0, None, Failure(RETURNED, "")))
        self._flush()

    def _tell(self, answer: Answer) -> None:
        """Answer at once, while the call runs."""
        with self._lock:
            if self._begun:
                self._answers.append(answer)
                self._flush()
