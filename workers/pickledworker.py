"""The child process of a PoolExecutor: runs pickled functions instead of named tasks."""

from __future__ import annotations

import math
import multiprocessing.process
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from workers import mapped
from workers.calls import UNFIT, Answer, Failure, Job
from workers.errors import TooLarge
from workers.exchange import number_of
from workers.failures import failure_of
from workers.forked import Terminated, end_copy
from workers.pickling import MAX_CALL, Loader, dump_error, dump_result, load
from workers.scoreboard import SlotWriter
from workers.segments import Arena, Reader
from workers.workerloop import Settings, WorkerLoop, serve

TARGET = "workers.pickledworker:main"

within = False
"""Whether this process is such a worker."""


def main(config: bytes, fds: list[int]) -> None:
    """The forked worker's whole life. Its setup is a pickle of (initializer, initargs, authkey, bytes of
    shared memory for results). `fds` are the scoreboard's and, unless those bytes are 0, the files of
    segments with arguments and with results.
    """
    global within
    within = True
    settings = msgspec.msgpack.decode(config, type=Settings)
    try:
        initializer, initargs, authkey, share = load(settings.setup)
        process = multiprocessing.process.current_process()
        process.authkey = authkey  # the queues and proxies of the program's managers ask for it
        process.name = f"PoolExecutor-{settings.slot + 1}"  # in logs
        if initializer is not None:
            initializer(*initargs)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(UNFIT)
    reader = arena = None
    if share:
        number = number_of(settings.identity)
        reader = Reader(fds[1], number, private=True)
        arena = _Trimmer(fds[2], share, number).arena

    def make(socket: zmq.Socket[bytes], slot: SlotWriter) -> WorkerLoop:
        return PickledWorker(socket, slot, reader, arena)

    serve(settings, fds, make)


class _Trimmer:
    """A thread that frees idle memory, there from when there is some."""

    def __init__(self, fd: int, limit: int, number: int) -> None:
        self.arena = Arena(fd, limit, number, self._wake)
        self._due = threading.Event()
        self._started = False

    def _wake(self) -> None:
        self._due.set()
        if not self._started:
            self._started = True
            threading.Thread(target=self._run, name="acomm-trim", daemon=True).start()

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the task's
        while self._due.wait():
            self._due.clear()
            while (due := self.arena.due) is not None:
                time.sleep(max(0.0, due - time.monotonic()))
                self.arena.trim(time.monotonic())


class _Expected:
    """What is known of the functions of one name. As a Runnable, as far as the worker's loop asks."""

    __slots__ = ("expected", "streams")

    def __init__(self) -> None:
        self.expected = math.inf
        self.streams = False

    def learn(self, seconds: float) -> None:
        known = self.expected
        self.expected = seconds if known == math.inf else known + (seconds - known) * 0.1


class PickledWorker(WorkerLoop):
    """Runs pickled calls."""

    def __init__(
        self, socket: zmq.Socket[bytes], slot: SlotWriter, reader: Reader | None, arena: Arena | None
    ) -> None:
        known: dict[str, Any] = {}
        get = known.get
        super().__init__(
            socket, slot, MAX_CALL, lambda name: get(name) or known.setdefault(name, _Expected())
        )
        self._loader = Loader(reader)
        self._arena = arena
        mapped.mark = slot.progress

    def _answer(self, job: Job, runnable: Any) -> Answer:
        try:
            assert job.args is not None
            function: Callable[..., Any]
            function, args, kwargs = self._loader.call(job.args)
            result = function(*args, **kwargs)
            return Answer(job.number, 0.0, dump_result(result, self._max_result, self._arena))
        except BaseException as error:  # SystemExit too: a call ends itself, never its worker
            if os.getpid() != self._pid:
                end_copy(error)
            if isinstance(error, Terminated):
                raise
            if isinstance(error, TooLarge):
                return Answer(job.number, 0.0, None, Failure(error.code, error.message))
            error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next  # our own frame
            data = dump_error(error)
            if data is not None:
                return Answer(job.number, 0.0, data)
            return Answer(job.number, 0.0, None, failure_of(error, ()))
