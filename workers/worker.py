"""The child process of a supervisor: what runs the calls of tasks (`workers.workerloop` is its loop).

Calls of coroutine tasks overlap, in `workers.coroutines`; meanwhile the loop's helper has nothing to do.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import math
import os
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from acomm.egress import Policy
from workers import coroutines, memorylimit, softlimit, streaming
from workers.calls import ABANDONED, Answer, Failure, Job, StreamPlace
from workers.coroutines import Overlap
from workers.errors import TooLarge
from workers.failures import failure_of, own_files
from workers.forked import Terminated, end_copy
from workers.registry import Registry, Task, encode_result
from workers.running import Context, answered, enter, leave
from workers.scoreboard import SlotWriter
from workers.softlimit import limited, limited_coroutine
from workers.streaming import ConsumerLeft, NoConsumer, Producer
from workers.workerloop import Settings, WorkerLoop, serve

own_files.update(
    module.__file__ for module in (coroutines, memorylimit, softlimit, streaming) if module.__file__
)
own_files.add(__file__)


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


class Worker(WorkerLoop):
    """Runs calls of tasks."""

    def __init__(
        self,
        registry: Registry,
        socket: zmq.Socket[bytes],
        slot: SlotWriter,
        max_result: int,
        place: StreamPlace,
        policy: Policy,
    ) -> None:
        self._place = place
        self._policy = policy
        tasks = {name: Runnable(task, self._run_coroutine) for name, task in registry.items()}
        super().__init__(socket, slot, max_result, tasks.get)
        self._overlapping = {name: tasks[name] for name, task in registry.items() if task.overlaps}
        self._overlap: Overlap | None = None
        self._runner: asyncio.Runner | None = None

    def _run_batch(self, batch: list[Job]) -> None:
        if batch and batch[0].task in self._overlapping:
            self._run_overlapping(batch)
        else:
            self._run_all(batch)

    def _stops_at_once(self) -> bool:
        return self._overlap is None or self._overlap.terminate()

    def _close(self) -> None:
        if self._runner is not None:
            self._runner.close()

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
            answered(context)
            items = runnable.call(*args, **kwargs)
            if runnable.is_async:
                self._run_coroutine(producer.send_async_items, items)
            else:
                producer.send_items(items)
            producer.finish()

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
