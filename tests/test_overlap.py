"""Calls that overlap, with real processes: each has its own limits, cancel and death."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from test_pool import DEADLINE, HERE, Driver, idle, make

from workers import scaling
from workers.calls import Call
from workers.errors import CallCancelled, CallTimeout, WorkerLost
from workers.lanes import UNLIMITED

pytestmark = pytest.mark.process


def start(workers: int, **options: object) -> Driver:
    driver = make(workers, ("overlaptasks",), (HERE,), **options)
    driver.ready()
    return driver


@pytest.fixture
def single() -> Iterator[Driver]:
    driver = start(1)
    yield driver
    driver.close()


def heard(driver: Driver, condition: Callable[[], object]) -> None:
    """Until something outside of the pool is so, while that is driven on."""
    end = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < end, f"waited in vain; {driver.pool}, {driver.pool.workers()}"
        driver.turn(0.01)


class Notes:
    """What tasks have told."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def lines(self) -> list[str]:
        return Path(self.path).read_text().splitlines() if os.path.exists(self.path) else []

    def wait(self, driver: Driver, *lines: str) -> None:
        """Until all these were told, while the pool is driven on."""
        heard(driver, lambda: set(lines) <= set(self.lines()))


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


def call(task: str, *args: object, **options: object) -> Call:
    options = {"concurrency": UNLIMITED, **options}
    return Call(task, msgspec.json.encode(args), overlaps=True, **options)  # type: ignore[arg-type]


def lasting(notes: Notes, driver: Driver, *names: str, **options: object) -> list[Call]:
    calls = [call("last", notes.path, name, **options) for name in names]
    driver.submit(*calls)
    notes.wait(driver, *(f"{name} begins" for name in names))
    return calls


def test_they_run_at_the_same_time_and_each_is_seen(single: Driver, notes: Notes) -> None:
    names = [f"n{number}" for number in range(30)]
    calls = lasting(notes, single, *names)
    (info,) = single.pool.workers()
    assert {item.note for item in info.calls} == set(names) and info.held == 30
    assert {(item.state, item.task, item.done, item.total) for item in info.calls} == {
        ("running", "last", 1.0, 2.0)
    }
    assert (info.task, info.note) == ("last", max(info.calls, key=lambda item: item.seconds).note)
    assert [single.pool.look(item).note for item in calls] == names
    for item in calls:
        single.cancel(item)
    assert {type(outcome.error) for outcome in single.finish(*calls)} == {CallCancelled}
    assert single.pool.restarts == 0
    assert single.pool.workers()[0].calls == ()
    idle(single)


def test_a_worker_runs_as_many_as_it_may() -> None:
    driver = start(1, coroutines=2)
    try:
        calls = [call("short", 0.001) for _ in range(50)]
        driver.submit(*calls)
        assert driver.pool.workers()[0].held <= 2
        assert {outcome.error for outcome in driver.finish(*calls)} == {None}
    finally:
        driver.close()


def test_one_is_cancelled_alone_and_may_clean_up(single: Driver, notes: Notes) -> None:
    first, second = lasting(notes, single, "first", "second")
    single.cancel(first)
    (outcome,) = single.finish(first)
    assert isinstance(outcome.error, CallCancelled)
    assert "first is cancelled True" in notes.lines()
    assert second not in single.outcomes and single.pool.look(second).state == "running"
    single.cancel(second)
    single.finish(second)
    assert single.pool.restarts == 0
    idle(single)


@pytest.mark.parametrize("limit", ["timeout", "deadline"])
def test_a_limit_ends_that_call_alone(single: Driver, notes: Notes, limit: str) -> None:
    (other,) = lasting(notes, single, "other")
    when = time.monotonic() + 0.1 if limit == "deadline" else 0.1
    late = call("last", notes.path, "late", **{limit: when})
    (outcome,) = single.run(late)
    assert isinstance(outcome.error, CallTimeout)
    assert "late is cancelled True" in notes.lines()
    assert single.pool.look(other).state == "running" and single.pool.restarts == 0
    single.cancel(other)
    single.finish(other)
    idle(single)


@pytest.mark.parametrize("task", ["stubborn", "block"])
def test_what_does_not_end_is_killed_and_its_siblings_run_again(
    single: Driver, notes: Notes, task: str
) -> None:
    sibling = call("attempt", notes.path)
    single.submit(sibling)
    heard(single, lambda: any("attempt 1" in line for line in notes.lines()))
    Path(notes.path + ".again").touch()
    killed = call(task, notes.path, timeout=0.1)
    single.submit(killed)
    first, second = single.finish(killed, sibling)
    assert isinstance(first.error, CallTimeout) and "limit of 0.1 seconds" in str(first.error)
    assert second.result == b"1"  # uncounted
    began = [line for line in notes.lines() if "attempt" in line]
    assert len(set(began)) == 2 and single.pool.restarts == 1
    idle(single)


