"""The worker's side of the fork: what turns a copy of the template into a worker, and how that ends.

All workers go through here, whatever they run. It imports little, as the template has it in memory.
"""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import fcntl
import gc
import os
import select
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn

OOM_SCORE = 500
"""Added to a worker's `oom_score_adj`: when memory runs out, the kernel takes a worker, not the parent."""

_PR_SET_NAME = 15

_libc = ctypes.CDLL(None, use_errno=True)

Target = Callable[[bytes, "list[int]"], object]


def become(settle: Callable[[], None], target: Target, config: bytes, fds: list[int]) -> NoReturn:
    """Be a worker, from the fork to the end: `settle`, then the target."""
    code = 1
    try:
        settle()
        code = _call(target, config, fds)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        _end(code)


def settle(lifeline: int, handled: Iterable[int], dump: int) -> None:
    """Make this process one of its own: group, lifeline, name, signals (of which `handled` had handlers).
    faulthandler writes to the descriptor `dump`.
    """
    with suppress(OSError):
        os.setpgid(0, 0)
    arm_lifeline(lifeline)
    for number in handled:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)
    set_name("acomm-worker")
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+") as file:
        score = int(file.read())
        file.seek(0)
        file.write(str(min(1000, score + OOM_SCORE)))
    with suppress(OSError, ValueError, RuntimeError):
        faulthandler.enable(file=dump)
        faulthandler.register(signal.SIGUSR1, file=dump, chain=False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    atexit._clear()  # what preloaded modules registered is for the template's end, not for each worker's
    if numpy_random := sys.modules.get("numpy.random"):  # `random` reseeds itself after a fork
        numpy_random.seed()
    gc.enable()


def arm_lifeline(fd: int) -> None:
    """Have the kernel SIGKILL this process group when the last write end of the pipe `fd` is closed.

    The signal settings belong to the open file description, so it is opened anew: one a worker. It is
    sent by the kernel (fcntl(2): O_ASYNC, F_SETSIG), which needs no bytecode to run here.
    """
    own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if poller.poll(0):  # it ended before it was armed
        os.killpg(0, signal.SIGKILL)


def _call(target: Target, config: bytes, fds: list[int]) -> int:
    """Run the target and its exit functions; the exit code. Threads are not joined: they must not hold us."""
    code = 0
    try:
        target(config, fds)
    except BaseException as error:
        code = _exit_code(error)
    atexit._run_exitfuncs()
    return code


class Terminated(SystemExit):
    """Raised in the main thread of a worker by SIGTERM: its call must stop, and so must the worker."""


def _exit_code(error: BaseException) -> int:
    """What the interpreter makes of an exception that nobody catches; below 0: the signal to die of."""
    if isinstance(error, Terminated):
        return -signal.SIGTERM
    if not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
        return 1
    if error.code is None or isinstance(error.code, int):
        return (error.code or 0) & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def end_copy(error: BaseException | None) -> NoReturn:
    """End a process that a task has forked, and that has come out of the task like its original, with `error`
    or without. It holds the worker's socket and must not go on as a second worker.
    """
    code = 1
    try:
        code = 0 if error is None else _exit_code(error)
    finally:
        _end(code)


def _end(code: int) -> NoReturn:
    flush()
    if code < 0:  # who waits for us is to see what we died of
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 0xFF)


def flush() -> None:
    """Write out what Python holds of stdout and stderr, as far as they take it."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()


def set_name(name: str) -> None:
    """What `ps` shows of this process."""
    prctl(_PR_SET_NAME, name.encode())


def prctl(option: int, value: int | bytes) -> None:
    """prctl(2); a failure is none of ours."""
    _libc.prctl(option, value, 0, 0, 0)
