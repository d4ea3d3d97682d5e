"""What the pool enforces of a task's options and its own, with real processes."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_pool import DEADLINE, HERE, Driver, Fifo, add, make, text

from workers import processes as processes_module
from workers import scaling
from workers.calls import Call
from workers.errors import CallTimeout
from workers.launcher import launch
from workers.scaling import Scaler

pytestmark = pytest.mark.process


@contextlib.contextmanager
def driven(workers: int, modules: tuple[str, ...] = ("pooltasks",), **options: Any) -> Iterator[Driver]:
    driver = make(workers, modules, **options)
    try:
        driver.ready()
        yield driver
    finally:
        driver.close()


@pytest.mark.parametrize("most", [1, 10])
def test_workers_are_replaced_between_calls(most: int) -> None:
    with driven(1, max_tasks_per_child=most) as driver:
        calls = [Call("pid", None) for _ in range(100 * most if most > 1 else 30)]
        outcomes = driver.run(*calls)
        assert {outcome.error for outcome in outcomes} == {None}
        assert set(Counter(outcome.result for outcome in outcomes).values()) == {most}
        assert driver.pool.restarts == 0 and driver.pool.healthy


def test_calls_that_fail_and_die_count_too() -> None:
    with driven(2, max_tasks_per_child=3) as driver:
        kinds = [("add", b"[1,1]"), ("fail", b'["no"]'), ("die", b'["kill"]'), ("pid", None)] * 20
        outcomes = driver.run(*[Call(task, args) for task, args in kinds])
        assert [outcome.error and outcome.error.code for outcome in outcomes] == (
            [None, "task_error", "worker_lost", None] * 20
        )
        assert driver.pool.restarts == 20 and driver.pool.healthy


def test_a_worker_that_does_not_exit_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes_module, "LEAVE_TIMEOUT", 0.05)
    (tmp_path / "lingering.py").write_text(
        "import atexit, threading\n"
        "from workers import task\n"
        "@task\n"
        "def linger() -> None:\n"
        "    atexit.register(threading.Event().wait)\n"
    )
    with driven(1, ("pooltasks", "lingering"), paths=(HERE, str(tmp_path)), max_tasks_per_child=1) as driver:
        outcomes = driver.run(Call("linger", None), add(1), Call("linger", None), add(2))
        assert [outcome.result for outcome in outcomes] == [b"null", b"2", b"null", b"3"]


def test_an_idle_worker_is_replaced_before_its_next_call() -> None:
    with driven(1, max_tasks_per_child=1) as driver:
        driver.run(add(1))
        driver.until(lambda: driver.pool.ready and all(info.finished == 0 for info in driver.pool.workers()))
        assert driver.run(add(2))[0].result == b"3"


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "fifo")
    yield fifo
    fifo.close()


def test_calls_beyond_the_limit_of_a_task_wait_and_others_pass(fifo: Fifo) -> None:
    with driven(2) as driver:
        held = [Call("nap", text(fifo.path), concurrency=1) for _ in range(3)]
        driver.submit(*held)
        fifo.number(driver)
        assert [outcome.result for outcome in driver.run(*[add(number) for number in range(50)])] == [
            b"%d" % (number + 1) for number in range(50)
        ]
        assert driver.pool.dispatcher.queued == 2
        for call in held:
            driver.cancel(call)
        assert [outcome.error and outcome.error.code for outcome in driver.finish(*held)] == ["cancelled"] * 3


@pytest.mark.parametrize("task", ["sleep_softly", "spin_softly", "await_softly"])
def test_a_soft_limit_is_the_calls_error_and_its_worker_goes_on(task: str) -> None:
    with driven(1) as driver:
        (pid,) = [info.pid for info in driver.pool.workers()]
        late, behind = driver.run(Call(task, None), add(1))
        assert isinstance(late.error, CallTimeout) and behind.result == b"2"
        assert str(late.error) == f"task {task} ran longer than its soft limit of 0.05 seconds"
        assert late.error.type == "SoftTimeout" and "pooltasks.py" in str(late.error.traceback)
        assert [info.pid for info in driver.pool.workers()] == [pid]


def test_a_call_at_its_soft_limit_is_tried_again_or_answers_with_what_it_has() -> None:
    with driven(1) as driver:
        (outcome,) = driver.run(Call("sleep_softly_once", None, retries=1))
        assert outcome.result == b'"attempt 2"'
        (outcome,) = driver.run(Call("as_far_as_it_comes", None))
        assert outcome.result == b"true"


ALONE = """
import os
from workers import task


