"""The pool with real processes: what is answered, and that no fault costs more than the call at fault."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq

from workers import generations as generations_module
from workers import pool as pool_module
from workers import workerprocess
from workers.calls import READY, Answer, Call, Outcome
from workers.errors import CallCancelled, CallTimeout, ConfigError, Poisoned, TaskError, TooLarge, WorkerLost
from workers.pool import Pool
from workers.poolview import WorkerInfo

pytestmark = pytest.mark.process

DEADLINE = 60.0
"""Seconds; generous, as the machine may be busy. Nothing here waits for it unless it fails."""

HERE = str(Path(__file__).parent)


class Driver:
    """Whoever drives a pool, as small as it can be; notes that each call has one outcome at most."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.outcomes: dict[Call, Outcome] = {}
        self._poller = select.epoll()
        self._poller.register(pool.fileno(), select.EPOLLIN)

    def take(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            assert outcome.call not in self.outcomes
            assert (outcome.result is None) != (outcome.error is None)
            self.outcomes[outcome.call] = outcome

    def turn(self, patience: float = 5.0) -> None:
        due = self.pool.next_deadline()
        wait = patience if due is None else min(patience, max(0.0, due - time.monotonic()))
        self._poller.poll(wait)
        self.take(self.pool.process_events())

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < end, f"waited in vain; {self.pool}, {self.pool.workers()}"
            self.turn(end - time.monotonic())

    def ready(self) -> None:
        self.until(lambda: self.pool.ready == self.pool.size)

    def submit(self, *calls: Call) -> None:
        for call in calls:
            self.pool.submit(call)
        self.take(self.pool.process_events())

    def finish(self, *calls: Call) -> list[Outcome]:
        self.until(lambda: all(call in self.outcomes for call in calls))
        return [self.outcomes[call] for call in calls]

    def run(self, *calls: Call) -> list[Outcome]:
        self.submit(*calls)
        return self.finish(*calls)

    def cancel(self, call: Call) -> None:
        outcome = self.pool.cancel(call.number)
        self.take([outcome] if outcome else [])
        self.take(self.pool.process_events())

    def info(self, pid: int) -> WorkerInfo:
        return next(info for info in self.pool.workers() if info.pid == pid)

    def close(self) -> None:
        self._poller.close()
        self.pool.close()


def make(
    workers: int = 2,
    modules: tuple[str, ...] = ("pooltasks",),
    paths: tuple[str, ...] = (HERE,),
    **options: Any,
) -> Driver:
    pool = Pool(modules, paths, workers=workers, max_result=1000, **options)
    pool.start()
    return Driver(pool)


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = make()
    driver.ready()
    yield driver
    driver.close()


@pytest.fixture
def single() -> Iterator[Driver]:
    driver = make(1)
    driver.ready()
    yield driver
    driver.close()


class Fifo:
    """Hears from a task: what it says is the event that a test waits for."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def number(self, driver: Driver) -> int:
        """The number that a task tells, while the pool is driven on."""
        data = b""
        end = time.monotonic() + DEADLINE
        while not data.endswith(b"\n"):
            assert time.monotonic() < end, f"no task spoke; {driver.pool.workers()}"
            if self._fd in select.select([self._fd, driver.pool.fileno()], [], [], 0.01)[0]:
                data += os.read(self._fd, 100)
            driver.take(driver.pool.process_events())
        return int(data)

    def close(self) -> None:
        os.close(self._fd)


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "fifo")
    yield fifo
    fifo.close()


def add(a: int, b: int = 1, **options: object) -> Call:
    return Call("add", b"[%d,%d]" % (a, b), **options)  # type: ignore[arg-type]


def text(value: str) -> bytes:
    return b'["%s"]' % value.encode()


def gone(pid: int) -> None:
    """Returns when the process is dead, or fails."""
    try:
        handle = os.pidfd_open(pid)  # readable from the death on, whenever it is reaped
    except ProcessLookupError:
        return
    assert select.select([handle], [], [], DEADLINE)[0]
    os.close(handle)


def idle(driver: Driver) -> None:
    """Nothing of any call is left in any table."""
    dispatcher = driver.pool.dispatcher
    driver.until(lambda: dispatcher.assigned == 0)
    assert (len(dispatcher), dispatcher.queued) == (0, 0)
    assert not dispatcher._queues and not dispatcher._holder and not dispatcher._calls
    assert not len(dispatcher._limits) and not len(dispatcher._deadlines) and not len(dispatcher._backoff)


# -- answers


def test_results(driver: Driver) -> None:
    calls = [add(n) for n in range(1000)] + [Call("add_later", b'{"a":1,"b":%d}' % n) for n in range(100)]
    expected = [b"%d" % (n + 1) for n in (*range(1000), *range(100))]
    assert [outcome.result for outcome in driver.run(*calls)] == expected
    assert repr(driver.pool) == "<Pool 2 workers, 0 queued, 0 assigned>"
    assert driver.pool.healthy and driver.pool.alive == 2 and driver.pool.restarts == 0
    idle(driver)


def test_calls_submitted_before_the_workers_are_ready() -> None:
    driver = make()
    try:
        assert {outcome.result for outcome in driver.run(*[add(1) for _ in range(50)])} == {b"2"}
    finally:
        driver.close()


def test_errors_are_those_of_the_call(driver: Driver) -> None:
    raised, large, unknown, exits, interrupts = driver.run(
        Call("fail", text("on purpose")),
        Call("size", b"[2000]"),
        Call("no_such", None),
        Call("die", text("exit")),
        Call("die", text("interrupt")),
    )
    assert isinstance(raised.error, TaskError) and raised.error.type == "ValueError"
    assert str(raised.error) == "ValueError: on purpose"
    assert raised.error.traceback and "raise ValueError(text)" in raised.error.traceback
    assert isinstance(large.error, TooLarge)
    assert unknown.error and unknown.error.code == "unknown_task"
    assert str(exits.error) == "SystemExit: 3" and str(interrupts.error) == "KeyboardInterrupt"
    assert driver.pool.restarts == 0


def test_a_raising_call_is_tried_again_while_it_has_retries(driver: Driver) -> None:
    never = Call("attempt", b"[2]", retries=0)
    spent = Call("fail_with", text("os"), retries=2, backoff=lambda attempt: 0.001 * attempt)
    other = Call("fail_with", text("value"), retries=2)
    outcomes = driver.run(never, spent, other)
    assert [str(outcome.error) for outcome in outcomes] == [
        "ValueError: not yet",
        "OSError: on purpose",
        "ValueError: on purpose",
    ]
    assert [call.failed for call in (never, spent, other)] == [1, 3, 1]
    idle(driver)


# -- deaths


@pytest.mark.parametrize(
    ("how", "sig", "status"),
    [
        ("kill", 9, None),
        ("segfault", 11, None),
        ("abort", 6, None),
        ("_exit", None, 3),
        ("without descriptors", 6, None),
    ],
)
def test_a_death_costs_the_call_that_ran(
    driver: Driver, how: str, sig: int | None, status: int | None
) -> None:
    calls = [add(n) for n in range(300)]
    deadly = Call("die", text(how))
    outcomes = driver.run(*calls[:150], deadly, *calls[150:])
    lost = outcomes.pop(150)
    assert [outcome.result for outcome in outcomes] == [b"%d" % (n + 1) for n in range(300)]
    assert isinstance(lost.error, WorkerLost) and lost.error.receipt
    assert (lost.error.receipt["signal"], lost.error.receipt["exit_status"]) == (sig, status)
    assert lost.error.receipt["task"] == "die" and lost.error.receipt["attempt"] == 1
    driver.ready()
    assert driver.pool.healthy and driver.pool.restarts == 1
    idle(driver)


@pytest.mark.parametrize(("how", "status"), [("exit", 7), ("raise", 1), ("return", 0)])
def test_a_copy_that_a_task_forks_is_no_second_worker(driver: Driver, how: str, status: int) -> None:
    driver.submit(call := Call("fork", text(how)))
    assert driver.finish(call)[0].result == b"[%d]" % (status << 8)
    assert driver.pool.restarts == 0
    idle(driver)


def test_many_deadly_calls_do_not_stop_the_others(driver: Driver) -> None:
    deadly = [Call("die", text("_exit")) for _ in range(40)]
    calls = [add(n) for n in range(400)]
    mixed = [call for n in range(40) for call in (deadly[n], *calls[10 * n : 10 * n + 10])]
    driver.run(*mixed)
    assert all(isinstance(driver.outcomes[call].error, WorkerLost) for call in deadly)
    assert [driver.outcomes[call].result for call in calls] == [b"%d" % (n + 1) for n in range(400)]
    assert driver.pool.healthy
    idle(driver)


def test_a_kill_in_the_middle_of_many_calls(driver: Driver) -> None:
    calls = [add(n) for n in range(1000)]
    driver.run(*[add(0) for _ in range(10)])
    driver.submit(*calls)
    driver.until(lambda: len(driver.outcomes) >= 110)
    victim = driver.pool.workers()[0].pid
    os.kill(victim, signal.SIGKILL)
    outcomes = driver.finish(*calls)
    right = sum(outcome.result == b"%d" % (n + 1) for n, outcome in enumerate(outcomes))
    lost = [outcome.error for outcome in outcomes if outcome.error]
    assert right >= 999 and all(isinstance(error, WorkerLost) for error in lost)
    driver.until(lambda: driver.pool.restarts == 1 and driver.pool.ready == 2)
    assert victim not in [info.pid for info in driver.pool.workers()]
    idle(driver)


def test_a_kill_of_an_idle_worker(driver: Driver) -> None:
    for info in driver.pool.workers():
        os.kill(info.pid, signal.SIGKILL)
    driver.until(lambda: driver.pool.restarts == 2)
    driver.ready()
    assert driver.run(add(1))[0].result == b"2"


def test_a_kill_before_ready() -> None:
    driver = make()
    try:
        driver.submit(add(1))
        driver.until(lambda: any(info.pid for info in driver.pool.workers()))
        for info in driver.pool.workers():
            if info.pid and info.state == "starting":
                os.kill(info.pid, signal.SIGKILL)
        driver.until(lambda: driver.outcomes)
        assert next(iter(driver.outcomes.values())).result == b"2"
        driver.ready()
    finally:
        driver.close()


def test_a_call_that_kills_is_tried_again_and_then_poisoned(driver: Driver) -> None:
    spared = Call("die_first", b"[2]", crashes=2)
    spent = Call("die_first", b"[9]", crashes=2)
    first, second = driver.run(spared, spent)
    assert first.result == b"3"
    assert isinstance(second.error, Poisoned) and second.error.receipt
    assert second.error.receipt["exit_status"] == 9 and second.error.receipt["attempt"] == 3
    assert spent.crashed == 3
    idle(driver)


def test_progress_and_the_table_of_what_runs(driver: Driver, fifo: Fifo) -> None:
    call = Call("step", text(fifo.path))
    driver.submit(call)
    pid = fifo.number(driver)
    info = driver.info(pid)
    assert (info.state, info.held, info.task, info.done, info.total) == ("ready", 1, "step", 3.0, 10.0)
    os.kill(pid, signal.SIGKILL)
    error = driver.finish(call)[0].error
    assert error and error.receipt and error.receipt["progress"] == {"done": 3.0, "total": 10.0}
    assert error.receipt["pid"] == pid


def test_a_grandchild_in_its_own_session_dies_with_its_worker(driver: Driver, fifo: Fifo) -> None:
    call = Call("escape", text(fifo.path))
    driver.submit(call)
    grandchild = fifo.number(driver)
    driver.cancel(call)
    assert isinstance(driver.finish(call)[0].error, CallCancelled)
    gone(grandchild)


def test_a_worker_that_sends_garbage_is_replaced(driver: Driver) -> None:
    babbler = Call("babble", None)
    lost, *rest = driver.run(babbler, *[add(n) for n in range(100)])
    assert isinstance(lost.error, WorkerLost)
    assert [outcome.result for outcome in rest] == [b"%d" % (n + 1) for n in range(100)]
    driver.until(lambda: driver.pool.restarts == 1 and driver.pool.ready == 2)


# -- limits, cancelling


def test_a_time_limit_ends_c_code(driver: Driver) -> None:
    call = Call("crunch", None, timeout=0.2)
    error = driver.run(call)[0].error
    assert isinstance(error, CallTimeout) and "limit of 0.2 seconds" in str(error)
    driver.ready()
    assert driver.run(add(1))[0].result == b"2"
    assert driver.pool.healthy
    idle(driver)


def test_deadlines_of_a_running_and_a_queued_call(single: Driver, fifo: Fifo) -> None:
    soon = time.monotonic() + 0.3
    running, queued = Call("nap", text(fifo.path), deadline=soon), add(1, deadline=soon - 0.2)
    single.submit(running, queued)
    fifo.number(single)
    assert isinstance(single.finish(queued)[0].error, CallTimeout)
    assert isinstance(single.finish(running)[0].error, CallTimeout)
    single.ready()
    assert single.run(add(2))[0].result == b"3"
    idle(single)


def test_cancel_a_queued_and_a_running_call(single: Driver, fifo: Fifo) -> None:
    running, queued, behind = Call("nap", text(fifo.path)), add(1), add(2)
    single.submit(running, queued, behind)
    fifo.number(single)
    single.cancel(queued)
    assert isinstance(single.outcomes[queued].error, CallCancelled)
    single.cancel(running)
    assert isinstance(single.finish(running)[0].error, CallCancelled)
    assert single.finish(behind)[0].result == b"3"
    assert single.pool.cancel(running.number) is None
    idle(single)


def test_a_cancelled_call_that_waits_in_a_worker_does_not_run_on(single: Driver, fifo: Fifo) -> None:
    single.run(*[Call("nap_if", text("")) for _ in range(5)])  # now it passes for tiny
    tiny = Call("nap_if", text(""))
    naps = Call("nap_if", text(fifo.path))
    single.submit(tiny, naps)
    single.cancel(naps)
    assert isinstance(single.finish(naps)[0].error, CallCancelled)
    after = add(1)
    single.submit(after)
    assert single.finish(tiny, after)[0].result == b"null"
    idle(single)


def test_calls_behind_one_that_lasts_move_to_another_worker(driver: Driver, fifo: Fifo) -> None:
    driver.run(*[Call("nap_if", text("")) for _ in range(50)])
    calls = [Call("nap_if", text("")) for _ in range(20)]
    naps = Call("nap_if", text(fifo.path))
    driver.submit(*calls[:5], naps, *calls[5:])
    outcomes = driver.finish(*calls)
    assert {outcome.result for outcome in outcomes} == {b"null"}
    assert naps not in driver.outcomes
    driver.cancel(naps)
    assert isinstance(driver.finish(naps)[0].error, CallCancelled)
    idle(driver)


# -- the fork server


def template_of(driver: Driver) -> int:
    return driver.pool._processes._current.server.pid


def test_the_fork_server_is_killed(driver: Driver, fifo: Fifo) -> None:
    running = Call("nap", text(fifo.path))
    calls = [add(n) for n in range(200)]
    driver.submit(running, *calls)
    pid = fifo.number(driver)
    os.kill(template_of(driver), signal.SIGKILL)
    outcomes = driver.finish(*calls)
    wrong = [outcome for n, outcome in enumerate(outcomes) if outcome.result != b"%d" % (n + 1)]
    assert len(wrong) <= 1  # the one that the other worker ran
    assert all(isinstance(outcome.error, WorkerLost) for outcome in wrong)
    assert isinstance(driver.finish(running)[0].error, WorkerLost)
    gone(pid)
    driver.ready()
    idle(driver)


def test_the_fork_server_is_killed_while_it_loads() -> None:
    driver = make()
    try:
        call = add(1)
        driver.submit(call)
        os.kill(template_of(driver), signal.SIGKILL)
        assert driver.finish(call)[0].result == b"2"
        driver.ready()
    finally:
        driver.close()


def test_the_fork_server_is_killed_while_workers_start() -> None:
    driver = make(4)
    try:
        call = add(1)
        driver.submit(call)
        driver.until(lambda: any(info.pid for info in driver.pool.workers()))
        os.kill(template_of(driver), signal.SIGKILL)
        assert driver.finish(call)[0].result == b"2"
        driver.ready()
    finally:
        driver.close()


def test_a_module_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "broken_tasks.py").write_text("import nothing_such\n")
    driver = make(modules=("broken_tasks",), paths=(str(tmp_path),))
    try:
        call = add(1)
        driver.submit(call)
        error = driver.finish(call)[0].error
        assert driver.pool.failure and "nothing_such" in driver.pool.failure
        assert isinstance(error, WorkerLost) and "nothing_such" in str(error)
        assert not driver.pool.healthy
        driver.until(lambda: driver.pool.alive == 0)
    finally:
        driver.close()


@pytest.mark.parametrize("where", ["import", "start"])
def test_a_crash_loop_makes_the_pool_unhealthy(tmp_path: Path, where: str) -> None:
    lines = {"import": "os._exit(7)", "start": "os.register_at_fork(after_in_child=lambda: os._exit(7))"}
    (tmp_path / "crashing_tasks.py").write_text(f"import os\n{lines[where]}\n")
    driver = make(modules=("crashing_tasks",), paths=(str(tmp_path),))
    try:
        driver.until(lambda: not driver.pool.healthy)
        assert driver.pool.ready == 0
        due = driver.pool.next_deadline()
        assert due is None or due > time.monotonic() - 1  # it does not spin
    finally:
        driver.close()


# -- strangers


def test_a_stranger_is_not_heard(single: Driver, fifo: Fifo) -> None:
    running = Call("nap", text(fifo.path))
    single.submit(running)
    fifo.number(single)
    known = next(iter(single.pool._processes._by_identity))
    context = zmq.Context()
    try:
        strangers = []
        for identity in (known, b"stranger"):
            stranger = context.socket(zmq.DEALER)
            stranger.setsockopt(zmq.LINGER, 0)
            stranger.setsockopt(zmq.IDENTITY, identity)
            stranger.connect(single.pool._router.endpoint)
            for message in (READY, pool_module._encode([Answer(running.number, 0.1, b"1")]), b"\xc1"):
                stranger.send(message)
            strangers.append(stranger)
        # Sent after theirs and answered: theirs have been read by then.
        queued = add(1)
        single.submit(queued)
        for _ in range(20):
            single.turn(0.01)
        assert not single.outcomes and single.pool.ready == 1
        for stranger in strangers:
            stranger.close()
    finally:
        context.destroy(linger=0)  # whatever is open yet, if something above has failed
    single.cancel(running)
    assert single.finish(queued)[0].result == b"2"


def test_a_stranger_with_the_identity_of_a_worker_that_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workerprocess.secrets, "token_bytes", lambda n: b"guessed" + os.urandom(0))
    driver = make(1)
    context = zmq.Context()
    try:
        stranger = context.socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.setsockopt(zmq.IDENTITY, b"wguessed")
        stranger.connect(driver.pool._router.endpoint)
        stranger.send(READY)
        driver.until(lambda: any(info.pid for info in driver.pool.workers()))
        for _ in range(20):
            driver.turn(0.01)
        assert driver.pool.ready == 0
        stranger.close()
    finally:
        context.destroy(linger=0)  # whatever is open yet, if something above has failed
        driver.close()


# -- life


def test_no_workers_is_an_error() -> None:
    with pytest.raises(ConfigError):
        Pool(["pooltasks"], workers=0)


def test_stop_workers_lets_them_finish_what_they_hold(driver: Driver) -> None:
    held = [add(n) for n in range(20)]
    driver.submit(*held)
    driver.pool.stop_workers()
    driver.until(lambda: driver.pool.alive == 0)
    driver.until(lambda: driver.pool.dispatcher.assigned == 0)
    # Whoever was sent to a worker was answered; the rest waits as before.
    assert len(driver.outcomes) + driver.pool.dispatcher.queued == 20
    assert driver.pool.restarts == 0


def test_stop_workers_while_they_start() -> None:
    driver = make()
    try:
        driver.pool.stop_workers()
        driver.until(lambda: driver.pool.alive == 0)
    finally:
        driver.close()


def descendants() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def descriptors() -> list[str]:
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}").partition(":")[0])
        except FileNotFoundError:
            continue  # the listing's own
    return sorted(links)


@pytest.mark.parametrize("when", ["unstarted", "loading", "starting", "running", "gone"])
def test_close_leaves_nothing(when: str) -> None:
    before = descendants(), descriptors(), threading.active_count(), set(os.listdir("/dev/shm"))
    pool = Pool(["pooltasks"], [HERE], workers=2)
    folder = ""
    if when != "unstarted":
        pool.start()
        folder = pool._router.folder
        driver = Driver(pool)
        if when in ("starting", "gone"):
            driver.until(lambda: any(info.pid for info in pool.workers()))
        if when == "gone":
            os.kill(template_of(driver), signal.SIGKILL)
            driver.until(lambda: pool.alive == 0 or pool.ready == 2)
        if when == "running":
            driver.ready()
            driver.submit(Call("crunch", None), add(1))
            driver.until(lambda: len(driver.outcomes) == 1)
        driver._poller.close()
    pool.close()
    pool.close()
    after = descendants(), descriptors(), threading.active_count(), set(os.listdir("/dev/shm"))
    assert after == before
    assert not folder or not os.path.exists(folder)


def test_a_start_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = descriptors(), set(os.listdir("/tmp"))

    def refuse(self: object) -> None:
        raise OSError(11, "no more processes")

    monkeypatch.setattr(generations_module.ForkServer, "start", refuse)
    pool = Pool(["pooltasks"], [HERE], workers=2)
    with pytest.raises(OSError, match="no more"):
        pool.start()
    pool.close()
    assert (descriptors(), set(os.listdir("/tmp"))) == before


def test_many_calls_leave_everything_where_it_was(driver: Driver) -> None:
    driver.run(*[add(1) for _ in range(1000)])
    workers = [psutil.Process(info.pid) for info in driver.pool.workers()]

    def state() -> tuple[object, ...]:
        return descriptors(), threading.active_count(), [(w.num_fds(), w.num_threads()) for w in workers]

    before = state()
    calls = [add(n, deadline=time.monotonic() + 1000, timeout=1000) for n in range(10_000)]
    driver.run(*calls)
    assert state() == before
    idle(driver)


def test_a_late_look_sees_answers_before_deadlines(driver: Driver) -> None:
    driver.run(*[add(n) for n in range(100)])  # so that all fit into a window
    calls = [add(n, deadline=time.monotonic() + 0.05) for n in range(10)]
    driver.submit(*calls)
    # As if this process had been stopped: the answers are there, and the deadlines have passed.
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass
    assert [outcome.result for outcome in driver.finish(*calls)] == [b"%d" % (n + 1) for n in range(10)]


def test_a_busy_pool_returns_to_its_driver(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_BURST", 0.0)
    calls = [add(n) for n in range(2000)]
    assert [outcome.result for outcome in driver.run(*calls)] == [b"%d" % (n + 1) for n in range(2000)]
