"""The child process: takes calls from its socket, runs them, answers in batches.

It speaks first (`READY`), runs what it is sent one by one, and marks in its slot of the scoreboard what
it runs. Answers wait for each other only while the calls are tiny, never behind one that may be long.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from workers.calls import READY, STOP, Answer, Failure, Job
from workers.errors import AcommError, TooLarge
from workers.registry import Registry, Task, encode_result
from workers.running import enter
from workers.scoreboard import Scoreboard, SlotWriter

HOLD = 0.0002
"""Seconds that a finished answer may wait for others: sending one costs about a tenth of it."""

MAX_TRACEBACK = 20_000
_LINGER_MS = 2000

_jobs = msgspec.msgpack.Decoder(list[Job])
_encode = msgspec.msgpack.Encoder().encode


class Settings(msgspec.Struct):
    """What the supervisor tells a new worker."""

    endpoint: str
    identity: bytes
    slot: int
    slots: int
    modules: tuple[str, ...]
    paths: tuple[str, ...]
    max_result: int


def main(config: bytes, fds: list[int]) -> None:
    """The forked worker's whole life. `fds` holds the scoreboard."""
    settings = msgspec.msgpack.decode(config, type=Settings)
    scoreboard = Scoreboard.attach(fds[0], settings.slots)
    registry = Registry.from_modules(settings.modules, settings.paths)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, settings.identity)
    socket.setsockopt(zmq.SNDHWM, 0)  # credit is the limit; a full queue would drop or block
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, _LINGER_MS)
    socket.connect(settings.endpoint)
    try:
        socket.send(READY)
        Worker(registry, socket, scoreboard.writer(settings.slot), settings.max_result).run()
    finally:
        socket.close()
        context.term()


class Worker:
    """Runs calls until it is told to stop."""

    def __init__(
        self, registry: Registry, socket: zmq.Socket[bytes], slot: SlotWriter, max_result: int
    ) -> None:
        self._socket = socket
        self._slot = slot
        self._max_result = max_result
        self._tasks = {name: Runnable(task, self._run_coroutine) for name, task in registry.items()}
        self._answers: list[Answer] = []
        self._runner: asyncio.Runner | None = None

    def run(self) -> None:
        """Serve until STOP."""
        try:
            while (message := self._socket.recv()) != STOP:
                self._run_all(_jobs.decode(message))
        finally:
            if self._runner is not None:
                self._runner.close()

    def _run_all(self, jobs: list[Job]) -> None:
        now = time.monotonic()
        held_since = now
        for job in jobs:
            runnable = self._tasks.get(job.task)
            if self._answers and (now - held_since > HOLD or runnable is None or runnable.expected > HOLD):
                self._flush()
                held_since = now
            self._slot.begin(job.number, now)
            answer = self._answer(job, runnable)
            self._slot.end()
            started, now = now, time.monotonic()
            answer.seconds = now - started
            if runnable is not None:
                runnable.learn(answer.seconds)
            self._answers.append(answer)
        self._flush()

    def _flush(self) -> None:
        self._socket.send(_encode(self._answers))
        self._answers.clear()

    def _answer(self, job: Job, runnable: Runnable | None) -> Answer:
        if runnable is None:
            failure = Failure("unknown_task", f"the worker does not know the task {job.task}")
            return Answer(job.number, 0.0, None, failure)
        enter((job, self._slot))
        try:
            args, kwargs = runnable.bind(job.args)
            result = encode_result(runnable.call(*args, **kwargs), self._max_result)
        except TooLarge as error:
            return Answer(job.number, 0.0, None, Failure(error.code, error.message))
        except BaseException as error:  # SystemExit too: a task ends itself, never its worker
            return Answer(job.number, 0.0, None, _failure(error, runnable.retry_on))
        return Answer(job.number, 0.0, result)

    def _run_coroutine(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(function(*args, **kwargs))


class Runnable:
    """A task as the worker uses it: everything looked up once."""

    __slots__ = ("bind", "call", "expected", "retry_on")

    def __init__(self, task: Task[..., Any], run_coroutine: Callable[..., Any]) -> None:
        function = task.function
        self.bind = task.bind
        self.retry_on: tuple[type[BaseException], ...] = task.retry.on if task.retry else ()
        self.expected = 1.0
        self.call: Callable[..., Any] = function
        if task.is_coroutine:
            self.call = lambda *args, **kwargs: run_coroutine(function, *args, **kwargs)

    def learn(self, seconds: float) -> None:
        self.expected = min(seconds, self.expected * 0.9 + seconds * 0.1)


def _failure(error: BaseException, retry_on: tuple[type[BaseException], ...]) -> Failure:
    """An exception as text. It may be hostile: its `str` may raise."""
    name = type(error).__name__
    try:
        text = str(error)
    except Exception as why:
        text = f"<its text cannot be had: {type(why).__name__}>"
    try:
        # The first two frames are ours.
        trail = error.__traceback__.tb_next if error.__traceback__ else None
        trace = "".join(traceback.format_exception(type(error), error, trail))[-MAX_TRACEBACK:]
    except Exception:
        trace = None
    message = f"{name}: {text}" if text else name
    code = error.code if isinstance(error, AcommError) and error.code == "bad_args" else "task_error"
    return Failure(code, _sound(message[:2000]), name, trace and _sound(trace), isinstance(error, retry_on))


def _sound(text: str) -> str:
    """Text that can be encoded: lone surrogates replaced."""
    return text.encode("utf-8", "replace").decode()
