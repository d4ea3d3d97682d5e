"""The demo: the standard library's source, analysed by worker processes, one of which is killed.

    client (this program)                supervisor (child)                workers
      one request a file  ------------->   accepts, sends out  ---------->   analyse(path)
      on_success, pickled here                 |
                                           runs on_success: collect() <---- report
      answer at our hook  <-------------   then answers the hook

The totals are collected in the supervisor, in TOTALS below: the handlers, which it unpickles one by one,
share them because they reach them through this importable module. At the end a last request's handler
writes them to a file of the client's choice.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from acomm.calls import Call
from acomm.client import Client
from acomm.messages import Request, Response
from workers.config import available_cpus
from workers.options import Retry
from workers.registry import task
from workers.sourcecode import FileReport, Totals, analyse, merge, standard_library

TOTALS = Totals()
_lock = threading.Lock()


@task(retry=Retry(times=0, crashes=3))
def analyse_file(path: str) -> FileReport:
    """Count, measure and compress one Python source file."""
    return analyse(path)


@task
def analysed() -> None:
    """Do nothing: the request's handler writes the totals."""


def collect(report: FileReport) -> None:
    """Add a report to the totals; runs in the supervisor."""
    with _lock:
        TOTALS.add(report)


def totals_as_json() -> bytes:
    """The totals so far; runs in the supervisor."""
    with _lock:
        return msgspec.json.encode(TOTALS.as_dict())


def collecting() -> Callable[[Request, Response], None]:
    """A handler for `analyse_file`."""

    def on_success(request: Request, response: Response) -> None:
        collect(response.result_as(FileReport))

    return on_success


def writing_to(path: str) -> Callable[[Request, Response], None]:
    """A handler that leaves the supervisor's totals at `path`."""

    def on_success(request: Request, response: Response) -> None:
        Path(path).write_bytes(totals_as_json())

    return on_success


def run(*, workers: int | None = None, quick: bool = False) -> int:
    """Run the demo and print its table. Returns the exit status: 0 if nothing was lost."""
    from workers.launcher import launch

    workers = workers or available_cpus()
    files = standard_library(tests=not quick)
    print(
        f"{len(files)} source files of Python {sys.version.split()[0]}; {workers} worker processes",
        flush=True,
    )
    with launch("workers.demo", workers=workers) as client, tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        killed, failures = _analyse_all(client, files)
        seconds = time.perf_counter() - started
        summary = Path(folder, "totals.json")
        client.using(on_success=writing_to(str(summary))).call("analysed")
        totals: dict[str, Any] = msgspec.json.decode(summary.read_bytes())
        stats = client.stats()
    print("the same in one process, to compare", flush=True)
    started = time.perf_counter()
    alone = merge(_tracked("one process", len(files), map(analyse, files))).as_dict()
    seconds_alone = time.perf_counter() - started
    lost = len(files) - totals["files"]
    same = alone == totals
    _print_summary(totals, len(files), seconds, seconds_alone, workers)
    restarts = stats["worker_restarts"]
    print(f"killed: worker {killed} by SIGKILL half-way; workers replaced: {restarts}")
    print(f"lost after the kill: {lost} of {len(files)} files, {len(failures)} failed calls")
    print("totals: " + ("the same as in one process" if same else "DIFFERENT from one process"), flush=True)
    for failure in failures[:10]:
        print(f"failed: {failure}")
    return 0 if killed and not lost and not failures and same else 1


def _analyse_all(client: Client, files: list[str]) -> tuple[int, list[str]]:
    """Send a request for each file and wait for all; kill a worker half-way. Its pid, and what failed."""
    analysing = client.using(on_success=collecting())
    calls: dict[Call, str] = {analysing.submit("analyse_file", file): file for file in files}
    killed = 0
    failures = []
    for number, call in enumerate(_tracked(f"{len(files)} calls", len(files), as_completed(calls))):
        if not killed and number >= len(files) // 2:
            killed = _kill_a_busy_worker(client)
        error = call.exception()
        if error is not None:
            failures.append(f"{calls[call]}: {error}")
    return killed, failures


def _kill_a_busy_worker(client: Client) -> int:
    """SIGKILL a worker that runs a call; its pid, or 0 if none runs one just now."""
    for worker in client.stats()["workers"]:
        if worker["task"] is not None:
            os.kill(worker["pid"], signal.SIGKILL)
            return int(worker["pid"])
    return 0


def _tracked(what: str, total: int, items: Iterator[Any]) -> Iterator[Any]:
    """The items, with a live bar and rate on a terminal, else a plain line now and then."""
    with _progress(what, total) as advance:
        for item in items:
            yield item
            advance()


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[], None]]:
    if not sys.stdout.isatty():
        started, done = time.perf_counter(), 0

        def advance() -> None:
            nonlocal done
            done += 1
            if done % max(total // 10, 1) == 0 or done == total:
                rate = done / (time.perf_counter() - started)
                print(f"{what}: {done}/{total}, {rate:.0f} files/s", flush=True)

        yield advance
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed  # None until there is something to tell it from
            return Text("" if speed is None else f"{speed:.0f} files/s")

    with Progress(
        "{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), Rate()
    ) as bar:
        shown = bar.add_task(what, total=total)
        yield lambda: bar.advance(shown)


def _print_summary(
    totals: dict[str, Any], files: int, seconds: float, seconds_alone: float, workers: int
) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 110)
    top = Table("complexity", "function", "file", box=box.SIMPLE, title="The ten most complex functions")
    root = os.path.dirname(os.__file__)
    for entry in totals["top"]:
        place = f"{os.path.relpath(entry['path'], root)}:{entry['line']}"
        top.add_row(str(entry["complexity"]), entry["name"], place)
    console.print(top)
    table = Table(box=box.SIMPLE, show_header=False)
    for label, value in (
        ("files", f"{totals['files']:,}"),
        ("lines", f"{totals['lines']:,}"),
        ("functions", f"{totals['functions']:,}"),
        ("bytes, compressed", f"{totals['bytes']:,} -> {totals['compressed_bytes']:,}"),
        ("calls/s", f"{files / seconds:,.0f}"),
        (f"wall time, {workers} workers", f"{seconds:.1f} s"),
        ("wall time, one process", f"{seconds_alone:.1f} s ({seconds_alone / seconds:.2f} times)"),
    ):
        table.add_row(label, value)
    console.print(table)
