"""Large arguments and results of a PoolExecutor, through deaths, cancels, forks and full memory."""

import concurrent.futures as cf
import gc
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import executortasks as tasks
import largetasks
import numpy as np
import psutil
import pytest

from workers import PoolExecutor
from workers.errors import CallCancelled
from workers.executor import BrokenPool, CallLost

pytestmark = pytest.mark.process

DEADLINE = 60.0
"""Seconds; nothing here waits for it unless it fails."""

SIZE = 1 << 20
SHARED = 1 << 27


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    assert shared() == 0
    assert "acomm-segments" not in Path("/proc/self/maps").read_text()


@pytest.fixture
def pool() -> Iterator[PoolExecutor]:
    with PoolExecutor(2, shared_memory=SHARED) as pool:
        yield pool


def shared() -> int:
    """Bytes of shared memory that this process has descriptors of."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if "acomm-segments" in os.readlink(f"/proc/self/fd/{fd}"):
                found += os.stat(f"/proc/self/fd/{fd}").st_blocks * 512
    return found


def arena(pool: PoolExecutor) -> str:
    return repr(pool._arena)


def running(fifo: str) -> None:
    """Wait until `hang` says that it runs."""
    assert Path(fifo).read_text() == "running\n"


def test_arguments_and_results_are_mapped_on_the_far_side(pool: PoolExecutor) -> None:
    array = largetasks.made(1, SIZE)
    assert pool.submit(largetasks.is_mapped, array).result(DEADLINE)
    there = pool.submit(tasks.echo, array).result(DEADLINE)
    assert largetasks.is_mapped(there)
    assert np.array_equal(there, array)
    there += 1
    assert np.array_equal(there, array + 1)


def test_large_items_of_a_map_are_mapped_too(pool: PoolExecutor) -> None:
    array = largetasks.made(1, SIZE)
    assert all(pool.map(largetasks.is_mapped, [array] * 20))
    results = list(pool.map(largetasks.made, range(20), [SIZE] * 20))
    assert all(map(largetasks.is_sound, results))
    # A few are looked at together, before it is known how large they are.
    assert sum(map(largetasks.is_mapped, results)) > 10


def test_a_task_may_write_to_its_argument(pool: PoolExecutor) -> None:
    array = np.arange(SIZE)
    for _ in range(10):
        assert np.array_equal(pool.submit(largetasks.doubled, array).result(DEADLINE), array * 2)
    assert np.array_equal(array, np.arange(SIZE))


def test_memory_is_used_again_and_bounded(pool: PoolExecutor) -> None:
    for n in range(30):
        result = pool.submit(largetasks.checked, largetasks.made(n, SIZE), n, SIZE).result(DEADLINE)
        assert largetasks.is_sound(result)
        del result
    assert shared() < 10 * SIZE


def test_results_stay_as_long_as_somebody_has_them() -> None:
    with PoolExecutor(2, shared_memory=SHARED) as pool:
        kept = [pool.submit(largetasks.made, n, SIZE).result(DEADLINE) for n in range(30)]
        parts = [array[5:] for array in kept]
        del kept
        for n in range(30):
            pool.submit(largetasks.made, n + 100, SIZE).result(DEADLINE)
    for n, part in enumerate(parts):
        assert np.array_equal(part, largetasks.made(n, SIZE)[5:])


def test_arguments_stay_as_long_as_the_worker_has_them(pool: PoolExecutor) -> None:
    futures = [pool.submit(largetasks.keep, largetasks.made(n, SIZE)) for n in range(20)]
    cf.wait(futures, DEADLINE)
    for n in range(20):
        array = largetasks.made(n + 100, SIZE)
        assert largetasks.is_sound(pool.submit(tasks.echo, array).result(DEADLINE))
        assert pool.submit(largetasks.kept_are_sound, array).result(DEADLINE)
    assert all(future.result() for future in futures)


def test_more_than_there_is_room_for() -> None:
    """Of 40 MB queued, 8 are in shared memory; the rest travels as small calls do."""
    with PoolExecutor(2, shared_memory=16 * SIZE) as pool:
        futures = [pool.submit(largetasks.checked, largetasks.made(n, SIZE), n, SIZE) for n in range(40)]
        for n, future in enumerate(futures):
            assert np.array_equal(future.result(DEADLINE), largetasks.made(n, SIZE))
            assert shared() <= 17 * SIZE


def test_no_shared_memory_at_all() -> None:
    with PoolExecutor(1, shared_memory=0) as pool:
        array = largetasks.made(1, SIZE)
        assert not pool.submit(largetasks.is_mapped, array).result(DEADLINE)
        assert np.array_equal(pool.submit(tasks.echo, array).result(DEADLINE), array)
        assert bytes(pool.submit(tasks.echo, memoryview(array)).result(DEADLINE)) == bytes(array)
        assert shared() == 0
    for bad, error in ((-1, ValueError), (0.5, TypeError), ("1G", TypeError)):
        with pytest.raises(error, match="shared_memory must be"):
            PoolExecutor(shared_memory=bad)  # type: ignore[arg-type]


def test_one_that_is_never_used_leaves_nothing() -> None:
    PoolExecutor(2).shutdown()
    PoolExecutor(2)


def test_small_calls_take_none(pool: PoolExecutor) -> None:
    assert list(pool.map(tasks.square, range(1000))) == [n * n for n in range(1000)]
    assert arena(pool) == "<Arena 0 bytes, 0 busy, 0 out, 0 free>"


def test_cancelled_calls_and_their_memory(pool: PoolExecutor, fifo: str) -> None:
    hanging = [pool.submit(tasks.hang, fifo)]
    running(fifo)
    hanging.append(pool.submit(tasks.hang, fifo))
    running(fifo)
    futures = [pool.submit(tasks.echo, largetasks.made(n, SIZE)) for n in range(10)]
    assert "10 busy" in arena(pool)
    assert all(future.cancel() for future in futures)
    cf.wait(futures, DEADLINE)
    assert "0 busy" in arena(pool)
    for future in hanging:
        pool.kill(future)
    assert largetasks.is_sound(pool.submit(tasks.echo, largetasks.made(1, SIZE)).result(DEADLINE))


def test_a_shutdown_with_calls_queued(fifo: str) -> None:
    pool = PoolExecutor(1, shared_memory=SHARED)
    hanging = pool.submit(tasks.hang, fifo)
    running(fifo)
    futures = [pool.submit(tasks.echo, largetasks.made(n, SIZE)) for n in range(10)]
    pool.shutdown(wait=False, cancel_futures=True)
    cf.wait(futures, DEADLINE)
    assert all(future.cancelled() for future in futures)
    assert "0 busy" in arena(pool)
    pool.kill(hanging)
    pool.shutdown()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(tasks.echo, largetasks.made(1, SIZE))


def test_a_broken_pool() -> None:
    pool = PoolExecutor(1, initializer=tasks.fail, initargs=(1,))
    futures = [pool.submit(tasks.echo, largetasks.made(n, SIZE)) for n in range(3)]
    for future in futures:
        with pytest.raises(BrokenPool):
            future.result(DEADLINE)
    with pytest.raises(BrokenPool):
        pool.submit(tasks.echo, largetasks.made(1, SIZE))
    pool.shutdown()


def test_a_death_with_an_argument_in_hand(pool: PoolExecutor) -> None:
    others = [pool.submit(largetasks.checked, largetasks.made(n, SIZE), n, SIZE) for n in range(4)]
    lost = [pool.submit(largetasks.overwrite, largetasks.made(n, SIZE)) for n in range(4)]
    others += [pool.submit(largetasks.checked, largetasks.made(n, SIZE), n, SIZE) for n in range(4)]
    for future in lost:
        with pytest.raises(CallLost):
            future.result(DEADLINE)
    assert all(largetasks.is_sound(future.result(DEADLINE)) for future in others)


def test_a_killed_call_gives_its_memory_back(pool: PoolExecutor, fifo: str) -> None:
    for n in range(5):
        future = pool.submit(tasks.hang_with, fifo, largetasks.made(n, SIZE))
        running(fifo)
        assert pool.kill(future)
        with pytest.raises(CallCancelled):
            future.result(DEADLINE)
    assert largetasks.is_sound(pool.submit(tasks.echo, largetasks.made(1, SIZE)).result(DEADLINE))
    assert "0 busy" in arena(pool)


def test_workers_that_are_replaced_after_each_call() -> None:
    """A worker has exited before its result is looked at."""
    with PoolExecutor(2, max_tasks_per_child=1, shared_memory=SHARED) as pool:
        futures = [pool.submit(largetasks.checked, largetasks.made(n, SIZE), n, SIZE) for n in range(20)]
        for n, future in enumerate(futures):
            assert np.array_equal(future.result(DEADLINE), largetasks.made(n, SIZE))


@pytest.mark.parametrize("seed", range(3))
def test_deaths_at_any_moment_cost_no_other_call_its_bytes(seed: int, rounds: range) -> None:
    rng = random.Random(seed)
    kept = []
    with PoolExecutor(2, shared_memory=SHARED) as pool:
        for round in range(6 * len(rounds)):
            sizes = [rng.choice([200_000, SIZE, 3 * SIZE]) for _ in range(8)]
            futures = [
                pool.submit(largetasks.checked, largetasks.made(n, size), round * 100 + n, size)
                for n, size in enumerate(sizes)
            ]
            killer = threading.Timer(rng.uniform(0, 0.05), kill_a_worker, [rng.random()])
            killer.start()
            lost = 0
            for n, (future, size) in enumerate(zip(futures, sizes, strict=True)):
                try:
                    result = future.result(DEADLINE)
                except CallLost:
                    lost += 1
                else:
                    assert np.array_equal(result, largetasks.made(round * 100 + n, size))
                    if rng.random() < 0.2:
                        kept.append(result)
                    del result
            killer.join()
            assert lost <= 1
            assert all(map(largetasks.is_sound, kept))
        assert largetasks.is_sound(pool.submit(tasks.echo, largetasks.made(1, SIZE)).result(DEADLINE))
        assert "0 busy" in arena(pool)
    assert all(map(largetasks.is_sound, kept))


def kill_a_worker(which: float) -> None:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name() == "acomm-worker":
                found.append(process)
    if found:
        with suppress(psutil.NoSuchProcess):
            found[int(which * len(found))].kill()


def test_a_process_that_a_task_leaves_behind_sees_its_argument(pool: PoolExecutor, tmp_path: Path) -> None:
    go, told = str(tmp_path / "go"), str(tmp_path / "told")
    os.mkfifo(go)
    os.mkfifo(told)
    pool.submit(largetasks.fork_with, largetasks.made(1, SIZE), go, told).result(DEADLINE)
    for n in range(20):
        pool.submit(tasks.echo, largetasks.made(n, SIZE)).result(DEADLINE)
    Path(go).write_text("")
    assert Path(told).read_text() == "True"


def test_a_copy_of_a_worker_does_not_write_its_result(pool: PoolExecutor) -> None:
    for _ in range(5):
        result = pool.submit(largetasks.fork_and_return, SIZE).result(DEADLINE)
        assert np.array_equal(result, largetasks.made(1, SIZE))


def test_a_fork_of_the_program_sees_its_results(pool: PoolExecutor) -> None:
    result = pool.submit(largetasks.made, 1, SIZE).result(DEADLINE)
    go, went = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        os.read(go, 1)
        os._exit(0 if largetasks.is_sound(result) and shared() == 0 else 1)
    del result
    for n in range(10):
        pool.submit(largetasks.made, n, SIZE).result(DEADLINE)
    os.write(went, b"x")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(go)
    os.close(went)


def test_threads_submit_large_calls_at_once(pool: PoolExecutor) -> None:
    failures: list[Any] = []

    def submit(thread: int) -> None:
        for n in range(10):
            seed = thread * 100 + n
            future = pool.submit(largetasks.checked, largetasks.made(seed, SIZE), seed, SIZE)
            if not np.array_equal(future.result(DEADLINE), largetasks.made(seed, SIZE)):
                failures.append(seed)

    threads = [threading.Thread(target=submit, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_program_that_exits_or_dies_with_results_in_hand(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
import os, sys
import numpy as np
from workers import PoolExecutor

class Holder:
    def __init__(self, array):
        self.array = array

def make(n):
    return Holder(np.arange(n))

pool = PoolExecutor(2)
held = [pool.submit(make, 1000_000).result() for _ in range(5)]
assert all(h.array[-1] == 999_999 for h in held)
assert list(pool.map(lambda a: a.sum(), [np.ones(1_000_000)] * 5)) == [1_000_000] * 5
if sys.argv[1] == "dies":
    os.kill(os.getpid(), 9)
""")
    for how, status in (("exits", 0), ("dies", -signal.SIGKILL)):
        run = subprocess.run([sys.executable, str(script), how], capture_output=True, timeout=DEADLINE)
        assert (run.returncode, run.stderr) == (status, b"")
