"""Who waits for a call may drive the pool, and nobody notices but by the clock."""

import concurrent.futures as cf
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import executortasks as tasks
import leftovers
import pytest

from workers import PoolExecutor
from workers.errors import CallCancelled
from workers.executor import BrokenPool, CallLost
from workers.interrupts import others_may_interrupt

pytestmark = pytest.mark.process

DEADLINE = 60.0


@pytest.fixture
def pool() -> Iterator[PoolExecutor]:
    with PoolExecutor(2) as pool:
        yield pool


@pytest.fixture
def interruptible() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def until(condition: Callable[[], object]) -> None:
    """By looking: there is no event that tells who has the pool."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, "it has not come to that"
        os.sched_yield()


def sleeps(pool: PoolExecutor) -> None:
    """Until the driver sleeps, and all workers have started, so that nothing is due."""
    driver = pool._driver
    pool.submit(tasks.pid).result(DEADLINE)
    until(lambda: driver._sleeping and driver._pool.ready == driver._pool.size)


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    with cf.ThreadPoolExecutor(1) as thread:
        done = thread.submit(act)
        yield
        done.result(DEADLINE)


def waiting(pool: PoolExecutor, fifo: str, act: Callable[[cf.Future[Any]], object]) -> cf.Future[Any]:
    """A call that hangs, and `act` on it from another thread as soon as this one has the pool."""
    sleeps(pool)
    future = pool.submit(tasks.hang, fifo)

    def then() -> None:
        assert Path(fifo).read_text() == "running\n"
        until(lambda: pool._driver._borrower)
        act(future)

    with meanwhile(then):
        with suppress(CallCancelled, CallLost, TimeoutError):
            future.result(DEADLINE)
    return future


def test_who_waits_settles_the_call(pool: PoolExecutor) -> None:
    for _ in range(100):
        sleeps(pool)
        if pool.submit(tasks.thread_of_loading).result(DEADLINE) == threading.get_ident():
            return
    pytest.fail("the driver's thread was always faster")


def start_with(program: str) -> str:
    """What a program prints that starts a pool and then looks what is left of it."""
    code = f"import os, resource, threading, zmq\nfrom workers import PoolExecutor\n{program}"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=DEADLINE, text=True)
    assert done.returncode == 0
    return done.stdout


def test_a_start_that_is_cut_short_can_be_repeated() -> None:
    """By a signal's handler, say, when there is a socket that nobody knows yet."""
    program = """
real = zmq.Context.socket
def socket(*args):
    made = real(*args)
    raise InterruptedError
with PoolExecutor(1) as pool:
    zmq.Context.socket = socket
    try:
        pool.submit(abs, -1)
    except InterruptedError:
        print("cut short")
    zmq.Context.socket = real
    print(pool.submit(abs, -2).result())
"""
    assert start_with(program) == "cut short\n2\n"


def test_a_want_of_descriptors_at_the_start_is_an_error() -> None:
    """At any point of it, and the pool starts when there are some."""
    program = """
before = resource.getrlimit(resource.RLIMIT_NOFILE)
limits = range(len(os.listdir("/proc/self/fd")) + 8, 64)
with PoolExecutor(1) as pool:
    for limit in limits:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
        try:
            pool.submit(abs, -1)
            break
        except OSError:
            pass
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    print(pool.submit(abs, -2).result(), limit > limits[0])
"""
    assert start_with(program) == "2 True\n"


def test_a_pool_whose_thread_cannot_start_is_broken_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = leftovers.state()
    with PoolExecutor(1) as pool:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="no thread"):
                pool.submit(abs, -1)
        with pytest.raises(BrokenPool, match="could not be started"):
            pool.submit(abs, -1)
    del pool
    assert leftovers.state() == before


def refuse(thread: threading.Thread) -> None:
    raise RuntimeError("no thread can be started")


def test_a_cancel_in_a_fork_waits_for_no_lock() -> None:
    """Whoever had it is not there to let go."""
    program = """
import signal
from workers.futures import Future
with PoolExecutor(1) as pool:
    future = Future(pool._driver)
    held, leave = threading.Event(), threading.Event()
    def hold():
        with pool._driver._lock:
            held.set()
            leave.wait()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if not child:
        signal.alarm(10)
        os._exit(3 if future.cancel() else 4)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    leave.set()
    thread.join()
"""
    assert start_with(program) == "3\n"


def test_a_kill_that_came_too_late_is_forgotten(pool: PoolExecutor, fifo: str) -> None:
    future = pool.submit(Path(fifo).read_text)
    with open(fifo, "w"):  # the worker reads there
        pool._driver._killed.add(future.call)
    assert future.result(DEADLINE) == ""
    assert not pool._driver._killed


def test_callbacks_run_in_the_drivers_thread(pool: PoolExecutor) -> None:
    for n in range(100):
        sleeps(pool)
        names: list[str] = []
        future = pool.submit(tasks.square, n)
        future.add_done_callback(lambda _, names=names: names.append(threading.current_thread().name))  # type: ignore[misc]
        assert future.result(DEADLINE) == n * n
        until(lambda names=names: names)  # type: ignore[misc]
        # One that had ended before the callback was added runs it at once.
        assert names[0] in ("acomm-executor", threading.current_thread().name)


def test_a_kill_from_elsewhere(pool: PoolExecutor, fifo: str) -> None:
    assert isinstance(waiting(pool, fifo, pool.kill).exception(0), CallCancelled)
    assert pool.submit(tasks.square, 2).result(DEADLINE) == 4


def test_a_death(pool: PoolExecutor) -> None:
    for _ in range(5):
        sleeps(pool)
        assert isinstance(pool.submit(os.kill, 0, signal.SIGKILL).exception(DEADLINE), CallLost)