def test_a_death_is_charged_to_all_that_ran(single: Driver, notes: Notes) -> None:
    poor, rich = lasting(notes, single, "poor"), lasting(notes, single, "rich", crashes=1)
    (pid,) = [info.pid for info in single.pool.workers()]
    os.kill(pid, signal.SIGKILL)
    (outcome,) = single.finish(*poor)
    assert isinstance(outcome.error, WorkerLost)
    assert outcome.error.receipt["progress"]["note"] == "poor" and outcome.error.receipt["pid"] == pid
    heard(single, lambda: notes.lines().count("rich begins") == 2)
    assert rich[0].attempt == 2
    single.cancel(rich[0])
    single.finish(*rich)
    idle(single)


def test_a_crash_in_a_coroutine_is_its_own(single: Driver) -> None:
    (outcome,) = single.run(call("die"))
    assert isinstance(outcome.error, WorkerLost) and "exited with status 9" in str(outcome.error)
    assert single.run(call("short", 0))[0].error is None


def test_plain_calls_have_a_worker_while_coroutines_last(notes: Notes) -> None:
    driver = start(2)
    try:
        held = lasting(notes, driver, "a", "b", "c", "d")
        outcomes = driver.run(*[Call("plain", None) for _ in range(100)])
        assert {outcome.error for outcome in outcomes} == {None}
        assert len({outcome.result for outcome in outcomes}) == 1
        mixed = [Call("plain", None) if n % 2 else call("short", 0.001) for n in range(200)]
        assert {outcome.error for outcome in driver.run(*mixed)} == {None}
        for item in held:
            driver.cancel(item)
        driver.finish(*held)
        idle(driver)
    finally:
        driver.close()


def test_a_single_worker_takes_turns(single: Driver) -> None:
    mixed = [Call("plain", None) if n % 3 else call("short", 0.002) for n in range(300)]
    assert {outcome.error for outcome in single.run(*mixed)} == {None}
    idle(single)


def test_a_worker_that_is_told_to_exit_finishes_them(notes: Notes) -> None:
    driver = start(1)
    try:
        calls = [call("short", 0.2) for _ in range(10)]
        late = lasting(notes, driver, "late", timeout=0.3)
        driver.submit(*calls)
        driver.pool.stop_workers()
        assert {outcome.error for outcome in driver.finish(*calls)} == {None}
        assert isinstance(driver.finish(*late)[0].error, CallTimeout)  # cancels reach it still
        heard(driver, lambda: not driver.pool.alive)
        assert driver.pool.workers() == []
    finally:
        driver.close()


def test_a_worker_that_is_ended_lets_its_coroutines_clean_up(single: Driver, notes: Notes) -> None:
    (sibling,) = lasting(notes, single, "sibling")
    (outcome,) = single.run(call("block", notes.path, timeout=0.1))
    assert isinstance(outcome.error, CallTimeout)
    receipt = outcome.error.receipt
    assert receipt is not None and "in block" in receipt["dump"]
    assert (receipt["signal"], receipt["task"], receipt["attempt"]) == (signal.SIGTERM, "block", 1)
    assert "sibling is cancelled True" in notes.lines()
    heard(single, lambda: notes.lines().count("sibling begins") == 2)
    assert sibling.attempt == 1 and single.pool.look(sibling).state == "running"
    single.cancel(sibling)
    single.finish(sibling)
    idle(single)


def test_a_sigterm_of_others_is_charged_to_those_that_do_not_end_well(single: Driver, notes: Notes) -> None:
    (lost,) = lasting(notes, single, "lost")
    saved = call("save", notes.path)
    single.submit(saved)
    notes.wait(single, "save begins")
    (pid,) = [info.pid for info in single.pool.workers()]
    os.kill(pid, signal.SIGTERM)
    first, second = single.finish(lost, saved)
    assert isinstance(first.error, WorkerLost) and first.error.receipt is not None
    assert first.error.receipt["signal"] == signal.SIGTERM
    assert second.result == b'"saved"'
    idle(single)


def test_calls_that_find_room_bring_no_workers_and_others_do(
    notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "PATIENCE", 0.02)
    monkeypatch.setattr(scaling, "IDLE", 0.2)
    driver = make(4, ("overlaptasks",), (HERE,), min_workers=1, coroutines=10)
    try:
        driver.until(lambda: driver.pool.ready == 1)
        held = lasting(notes, driver, *(f"n{number}" for number in range(10)))
        assert driver.pool.wanted == 1
        held += lasting(notes, driver, *(f"n{number}" for number in range(10, 15)))
        # A third one, as they leave one alone; it goes again, and those that hold some stay.
        driver.until(lambda: driver.pool.wanted == driver.pool.alive == 2)
        assert len(held) == driver.pool.dispatcher.assigned == 15 and driver.pool.restarts == 0
        for item in held:
            driver.cancel(item)
        assert {type(outcome.error) for outcome in driver.finish(*held)} == {CallCancelled}
        driver.until(lambda: driver.pool.wanted == driver.pool.alive == 1)
        assert driver.pool.restarts == 0
        idle(driver)
    finally:
        driver.close()
