"""PoolExecutor keeps the standard library's contract, and a death costs one call."""

import asyncio
import concurrent.futures as cf
import functools
import gc
import operator
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import executortasks as tasks
import pytest
from leftovers import workers

from workers import PoolExecutor
from workers.errors import CallCancelled, TaskError, WorkerLost
from workers.executor import BrokenPool

pytestmark = pytest.mark.process

DEADLINE = 60.0
"""Seconds; nothing here waits for it unless it fails."""


@pytest.fixture
def pool() -> Iterator[PoolExecutor]:
    with PoolExecutor(2) as pool:
        yield pool


def running(future: cf.Future[Any], fifo: str) -> None:
    """Wait until `hang` says that it runs."""
    assert Path(fifo).read_text() == "running\n"
    assert future.running()


# -- results


def test_a_call(pool: PoolExecutor) -> None:
    assert pool.submit(tasks.square, 3).result(DEADLINE) == 9
    assert pool.submit(tasks.echo, value=[1, "two", b"3"]).result(DEADLINE) == [1, "two", b"3"]
    assert pool.submit(functools.partial(pow, 2), 10).result(DEADLINE) == 1024
    assert pool.submit([3, 4].index, 4).result(DEADLINE) == 1
    assert pool.submit(operator.add, 1, 2).result(DEADLINE) == 3


def test_lambdas_and_closures_are_of_the_moment_of_the_submit(pool: PoolExecutor) -> None:
    n = 1
    data = [1]

    def local(x: int) -> int:
        return x + n

    def changing() -> list[int]:
        return data

    assert pool.submit(local, 1).result(DEADLINE) == 2
    n = 10
    assert pool.submit(local, 1).result(DEADLINE) == 11
    assert pool.submit(changing).result(DEADLINE) == [1]
    data.append(2)
    assert pool.submit(changing).result(DEADLINE) == [1, 2]
    assert list(pool.map(lambda x: x + 1, range(100))) == list(range(1, 101))
    assert pool.submit(tasks.call, [functools.partial(lambda: 7)]).result(DEADLINE) == 7


def test_a_scripts_own_functions_and_classes(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
from workers import PoolExecutor
COUNT = 2
class Point:
    def __init__(self, x): self.x = x
class Odd(Exception): pass
def helper(x): return x * COUNT
def double(point): return Point(helper(point.x))
def odd(): raise Odd("odd")
with PoolExecutor(1) as pool:
    result = pool.submit(double, Point(3)).result()
    assert type(result) is Point and result.x == 6
    COUNT = 5
    assert pool.submit(double, Point(3)).result().x == 15
    try:
        pool.submit(odd).result()
    except Odd as error:
        print("done", error)
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr, done.returncode) == ("done odd\n", "", 0)


