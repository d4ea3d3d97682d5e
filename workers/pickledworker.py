"""The child process of a PoolExecutor: runs pickled functions instead of named tasks."""

from __future__ import annotations

import math
import multiprocessing.process
import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import zmq

from acomm.egress import Policy
from workers.calls import UNFIT, Answer, Failure, Job
from workers.errors import TooLarge
from workers.forked import Terminated, end_copy
from workers.pickling import MAX_CALL, Loader, dump_error, dump_result, load
from workers.registry import Registry
from workers.scoreboard import SlotWriter
from workers.streaming import Place
from workers.worker import Settings, Worker, failure_of, serve

TARGET = "workers.pickledworker:main"

within = False
"""Whether this process is such a worker."""


def main(config: bytes, fds: list[int]) -> None:
    """The forked worker's whole life. Its setup is a pickle of (initializer, initargs, authkey)."""
    global within
    within = True
    settings = msgspec.msgpack.decode(config, type=Settings)
    try:
        initializer, initargs, authkey = load(settings.setup)
        process = multiprocessing.process.current_process()
        process.authkey = authkey  # the queues and proxies of the program's managers ask for it
        process.name = f"PoolExecutor-{settings.slot + 1}"  # in logs
        if initializer is not None:
            initializer(*initargs)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(UNFIT)
    serve(settings, fds, PickledWorker)


class _Expected:
    """What is known of the functions of one name. As a Runnable, as far as the worker's loop asks."""

    __slots__ = ("expected", "streams")

    def __init__(self) -> None:
        self.expected = math.inf
        self.streams = False

    def learn(self, seconds: float) -> None:
        known = self.expected
        self.expected = seconds if known == math.inf else known + (seconds - known) * 0.1


class PickledWorker(Worker):
    """Runs pickled calls."""

    def __init__(self, socket: zmq.Socket[bytes], slot: SlotWriter) -> None:
        super().__init__(Registry(()), socket, slot, MAX_CALL, Place(), Policy())
        self._loader = Loader()
        known: dict[str, Any] = {}
        get = known.get
        self._find = lambda name: get(name) or known.setdefault(name, _Expected())

    def _answer(self, job: Job, runnable: Any) -> Answer:
        try:
            assert job.args is not None
            function: Callable[..., Any]
            function, args, kwargs = self._loader.call(job.args)
            return Answer(job.number, 0.0, dump_result(function(*args, **kwargs), self._max_result))
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
