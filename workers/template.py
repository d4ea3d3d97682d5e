"""The template process: preload once, fork workers on command, bury them.

It runs in a process of its own, started by `workers.forkserver`, which has the picture of the actors.
Single-threaded: one `poll` on the socket to the parent, on the signal wake-up pipe, and on what workers
print (`workers.capture`). It imports little, as everything that it imports is in every worker.

Whose orphan is it? A descendant of a worker that left the worker's process group (`setsid`) is not hit by
a kill of the group. The template is a subreaper, so such a process becomes its child as soon as its own
parent is dead, and the rule is: *a child that is no worker dies, unless a living worker owns it*. The
owner is read from a mark in the initial environment (`workers.lineage`). A program that was started with
an emptied environment has no owner; it is left alone while its parent lives, and dies at the next death
of any worker after that.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys
import time
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from workers import forked
from workers.capture import Capture, Outputs
from workers.ending import Ending, Graces
from workers.lineage import Mark
from workers.oomkills import OomKills

COMMAND = struct.Struct("=BqiH")
"""Parent to template: kind, token or pid, signal, number of descriptors; the config bytes follow."""

FORK, FORK_MEMFD, KILL, END, CLEAN = range(5)
"""Kinds of command. FORK_MEMFD has its config in a memfd, which is the first descriptor; END has GRACES,
CLEAN paths between null bytes.
"""

GRACES = struct.Struct("=dd")

EVENT = struct.Struct("=BqiiQd")
"""Template to parent: kind, token, pid, status, max RSS, CPU seconds; UTF-8 text follows, or for EXITED one
byte, whether it was the OOM killer, and what the worker said (`workers.tails.pack`).
"""

READY, FORKED, EXITED, FAILED, FORK_FAILED = range(5)
"""Kinds of event."""

MAX_MESSAGE = 65536
"""Bytes in one datagram: well below the default send buffer (208 KiB), above which it is EMSGSIZE."""

MAX_FDS = 250
"""Descriptors in one datagram; the kernel's limit is 253 (SCM_MAX_FD)."""

STOP_PATIENCE = 5.0
"""Seconds that a stopping template waits for killed processes (one in a stuck disk wait cannot die)."""

_FLUSH_PATIENCE = 1.0
"""Seconds that a stopping template gives each reader of what workers have printed to take the rest."""

