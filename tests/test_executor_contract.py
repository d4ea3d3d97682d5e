"""The contract of `concurrent.futures` executors. Each test runs on the standard library's, which says what
the contract is, and on ours.
"""

import concurrent.futures as cf
import gc
import itertools
import logging
import multiprocessing
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import contracttasks as tasks
import pytest
from leftovers import state
from serving import HERE, Fifo

from workers import PoolExecutor

pytestmark = pytest.mark.process

DEADLINE = 60.0
"""Seconds; nothing here waits for it unless it fails."""

Make = Callable[..., cf.Executor]


def standard(max_workers: int | None = None, **options: Any) -> cf.Executor:
    context = multiprocessing.get_context("forkserver")
    return cf.ProcessPoolExecutor(max_workers, mp_context=context, **options)


MAKERS: dict[str, Make] = {"standard": standard, "ours": PoolExecutor}


@pytest.fixture(params=[pytest.param("standard", marks=pytest.mark.untidy), "ours"], scope="module")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def make(kind: str) -> Make:
    return MAKERS[kind]


@pytest.fixture(scope="module")
def pool(make: Make) -> Iterator[cf.Executor]:
    """One with two workers, for tests that leave it as it was."""
    with make(2) as pool:
        list(pool.map(tasks.nap, [0.05] * 4))  # the standard library's starts its workers one by one
        yield pool


@pytest.fixture(autouse=True)
def nothing_is_left(kind: str, pool: cf.Executor) -> Iterator[None]:
    pool.submit(tasks.double, 1).result(DEADLINE)
    before = state()
    yield
    if kind == "ours":
        assert state() == before


# -- submit


def test_any_argument_may_be_given(pool: cf.Executor) -> None:
    assert pool.submit(tasks.capture).result(DEADLINE) == ((), {})
    assert pool.submit(tasks.capture, 1, a=2).result(DEADLINE) == ((1,), {"a": 2})
    named = {"self": 1, "fn": 2, "function": 3, "args": 4, "kwargs": 5, "timeout": 6}
    assert pool.submit(tasks.capture, **named).result(DEADLINE) == ((), named)  # type: ignore[arg-type]


def test_a_submit_without_a_function(pool: cf.Executor) -> None:
    with pytest.raises(TypeError):
        pool.submit()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        pool.submit(arg=1)  # type: ignore[call-arg]


def test_what_cannot_be_called_is_the_futures_error(pool: cf.Executor) -> None:
    assert isinstance(pool.submit(5).exception(DEADLINE), TypeError)  # type: ignore[arg-type]


def test_methods_and_types(pool: cf.Executor) -> None:
    assert pool.submit(tasks.Plain().method).result(DEADLINE) == "done"
    assert pool.submit(int, "7").result(DEADLINE) == 7
    assert isinstance(pool.submit(tasks.Plain).result(DEADLINE), tasks.Plain)


def test_arguments_and_results_larger_than_any_buffer(pool: cf.Executor) -> None:
    data = bytes(3_000_000)
    futures = [pool.submit(tasks.capture, data) for _ in range(10)]
    assert all(len(future.result(DEADLINE)[0][0]) == len(data) for future in futures)


def test_more_calls_than_anything_holds(pool: cf.Executor) -> None:
    futures = [pool.submit(tasks.double, n) for n in range(5000)]
    assert [future.result(DEADLINE) for future in futures] == [2 * n for n in range(5000)]


# -- map


def test_map_stops_with_the_shortest(pool: cf.Executor) -> None:
    assert list(pool.map(tasks.capture, [1, 2, 3], "ab")) == [((1, "a"), {}), ((2, "b"), {})]
    assert list(pool.map(tasks.double)) == []


def test_map_has_results_up_to_an_error_and_then_ends(pool: cf.Executor) -> None:
    results = pool.map(tasks.divide, [1, 1, 1, 1], [1, 2, 0, 4])
    assert [next(results), next(results)] == [1, 0.5]
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_maps_input_may_raise(pool: cf.Executor) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise LookupError("in the input")

    with pytest.raises(LookupError, match="in the input"):
        list(pool.map(tasks.double, broken()))


def test_map_times_out(pool: cf.Executor) -> None:
    results = pool.map(tasks.nap, [0, 0.3], timeout=0.05)
    assert next(results) == 0
    with pytest.raises(TimeoutError):
        next(results)
    assert list(pool.map(tasks.nap, [0, 0.01], timeout=DEADLINE)) == [0, 0.01]