@task(concurrency=1)
def alone(path: str) -> int:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL))  # raises if there is another
    os.unlink(path)
    return os.getpid()
"""


def test_a_supervisor_keeps_its_limits(tmp_path: Path) -> None:
    (tmp_path / "alone_tasks.py").write_text(ALONE)
    with launch(str(tmp_path / "alone_tasks.py"), workers=3, max_tasks_per_child=20) as client:
        calls = [client.submit("alone", str(tmp_path / "lock")) for _ in range(200)]
        pids = Counter(call.result(DEADLINE) for call in calls)
        assert max(pids.values()) <= 20
        assert client.stats()["worker_restarts"] == 0
        (schema,) = client.tasks()
        assert schema["concurrency"] == 1


def test_workers_come_while_calls_wait_and_go_when_they_are_not_needed(
    fifo: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "PATIENCE", 0.02)
    monkeypatch.setattr(scaling, "IDLE", 0.2)
    driver = make(4, min_workers=1)
    try:
        driver.until(lambda: driver.pool.ready == 1)
        assert driver.run(*[add(number) for number in range(100)])
        assert driver.pool.wanted == 1 == len(driver.pool.workers())  # small work for one
        held = [Call("nap", text(fifo.path)) for _ in range(3)]
        driver.submit(*held)
        driver.until(lambda: driver.pool.dispatcher.assigned == 3)
        assert driver.pool.wanted in (3, 4)
        for call in held:
            driver.cancel(call)
        driver.finish(*held)
        driver.until(lambda: driver.pool.wanted == driver.pool.alive == 1)
        assert driver.pool.restarts == 3  # those that were killed, and no other
        assert driver.run(add(1))[0].result == b"2"
        assert driver.pool.healthy
    finally:
        driver.close()


def test_calls_that_may_not_run_bring_no_workers(fifo: Fifo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PATIENCE", 0.02)
    driver = make(4, min_workers=1)
    try:
        held = [Call("nap", text(fifo.path), concurrency=1) for _ in range(10)]
        driver.submit(*held)
        fifo.number(driver)
        looks = []
        monkeypatch.setattr(Scaler, "look", lambda self, now, load: looks.append(load) or load.workers)
        driver.until(lambda: len(looks) == 10)
        assert {load.waiting for load in looks} == {0} and driver.pool.wanted == 1
    finally:
        driver.close()


@pytest.mark.parametrize("kill", [False, True])
def test_a_pool_of_changing_size_loses_nothing(kill: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "PATIENCE", 0.002)
    monkeypatch.setattr(scaling, "IDLE", 0.02)
    driver = make(4, min_workers=1, max_tasks_per_child=50)
    sizes = set()
    try:
        for turn in range(20):
            calls = [Call("spin", b"[%d]" % number) for number in range(60)]
            if kill:
                calls.insert(30, Call("die", b'["kill"]'))
            codes = [outcome.error and outcome.error.code for outcome in driver.run(*calls)]
            assert codes.count(None) == 60 and codes.count("worker_lost") == kill
            sizes.add(driver.pool.wanted)
            if turn % 5 == 4:
                driver.until(lambda: driver.pool.wanted == driver.pool.alive == 1)
        assert max(sizes) > 1 and driver.pool.healthy
    finally:
        driver.close()