_QUIET = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Blocked in the template, as only the end of its socket ends it: a terminal, or a service manager that
signals all processes of a service, must not take the workers away from a parent that drains."""

_PR_SET_CHILD_SUBREAPER = 36


def main(
    sock_fd: int,
    lifeline: int,
    server: str,
    target: str,
    preload: Sequence[str],
    cleanup: Sequence[str],
    capture: bool,
) -> NoReturn:
    """Run the template until its parent is gone. Entry point of the child interpreter."""
    template = Template(socket.socket(fileno=sock_fd), lifeline, server, cleanup, capture)
    if template.preload(preload, target):
        template.run()
    template.stop()


class _Worker:
    """A worker that is not reaped. `struck` is whether it was sent SIGKILL from here."""

    __slots__ = ("capture", "ending", "serial", "struck", "token")

    def __init__(self, token: int, serial: int, capture: Capture) -> None:
        self.token = token
        self.serial = serial
        self.capture = capture
        self.ending: Ending | None = None
        self.struck = False


class Template:
    """The loop of the template process, and what it knows of its workers."""

    def __init__(
        self, sock: socket.socket, lifeline: int, server: str, cleanup: Sequence[str], capture: bool
    ) -> None:
        self._sock = sock
        self._lifeline = lifeline
        self._mark = Mark(server)
        self._cleanup = cleanup
        self._workers: dict[int, _Worker] = {}  # by pid
        self._ending: set[int] = set()  # the pids of those that have something to come
        self._serial = 0
        self._kept: frozenset[int] = frozenset()
        self._outbox: deque[bytes] = deque()
        self._target: forked.Target | None = None
        self._handled: list[int] = []  # signals that have a Python handler
        self._wake_read, self._wake_write = os.pipe()
        self._poller = select.poll()
        self._poller.register(self._wake_read, select.POLLIN)
        self._outputs = Outputs(self._poller, capture)
        self._oom_kills = OomKills()
        sock.setblocking(False)
        for fd in (sock.fileno(), lifeline):
            os.set_inheritable(fd, False)
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        forked.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        forked.set_name("acomm-template")
        signal.pthread_sigmask(signal.SIG_BLOCK, _QUIET)

    # -- start

    def preload(self, modules: Sequence[str], target: str) -> bool:
        """Import everything; True if the template can fork."""
        # An import may take long, or for ever; the loop that would see the parent's end is not running yet.
        signal.signal(signal.SIGIO, lambda *_: self.stop())
        fcntl.fcntl(self._lifeline, fcntl.F_SETOWN, os.getpid())
        flags = fcntl.fcntl(self._lifeline, fcntl.F_GETFL)
        fcntl.fcntl(self._lifeline, fcntl.F_SETFL, flags | os.O_ASYNC)
        name = target
        try:
            for name in modules:
                importlib.import_module(name)
            name = target
            module, _, attribute = target.partition(":")
            self._target = getattr(importlib.import_module(module), attribute)
        except BaseException as error:
            self._fail(name, error)
            return False
        finally:
            fcntl.fcntl(self._lifeline, fcntl.F_SETFL, flags)
            signal.signal(signal.SIGIO, signal.SIG_IGN)
        self._kept = frozenset(_children())
        self._mark.locate()
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._handled = [
            n for n in signal.valid_signals() if callable(signal.getsignal(n)) and n != signal.SIGINT
        ]
        _quiet_fork_warning()
        forked.flush()
        gc.collect()
        gc.disable()  # until a worker enables it: a collection here would only unshare pages
        gc.freeze()
        self._send(READY)
        return True

    def _fail(self, name: str, error: BaseException) -> None:
        import traceback

        lines = "".join(traceback.format_exception(error))
        what = " ".join(traceback.format_exception_only(error)[-1].split())
        message = f"{name}: {what} ({_place(error)})"
        self._send(FAILED, text=f"{message[:2000]}\n{lines}")

    # -- loop

    def run(self) -> None:
        """Serve until the socket to the parent ends."""
        while True:
            self._poller.register(self._sock, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            ready = self._poller.poll(self._patience())
            self._outputs.events(ready, time.monotonic())
            if not self._receive():
                return
            if self._ending:
                self._step_endings(time.monotonic())
            self._reap()
            if not self._flush_outbox():
                return

    def _patience(self) -> float | None:
        """Milliseconds to wait for events; None: any time."""
        times = [ending.due for pid in self._ending if (ending := self._workers[pid].ending)]
        times.append(self._outputs.due)
        due = min((when for when in times if when is not None), default=None)
        return None if due is None else max(0.0, due - time.monotonic()) * 1000

    def _receive(self) -> bool:
        """Do one command, if there is one; False at the end of the socket."""
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                2 * MAX_MESSAGE, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        if not data:
            return False
        fds = array("i")
        for _, _, payload in ancillary:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        kind, number, sig, fd_count = COMMAND.unpack_from(data)
        try:
            if kind == KILL:
                self._kill(number, sig)
            elif kind == END:
                self._end(number, Graces(*GRACES.unpack_from(data, COMMAND.size)))
            elif kind == CLEAN:
                self._cleanup = [os.fsdecode(path) for path in data[COMMAND.size :].split(b"\0") if path]
            elif len(fds) != fd_count:
                self._send(FORK_FAILED, number, text="descriptors were lost on the way: too many open files")
            else:
                config = data[COMMAND.size :]
                if kind == FORK_MEMFD:
                    config = _read_all(fds[0])
                    os.close(fds.pop(0))
                self._fork(number, config, list(fds))
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _fork(self, token: int, config: bytes, fds: list[int]) -> None:
        self._serial += 1
        capture = None
        try:
            capture = self._outputs.open()
            pid = os.fork()
        except OSError as error:
            if capture is not None:
                capture.close()
            code = errno.errorcode.get(error.errno or 0, str(error.errno))
            self._send(FORK_FAILED, token, text=f"fork: {code}: {error.strerror}")
            return
        if pid == 0:
            assert self._target is not None
            forked.become(partial(self._settle, capture), self._target, config, fds)
        with suppress(OSError):  # also done by the child; whoever is first
            os.setpgid(pid, pid)
        self._workers[pid] = _Worker(token, self._serial, capture)
        self._outputs.watch(capture)
        self._oom_kills.look()  # what was before is no death of this one
        self._send(FORKED, token, pid)

    def _kill(self, pid: int, sig: int) -> None:
        # A pid in the table is not reaped, so the number cannot have been given to another process.
        worker = self._workers.get(pid)
        if worker is not None:
            worker.struck |= sig == signal.SIGKILL
            with suppress(OSError):
                os.killpg(pid, sig)

    def _end(self, pid: int, graces: Graces) -> None:
        worker = self._workers.get(pid)
        if worker is not None and worker.ending is None:
            worker.ending = Ending(graces, time.monotonic())
            worker.capture.want_dump()
            self._ending.add(pid)

    def _step_endings(self, now: float) -> None:
        for pid in list(self._ending):
            worker = self._workers[pid]
            assert worker.ending is not None
            # When the stack is on its way, who handles SIGTERM does so behind it; others would die half-way.
            dumped = partial(_catches_term, pid) if worker.capture.dumped else bool
            while (sig := worker.ending.step(now, dumped)) is not None:
                if sig == signal.SIGUSR1:  # its subprocesses would die of it
                    with suppress(OSError):
                        os.kill(pid, sig)
                else:
                    self._kill(pid, sig)
            if worker.ending.due is None:
                self._ending.discard(pid)

    def _reap(self) -> None:
        """Report dead workers, and kill what they left behind."""
        with suppress(BlockingIOError):
            os.read(self._wake_read, 4096)
        exits = []
        died = False
        while (pid := _next_dead()) is not None:
            died = True
            worker = self._workers.pop(pid, None)
            if worker:
                self._ending.discard(pid)
                with suppress(OSError):  # before the pid is free: it is the id of the group, too
                    os.killpg(pid, signal.SIGKILL)
            _, status, usage = os.wait4(pid, 0)
            if worker:
                exits.append((worker, pid, os.waitstatus_to_exitcode(status), usage))
        if died:
            self._kill_orphans()
        struck = [code == -signal.SIGKILL and not worker.struck for worker, _, code, _ in exits]
        oom = any(struck) and self._oom_kills.look()
        for (worker, pid, code, usage), by_others in zip(exits, struck, strict=True):
            cpu = usage.ru_utime + usage.ru_stime
            tail = bytes([oom and by_others]) + self._outputs.bury(worker.capture)
            self._send(EXITED, worker.token, pid, code, usage.ru_maxrss * 1024, cpu, tail=tail)

    def _kill_orphans(self) -> None:
        owners = {worker.serial for worker in self._workers.values()}
        for pid in _children():
            if pid not in self._workers and pid not in self._kept and self._mark.owner(pid) not in owners:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    # -- messages out

    def _send(
        self,
        kind: int,
        token: int = 0,
        pid: int = 0,
        status: int = 0,
        rss: int = 0,
        cpu: float = 0.0,
        text: str = "",
        tail: bytes = b"",
    ) -> None:
        tail = tail or text.encode("utf-8", "replace")[: MAX_MESSAGE // 2]
        self._outbox.append(EVENT.pack(kind, token, pid, status, rss, cpu) + tail)
        self._flush_outbox()

    def _flush_outbox(self) -> bool:
        try:
            while self._outbox:
                self._sock.send(self._outbox[0])
                self._outbox.popleft()
        except (BlockingIOError, InterruptedError):
            pass  # the parent reads slowly; the loop waits for room
        except ConnectionError:
            return False
        return True

    # -- end

    def stop(self) -> NoReturn:
        """Kill every descendant, remove the cleanup paths, exit."""
        import shutil

        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
        signal.alarm(int(2 * STOP_PATIENCE))  # whatever an exit function does, it does not keep us
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        deadline = time.monotonic() + STOP_PATIENCE
        while (children := _children()) and time.monotonic() < deadline:
            for pid in children:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                if pid in self._workers:
                    with suppress(OSError):
                        os.killpg(pid, signal.SIGKILL)
            select.select([self._wake_read], [], [], 0.1)
            with suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
            while (pid_dead := _next_dead()) is not None:
                self._workers.pop(pid_dead, None)
                os.waitpid(pid_dead, 0)
        self._outputs.finish(_FLUSH_PATIENCE)
        for path in self._cleanup:
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                with suppress(OSError):
                    os.unlink(path)
        atexit._run_exitfuncs()
        forked.flush()
        os._exit(0)

    # -- the worker's side of the fork

    def _settle(self, capture: Capture) -> None:
        """Leave what is the template's alone."""
        forked.settle(self._lifeline, self._handled, capture.adopt())
        self._outputs.leave()
        for fd in (self._lifeline, self._wake_read, self._wake_write):
            os.close(fd)
        self._sock.close()
        self._mark.sign(self._serial)


