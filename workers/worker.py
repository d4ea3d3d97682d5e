"""The child process: takes calls from its socket, runs them, answers in batches.

It speaks first (`READY`), runs what it is sent one by one, and marks in its slot of the scoreboard what
it runs. Answers wait for each other only while the calls are tiny, never behind one that is expected to
last. If one lasts all the same, a helper thread sends the finished answers and gives back the calls that
wait behind it; it cannot while C code holds the GIL. Calls of coroutine tasks overlap instead, in
`workers.coroutines`; meanwhile there is nothing for the helper to do.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

import msgspec
import zmq

from acomm.egress import Policy
from workers import coroutines, memory, memorylimit, softlimit, streaming
from workers.calls import ABANDONED, CANCEL, OUTGROWN, READY, RETURNED, STOP, Answer, Failure, Job
from workers.coroutines import Overlap
from workers.errors import BadArgs, SoftTimeout, TooLarge
from workers.forked import Terminated, end_copy
from workers.registry import Registry, Task, encode_result
from workers.running import Context, enter, leave
from workers.scoreboard import Scoreboard, SlotWriter
from workers.softlimit import limited, limited_coroutine
from workers.streaming import ConsumerLeft, NoConsumer, Place, Producer

HOLD = 0.0002
"""Seconds that a finished answer may wait for others: sending one costs about a tenth of it."""

RELIEF = 0.005
"""Seconds that a call runs before others, finished or not begun, stop waiting for it; as long as the
supervisor waits before it sends elsewhere."""

MAX_MESSAGE, MAX_TRACEBACK = 2000, 20_000
"""Characters of an exception's text that travel."""

_LINGER_MS = 2000
_OWN_FILES = (
    __file__,
    coroutines.__file__,
    memorylimit.__file__,
    softlimit.__file__,
    streaming.__file__,
)

_jobs = msgspec.msgpack.Decoder(list[Job])
_encode = msgspec.msgpack.Encoder().encode


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
    place: Place
    allow_hook: tuple[str, ...] = ()
    url: str | None = None
    setup: bytes = b""  # for workers of another kind
    max_growth: int | None = None


def main(config: bytes, fds: list[int]) -> None:
    """The forked worker's whole life. `fds` holds the scoreboard."""
    settings = msgspec.msgpack.decode(config, type=Settings)
    if settings.url is not None:
        os.environ["ACOMM_URL"] = settings.url  # what a task submits goes to whoever runs it
    registry = Registry.from_modules(settings.modules, settings.paths)
    policy = Policy(settings.allow_hook)

    def make(socket: zmq.Socket[bytes], slot: SlotWriter) -> Worker:
        return Worker(registry, socket, slot, settings.max_result, settings.place, policy)

    serve(settings, fds, make)


