"""PoolExecutor under faults: the right error on the right future, an answer for all others, no slot lost.

`--rounds N` repeats each; one round is what continuous integration has time for.
"""

import concurrent.futures as cf
import contextlib
import os
import random
import signal
from typing import Any

import executortasks as tasks
import psutil
import pytest
from leftovers import workers
from serving import Fifo

from workers import PoolExecutor
from workers.errors import CallCancelled
from workers.executor import CallLost

pytestmark = pytest.mark.process

DEADLINE = 60.0
"""Seconds; nothing here waits for it unless it fails."""


# -- every fault at every step

MATRIX = [
    (how, step)
    for how in ("error", "exit", "os_exit", "segfault")
    for step in ("dump", "load", "run", "dump result", "load result")
    # These would end the program itself, as with any executor.
    if not (how in ("os_exit", "segfault") and step in ("dump", "load result"))
]

EXPECTED = {"error": ZeroDivisionError, "exit": SystemExit, "os_exit": CallLost, "segfault": CallLost}


def submit(pool: PoolExecutor, how: str, step: str) -> cf.Future[Any]:
    me = os.getpid()
    match step:
        case "dump":
            return pool.submit(tasks.echo, tasks.Evil(how, "pickle"))
        case "load":
            return pool.submit(tasks.echo, tasks.Evil(how, "child", me))
        case "run":
            return pool.submit(tasks.die, how)
        case "dump result":
            return pool.submit(tasks.make_evil, how, "pickle", me)
        case _:
            return pool.submit(tasks.make_evil, how, "parent", me)


@pytest.mark.parametrize("size", [1, 2, 5, 13])
def test_every_fault_at_every_step(size: int, rounds: range) -> None:
    with PoolExecutor(size) as pool:
        for _ in rounds:
            for how, step in MATRIX:
                faulty = submit(pool, how, step)
                others = [pool.submit(tasks.square, n) for n in range(20)]
                error = faulty.exception(DEADLINE)
                assert type(error) is EXPECTED[how], (how, step)
                assert [other.result(DEADLINE) for other in others] == [n * n for n in range(20)]


def test_all_faults_at_once(rounds: range) -> None:
    rng = random.Random(3)
    with PoolExecutor(3) as pool:
        for _ in rounds:
            faults = MATRIX * 2
            rng.shuffle(faults)
            futures = []
            for how, step in faults:
                futures += [(submit(pool, how, step), EXPECTED[how], (how, step))]
                futures += [(pool.submit(tasks.square, n), None, n) for n in range(rng.randrange(9))]
            for future, expected, what in futures:
                if expected is None:
                    assert future.result(DEADLINE) == what * what
                else:
                    assert type(future.exception(DEADLINE)) is expected, what


# -- workers killed


def test_workers_killed_at_random(rounds: range) -> None:
    rng = random.Random(7)
    with PoolExecutor(2) as pool:
        for _ in rounds:
            futures = [pool.submit(tasks.spin, n) for n in range(1000)]
            for n in range(1000):
                if rng.random() < 0.05:
                    for victim in rng.sample(found := workers(), min(1, len(found))):
                        with contextlib.suppress(psutil.NoSuchProcess):
                            victim.kill()
                error = futures[n].exception(DEADLINE)
                assert error is None or isinstance(error, CallLost)
                assert error is not None or futures[n].result() == n


def test_running_calls_killed_at_random(rounds: range, started: Fifo) -> None:
    """Each call tells that it runs; some are then killed through the pool, or their workers by a signal, at
    once or when others have begun.
    """
    kills = 100 if len(rounds) == 1 else 1000
    rng = random.Random(11)
    with PoolExecutor(4) as pool:
        for _ in rounds:
            many = range(6 * kills)
            futures = [pool.submit(tasks.tell_and_spin, started.path, n, rng.randrange(3000)) for n in many]
            killed: set[int] = set()
            signalled, began = 0, 0
            running: list[tuple[int, int]] = []
            rest = ""
            while len(killed) + signalled < kills:
                assert began < len(futures), "too few calls for so many kills"
                *lines, rest = (rest + started.read()).split("\n")  # a read may end within a line
                for line in lines:
                    number, pid = map(int, line.split())
                    running = [*running[-4:], (number, pid)]
                    began += 1
                if rng.random() < 0.5:
                    continue
                number, pid = rng.choice(running)
                if rng.random() < 0.5:
                    if pool.kill(futures[number]):
                        killed.add(number)
                else:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        signalled += 1
            assert not cf.wait(futures, DEADLINE).not_done
            lost = 0
            for number, future in enumerate(futures):
                if future.cancelled() or isinstance(error := future.exception(), CallCancelled):
                    assert number in killed
                elif error is None:
                    assert future.result() == number
                else:
                    assert isinstance(error, CallLost), error
                    lost += 1
            assert lost <= signalled
            started.drain()
            assert_all_run_at_once(pool, 4, started)


def assert_all_run_at_once(pool: PoolExecutor, size: int, started: Fifo) -> None:
    """No slot was lost: as many calls as there are workers run."""
    waiting = [pool.submit(tasks.tell_and_wait, started.path) for _ in range(size)]
    pids: set[str] = set()
    while len(pids) < size:
        pids |= set(started.read().split())
    for future in waiting:
        assert pool.kill(future)
        assert isinstance(future.exception(DEADLINE), CallCancelled)


def test_workers_replaced_after_each_call(rounds: range) -> None:
    with PoolExecutor(2, max_tasks_per_child=1) as pool:
        for _ in rounds:
            pids = list(pool.map(tasks.pid, range(50)))
            assert len(set(pids)) > 40  # pids may come again
