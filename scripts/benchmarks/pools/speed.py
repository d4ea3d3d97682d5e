"""Cases: how many calls, how long one takes, how much data, how much work."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median
from typing import Any

from benchmarks.harness import percentiles
from benchmarks.pools import bare
from benchmarks.pools.contenders import WORKERS, Cannot, Contender, Pool, warm
from benchmarks.pools.functions import identity, spin
from benchmarks.pools.samples import Figure, Figures

IN_FLIGHT = 64

PASSES = 0.3
"""Seconds that are filled with passes, as some pools are done with theirs in a few milliseconds."""


def _check(expected: object, found: object) -> None:
    if found != expected:
        raise AssertionError("a result is not what was sent")


def _passes(run: Callable[[int], float], calls: int) -> float:
    """The median seconds of `run`, fed `calls` calls again and again, after some that do not count."""
    run(min(calls, 500))
    each: list[float] = []
    while sum(each) < PASSES:
        each.append(run(calls))
    return median(each)


def submit(contender: Contender, calls: int) -> Figures:
    """All submitted at once, then waited for, in order."""
    _needs_futures(contender)
    with contender.open() as pool:
        warm(pool, contender)
        return {"submit": Figure(calls / _passes(partial(_submit_all, pool), calls))}


def _submit_all(pool: Pool, calls: int) -> float:
    values = range(calls)
    started = time.perf_counter()
    handles = [pool.submit(identity, value) for value in values]
    found = [pool.result(handle) for handle in handles]
    seconds = time.perf_counter() - started
    _check(list(values), found)
    return seconds


def window(contender: Contender, calls: int) -> Figures:
    """IN_FLIGHT under way, the oldest of which is waited for before the next is submitted."""
    _needs_futures(contender)
    with contender.open() as pool:
        warm(pool, contender)
        return {"window": Figure(calls / _passes(partial(_window_of, pool), calls))}


def _window_of(pool: Pool, calls: int) -> float:
    under_way: deque[tuple[int, Any]] = deque()
    started = time.perf_counter()
    for value in range(calls):
        if len(under_way) == IN_FLIGHT:
            expected, handle = under_way.popleft()
            _check(expected, pool.result(handle))
        under_way.append((value, pool.submit(identity, value)))
    for expected, handle in under_way:
        _check(expected, pool.result(handle))
    return time.perf_counter() - started


def map_by_default(contender: Contender, calls: int) -> Figures:
    with contender.open() as pool:
        warm(pool, contender)
        return {"map": Figure(calls / _passes(partial(_map_all, pool, None), calls))}


def map_in_chunks(contender: Contender, calls: int) -> Figures:
    """The chunk size that is found best in a first pass is measured in a second."""
    with contender.open() as pool:
        warm(pool, contender)
        chunks = sorted({max(1, calls // parts) for parts in (4 * WORKERS, 16 * WORKERS, 64 * WORKERS)})
        best = min(chunks, key=lambda chunk: _passes(partial(_map_all, pool, chunk), calls))
        rate = calls / _passes(partial(_map_all, pool, best), calls)
        return {"chunks": Figure(rate, f"by {best:,}")}


def _map_all(pool: Pool, chunk: int | None, calls: int) -> float:
    values = range(calls)
    started = time.perf_counter()
    found = pool.map(identity, values, chunk)
    seconds = time.perf_counter() - started
    _check(list(values), found)
    return seconds


def round_trip(contender: Contender, calls: int) -> Figures:
    with contender.open() as pool:
        warm(pool, contender)
        for value in range(min(calls, 100)):
            _timed(pool, value)
        return _trips([_timed(pool, value) for value in range(calls)])


def _timed(pool: Pool, value: int) -> float:
    started = time.perf_counter()
    found = pool.call(identity, value)
    seconds = time.perf_counter() - started
    _check(value, found)
    return seconds


def pipe_round_trip(calls: int) -> Figures:
    return _trips(bare.pipe_pings(calls))


def zmq_round_trip(calls: int) -> Figures:
    return _trips(bare.zmq_pings(calls))


def _trips(seconds: list[float]) -> Figures:
    found = percentiles(seconds)
    return {"p50": Figure(found["µs p50"]), "p99": Figure(found["µs p99"])}


def echo(contender: Contender, repeats: int, *, megabytes: int) -> Figures:
    """An array there and back; the median of `repeats`, after two that do not count."""
    if find_spec("numpy") is None:
        raise Cannot("numpy is not installed")
    import numpy

    each = []
    with contender.open() as pool:
        warm(pool, contender)
        for number in range(2 + repeats):
            # A new one each time: joblib does not send an object again that it has sent before.
            data = numpy.arange(number, number + megabytes * 1_000_000 // 8, dtype=numpy.int64)
            started = time.perf_counter()
            found = pool.call(identity, data)
            each.append(time.perf_counter() - started)
            if not numpy.array_equal(found, data):
                raise AssertionError("the array did not come back")
            del found
    return {f"{megabytes} MB": Figure(1e3 * sorted(each[2:])[repeats // 2])}


def work(contender: Contender, calls: int, *, turns: int) -> Figures:
    """Seconds for `calls` calls that keep a processor busy."""
    with contender.open() as pool:
        warm(pool, contender)
        started = time.perf_counter()
        if contender.futures:
            handles = [pool.submit(spin, turns) for _ in range(calls)]
            found = [pool.result(handle) for handle in handles]
        else:
            found = pool.map(spin, [turns] * calls)
        seconds = time.perf_counter() - started
    _check([spin(turns)] * calls, found)
    return {"work": Figure(calls / seconds)}


def bare_work(calls: int, *, turns: int) -> Figures:
    return {"work": Figure(calls / bare.spinning(WORKERS, calls, turns))}


def turns_of(seconds: float) -> int:
    """How many turns of `spin` take so much processor time here, at the best of some trials."""
    trial = 200_000
    spent = []
    for _ in range(5):
        started = time.process_time()
        spin(trial)
        spent.append(time.process_time() - started)
    return max(1, round(trial * seconds / min(spent)))


def _needs_futures(contender: Contender) -> None:
    if not contender.futures:
        raise Cannot("has no futures")