@pytest.mark.parametrize("chunksize", [1, 2, 5, 100])
def test_maps_chunks(pool: cf.Executor, chunksize: int) -> None:
    assert list(pool.map(tasks.double, range(9), chunksize=chunksize)) == [2 * n for n in range(9)]
    results = pool.map(tasks.divide, [1, 1], [1, 0], chunksize=chunksize)
    if chunksize == 1:
        assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        list(results)


def test_map_refuses_a_chunksize_below_one(pool: cf.Executor) -> None:
    with pytest.raises(ValueError):
        pool.map(tasks.double, [1], chunksize=0)


def test_map_submits_before_it_is_iterated(pool: cf.Executor, started: Fifo) -> None:
    pool.map(tasks.Told, [started.path], [os.getpid()])
    assert started.read() == "collected\n"


def test_maps_results_are_not_held(pool: cf.Executor) -> None:
    for result in pool.map(tasks.capture, range(5)):
        held = [holder for holder in gc.get_referrers(result) if isinstance(holder, cf.Future | list)]
        assert not held


# -- errors


def test_exceptions_that_end_programs(pool: cf.Executor) -> None:
    for error in (SystemExit(3), KeyboardInterrupt("stop"), GeneratorExit(), BaseException("any")):
        caught = pool.submit(tasks.fail, error).exception(DEADLINE)
        assert type(caught) is type(error) and caught.args == error.args


def test_exceptions_that_are_false(kind: str, pool: cf.Executor) -> None:
    if kind == "standard" and sys.version_info < (3, 14):
        pytest.skip("they are lost by the standard library before Python 3.14")
    future = pool.submit(tasks.fail, tasks.Falsey("false"))
    assert type(future.exception(DEADLINE)) is tasks.Falsey
    with pytest.raises(tasks.Falsey):
        future.result(DEADLINE)


def test_the_remote_traceback_is_the_cause(pool: cf.Executor) -> None:
    with pytest.raises(LookupError, match="no such thing") as caught:
        pool.submit(tasks.fail_with_cause).result(DEADLINE)
    text = str(caught.value.__cause__)
    assert "in fail_with_cause" in text and "ZeroDivisionError" in text and "direct cause" in text
    assert caught.value.__notes__ == ["a note"]


def test_groups_of_exceptions(pool: cf.Executor) -> None:
    group = ExceptionGroup("several", [ValueError(1), TypeError(2)])
    with pytest.raises(ExceptionGroup) as caught:
        pool.submit(tasks.fail, group).result(DEADLINE)
    assert [type(error) for error in caught.value.exceptions] == [ValueError, TypeError]


def test_a_killed_worker_is_a_broken_process_pool(make: Make) -> None:
    pool = make(1)
    future = pool.submit(tasks.kill_self)
    assert isinstance(future.exception(DEADLINE), cf.process.BrokenProcessPool)
    pool.shutdown()


# -- futures


def test_a_results_timeout(pool: cf.Executor, fifo: str) -> None:
    future = pool.submit(tasks.wait_for, fifo)
    for ask in (future.result, future.exception):
        with pytest.raises(cf.TimeoutError):
            ask(timeout=0)
        with pytest.raises(TimeoutError):
            ask(timeout=0.01)
    Path(fifo).write_text("go")
    assert future.result(DEADLINE) == "go" and future.exception(0) is None
    assert not future.cancel() and not future.cancelled() and not future.running() and future.done()


def test_callbacks(pool: cf.Executor, fifo: str, caplog: pytest.LogCaptureFixture) -> None:
    future = pool.submit(tasks.wait_for, fifo)
    heard: list[Any] = []
    over = threading.Event()
    future.add_done_callback(lambda f: heard.append(("first", f.result())))
    future.add_done_callback(lambda f: 1 / 0)
    future.add_done_callback(lambda f: heard.append(("third", f is future)))
    future.add_done_callback(lambda f: over.set())
    assert heard == []
    with caplog.at_level(logging.ERROR, "concurrent.futures"):
        Path(fifo).write_text("go")
        assert over.wait(DEADLINE)
    assert heard == [("first", "go"), ("third", True)]
    assert "exception calling callback" in caplog.text
    future.add_done_callback(lambda f: heard.append("at once"))
    assert heard[-1] == "at once"


def test_a_callback_may_submit(pool: cf.Executor) -> None:
    more: cf.Future[cf.Future[int]] = cf.Future()
    first = pool.submit(tasks.double, 1)
    first.add_done_callback(lambda f: more.set_result(pool.submit(tasks.double, f.result())))
    assert more.result(DEADLINE).result(DEADLINE) == 4


