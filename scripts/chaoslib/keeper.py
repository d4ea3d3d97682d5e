"""The supervisor under test: started again whenever it ends, as an init system does, and struck."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from chaoslib.history import Log

RESTART = 0.1
"""Seconds between an end and the next start."""

READY = 60.0
GONE = 5.0
"""Seconds that a supervisor has to be ready, and that its processes have to be gone after its death."""


_PR_SET_PDEATHSIG = 1


class NotReady(Exception):
    """The first supervisor did not start."""


class Keeper:
    """Keeps a supervisor running in `folder`: `command` is its program and words."""

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str], log: Log) -> None:
        self._command = command
        self._folder = folder
        self._log = log
        self._stderr = os.open(folder / "stderr", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notify.bind(str(folder / "notify"))
        self._environment = {**environment, "NOTIFY_SOCKET": str(folder / "notify")}
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._watching: set[asyncio.Task[None]] = set()
        self.up = asyncio.Event()

    @property
    def pid(self) -> int | None:
        """Of the supervisor that takes requests now."""
        return self._process.pid if self._process is not None and self.up.is_set() else None

    async def start(self) -> None:
        """Raises NotReady."""
        self._keeping = asyncio.create_task(self._keep())
        ready = asyncio.create_task(self.up.wait())
        await asyncio.wait({ready, self._keeping}, timeout=READY, return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not self.up.is_set():
            raise NotReady(f"the supervisor did not start; see {self._folder / 'stderr'}")

    async def _keep(self) -> None:
        while True:
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=self._stderr,
                cwd=self._folder,
                env=self._environment,
                preexec_fn=_end_with_parent,
            )
            readiness = asyncio.create_task(self._await_ready(process.pid))
            status = await process.wait()
            readiness.cancel()
            self.up.clear()
            self._log.note("down", process.pid, status)
            await asyncio.sleep(RESTART)

    async def _await_ready(self, pid: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            data, _ = await loop.sock_recvfrom(self._notify, 4096)
            if data == b"READY=1":
                self._log.note("up", pid)
                self.up.set()

    async def stop(self) -> int:
        """Stop it as an init system does; its exit status."""
        assert self._keeping is not None
        assert self._process is not None
        self._keeping.cancel()
        self._process.terminate()
        try:
            async with asyncio.timeout(READY):
                return await self._process.wait()
        finally:
            self.kill_all()

    def kill_all(self) -> None:
        """Whatever happens, nothing of ours goes on."""
        if self._keeping is not None:
            self._keeping.cancel()
        if self._process is not None and self._process.returncode is None:
            self._process.kill()

    def close(self) -> None:
        self.kill_all()
        self._notify.close()
        os.close(self._stderr)

    # -- faults -------------------------------------------------------------------------------------

    def template(self) -> psutil.Process | None:
        """The process that workers are forked from."""
        children = self._children(self.pid)
        return children[0] if children else None

    def workers(self) -> list[psutil.Process]:
        template = self.template()
        return [] if template is None else self._children(template.pid)

    def _children(self, pid: int | None) -> list[psutil.Process]:
        if pid is None:
            return []
        with contextlib.suppress(psutil.Error):
            return sorted(psutil.Process(pid).children(), key=lambda child: child.pid)
        return []

    def kill_worker(self, chance: float) -> None:
        workers = self.workers()
        if workers:
            victim = workers[int(chance * len(workers))]
            self._strike("worker", victim, [victim.pid])

    def kill_template(self) -> None:
        template = self.template()
        if template is not None:
            pids = [worker.pid for worker in self._children(template.pid)]
            self._strike("template", template, [template.pid, *pids])

    def _strike(self, role: str, victim: psutil.Process, pids: list[int]) -> None:
        """Kill `victim`; `pids` are all that ends with it."""
        family = _opened(pids)
        self._log.note("kill", role, *pids)
        self._kill(victim)
        self._watch(self._tell_the_end(family))

    async def _tell_the_end(self, family: list[tuple[int, int]]) -> None:
        until = asyncio.get_running_loop().time() + GONE
        for pid, fd in family:
            if await _ended(fd, until):
                self._log.note("killed", pid)

    def kill_supervisor(self) -> None:
        pid = self.pid
        if pid is None:
            return
        family = _opened([child.pid for child in psutil.Process(pid).children(recursive=True)])
        self._log.note("kill", "supervisor", pid)
        self.up.clear()
        os.kill(pid, signal.SIGKILL)
        self._watch(self._tell_of_orphans(family))

    async def _tell_of_orphans(self, family: list[tuple[int, int]]) -> None:
        """How long the processes of a killed supervisor take to be gone."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        for pid, fd in family:
            if not await _ended(fd, started + GONE):
                self._log.note("survived", pid, round(1000 * GONE))
        self._log.note("orphans", round(1000 * (loop.time() - started), 1))

    def _watch(self, watch: Coroutine[Any, Any, None]) -> None:
        watching = asyncio.get_running_loop().create_task(watch)
        self._watching.add(watching)
        watching.add_done_callback(self._watching.discard)

    def _kill(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):
            process.kill()  # it makes sure that the pid is still this process's

    async def stop_for(self, chance: float, seconds: float) -> None:
        """Stop a worker, or the supervisor, for a while."""
        pids = [worker.pid for worker in self.workers()]
        if self.pid is not None:
            pids.append(self.pid)
        if not pids:
            return
        pid = pids[int(chance * len(pids))]
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        self._log.note("fault", "stop", pid)
        try:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGSTOP)
            await asyncio.sleep(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGCONT)
            os.close(fd)


def _end_with_parent() -> None:
    """Whatever we die of, the supervisor does not stay behind, not even a stopped one."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _opened(pids: Iterable[int]) -> list[tuple[int, int]]:
    """Those that are alive, with a descriptor each."""
    family = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            family.append((pid, os.pidfd_open(pid)))
    return family


async def _ended(fd: int, until: float) -> bool:
    """Wait for the end of a process, and close its descriptor; False if it is there at `until`, by the event
    loop's clock.
    """
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(fd, ended.set)
    try:
        async with asyncio.timeout_at(until):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(fd)
        os.close(fd)
    return True
