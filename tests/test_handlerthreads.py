"""HandlerThreads: few threads, whatever some of them do."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import wait
from typing import Any

import pytest

from workers.handlerthreads import HandlerThreads

WAIT = 20.0


def test_results_and_errors() -> None:
    threads = HandlerThreads()
    assert threads.submit(divmod, 7, 2).result(WAIT) == (3, 1)
    assert threads.submit(int, "12", base=3).result(WAIT) == 5
    with pytest.raises(ZeroDivisionError):
        threads.submit(divmod, 7, 0).result(WAIT)
    with pytest.raises(SystemExit):
        threads.submit(sys.exit).result(WAIT)
    assert threads.submit(int).result(WAIT) == 0
    threads.shutdown()


def test_idle_threads_are_used_again() -> None:
    threads = HandlerThreads(4)
    used = {threads.submit(threading.get_ident).result(WAIT) for _ in range(100)}
    # A thread may not be idle yet when its result is there.
    assert len(used) <= 4
    threads.shutdown()


def test_no_more_run_at_a_time_than_its_size() -> None:
    threads = HandlerThreads(3)
    lock, running, most = threading.Lock(), 0, 0
    meeting = threading.Barrier(3)

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        meeting.wait(WAIT)  # there are three at a time, too
        with lock:
            running -= 1

    futures = [threads.submit(work) for _ in range(30)]
    done, _ = wait(futures, WAIT)
    assert all(future.exception() is None for future in done)
    assert (len(done), most) == (30, 3)
    threads.shutdown()


def test_those_that_block_make_room_for_others_after_a_while() -> None:
    threads = HandlerThreads(2, patience=0.05)
    release = threading.Event()
    blocked = [threads.submit(release.wait, WAIT) for _ in range(4)]
    # Nothing is submitted any more that would have it look again.
    assert threads.submit(int).result(WAIT) == 0
    assert not any(future.done() for future in blocked)
    release.set()
    assert all(future.result(WAIT) for future in blocked)
    # The additional threads end when there is nothing left to do.
    for _ in range(10):
        assert threads.submit(int).result(WAIT) == 0
    threads.shutdown()


def test_there_is_an_end_to_that() -> None:
    threads = HandlerThreads(1, patience=0.01, most=3)
    release = threading.Event()
    blocked = [threads.submit(release.wait, WAIT) for _ in range(3)]
    waiting = threads.submit(int)
    with pytest.raises(TimeoutError):
        waiting.result(0.2)
    assert repr(threads) == "<HandlerThreads 3 threads, 1 waiting>"
    release.set()
    assert waiting.result(WAIT) == 0
    wait(blocked)
    threads.shutdown()


def test_a_cancelled_one_does_not_run() -> None:
    threads = HandlerThreads(1)
    release, ran = threading.Event(), []
    blocked = threads.submit(release.wait, WAIT)
    cancelled = threads.submit(ran.append, 1)
    assert cancelled.cancel()
    release.set()
    assert blocked.result(WAIT)
    assert threads.submit(int).result(WAIT) == 0
    assert ran == []
    threads.shutdown()


def test_after_the_end() -> None:
    threads = HandlerThreads(1)
    runs, release = threading.Event(), threading.Event()
    blocked = threads.submit(lambda: (runs.set(), release.wait(WAIT))[1])
    assert runs.wait(WAIT)
    dropped = threads.submit(int)
    threads.shutdown(cancel_futures=True)
    assert dropped.cancelled()
    with pytest.raises(RuntimeError):
        threads.submit(int)
    release.set()
    assert blocked.result(WAIT)


def test_nothing_is_kept_of_what_has_run() -> None:
    import gc
    import weakref

    class Thing: ...

    threads = HandlerThreads(1)
    thing: Any = Thing()
    watch = weakref.ref(thing)
    future = threads.submit(lambda value: value, thing)
    future.result(WAIT)
    threads.submit(int).result(WAIT)
    del thing, future
    gc.collect()
    assert watch() is None
    threads.shutdown()


@pytest.mark.process
def test_one_that_never_returns_does_not_keep_the_process_from_ending() -> None:
    script = (
        "import threading\n"
        "from workers.handlerthreads import HandlerThreads\n"
        "HandlerThreads().submit(threading.Event().wait)\n"
        "print('end')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=WAIT)
    assert (done.returncode, done.stdout) == (0, b"end\n")
