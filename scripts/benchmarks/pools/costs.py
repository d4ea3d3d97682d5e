"""Cases: memory, the start, and what a call costs that waits with many others."""

from __future__ import annotations

import gc
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import psutil

from benchmarks.pools.contenders import WORKERS, Cannot, Contender, Pool, warm
from benchmarks.pools.functions import hold, identity
from benchmarks.pools.samples import Figure, Figures

START_LIMIT = 30.0
"""Seconds in which a program must have its first result, and held workers must have begun."""

SETTLE_LIMIT = 5.0
"""Seconds for the memory of a pool that has taken many calls to stop growing."""

PROGRAM = """\
import time
{imports}
from benchmarks.pools.functions import identity
started = time.monotonic()
with {make} as pool:
    result = {first}
    ended = time.monotonic()
    print(started, ended, result, flush=True)
"""
"""A program that a user would write, and the times when it makes the pool and has its first result."""


# -- memory -------------------------------------------------------------------------------------------


def memory(contender: Contender, settle: int) -> Figures:
    """Megabytes of an idle pool, `settle` milliseconds after both workers have made a call."""
    with contender.open() as pool:
        warm(pool, contender)
        gc.collect()
        time.sleep(settle / 1000)  # idle is what is measured
        processes = psutil.Process().children(recursive=True)
        theirs = sum(pss(process.pid) for process in processes)
        program = pss(os.getpid())
        return {
            "pool": Figure(theirs / 1e6, f"{len(processes)} processes"),
            "all": Figure((theirs + program) / 1e6),
        }


def pss(pid: int) -> int:
    """Bytes: its own pages, and its share of shared ones (proc(5), smaps_rollup). 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))


def _of_all() -> int:
    return pss(os.getpid()) + sum(pss(child.pid) for child in psutil.Process().children(recursive=True))


# -- start --------------------------------------------------------------------------------------------


def start(contender: Contender, programs: int) -> Figures:
    """Programs that make a pool and one call, one after the other; the medians of their times."""
    program = PROGRAM.format(imports=contender.imports, make=contender.make, first=contender.first)
    cold, within, whole = [], [], []
    for _ in range(programs):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=START_LIMIT, check=False
        )
        whole.append(time.monotonic() - began)
        if done.returncode or len(words := done.stdout.split()) != 3 or words[2] != "1":
            raise RuntimeError(f"the program failed: {done.stderr.strip()[-300:] or done.stdout!r}")
        made, ended = float(words[0]), float(words[1])
        cold.append(ended - began)
        within.append(ended - made)
    return {
        "interpreter": Figure(1e3 * median(cold)),
        "constructor": Figure(1e3 * median(within)),
        "program": Figure(1e3 * median(whole)),
    }


# -- growth -------------------------------------------------------------------------------------------


def growth(contender: Contender, calls: int) -> Figures:
    """`calls` calls are queued while the workers are held; then they run."""
    if not contender.futures:
        raise Cannot("has no futures")
    with contender.open() as pool:
        warm(pool, contender)
        with _held(pool) as held:
            gc.collect()
            before = _of_all()
            started = time.perf_counter()
            handles = [pool.submit(identity, value) for value in range(calls)]
            queueing = time.perf_counter() - started
            grown = _settled() - before
            held()
            started = time.perf_counter()
            found = [pool.result(handle) for handle in handles]
            seconds = queueing + time.perf_counter() - started
        if found != list(range(calls)):
            raise AssertionError("a result is not what was sent")
    return {f"calls/s of {calls}": Figure(calls / seconds), f"bytes each of {calls}": Figure(grown / calls)}


@contextmanager
def _held(pool: Pool) -> Iterator[Callable[[], None]]:
    """Both workers are busy until what is yielded is called; raises Cannot if they do not begin."""
    with tempfile.TemporaryDirectory(prefix="acomm-bench-") as folder:
        paths = [str(Path(folder, name)) for name in ("started", "release")]
        for path in paths:
            os.mkfifo(path)
        started, release = (os.open(path, os.O_RDWR) for path in paths)
        handles = [pool.submit(hold, *paths) for _ in range(WORKERS)]
        begun, end = 0, time.monotonic() + START_LIMIT
        while begun < WORKERS:
            ready, _, _ = select.select([started], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                os.write(release, b"." * WORKERS)
                raise Cannot(f"only {begun} of {WORKERS} calls began")
            begun += len(os.read(started, WORKERS))

        def let_go() -> None:
            os.write(release, b"." * WORKERS)
            for handle in handles:
                pool.result(handle)

        yield let_go
        os.close(started)
        os.close(release)


def _settled() -> int:
    """Bytes of all processes, once they have stopped to grow."""
    end = time.monotonic() + SETTLE_LIMIT
    last, now = 0, _of_all()
    while now > 1.005 * last and time.monotonic() < end:
        time.sleep(0.05)  # a pool moves what it was given from one place to another, and does not tell
        last, now = now, _of_all()
    return now
