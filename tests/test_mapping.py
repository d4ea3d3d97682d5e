"""`map`: items travel together, and nobody can tell but by the clock."""

import concurrent.futures as cf
import contextlib
import functools
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import executortasks as tasks
import psutil
import pytest

from workers import PoolExecutor, mapped
from workers.executor import BrokenPool, CallLost
from workers.futures import Future
from workers.mapping import MAX_BYTES, PART, Mapping, Size

DEADLINE = 60.0


# -- pure


def test_parts_double_while_they_are_short() -> None:
    size = Size(4096)
    seen = []
    for _ in range(14):
        seen.append(size.items)
        size.learn(size.items, size.items * 1e-6, 0)
    assert seen[:6] == [1, 2, 4, 8, 16, 32] and seen[-1] == int(PART / 1e-6)


def test_long_items_go_alone_and_large_ones_few_at_a_time() -> None:
    size = Size(4096)
    for _ in range(10):
        size.learn(size.items, size.items * PART * 2, 0)
    assert size.items == 1
    size = Size(4096)
    for _ in range(14):
        size.learn(size.items, size.items * 1e-6, size.items * MAX_BYTES // 10)
    assert size.items == 10
    size = Size(3)
    for _ in range(5):
        size.learn(size.items, 1e-6, 0)
    assert size.items == 3


def test_the_last_parts_do_not_shrink_what_was_learned() -> None:
    size = Size(4096)
    for _ in range(14):
        size.learn(size.items, size.items * 1e-6, 0)
    size.learn(1, 1e-6, 0)
    assert size.items == int(PART / 1e-6)


class Workers:
    """What runs parts at once, or when it is told to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = pickle.dumps(function)
        self.parts: list[tuple[Future[Any], bytes]] = []
        self.sizes: list[int] = []
        self.commands: list[tuple[Callable[[Any], None], Any]] = []

    def command(self, function: Callable[[Any], None], argument: Any) -> None:
        self.commands.append((function, argument))

    def one(self, args: tuple[Any, ...]) -> bytes:
        return self.several([args])[0]

    def several(self, items: list[tuple[Any, ...]]) -> tuple[bytes, dict[int, BaseException]]:
        return mapped.pack(items)

    def send(self, packed: bytes, ended: Callable[[Any], None], begun: bool) -> Future[Any]:
        future: Future[Any] = Future()
        future.add_done_callback(ended)
        self.parts.append((future, packed))
        plain, alone = pickle.loads(packed)
        self.sizes.append(len(plain if alone is None else alone))
        return future

    def run(self, error: BaseException | None = None) -> None:
        future, packed = self.parts.pop(0)
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(mapped.run_part(self.function, False, packed))


def mapping_of(count: int, size: int = 8) -> tuple[Workers, Mapping]:
    workers = Workers(tasks.square)
    mapping = Mapping(workers, 2, size)  # type: ignore[arg-type]
    mapping.add(((n,) for n in range(count)), begun=False)
    return workers, mapping


def lost(ran: int) -> CallLost:
    return CallLost("died", receipt={"progress": {"done": ran, "total": 0}})


def test_so_many_parts_are_out_at_a_time() -> None:
    workers, mapping = mapping_of(100)
    assert len(workers.parts) == 2
    while workers.parts:
        assert len(workers.parts) <= 2
        workers.run()
    assert list(mapping.results(None, iter(()), None)) == [n * n for n in range(100)]
    assert max(workers.sizes) == 8


@pytest.mark.parametrize("known", [True, False])
def test_a_death_costs_the_item_that_ran(known: bool) -> None:
    workers, mapping = mapping_of(64)
    deaths = 0
    while workers.parts:
        items = [args[0] for args in pickle.loads(workers.parts[0][1])[0]]
        if 30 in items:
            deaths += 1
            workers.run(lost(items.index(30) + 1 if known else 0))
        else:
            workers.run()
    assert deaths == (1 if known else 2)
    results = mapping.results(None, iter(()), None)
    assert [next(results) for _ in range(30)] == [n * n for n in range(30)]
    with pytest.raises(CallLost):
        next(results)


def test_a_broken_pool_fails_what_is_left() -> None:
    workers, mapping = mapping_of(10)
    workers.run()
    workers.run(BrokenPool("broken"))
    results = mapping.results(None, iter(()), None)
    assert next(results) == 0
    with pytest.raises(BrokenPool):
        next(results)


def test_what_lasts_returns_what_it_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, _ = mapped.pack([(n,) for n in range(5)])
    monkeypatch.setattr(mapped, "LATE", -1.0)
    answer = mapped.run_part(pickle.dumps(tasks.square), False, packed)
    assert answer.plain == [0]
    workers, mapping = mapping_of(50)
    while workers.parts:
        workers.run()
    assert list(mapping.results(None, iter(()), None)) == [n * n for n in range(50)]


# -- with workers


@pytest.fixture
def pool() -> Iterator[PoolExecutor]:
    with PoolExecutor(2) as pool:
        list(pool.map(tasks.square, range(2000)))
        yield pool


@pytest.mark.process
def test_items_share_nothing(pool: PoolExecutor) -> None:
    shared: list[int] = []
    assert set(pool.map(tasks.append_and_count, [shared] * 3000)) == {1}
    assert set(pool.map(functools.partial(tasks.append_and_count, shared), [1] * 3000)) == {1}
    assert set(pool.map(tasks.Counter().count, range(3000))) == {1}


@pytest.mark.process
def test_each_error_is_of_its_own_item(pool: PoolExecutor) -> None:
    for bad in (0, 1, 700, 1999):
        results = pool.map(tasks.fail_at, range(2000), [bad] * 2000)
        for n in range(bad):
            assert next(results) == n
        with pytest.raises(ValueError) as caught:
            next(results)
        assert caught.value.args == (bad,) and "in fail_at" in str(caught.value.__cause__)
    results = pool.map(tasks.raise_two_at, range(1000))
    with pytest.raises(Exception, match="1 and 2"):
        list(results)


@pytest.mark.process
@pytest.mark.parametrize("step", ["pickle", "child", "make", "parent"])
def test_what_cannot_be_pickled_or_loaded_is_of_its_own_item(pool: PoolExecutor, step: str) -> None:
    me = os.getpid()
    if step in ("pickle", "child"):
        evil: Any = tasks.Evil("error", step, me)
        results = pool.map(tasks.echo, [[n] if n != 500 else evil for n in range(1000)])
    else:
        when = "pickle" if step == "make" else "parent"
        results = pool.map(tasks.evil_at, range(1000), [500] * 1000, [when] * 1000, [me] * 1000)
    for n in range(500):
        assert next(results) == [n]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.process
def test_an_item_that_cannot_be_pickled_is_not_run(pool: PoolExecutor, tmp_path: Path) -> None:
    """Not even by a function that could do without."""
    marks = [str(tmp_path / str(n)) for n in range(1000)]
    results = pool.map(tasks.touch, [mark if n != 500 else Lock() for n, mark in enumerate(marks)])
    for _ in range(500):
        next(results)
    with pytest.raises(TypeError, match="pickle"):
        next(results)
    assert not (tmp_path / "default").exists() and not Path("default").exists()


@pytest.mark.process
def test_a_worker_that_dies_costs_one_item(pool: PoolExecutor, tmp_path: Path) -> None:
    """All others run, though only the first error is seen."""
    results = pool.map(tasks.die_at, range(3000), [1000] * 3000, [str(tmp_path / "ran")] * 3000)
    for n in range(1000):
        assert next(results) == n
    with pytest.raises(CallLost) as caught:
        next(results)
    assert caught.value.receipt and caught.value.receipt["signal"] == signal.SIGKILL
    assert list(pool.map(tasks.square, range(100))) == [n * n for n in range(100)]


@pytest.mark.process
def test_deaths_in_a_map_cost_nobody_else(pool: PoolExecutor) -> None:
    seen = 0
    for _ in range(5):
        with contextlib.suppress(CallLost):
            for n, value in enumerate(pool.map(tasks.spin, range(2000))):
                assert value == n
                seen += 1
                if n % 500 == 250:  # while the next ones run
                    kill_a_worker()
    assert seen >= 5 * 250
    assert list(pool.map(tasks.square, range(100))) == [n * n for n in range(100)]


def kill_a_worker() -> None:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "acomm-worker":
                process.kill()
                return


def test_a_broken_pool_fails_what_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its only part has ended with it, so nothing is out any more that leads to it."""
    workers, mapping = mapping_of(10)
    waits = iter([BrokenPool("broken")])
    monkeypatch.setattr(mapping._changed, "wait", lambda _: workers.run(next(waits)))
    with pytest.raises(BrokenPool):
        next(mapping.results(None, iter(()), None))


def test_leaving_a_map_waits_for_nobody_who_sends() -> None:
    """It may be a collection amid a submit: who sends may be waiting for that."""
    workers, mapping = mapping_of(100)
    workers.run()
    results = mapping.results(None, iter(()), None)
    assert next(results) == 0
    with cf.ThreadPoolExecutor(1) as sender, cf.ThreadPoolExecutor(1) as collector:
        sender.submit(mapping._changed.acquire).result(DEADLINE)
        try:
            collector.submit(results.close).result(5.0)  # type: ignore[attr-defined]
        finally:
            sender.submit(mapping._changed.release).result(DEADLINE)
    for function, argument in workers.commands:
        function(argument)
    assert workers.parts and all(future.cancelled() for future, _ in workers.parts)


@pytest.mark.process
def test_a_shutdown_waits_for_all_items() -> None:
    with PoolExecutor(2) as pool:
        results = pool.map(tasks.square, range(20_000))
    assert list(results) == [n * n for n in range(20_000)]
    results = PoolExecutor(2).map(tasks.square, range(5000))
    assert list(results) == [n * n for n in range(5000)]
    results = PoolExecutor(2).map(tasks.square, range(3000), buffersize=10)
    assert list(results) == [n * n for n in range(3000)]


@pytest.mark.process
def test_a_shutdown_that_cancels_ends_the_map() -> None:
    pool = PoolExecutor(1)
    results = pool.map(tasks.nap, range(10_000))
    pool.shutdown(cancel_futures=True)
    with pytest.raises(cf.CancelledError):
        list(results)
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.map(tasks.square, range(10))


@pytest.mark.process
def test_a_shutdown_that_cancels_ends_the_map_that_somebody_waits_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with PoolExecutor(1) as pool:
        first = pool.submit(fifo.read_text)
        with open(fifo, "w"), cf.ThreadPoolExecutor(1) as threads:  # the worker reads there
            waiting: cf.Future[list[int]] = threads.submit(list, pool.map(tasks.square, range(10)))
            pool.shutdown(wait=False, cancel_futures=True)
            assert isinstance(waiting.exception(DEADLINE), cf.CancelledError)
        assert first.result(DEADLINE) == ""


@pytest.mark.process
def test_a_map_that_is_left_early_cancels_the_rest(tmp_path: Path) -> None:
    fifo, mark = tmp_path / "fifo", tmp_path / "last"
    os.mkfifo(fifo)
    with PoolExecutor(1) as pool:
        results = pool.map(tasks.touch_at, range(100), [99] * 100, [str(mark)] * 100, [str(fifo)] * 100)
        assert next(results) == 0
        results.close()  # type: ignore[attr-defined]
        fifo.write_text("go on")  # the item 1 waits for it
        assert pool.submit(tasks.square, 2).result(DEADLINE) == 4
    assert not mark.exists()


@pytest.mark.process
def test_a_long_item_keeps_no_others(pool: PoolExecutor, tmp_path: Path) -> None:
    """It waits for the last one, which could not run if it had to wait for it."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    results = pool.map(tasks.meet, range(3000), [str(fifo)] * 3000, timeout=DEADLINE)
    assert list(results) == list(range(3000))


@pytest.mark.process
def test_a_generator_that_uses_the_pool(pool: PoolExecutor) -> None:
    def items() -> Iterator[int]:
        for n in range(300):
            yield pool.submit(tasks.square, n).result(DEADLINE)

    assert list(pool.map(tasks.echo, items(), buffersize=5)) == [n * n for n in range(300)]
    assert list(pool.map(tasks.echo, items())) == [n * n for n in range(300)]


@pytest.mark.process
def test_a_function_that_cannot_be_pickled(pool: PoolExecutor) -> None:
    results = pool.map(functools.partial(tasks.echo, threading.Lock()), [1])
    with pytest.raises(TypeError, match="pickle"):
        next(results)
    assert list(pool.map(threading.Lock().acquire, [])) == []
    assert list(pool.map(tasks.square, range(500), chunksize=7)) == [n * n for n in range(500)]
