"""Calls that overlap: coroutine tasks of one worker, many at a time in its event loop.

    socket --> waiting --(a place is free)--> an asyncio task a call --> answers --once a turn--> socket
      ^                                          |
      +-- cancel: that call's task alone --------+

The worker hands over when it is sent such calls, and has its thread back when all have ended. All that a
call starts in the loop belongs to it, and ends before it has its answer: tasks that it leaves are cancelled.
What no call has started, but a thread of one, ends with the loop when the worker has nothing to do.

When the worker is to end at once, by SIGTERM, code that does not await is interrupted where it is, and all
other calls are cancelled. Those that return a result all the same have it; of the others the supervisor
learns by the worker's death.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextvars import ContextVar, copy_context
from typing import Any, Protocol

import msgspec
import zmq

from acomm.egress import Policy
from workers.calls import CANCEL, STOP, Answer, Failure, Job, cancelled
from workers.errors import TooLarge
from workers.forked import end_copy
from workers.registry import encode_result
from workers.running import Context, enter, leave
from workers.scoreboard import SlotWriter

_jobs = msgspec.msgpack.Decoder(list[Job])
_encode = msgspec.msgpack.Encoder().encode

_Coroutine = Generator[Any, None, Any] | Coroutine[Any, Any, Any]

_started: ContextVar[set[asyncio.Task[Any]] | None] = ContextVar("workers_started", default=None)
"""The tasks that a call has started and that have not ended."""


class Overlapping(Protocol):
    """A coroutine task, as far as this is about it."""

    function: Callable[..., Coroutine[Any, Any, Any]]
    retry_on: tuple[type[BaseException], ...]

    def bind(self, raw: Any, /) -> tuple[Any, dict[str, Any]]: ...


class _Running:
    """A call that has a place."""

    __slots__ = ("context", "place", "task")

    def __init__(self, place: int, context: Context, task: asyncio.Task[Answer]) -> None:
        self.place = place
        self.context = context
        self.task = task


class Overlap:
    """Runs calls of the tasks that `find` knows, as many at a time as there are `slots`; `failure_of` makes a
    failure of what one raises. `sent` is called when answers have left.
    """

    def __init__(
        self,
        socket: zmq.Socket[bytes],
        slots: list[SlotWriter],
        find: Callable[[str], Overlapping | None],
        failure_of: Callable[[BaseException, tuple[type[BaseException], ...]], Failure],
        max_result: int,
        policy: Policy,
        sent: Callable[[], None] = lambda: None,
    ) -> None:
        self._socket = socket
        self._slots = slots
        self._find = find
        self._failure_of = failure_of
        self._max_result = max_result
        self._policy = policy
        self._sent = sent
        self._pid = os.getpid()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, _Running] = {}
        self._places = list(range(len(slots)))[::-1]
        self._answers: list[tuple[Answer, int]] = []
        self._due = False
        self._active = False
        self._stopping = False
        self._terminated = False
        self._interrupted: asyncio.Task[Any] | None = None
        self._broken: BaseException | None = None

    def run(self, loop: asyncio.AbstractEventLoop, jobs: deque[Job]) -> bool:
        """Run the calls of `jobs`, and what else comes meanwhile, until all have ended. What is not of such a
        task, and all that came behind it, is left in `jobs`. False: the worker is to stop.

        No exception of a call comes out, whatever it is; the loop's tasks that are left are no call's.
        """
        self._loop = loop
        self._around = copy_context()
        self._waiting = jobs
        loop.set_task_factory(_task)
        loop.add_reader(self._socket.FD, self._step, self._receive)
        self._active = True
        try:
            self._receive()
            while self._running or self._answers:
                try:
                    loop.run_forever()
                except (SystemExit, KeyboardInterrupt):
                    # Of a task that a call has started: the loop lets it through, and the call sees it,
                    # too, if it awaits that.
                    loop.call_soon(self._step, self._flush)
                if self._broken is not None:
                    raise self._broken
        finally:
            self._active = False
            loop.remove_reader(self._socket.FD)
            loop.set_task_factory(None)
        return not self._stopping

    def terminate(self) -> bool:
        """For a signal's handler: begin no more calls, and cancel those that run. Whether the code that the
        signal has interrupted must be ended by an exception: it is a coroutine's, or none of ours.
        """
        if not self._active or os.getpid() != self._pid:
            return True
        self._terminated = True
        self._interrupted = asyncio.current_task(self._loop)
        self._loop.call_soon_threadsafe(self._step, self._cancel_others)
        return self._interrupted is not None

    def _cancel_others(self) -> None:
        self._cancel([n for n, running in self._running.items() if running.task is not self._interrupted])

    def _step(self, step: Callable[[], None]) -> None:
        """A step of ours in the loop, which would log its failure and go on."""
        try:
            step()
        except Exception as error:
            self._broken = error
            self._loop.stop()

    # -- the socket

    def _receive(self) -> None:
        while True:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            if message == STOP:
                self._stopping = True
            elif message.startswith(CANCEL):
                self._cancel(cancelled(message))
            else:
                self._waiting.extend(_jobs.decode(message))
        self._begin_waiting()

    def _begin_waiting(self) -> None:
        waiting = self._waiting
        while waiting and self._places and not self._terminated:
            task = self._find(waiting[0].task)
            if task is None:
                break
            self._begin(waiting.popleft(), task)

    def _begin(self, job: Job, task: Overlapping) -> None:
        place = self._places.pop()
        context = Context(job, self._slots[place], self._policy)
        around = self._around.copy()
        around.run(enter, context)
        # Not by the factory: it is nobody's.
        call = asyncio.Task(self._call(job, task, context), loop=self._loop, context=around)
        self._running[job.number] = _Running(place, context, call)
        call.add_done_callback(lambda call: self._ended(job.number, call), context=self._around)

    def _ended(self, number: int, call: asyncio.Task[Answer]) -> None:
        """A call has an answer. Those of one turn of the loop travel together."""
        running = self._running.pop(number)
        try:
            answer = call.result()
        except BaseException as error:  # as when another call cancels all tasks of the loop
            answer = Answer(number, 0.0, None, self._failure_of(error, ()))
        if not self._terminated or answer.failure is None:  # what fails now, may fail as it was cancelled
            self._answers.append((answer, running.place))
        if not self._due:
            self._due = True
            self._loop.call_soon(self._step, self._flush)

    def _flush(self) -> None:
        if os.getpid() != self._pid:
            end_copy(None)
        self._due = False
        if self._answers:
            self._socket.send(_encode([answer for answer, _ in self._answers]))
            self._sent()
        answers, self._answers = self._answers, []
        for _, place in answers:
            # Only now: if we die in answering, the calls that left us so pay for it.
            self._slots[place].end()
            self._places.append(place)
        self._receive()  # what came before the send: that may have eaten the descriptor's edge
        if not self._running and not self._answers:
            self._loop.stop()

    # -- one call

    async def _call(self, job: Job, task: Overlapping, context: Context) -> Answer:
        started = time.monotonic()
        self._slots[self._running[job.number].place].begin(job.number, started)
        tasks: set[asyncio.Task[Any]] = set()
        _started.set(tasks)
        try:
            args, kwargs = task.bind(job.args)
            answer = Answer(
                job.number, 0.0, encode_result(await task.function(*args, **kwargs), self._max_result)
            )
        except TooLarge as error:
            answer = Answer(job.number, 0.0, None, Failure(error.code, error.message))
        except BaseException as error:  # SystemExit too: a call ends itself, never its worker
            if os.getpid() != self._pid:
                end_copy(error)
            answer = Answer(job.number, 0.0, None, self._failure_of(error, task.retry_on))
        if os.getpid() != self._pid:
            end_copy(None)
        while tasks:
            await _end(tasks)
        leave(context)
        answer.seconds = time.monotonic() - started
        return answer

    def _cancel(self, numbers: list[int]) -> None:
        for number in numbers:
            running = self._running.get(number)
            if running is not None:
                running.context.cancelled = True
                running.task.cancel()


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel what a call has left running, and wait for its end; it may start more in that."""
    for task in tasks:
        task.cancel()
    with contextlib.suppress(asyncio.CancelledError):  # the call is to end, and does
        await asyncio.wait(list(tasks))


def _task(loop: asyncio.AbstractEventLoop, coroutine: _Coroutine, **options: Any) -> asyncio.Task[Any]:
    """The loop's task factory: notes a task with the call that starts it."""
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    context = options.get("context")
    tasks = _started.get() if context is None else context.get(_started)
    if tasks is not None:
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    return task
