"""A supervisor that finds unfinished requests in its journal, a million by default: how soon it takes new
ones, how long it has at the old, and how much memory.

    filler (a process that ends as a killed one does) --> journal --> supervisor --> hook (ours), each answer
    prober (ours) -------------- new requests, meanwhile -------------^              counted by its number

Each row is a request of its own id for a tiny task, with our hook. An answer that is wrong, missing or told
twice makes the run fail.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import uvloop

from acomm import Request
from acomm.acks import ok_ack
from acomm.channel import Channels
from acomm.connection import Connection
from acomm.errors import AcommError
from acomm.listener import UnixListener
from acomm.origin import Origin
from acomm.outgoing import Outgoing
from acomm.urls import unix_url
from benchmarks.harness import percentiles
from workers.journalfile import Batch, Entry, JournalFile
from workers.recent import digest

ROWS = 1_000_000
WORKERS = 2
START_TIMEOUT = 60.0
PROBE_EVERY = 0.05
"""Seconds between two new requests."""

STALLED = 60.0
"""Seconds without an answer after which no more are waited for."""

_BATCH = 1024
_IN_THE_LOG = 100_000
"""Rows that a killed supervisor may leave in the log: the next one finds them there and not in the file."""

_TASK = "echo"


class Failed(Exception):
    """Something that was promised was not kept."""


# -- the journal --------------------------------------------------------------------------------------


def fill(path: str, rows: int, hook: str) -> None:
    """Make a journal with `rows` accepted requests, as a supervisor leaves it that is killed. Run it in a
    process of its own, which it ends: SQLite would tidy up at an orderly end.
    """
    file = JournalFile(path, full=False)
    for start in range(0, rows, _BATCH):
        batch = Batch()
        batch.entries = [_entry(number, hook) for number in range(start, min(start + _BATCH, rows))]
        file.write(batch)
        if rows - start > _IN_THE_LOG and start // _BATCH % 16 == 0:
            file.checkpoint()
    os._exit(0)


def _entry(number: int, hook: str) -> Entry:
    # Ids in order, as no recovery looks at their index, and random ones would take minutes to write.
    request = Request(_TASK, [number], id=f"row-{number:07}", response_hook=hook)
    message = request.encode(3, extended=True)
    request = Request.decode(message)
    return Entry(
        number + 1,
        request.id,
        digest(request),
        request.task,
        message,
        request.wire,
        request.extended,
        Origin.unix(os.getuid()).text,
        time.time(),
    )


def _filled(path: Path, rows: int, hook: str) -> None:
    process = multiprocessing.get_context("spawn").Process(target=fill, args=(str(path), rows, hook))
    process.start()
    process.join()
    if process.exitcode:
        raise Failed("the journal could not be written")


# -- around the supervisor ----------------------------------------------------------------------------


class Answers:
    """Counts the answers at our hook: `told[number]` is how often row `number` was answered."""

    def __init__(self, rows: int) -> None:
        self.told = bytearray(rows)
        self.left = rows
        self.last = time.perf_counter()
        self.wrong: list[str] = []
        self.all_told = asyncio.Event()
        if not rows:
            self.all_told.set()

    def take(self, conn: Connection, data: bytes) -> None:
        message = json.loads(data)
        conn.acknowledge(ok_ack(b'""', 3, True), grants=True)
        self._count(message)

    def _count(self, message: dict[str, Any]) -> None:
        kind, _, number = message["id"].partition("-")
        if kind != "row":
            return  # a new one
        self.last = time.perf_counter()
        row = int(number)
        if message["error"] or message["result"] != row:
            self.wrong.append(f"{message['id']}: {message['error'] or message['result']}")
        self.told[row] = min(self.told[row] + 1, 255)
        if self.told[row] == 1:
            self.left -= 1
            if not self.left:
                self.all_told.set()

    async def wait(self) -> None:
        """Until each row was answered. Raises Failed when no more come."""
        while not self.all_told.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.all_told.wait(), 1.0)
            if time.perf_counter() - self.last > STALLED:
                raise Failed(f"{self.left} of {len(self.told)} requests were not answered")

    def check(self) -> None:
        """Raises Failed unless each was answered right, and once."""
        if self.wrong:
            raise Failed(f"{len(self.wrong)} wrong answers: {self.wrong[0]}")
        if twice := sum(count > 1 for count in self.told):
            raise Failed(f"{twice} requests were answered more than once")


class Prober:
    """Sends new requests, one at a time, and keeps how many seconds each waited for its acknowledgement."""

    def __init__(self, url: str, hook: str) -> None:
        self._url = url
        self._hook = hook
        self.seconds: list[float] = []

    async def run(self) -> None:
        channels = Channels(timeout=START_TIMEOUT)
        try:
            while True:
                started = time.perf_counter()
                await self._ask(channels)
                self.seconds.append(time.perf_counter() - started)
                await asyncio.sleep(PROBE_EVERY)
        finally:
            await channels.close()

    async def _ask(self, channels: Channels) -> None:
        told: asyncio.Future[AcommError | None] = asyncio.get_running_loop().create_future()
        payload = Request(_TASK, [-1], id=os.urandom(8).hex(), response_hook=self._hook).encode(extended=True)

        def acknowledged(error: AcommError | None) -> None:
            if not told.done():
                told.set_result(error)

        channels.post(self._url, Outgoing(payload, acknowledged, wire=3, extended=True))
        if (error := await told) is not None:
            raise Failed(f"a new request was not accepted: {error}")


async def first_acknowledgement(path: str) -> None:
    """Returns when a request is acknowledged at the socket `path`, which may not be there yet."""
    end = time.perf_counter() + START_TIMEOUT
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(path)
        except OSError:
            if time.perf_counter() > end:
                raise Failed("the supervisor did not start") from None
            await asyncio.sleep(0.001)
            continue
        payload = Request(_TASK, [-1], id=os.urandom(8).hex()).encode(3)
        writer.write(len(payload).to_bytes(4, "big") + payload)
        size = int.from_bytes(await reader.readexactly(4), "big")
        ack = json.loads(await reader.readexactly(size))
        writer.close()
        if ack["error"]:
            raise Failed(f"the first request was not accepted: {ack['error']}")
        return


@asynccontextmanager
async def served(folder: Path, journal: Path) -> AsyncIterator[psutil.Popen]:
    """A supervisor, which is stopped in order."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("ACOMM_")}
    scripts = Path(__file__).parents[1]
    own["PYTHONPATH"] = os.pathsep.join([str(scripts.parent), str(scripts)])
    command = [sys.executable, "-m", "workers", "benchmarks.tasks", "--socket", str(folder / "s.sock")]
    command += ["--workers", str(WORKERS), "--journal", str(journal), "--log-level", "warning"]
    process = psutil.Popen(command, env=own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        if await asyncio.to_thread(process.wait, START_TIMEOUT):  # its last answers come to us
            raise Failed("the supervisor did not end in order")
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def largest_memory(process: psutil.Process) -> int:
    """Bytes of memory that it has had at most, as the kernel counts."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "VmHWM":
            return int(value.split()[0]) * 1024
    raise Failed("the supervisor has ended by itself")


# -- the run ------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Seconds from the start to the first acknowledgement, and to the last answer; those of each new request
    meanwhile; bytes of memory at most; seconds of processor time, of the supervisor alone.
    """

    first: float
    all: float
    meanwhile: list[float]
    memory: int
    cpu: float


async def measure(folder: Path, journal: Path, answers: Answers) -> Found:
    """Raises Failed."""
    hook = folder / "hook.sock"
    async with UnixListener(str(hook), on_message=answers.take), served(folder, journal) as process:
        answers.last = started = time.perf_counter()
        await first_acknowledgement(str(folder / "s.sock"))
        first = time.perf_counter() - started
        prober = Prober(unix_url(str(folder / "s.sock")), unix_url(str(hook)))
        probing = asyncio.create_task(prober.run())
        waiting = asyncio.create_task(answers.wait())
        await asyncio.wait({probing, waiting}, return_when=asyncio.FIRST_COMPLETED)
        seconds = answers.last - started
        for task in (probing, waiting):
            if not task.done():
                task.cancel()
        for result in await asyncio.gather(probing, waiting, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        memory = largest_memory(process)
        cpu = sum(process.cpu_times()[:2])
    answers.check()
    return Found(first, seconds, prober.seconds, memory, cpu)


def run(arguments: Sequence[str], machine: str) -> int:
    """Returns the exit status: 1 if something was not answered, or not once."""
    parser = argparse.ArgumentParser(
        prog="scripts/bench recovery", description="A supervisor whose journal has unfinished requests."
    )
    parser.add_argument("--rows", type=int, default=ROWS, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--folder", metavar="DIR", help="where the journal is made (default: where temporary files are)"
    )
    given = parser.parse_args(arguments)
    if given.rows < 1:
        parser.error("--rows must be 1 or more")
    print(machine, flush=True)
    with tempfile.TemporaryDirectory(prefix="acomm-bench-", dir=given.folder) as name:
        try:
            _run(Path(name), given.rows)
        except Failed as error:
            print(f"recovery: {error}", file=sys.stderr)
            return 1
    return 0


def _run(folder: Path, rows: int) -> None:
    empty = uvloop.run(_measured(folder, folder / "empty.db", 0))
    journal = folder / "journal.db"
    started = time.perf_counter()
    _filled(journal, rows, unix_url(str(folder / "hook.sock")))
    seconds = time.perf_counter() - started
    size = sum(Path(f"{journal}{tail}").stat().st_size for tail in ("", "-wal"))
    print(f"{rows:,} unfinished requests, {size / 2**20:,.0f} MiB, written in {seconds:.1f} s", flush=True)
    found = uvloop.run(_measured(folder, journal, rows))
    print(f"first acknowledgement    {found.first:8.2f} s ({empty.first:.2f} s with an empty journal)")
    print(f"all answered, each once  {found.all:8.2f} s ({rows / (found.all - found.first):,.0f} a second)")
    each = 1e6 * (found.cpu - empty.cpu) / rows
    print(f"processor time           {found.cpu:8.2f} s of the supervisor alone ({each:.0f} µs a request)")
    if found.meanwhile:
        p50, p99 = (value / 1000 for value in percentiles(found.meanwhile).values())
        print(f"new ones acknowledged    p50 {p50:8.1f} ms, p99 {p99:.1f} ms, of {len(found.meanwhile)}")
    print(
        f"the supervisor's memory  {found.memory / 2**20:8.0f} MiB at most "
        f"({empty.memory / 2**20:.0f} MiB with an empty journal)"
    )
    file = JournalFile(str(journal))
    left = file.count_unfinished()
    file.close()
    if left:
        raise Failed(f"{left} answers were taken and are unfinished in the journal all the same")


async def _measured(folder: Path, journal: Path, rows: int) -> Found:
    return await measure(folder, journal, Answers(rows))