def test_wait(pool: cf.Executor, fifo: str) -> None:
    slow = pool.submit(tasks.wait_for, fifo)
    quick, bad = pool.submit(tasks.double, 1), pool.submit(tasks.divide, 1, 0)
    futures = [slow, quick, bad]
    assert slow in cf.wait(futures, 0.01).not_done
    assert slow in cf.wait(futures, DEADLINE, cf.FIRST_COMPLETED).not_done
    done, rest = cf.wait([slow, bad], DEADLINE, cf.FIRST_EXCEPTION)
    assert done == {bad} and rest == {slow}
    Path(fifo).write_text("go")
    assert cf.wait(futures, DEADLINE) == (set(futures), set())
    assert cf.wait([quick, quick, bad]).done == {quick, bad}


def test_as_completed(pool: cf.Executor, fifo: str) -> None:
    slow = pool.submit(tasks.wait_for, fifo)
    quick = pool.submit(tasks.double, 1)
    order = cf.as_completed([slow, quick, quick], DEADLINE)
    assert next(order) is quick
    Path(fifo).write_text("go")
    assert list(order) == [slow]
    hanging = pool.submit(tasks.wait_for, fifo)
    with pytest.raises(TimeoutError, match=r"1 \(of 1\) futures unfinished"):
        list(cf.as_completed([hanging], 0.01))
    Path(fifo).write_text("go")
    assert hanging.result(DEADLINE) == "go"


def test_waiting_for_both_kinds(pool: cf.Executor) -> None:
    with cf.ThreadPoolExecutor(1) as threads:
        futures = [threads.submit(tasks.double, 1), pool.submit(tasks.double, 2)]
        assert {future.result() for future in cf.as_completed(futures, DEADLINE)} == {2, 4}


def test_many_threads_wait_for_one(pool: cf.Executor, fifo: str) -> None:
    future = pool.submit(tasks.wait_for, fifo)
    with cf.ThreadPoolExecutor(8) as threads:
        waiting = [threads.submit(future.result, DEADLINE) for _ in range(8)]
        Path(fifo).write_text("go")
        assert [one.result(DEADLINE) for one in waiting] == ["go"] * 8


def test_cancel(make: Make, fifo: str) -> None:
    with make(1) as pool:
        first = pool.submit(tasks.wait_for, fifo)
        rest = [pool.submit(tasks.double, n) for n in range(10)]
        assert rest[-1].cancel() and rest[-1].cancelled() and rest[-1].done()
        heard: list[Any] = []
        rest[-1].add_done_callback(heard.append)
        assert heard == [rest[-1]]
        with pytest.raises(cf.CancelledError):
            rest[-1].result(0)
        Path(fifo).write_text("go")
        assert [future.result(DEADLINE) for future in rest[:-1]] == [2 * n for n in range(9)]
        assert first.result(DEADLINE) == "go"


# -- nothing is held


def test_a_bound_methods_object_is_not_held(pool: cf.Executor) -> None:
    gone = threading.Event()
    plain = tasks.Plain()
    weakref.finalize(plain, gone.set)
    pool.submit(plain.method).result(DEADLINE)
    del plain
    gc.collect()
    assert gone.wait(DEADLINE)


def test_a_worker_does_not_hold_arguments_or_results(pool: cf.Executor, started: Fifo) -> None:
    told = tasks.Told(started.path, os.getpid())
    pool.submit(tasks.capture, told).result(DEADLINE)
    assert started.read().startswith("collected\n")


def test_a_future_does_not_outlive_its_last_user(pool: cf.Executor) -> None:
    future = pool.submit(tasks.double, 1)
    future.result(DEADLINE)
    ref = weakref.ref(future)
    del future
    pool.submit(tasks.double, 1).result(DEADLINE)
    gc.collect()
    assert ref() is None


# -- life


@pytest.mark.parametrize("wrong", [0, -1])
def test_the_number_of_workers(make: Make, wrong: int) -> None:
    with pytest.raises(ValueError, match="max_workers must be greater than 0"):
        make(wrong)


def test_the_number_of_workers_by_default(make: Make) -> None:
    pool: Any = make()
    assert 1 <= pool._max_workers <= (os.cpu_count() or 1)
    pool.shutdown()