def test_a_submit_and_a_wait_from_elsewhere(pool: PoolExecutor, fifo: str) -> None:
    def act(future: cf.Future[Any]) -> None:
        assert pool.submit(tasks.square, 3).result(DEADLINE) == 9
        with pytest.raises(TimeoutError):
            future.result(0.01)
        assert cf.wait([future], 0.01).not_done
        pool.kill(future)

    assert isinstance(waiting(pool, fifo, act).exception(DEADLINE), CallCancelled)


def test_a_shutdown_from_elsewhere(fifo: str) -> None:
    pool = PoolExecutor(2)

    def act(future: cf.Future[Any]) -> None:
        pool.shutdown(wait=False)
        pool.kill(future)

    assert isinstance(waiting(pool, fifo, act).exception(DEADLINE), CallCancelled)
    pool.shutdown()


def test_a_timeout(pool: PoolExecutor, fifo: str) -> None:
    sleeps(pool)
    future = pool.submit(tasks.hang, fifo)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            future.result(0.01)
    with pytest.raises(TimeoutError):
        future.exception(0.01)
    assert Path(fifo).read_text()
    pool.kill(future)
    assert isinstance(future.exception(DEADLINE), CallCancelled)


def test_an_interrupt_of_who_waits(pool: PoolExecutor, fifo: str, interruptible: None) -> None:
    main = threading.get_ident()
    with pytest.raises(KeyboardInterrupt):
        waiting(pool, fifo, lambda _: signal.pthread_kill(main, signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert pool.submit(tasks.square, 2).result(DEADLINE) == 4
    for worker in pool._driver._pool.workers():
        if worker.pid:  # 0 would be all of us
            os.kill(worker.pid, signal.SIGKILL)


def test_an_exception_of_another_signals_handler(pool: PoolExecutor, fifo: str) -> None:
    """As programs have that limit a wait by SIGALRM: the pool is left to its driver."""

    class Alarm(Exception):
        pass

    def ring(number: int, frame: object) -> None:
        raise Alarm

    main = threading.get_ident()
    sleeps(pool)
    before = signal.signal(signal.SIGALRM, ring)
    try:
        assert others_may_interrupt()
        future = pool.submit(tasks.hang, fifo)

        def then() -> None:
            assert Path(fifo).read_text() == "running\n"
            until(lambda: future._made is not None)  # somebody waits
            assert not pool._driver._borrower
            signal.pthread_kill(main, signal.SIGALRM)

        with meanwhile(then), pytest.raises(Alarm):
            future.result(DEADLINE)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not others_may_interrupt()
    assert pool.submit(tasks.square, 2).result(DEADLINE) == 4
    assert pool.kill(future) and isinstance(future.exception(DEADLINE), CallCancelled)


def test_an_interrupt_while_the_pool_is_touched(
    pool: PoolExecutor, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    driver = pool._driver
    calls = 0
    process_events = driver._pool.process_events

    def interrupted() -> Any:
        nonlocal calls
        if threading.current_thread() is threading.main_thread():
            calls += 1
            signal.raise_signal(signal.SIGINT)
        return process_events()

    futures = []
    sleeps(pool)
    with monkeypatch.context() as patch:
        patch.setattr(driver._pool, "process_events", interrupted)
        for n in range(20):
            with suppress(KeyboardInterrupt):
                futures.append(pool.submit(tasks.square, n))
            for future in futures:
                with suppress(KeyboardInterrupt):
                    future.result(DEADLINE)
            until(lambda: driver._sleeping)
    assert calls
    assert {future.result(DEADLINE) for future in futures} <= {n * n for n in range(20)}
    assert pool.submit(tasks.square, 2).result(DEADLINE) == 4


def test_interrupts_at_random(pool: PoolExecutor, interruptible: None) -> None:
    """A thousand calls one by one under fire: none hangs, and the pool works to the end."""
    rng = random.Random(5)
    main = threading.get_ident()
    ended = threading.Event()

    def fire() -> None:
        while not ended.wait(rng.random() * 0.004):
            signal.pthread_kill(main, signal.SIGINT)

    sleeps(pool)
    thread = threading.Thread(target=fire)
    n = 0
    futures = []
    try:
        thread.start()
        while n < 1000:
            with suppress(KeyboardInterrupt):
                while n < 1000:
                    n += 1
                    futures.append((n, pool.submit(tasks.square, n)))
                    assert futures[-1][1].result(DEADLINE) == n * n
    finally:
        while thread.is_alive():
            with suppress(KeyboardInterrupt):
                ended.set()
                thread.join()
    assert all(future.result(DEADLINE) == n * n for n, future in futures)
    assert pool.submit(tasks.square, 2).result(DEADLINE) == 4


def test_threads_that_wait_by_turns(pool: PoolExecutor) -> None:
    def calls(base: int) -> bool:
        return all(pool.submit(tasks.square, n).result(DEADLINE) == n * n for n in range(base, base + 300))

    with cf.ThreadPoolExecutor(3) as threads:
        assert all(threads.map(calls, (0, 1000, 2000)))


def test_who_waits_for_the_last_call_after_a_shutdown_ends_the_driver(pool: PoolExecutor, fifo: str) -> None:
    sleeps(pool)
    future = pool.submit(tasks.wait_for_line, fifo)
    pool.shutdown(wait=False)
    until(lambda: pool._driver._sleeping)

    def then() -> None:
        until(lambda: pool._driver._borrower)
        Path(fifo).write_text("go\n")

    with meanwhile(then):
        assert future.result(DEADLINE) == "go\n"
    pool._driver._thread.join(DEADLINE)
    assert not pool._driver._thread.is_alive()
