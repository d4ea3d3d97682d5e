"""A run: the processes, the faults at their times, and the end, when everything should settle."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from chaoslib.checker import unsettled
from chaoslib.disk import Disk
from chaoslib.history import TASKS_LOG, History, Log, Tail
from chaoslib.hooks import UNIX_HOOKS, port_file, unix_paths
from chaoslib.keeper import Keeper
from chaoslib.peer import Given
from chaoslib.schedule import SUPERVISOR, TEMPLATE, WORKER, Planned, plan
from chaoslib.shim import NoCompiler, Shim

HERE = Path(__file__).resolve().parent
_LOOK = 1.0
_END = 30.0
"""Seconds between two looks at what is unsettled, and that a peer has to end."""


class Settings(NamedTuple):
    """What a run is made of. `supervisor` is the program that serves; `rate` the requests a second of all
    clients together; `settle` for how many seconds the end is waited for; `fault_rate` multiplies how often
    faults strike.
    """

    seed: int
    seconds: float
    faults: tuple[str, ...]
    folder: Path
    journal: bool = True
    durability: str = "power"
    workers: int = 2
    rate: float = 500.0
    settle: float = 120.0
    fault_rate: float = 1.0
    supervisor: tuple[str, ...] = (sys.executable, "-m", "workers")


class Peer:
    """A process around the supervisor, which takes commands."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self.name = name

    @classmethod
    async def start(cls, module: str, given: Given, environment: dict[str, str]) -> Peer:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        stderr = os.open(Path(given.folder, f"{given.name}.stderr"), flags)
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"chaoslib.{module}",
                *given.command(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=environment,
            )
        finally:
            os.close(stderr)
        assert process.stdout is not None
        if await process.stdout.readline() != b"ready\n":
            raise RuntimeError(f"{given.name} did not start; see {given.folder}/{given.name}.stderr")
        return cls(process, given.name)

    def tell(self, do: str, **more: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **more}).encode() + b"\n")

    async def end(self) -> None:
        """Raises RuntimeError when it has failed: its part of the history is not whole then."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(_END):
                status = await self._process.wait()
        finally:
            if self._process.returncode is None:
                self._process.kill()
        if status:
            raise RuntimeError(f"{self.name} ended with status {status}; see its stderr")


class Run:
    """One run of `settings`. `tell` gets a line about what is under way."""

    def __init__(self, settings: Settings, tell: Callable[[str], None]) -> None:
        self._settings = settings
        self._tell = tell
        self._folder = settings.folder
        self._log = Log(self._folder / "runner.log")
        self._tails: dict[Path, Tail] = {}
        self._peers: dict[str, Peer] = {}
        self._lasting: set[asyncio.Task[None]] = set()
        self.history = History()

    async def run(self) -> History:
        """Raises NoDisk, NoCompiler, NotReady, RuntimeError for what could not be tried."""
        settings = self._settings
        with self._surroundings() as (self._shim, self._disk):
            self._keeper = Keeper(self._command(), self._folder, self._environment(), self._log)
            try:
                await self._keeper.start()
                async with AsyncExitStack() as stack:
                    await self._start_peers(stack)
                    await self._strike(
                        plan(settings.seed, settings.seconds, settings.faults, rate=settings.fault_rate)
                    )
                    await self._settle()
                status = await self._keeper.stop()
            finally:
                self._keeper.close()
            if status:
                self._log.note("fault", f"exit-status-{status}")
        self._read()
        return self.history

    @contextmanager
    def _surroundings(self) -> Iterator[tuple[Shim | None, Disk]]:
        """The shim, and the journal's disk."""
        faults = self._settings.faults
        shim = Shim(self._folder) if "calls" in faults else None
        if shim is None and "disk" in faults:
            with contextlib.suppress(NoCompiler):  # a disk can be mounted, perhaps
                shim = Shim(self._folder)
        disk = Disk(self._folder / "journal", shim, wanted="disk" in faults)
        try:
            yield shim, disk
        finally:
            disk.close()

    def _command(self) -> Sequence[str]:
        settings = self._settings
        command = [*settings.supervisor, "chaoslib.tasks", "--socket", self._socket]
        command += ["--workers", str(settings.workers), "--log-level", "warning"]
        if settings.journal:
            command += ["--journal", str(self._disk.path / "journal.db"), "--durability", settings.durability]
        return command

    @property
    def _socket(self) -> str:
        return str(self._folder / "s.sock")

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("ACOMM_")}
        own[TASKS_LOG] = str(self._folder / "tasks.log")
        own["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), str(HERE.parent.parent)])
        return own if self._shim is None else {**own, **self._shim.environment}

    async def _start_peers(self, stack: AsyncExitStack) -> None:
        settings = self._settings
        # Each takes this share of the requests, in the order in which they are started.
        shares = {"hooks": 0.0, "rough": 0.0, "kept-0": 0.4, "kept-1": 0.3, "plain-0": 0.15, "old-0": 0.05}
        shares |= {"raw-0": 0.02, "users-0": 0.08}
        environment = {key: value for key, value in self._environment().items() if key != "LD_PRELOAD"}
        hooks: tuple[str, ...] = ()
        for number, (name, share) in enumerate(shares.items()):
            given = Given(
                name, settings.seed + number, self._socket, str(self._folder), share * settings.rate, hooks
            )
            kind = name.partition("-")[0]
            module = "plain" if kind in ("old", "raw") else kind
            peer = await Peer.start(module, given, environment)
            stack.push_async_callback(peer.end)
            self._peers[name] = peer
            if name == "hooks":
                folder = str(self._folder)
                hooks = tuple(f"unix://{path}" for path in unix_paths(folder))
                hooks += (f"http://127.0.0.1:{port_file(folder).read_text()}/hook",)

    # -- faults -------------------------------------------------------------------------------------

    async def _strike(self, planned: list[Planned]) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        for fault in planned:
            await asyncio.sleep(max(started + fault.at - loop.time(), 0))
            self._tell(f"{fault.at:6.1f} s  {fault.fault} {' '.join(map(str, fault.detail))}")
            self._do(fault)
        await asyncio.sleep(max(started + self._settings.seconds - loop.time(), 0))

    def _do(self, fault: Planned) -> None:
        keeper, peers = self._keeper, self._peers
        match fault.fault:
            case "stop":
                self._last(keeper.stop_for(fault.chance, fault.for_seconds))
            case "hooks":
                self._log.note("fault", f"hook-{fault.detail[0]}")
                hook = int(fault.chance * (UNIX_HOOKS + 1))
                peers["hooks"].tell("trouble", hook=hook, how=fault.detail[0], seconds=fault.for_seconds)
            case "disk":
                self._last(self._full_disk(fault.for_seconds))
            case "calls":
                call, error, after = fault.detail
                self._fail_a_call(str(call), str(error), int(after))
            case "cut":
                self._log.note("fault", "cut")
                peers["rough"].tell("cut")
            case "flood":
                self._log.note("fault", "flood")
                peers["rough"].tell("flood", count=fault.detail[0])
            case _:
                strikes: dict[str, Callable[[], None]] = {
                    WORKER: lambda: keeper.kill_worker(fault.chance),
                    TEMPLATE: keeper.kill_template,
                    SUPERVISOR: keeper.kill_supervisor,
                }
                strikes[fault.fault]()

    def _last(self, fault: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(fault)
        self._lasting.add(task)
        task.add_done_callback(self._lasting.discard)

    async def _full_disk(self, seconds: float) -> None:
        pid = self._keeper.pid
        if pid is None:
            return
        self._log.note("fault", "disk")
        self._disk.fill(pid)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._disk.free()

    def _fail_a_call(self, call: str, error: str, after: int) -> None:
        template = self._keeper.template()
        pid = (template.pid if template else None) if call == "fork" else self._keeper.pid
        if pid is not None and self._shim is not None:
            self._shim.arm(call, error, pid=pid, after=after)

    # -- the end ------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """No more faults, no new requests: whatever is under way comes to its end, or never does."""
        if self._lasting:
            await asyncio.wait(self._lasting)
        if self._shim is not None:
            self._shim.disarm_all()
            for call, times in self._shim.failed.items():
                for _ in range(times):
                    self._log.note("fault", f"{call}-failed")
        for peer in self._peers.values():
            peer.tell("settle")
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.settle
        while loop.time() < end:
            await asyncio.sleep(_LOOK)
            self._read()
            left = unsettled(self.history, durable=self._settings.journal)
            if not left:
                return
            self._tell(f"settling: {left} requests without their end")

    def _read(self) -> None:
        for path in self._folder.glob("*.log"):
            if path not in self._tails:
                self._tails[path] = Tail(path)
            self.history.feed(self._tails[path].read())

    def close(self) -> None:
        for tail in self._tails.values():
            tail.close()
        self._log.close()
