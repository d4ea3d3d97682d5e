"""The tasks that the supervisor under test serves. Each execution is told in the history."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from chaoslib.history import TASKS_LOG, Log
from chaoslib.work import CRASHES, mixed
from workers import Retry, context, task

_log: Log | None = None


@contextmanager
def told() -> Iterator[None]:
    global _log
    if _log is None:  # opened here and not where the module is loaded: each process has its own
        _log = Log(os.environ[TASKS_LOG])
    call = context()
    _log.note("begin", call.request_id, call.attempt, os.getpid())
    yield
    _log.note("end", call.request_id, call.attempt, os.getpid())


@task
def quick(number: int) -> int:
    with told():
        return mixed(number)


@task
def busy(number: int) -> int:
    with told():
        return mixed(number) + 0 * sum(range(50_000))


@task
def doze(number: int) -> int:
    with told():
        time.sleep(0.05 + number % 100 / 1000)
        return mixed(number)


@task
def fail(number: int) -> int:
    with told():
        pass
    raise ValueError(f"on purpose: {number}")


@task(retry=Retry(times=0, crashes=CRASHES))
def stubborn(number: int) -> int:
    with told():
        time.sleep(0.005)
        return mixed(number)


@task
def die(number: int) -> int:
    with told():
        os.kill(os.getpid(), signal.SIGKILL)
        return number