def test_leaving_the_block_waits(make: Make) -> None:
    with make(2) as pool:
        futures = [pool.submit(tasks.nap, 0.001) for _ in range(50)]
    assert all(future.done() for future in futures)
    for again in (pool.submit, pool.map):
        with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
            again(tasks.double, [1])
    pool.shutdown()


def test_a_shutdown_that_does_not_wait(make: Make) -> None:
    pool = make(1)
    futures = [pool.submit(tasks.double, n) for n in range(30)]
    pool.shutdown(wait=False)
    assert [future.result(DEADLINE) for future in futures] == [2 * n for n in range(30)]
    pool.shutdown()


def test_a_shutdown_that_cancels(make: Make, fifo: str) -> None:
    pool = make(1)
    first = pool.submit(tasks.wait_for, fifo)
    rest = [pool.submit(tasks.double, n) for n in range(30)]
    while not first.running():
        cf.wait([first], 0.001)
    over = threading.Event()
    rest[-1].add_done_callback(lambda _: over.set())
    pool.shutdown(wait=False, cancel_futures=True)
    assert over.wait(DEADLINE)
    assert all(future.cancelled() for future in rest[5:])  # the standard library has handed out the others
    Path(fifo).write_text("go")
    pool.shutdown()
    assert first.result(DEADLINE) == "go"


def test_an_initializer(make: Make) -> None:
    with make(2, initializer=tasks.initialize, initargs=(1, "two")) as pool:
        assert pool.submit(tasks.initialized).result(DEADLINE) == [1, "two"]
    with pytest.raises(TypeError):
        make(1, initializer=5)


def test_an_initializer_that_fails(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    with make(1, initializer=tasks.fail_to_initialize) as pool:
        future = pool.submit(tasks.double, 1)
        assert isinstance(future.exception(DEADLINE), cf.BrokenExecutor)
        with pytest.raises(cf.BrokenExecutor):
            for _ in itertools.count():
                pool.submit(tasks.double, 1).exception(DEADLINE)


def test_workers_that_are_replaced(make: Make) -> None:
    with make(1, max_tasks_per_child=2) as pool:
        pids = [pool.submit(os.getpid).result(DEADLINE) for _ in range(6)]
    assert len(set(pids)) == 3
    for wrong in (0, -1):
        with pytest.raises(ValueError):
            make(1, max_tasks_per_child=wrong)


SCRIPT = """
import atexit, concurrent.futures, multiprocessing, sys, time
from contracttasks import double, nap
if {ours}:
    from workers import PoolExecutor as make
else:
    make = concurrent.futures.ProcessPoolExecutor
if __name__ == "__main__":
    if not {ours}:
        multiprocessing.set_start_method("forkserver")
    pool = make(2)
{code}
"""


def script(kind: str, folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(SCRIPT.format(ours=kind == "ours", code=indent(dedent(code), " " * 4)))
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    command = [sys.executable, path]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, env=env)


def test_the_interpreters_end_waits_for_calls(kind: str, tmp_path: Path) -> None:
    code = """
        for n in range(5):
            pool.submit(nap, 0.02).add_done_callback(lambda f: print("done", flush=True))
        sys.exit(4)
    """
    done = script(kind, tmp_path, code)
    assert (done.stdout, done.stderr, done.returncode) == ("done\n" * 5, "", 4)


def test_the_interpreters_end_after_a_shutdown_that_does_not_wait(kind: str, tmp_path: Path) -> None:
    code = """
        f = pool.submit(nap, 0.1)
        f.add_done_callback(lambda f: print("done", f.result(), flush=True))
        pool.shutdown(wait=False)
        del pool, f
    """
    done = script(kind, tmp_path, code)
    assert (done.stdout, done.stderr, done.returncode) == ("done 0.1\n", "", 0)


def test_a_submit_at_the_interpreters_end(kind: str, tmp_path: Path) -> None:
    code = """
        pool.submit(double, 1).result()
        @atexit.register
        def late():
            try:
                pool.submit(double, 1).result()
            except RuntimeError as error:
                print("refused:", error, flush=True)
    """
    done = script(kind, tmp_path, code)
    assert done.stdout.startswith("refused: cannot schedule new futures after"), done
    assert (done.stderr, done.returncode) == ("", 0)


def test_an_exception_ends_the_program(kind: str, tmp_path: Path) -> None:
    code = """
        pool.submit(nap, 0.05)
        raise LookupError("of the program")
    """
    done = script(kind, tmp_path, code)
    assert done.returncode == 1 and done.stderr.endswith("LookupError: of the program\n"), done