def serve(
    settings: Settings, fds: list[int], make: Callable[[zmq.Socket[bytes], SlotWriter], Worker]
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


class Worker:
    """Runs calls until it is told to stop."""

    def __init__(
        self,
        registry: Registry,
        socket: zmq.Socket[bytes],
        slot: SlotWriter,
        max_result: int,
        place: Place,
        policy: Policy,
    ) -> None:
        self._socket = socket
        self._slot = slot
        self._max_result = max_result
        self._place = place
        self._policy = policy
        self._pid = os.getpid()
        tasks = {name: Runnable(task, self._run_coroutine) for name, task in registry.items()}
        self._find: Callable[[str], Runnable | None] = tasks.get
        self._overlapping = {name: tasks[name] for name, task in registry.items() if task.overlaps}
        self._overlap: Overlap | None = None
        self.more_slots: Callable[[], list[SlotWriter]] = list  # for calls that overlap, besides the one
        self._runner: asyncio.Runner | None = None
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
                if self._overlapping and message.startswith(CANCEL):
                    continue  # what is to be cancelled has ended
                batch = _jobs.decode(message)
                if self._overlapping and batch and batch[0].task in self._overlapping:
                    self._run_overlapping(batch)
                else:
                    self._run_all(batch)
                self._look_grown()
        except Terminated:
            with self._lock:
                self._begun = 0.0  # the helper leaves the socket alone
                self._flush()
            raise
        finally:
            self._stopping = True
            self._batch.set()
            if self._runner is not None:
                self._runner.close()

    def terminate(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM: what runs must stop now, and nothing else is begun. Raised once: a task that cleans up is
        not interrupted again.
        """
        if not self._terminated:
            self._terminated = self._stopping = True
            self._jobs.clear()
            if self._overlap is None or self._overlap.terminate():
                raise Terminated

    def _look_grown(self) -> None:
        """Between batches: ask, once, to be replaced if this process has grown too much."""
        if self._outgrown is not None and self._outgrown():
            self._outgrown = None
            self._socket.send(_encode([Answer(0, 0.0, None, Failure(OUTGROWN, ""))]))

    def _run_overlapping(self, batch: list[Job]) -> None:
        if self._overlap is None:
            slots = [self._slot, *self.more_slots()]
            find = self._overlapping.get
            self._overlap = Overlap(
                self._socket, slots, find, failure_of, self._max_result, self._policy, self._look_grown
            )
        self._jobs.extend(batch)
        goes_on = self._overlap.run(self._event_loop(), self._jobs)
        if self._terminated:
            raise Terminated
        self._stopping = not goes_on
        self._end_loop()
        if self._jobs:
            self._run_all([])

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

    # -- one call

    def _answer(self, job: Job, runnable: Runnable | None) -> Answer:
        if runnable is None:
            failure = Failure("unknown_task", f"the worker does not know the task {job.task}")
            return Answer(job.number, 0.0, None, failure)
        context = Context(job, self._slot, self._policy)
        enter(context)
        try:
            args, kwargs = runnable.bind(job.args)
            if runnable.streams:
                self._stream(job, context, runnable, args, kwargs)
                return Answer(job.number, 0.0, None)
            result = encode_result(runnable.call(*args, **kwargs), self._max_result)
        except (TooLarge, ConsumerLeft, NoConsumer) as error:
            return Answer(job.number, 0.0, None, Failure(error.code, error.message))
        except BaseException as error:  # SystemExit too: a task ends itself, never its worker
            if os.getpid() != self._pid:
                end_copy(error)
            if isinstance(error, Terminated):
                raise
            return Answer(job.number, 0.0, None, failure_of(error, runnable.retry_on))
        finally:
            leave(context)
        return Answer(job.number, 0.0, result)

    def _stream(
        self, job: Job, context: Context, runnable: Runnable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Run a generator once somebody has come for what it yields."""

        def left() -> None:
            context.cancelled = True

        def abandoned() -> None:
            self._tell(Answer(job.number, 0.0, None, Failure(ABANDONED, "")))

        uid = None if job.origin is None else job.origin.uid
        with Producer(self._place, uid, left, abandoned) as producer:
            self._tell(Answer(job.number, 0.0, None, stream=producer.url))
            producer.accept()
            items = runnable.call(*args, **kwargs)
            if runnable.is_async:
                self._run_coroutine(producer.send_async_items, items)
            else:
                producer.send_items(items)
            producer.finish()

    def _tell(self, answer: Answer) -> None:
        """Answer at once, while the call runs."""
        with self._lock:
            if self._begun:
                self._answers.append(answer)
                self._flush()

    def _run_coroutine(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._event_loop()
        assert self._runner is not None
        try:
            # The runner's own context is of its first call.
            return self._runner.run(function(*args, **kwargs), context=contextvars.copy_context())
        finally:
            self._end_loop()

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.get_loop()

    def _end_loop(self) -> None:
        """End the event loop if something has been left there; it ends with it."""
        runner = self._runner
        if runner is not None and asyncio.all_tasks(runner.get_loop()):
            self._runner = None
            runner.close()


class Runnable:
    """A task as the worker uses it: everything looked up once."""

    __slots__ = ("bind", "call", "expected", "function", "is_async", "retry_on", "streams")

    def __init__(self, task: Task[..., Any], run_coroutine: Callable[..., Any]) -> None:
        function = task.function
        if task.soft_timeout is not None:
            limit = limited_coroutine if task.is_coroutine else limited
            function = limit(function, task.name, task.soft_timeout)
        if task.max_memory is not None:
            function = memorylimit.limited(function, task.name, task.max_memory)
        self.bind = task.bind
        self.retry_on: tuple[type[BaseException], ...] = task.retry.on if task.retry else ()
        self.expected = math.inf
        self.function = function
        self.call: Callable[..., Any] = function
        self.streams = task.streams
        self.is_async = task.streams and inspect.isasyncgenfunction(function)
        if task.is_coroutine:
            self.call = lambda *args, **kwargs: run_coroutine(function, *args, **kwargs)

    def learn(self, seconds: float) -> None:
        known = self.expected
        self.expected = seconds if known == math.inf else known + (seconds - known) * 0.1


def failure_of(error: BaseException, retry_on: tuple[type[BaseException], ...]) -> Failure:
    """An exception as text. It may be hostile: its `str` may raise, whatever it likes."""
    name = type(error).__name__[:200]
    try:
        text = _sound(str(error)[:MAX_MESSAGE])
    except BaseException as why:
        text = f"<its text cannot be had: {type(why).__name__[:200]}>"
    try:
        trail = error.__traceback__
        while trail is not None and trail.tb_frame.f_code.co_filename in _OWN_FILES:
            trail = trail.tb_next
        trace = _sound("".join(traceback.format_exception(type(error), error, trail))[-MAX_TRACEBACK:])
    except BaseException:
        trace = None
    if isinstance(error, BadArgs):
        return Failure(error.code, text, name, trace)
    if isinstance(error, SoftTimeout):
        return Failure(error.code, text, name, trace, isinstance(error, retry_on))
    message = f"{name}: {text}" if text else name
    return Failure("task_error", message, name, trace, isinstance(error, retry_on))


def _sound(text: str) -> str:
    """Text that can be encoded: lone surrogates replaced."""
    return str.encode(text, "utf-8", "replace").decode()