def _next_dead() -> int | None:
    """A child that is dead and not reaped yet."""
    try:
        info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return info.si_pid if info else None


def _children() -> list[int]:
    """Children of this process, adopted ones included; it costs some 10 µs.

    proc(5) warns that entries may be missed while others reap children; here, nobody else does.
    """
    with open("/proc/thread-self/children", "rb") as file:
        return [int(pid) for pid in file.read().split()]


def _catches_term(pid: int) -> bool:
    """Whether a process has a handler for SIGTERM; some 20 µs."""
    with suppress(OSError), open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)
    return False


def _place(error: BaseException) -> str:
    """`file:line` of the innermost frame that is neither ours nor the import system's."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    place = "not found"
    trace = error.__traceback__
    while trace:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith("<frozen") and file not in (__file__, importlib.__file__):
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _read_all(fd: int) -> bytes:
    size = os.fstat(fd).st_size
    data = b""
    while len(data) < size and (part := os.pread(fd, size - len(data), len(data))):
        data += part
    return data


def _quiet_fork_warning() -> None:
    """Python 3.12 warns of a fork when native threads run, such as OpenBLAS's, which survive forks."""
    threading: Any = sys.modules.get("threading")
    if threading is None or threading.active_count() == 1:
        import warnings

        warnings.filterwarnings(
            "ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning
        )