def test_whatever_a_program_has_of_its_own() -> None:
    command = [sys.executable, Path(__file__).with_name("mainprogram.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n", "", 0)


def test_map(pool: PoolExecutor) -> None:
    assert list(pool.map(tasks.square, range(3000))) == [n * n for n in range(3000)]
    assert list(pool.map(pow, [2, 3, 4], [5, 6])) == [32, 729]
    assert list(pool.map(tasks.square, range(10), chunksize=4, buffersize=3)) == [n * n for n in range(10)]
    assert list(pool.map(tasks.square, [])) == []


def test_map_takes_no_more_than_its_buffer(pool: PoolExecutor) -> None:
    taken = []
    results = pool.map(tasks.square, (taken.append(n) or n for n in range(100)), buffersize=2)  # type: ignore[func-returns-value]
    assert len(taken) == 2
    assert next(results) == 0 and len(taken) == 3


def test_an_error_in_map_costs_its_own_item(pool: PoolExecutor) -> None:
    results = pool.map(lambda n: 6 // (n - 3), range(5))
    assert [next(results), next(results), next(results)] == [-2, -3, -6]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_times_out(pool: PoolExecutor, fifo: str) -> None:
    results = pool.map(tasks.hang, [fifo], timeout=0.01)
    assert Path(fifo).read_text()
    with pytest.raises(TimeoutError):
        next(results)
    for process in workers():
        process.kill()


@pytest.mark.parametrize("options", [{"chunksize": 0}, {"buffersize": 0}])
def test_map_refuses_nonsense(pool: PoolExecutor, options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        pool.map(tasks.square, [1], **options)  # type: ignore[arg-type]


# -- errors


def test_an_exception_is_the_original_with_its_traceback(pool: PoolExecutor) -> None:
    with pytest.raises(ValueError) as caught:
        pool.submit(tasks.fail, 7).result(DEADLINE)
    assert caught.value.args == (7,)
    assert "executortasks.py" in str(caught.value.__cause__) and "in fail" in str(caught.value.__cause__)


def test_an_exception_that_cannot_be_reloaded_comes_as_text(pool: PoolExecutor) -> None:
    with pytest.raises(TaskError, match="TwoArguments: 1 and 2") as caught:
        pool.submit(tasks.raise_two).result(DEADLINE)
    assert "in raise_two" in str(caught.value.__cause__)


def test_what_cannot_be_pickled_is_the_futures_error(pool: PoolExecutor) -> None:
    with pytest.raises(TypeError, match="pickle"):
        pool.submit(tasks.echo, threading.Lock()).result(DEADLINE)
    with pytest.raises(TypeError, match="pickle"):
        pool.submit(threading.Lock).result(DEADLINE)
    with pytest.raises(TypeError, match="cannot be sent"):
        pool.submit(pool.submit, tasks.pid).result(DEADLINE)
    assert pool.submit(tasks.square, 2).result(DEADLINE) == 4


def test_a_death_is_of_one_future_alone(pool: PoolExecutor) -> None:
    pids = {pool.submit(tasks.pid).result(DEADLINE) for _ in range(20)}
    lost = pool.submit(os.kill, 0, signal.SIGKILL)
    others = [pool.submit(tasks.square, n) for n in range(1000)]
    error = lost.exception(DEADLINE)
    assert isinstance(error, WorkerLost) and isinstance(error, cf.BrokenExecutor)
    assert error.receipt and error.receipt["signal"] == 9 and error.receipt["pid"] in pids
    assert [other.result(DEADLINE) for other in others] == [n * n for n in range(1000)]


# -- kill, cancel, states


def test_kill_ends_a_running_call(pool: PoolExecutor, fifo: str) -> None:
    future = pool.submit(tasks.hang, fifo)
    running(future, fifo)
    assert not future.cancel()
    assert pool.kill(future)
    with pytest.raises(CallCancelled, match="hang was killed"):
        future.result(DEADLINE)
    assert not pool.kill(future)
    assert pool.submit(tasks.square, 2).result(DEADLINE) == 4


def test_cancel_and_the_states(fifo: str, tmp_path: Path) -> None:
    with PoolExecutor(1) as pool:
        first = pool.submit(tasks.hang, fifo)
        running(first, fifo)
        mark = tmp_path / "mark"
        second, third = pool.submit(mark.touch), pool.submit(mark.touch)
        assert not second.running() and not second.done()
        seen: list[cf.Future[Any]] = []
        second.add_done_callback(seen.append)
        assert second.cancel() and second.cancel() and second.cancelled() and seen == [second]
        assert pool.kill(third) and third.cancelled()
        with pytest.raises(cf.CancelledError):
            second.result()
        done, rest = cf.wait([first, second], DEADLINE, cf.FIRST_COMPLETED)
        assert (done, rest) == ({second}, {first})
        assert pool.kill(first)
    assert not mark.exists()
    assert repr(first).startswith("<Future at ") and "raised CallCancelled" in repr(first)


def test_wait_as_completed_and_callbacks(pool: PoolExecutor) -> None:
    futures = [pool.submit(tasks.square, n) for n in range(50)]
    assert {future.result() for future in cf.as_completed(futures, DEADLINE)} == {n * n for n in range(50)}
    futures = [pool.submit(tasks.square, n) for n in range(50)]
    assert cf.wait(futures, DEADLINE).not_done == set()
    heard = threading.Event()
    pool.submit(tasks.square, 1).add_done_callback(lambda _: heard.set())
    assert heard.wait(DEADLINE)


async def test_in_an_event_loop() -> None:
    loop = asyncio.get_running_loop()
    with PoolExecutor(2) as pool:
        calls = [loop.run_in_executor(pool, tasks.square, n) for n in range(100)]
        assert await asyncio.gather(*calls) == [n * n for n in range(100)]
        with pytest.raises(ValueError):
            await asyncio.wrap_future(pool.submit(tasks.fail, 1))


def test_many_threads_submit(pool: PoolExecutor) -> None:
    with cf.ThreadPoolExecutor(8) as threads:
        sums = threads.map(
            lambda base: sum(pool.map(tasks.square, range(base, base + 200))), range(0, 1600, 200)
        )
        assert sum(sums) == sum(n * n for n in range(1600))


# -- life


def test_shutdown() -> None:
    pool = PoolExecutor(1)
    futures = [pool.submit(tasks.square, n) for n in range(100)]
    pool.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(tasks.square, 1)
    assert [future.result(DEADLINE) for future in futures] == [n * n for n in range(100)]
    pool.shutdown()
    PoolExecutor(1).shutdown()


def test_shutdown_cancels(fifo: str) -> None:
    pool = PoolExecutor(1)
    first = pool.submit(tasks.hang, fifo)
    running(first, fifo)
    rest = [pool.submit(tasks.square, n) for n in range(50)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(isinstance(future.exception, object) for future in rest)
    assert cf.wait(rest, DEADLINE).not_done == set() and all(future.cancelled() for future in rest)
    pool.kill(first)
    pool.shutdown()


def test_one_that_is_dropped_shuts_down() -> None:
    pool = PoolExecutor(1)
    future = pool.submit(tasks.square, 3)
    (thread,) = [t for t in threading.enumerate() if t.name == "acomm-executor"]
    del pool
    gc.collect()
    assert future.result(DEADLINE) == 9
    thread.join(DEADLINE)
    assert not thread.is_alive()


def test_the_interpreters_end_waits() -> None:
    code = (
        "from workers import PoolExecutor; import time\n"
        "pool = PoolExecutor(1)\n"
        "pool.submit(time.sleep, 0.2).add_done_callback(lambda future: print('done', future.exception()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr, done.returncode) == ("done None\n", "", 0)


def test_a_managers_queue_and_the_name_in_logs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("""
import multiprocessing
from workers import PoolExecutor

def put_name(queue):
    queue.put(multiprocessing.current_process().name)

if __name__ == "__main__":
    with multiprocessing.Manager() as manager, PoolExecutor(1) as pool:
        queue = manager.Queue()
        pool.submit(put_name, queue).result()
        print(queue.get())
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=DEADLINE)
    assert (done.stdout, done.stderr, done.returncode) == ("PoolExecutor-1\n", "", 0)


def test_initializer() -> None:
    with PoolExecutor(2, initializer=tasks.initialize, initargs=("set",)) as pool:
        assert pool.submit(tasks.initialized).result(DEADLINE) == ["set"]


def test_an_initializer_that_fails_breaks_the_pool(capfd: pytest.CaptureFixture[str]) -> None:
    with PoolExecutor(2, initializer=tasks.broken_initializer) as pool:
        futures = [pool.submit(tasks.square, n) for n in range(3)]
        for future in futures:
            assert isinstance(future.exception(DEADLINE), BrokenPool)
        with pytest.raises(cf.BrokenExecutor):
            pool.submit(tasks.square, 1)
    assert "this initializer fails" in capfd.readouterr().err


def test_an_interrupt_within_a_submit_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with PoolExecutor(1) as pool:
        driver = pool._driver
        with pytest.raises(KeyboardInterrupt):
            while True:  # until the engine sleeps, and the submit sends by itself
                pool.submit(tasks.square, 2).result(DEADLINE)
                with driver._lock, monkeypatch.context() as patch:
                    patch.setattr(driver._pool, "process_events", interrupted)
                    if driver._sleeping:
                        pool.submit(tasks.square, 2)
        driver.join()
        with pytest.raises(BrokenPool, match="KeyboardInterrupt"):
            pool.submit(tasks.square, 2)


def test_max_tasks_per_child() -> None:
    with PoolExecutor(1, max_tasks_per_child=3) as pool:
        pids = list(pool.map(tasks.pid, range(30)))
    assert len(set(pids)) == 10 and all(pids.count(pid) == 3 for pid in pids)


def test_a_pool_in_a_worker_is_refused(pool: PoolExecutor) -> None:
    with pytest.raises(RuntimeError, match="a PoolExecutor of its own"):
        pool.submit(tasks.nested).result(DEADLINE)


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_fork_of_the_program_leaves_the_pool_to_its_parent(pool: PoolExecutor) -> None:
    assert pool.submit(tasks.square, 2).result(DEADLINE) == 4
    child = os.fork()
    if not child:
        code = 1
        try:
            pool.submit(tasks.square, 2)
        except RuntimeError:
            pool.shutdown()
            code = 0
        finally:
            os._exit(code)
    fd = os.pidfd_open(child)
    assert select.select([fd], [], [], DEADLINE)[0]
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.submit(tasks.square, 3).result(DEADLINE) == 9


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_workers": 0}, ValueError),
        ({"initializer": 3}, TypeError),
        ({"max_tasks_per_child": 0}, ValueError),
        ({"max_tasks_per_child": 1.5}, TypeError),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        PoolExecutor(**options)
