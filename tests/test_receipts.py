"""What is known of a death, and how calls are ended, with real processes."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from test_pool import HERE, Driver, Fifo, gone, idle, make

from workers.calling import shown
from workers.calls import Call
from workers.ending import Graces
from workers.errors import AcommError, CallCancelled, CallTimeout, TaskError, WorkerLost
from workers.executor import CallLost, PoolExecutor
from workers.receipts import worker_lost
from workers.scoreboard import Slot
from workers.tails import STDERR, TAIL, Said
from workers.workerprocess import Worker

pytestmark = pytest.mark.process

DEADLINE = 60.0


def start(workers: int = 2, **options: Any) -> Driver:
    driver = make(workers, ("dyingtasks", "pooltasks"), (HERE,), **options)
    driver.ready()
    return driver


@pytest.fixture
def driver() -> Iterator[Driver]:
    driver = start()
    yield driver
    driver.close()


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "fifo")
    yield fifo
    fifo.close()


def args(*values: object) -> bytes:
    return json.dumps(values).encode()


def failure(driver: Driver, call: Call) -> tuple[AcommError, dict[str, Any]]:
    error = driver.finish(call)[0].error
    assert error is not None and error.receipt is not None, error
    return error, error.receipt


# -- receipts


@pytest.mark.parametrize("how", ["segfault", "kill", "exit"])
def test_the_last_words_are_in_the_receipt_and_on_our_own_streams(
    capfd: pytest.CaptureFixture[str], how: str
) -> None:
    driver = start(1)
    try:
        driver.run(Call("say", args("an earlier call", "its errors")))
        driver.submit(call := Call("say_and_die", args("out of the task", "and to stderr", how)))
        error, receipt = failure(driver, call)
        idle(driver)
    finally:
        driver.close()
    assert isinstance(error, WorkerLost)
    assert receipt["stdout"].endswith("out of the task\n")
    assert receipt["stderr"].endswith("and to stderr")
    if how == "segfault":
        assert "Fatal Python error: Segmentation fault" in receipt["dump"]
        assert "in say_and_die" in receipt["dump"]
        assert any("in say_and_die" in line for line in shown(receipt))
    else:
        assert "dump" not in receipt
    out, err = capfd.readouterr()
    assert out == "an earlier call\nout of the task\n"
    assert err.startswith("its errors\nand to stderr")
    assert ("Fatal Python error: Segmentation fault" in err) == (how == "segfault")


def test_a_receipt_is_bounded_and_what_is_no_text_does_not_break_it(driver: Driver) -> None:
    call = Call("say_and_die", args("x" * 3 * TAIL, "\x00e", "kill"))
    driver.submit(call)
    _, receipt = failure(driver, call)
    assert receipt["stdout"] == "x" * (TAIL - 1) + "\n"
    assert receipt["stderr"] == "\x00e"
    assert "\\x00e" in "".join(shown(receipt))


@pytest.mark.parametrize("stream", [1, 2])
@pytest.mark.parametrize("dies", [True, False])
def test_a_flood_blocks_nothing_and_is_kept_nowhere(tmp_path: Path, stream: int, dies: bool) -> None:
    program = f"""
import resource, sys
sys.path[:0] = [{HERE!r}]
from test_receipts import Call, args, start
driver = start(2)
template = driver.pool._processes._current.server.pid
flood = Call("flood", args(256, {stream}, {dies}))
driver.submit(flood)
others = [Call("add", b"[%d,1]" % n) for n in range(200)]
driver.run(*others)
error = driver.finish(flood)[0].error
if {dies}:
    assert error.receipt[{("stdout", "stderr")[stream - 1]!r}].endswith("\\nthe end\\n"), error.receipt
else:
    assert error is None
with open(f"/proc/{{template}}/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
driver.close()
assert peak < 150_000, peak
"""
    with open(tmp_path / "errors", "w+") as errors:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=subprocess.DEVNULL if stream == 1 else errors,
            stderr=errors if stream == 1 else subprocess.DEVNULL,
            timeout=DEADLINE,
            check=False,
        )
        errors.seek(0)
        assert done.returncode == 0, errors.read()


def test_a_stuck_reader_holds_up_nobody() -> None:
    program = f"""
import sys
sys.path[:0] = [{HERE!r}]
from test_receipts import Call, args, start
driver = start(1)
assert driver.run(Call("flood", args(4, 1, False)))[0].result == b"4"
assert driver.run(Call("flood", args(4, 1, False)))[0].result == b"4"
driver.close()
sys.exit(7)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert process.wait(DEADLINE) == 7  # its stdout is a pipe that nobody has read
    assert process.stdout is not None
    assert len(process.stdout.read()) < 4 << 20
    process.stdout.close()


def test_without_capture_workers_print_straight(capfd: pytest.CaptureFixture[str]) -> None:
    driver = start(1, capture=False)
    try:
        driver.submit(call := Call("say_and_die", args("", "straight", "segfault")))
        _, receipt = failure(driver, call)
        assert "stderr" not in receipt and "in say_and_die" in receipt["dump"]
    finally:
        driver.close()
    assert "straight" in capfd.readouterr().err


# -- kills that hold


def cancelled(driver: Driver, call: Call) -> dict[str, Any]:
    driver.cancel(call)
    error, receipt = failure(driver, call)
    assert isinstance(error, CallCancelled)
    return receipt


def test_a_cancelled_call_tells_where_it_was(driver: Driver, fifo: Fifo) -> None:
    driver.submit(call := Call("hang", args(fifo.path)))
    pid = fifo.number(driver)
    receipt = cancelled(driver, call)
    assert receipt["signal"] == signal.SIGTERM and receipt["pid"] == pid and receipt["attempt"] == 1
    assert receipt["stdout"] == "I hang\n" and "in hang" in receipt["dump"]
    driver.ready()
    assert driver.pool.restarts == 1
    idle(driver)


@pytest.mark.parametrize("how", ["timeout", "deadline"])
def test_c_code_is_killed_in_time_and_tells_where_it_was(driver: Driver, fifo: Fifo, how: str) -> None:
    limit: dict[str, float] = {"timeout": 0.3} if how == "timeout" else {"deadline": time.monotonic() + 1}
    driver.submit(call := Call("crunch_when_told", args(fifo.path), **limit))  # type: ignore[arg-type]
    pid = fifo.number(driver)
    error, receipt = failure(driver, call)
    assert isinstance(error, CallTimeout)
    assert receipt["signal"] == signal.SIGKILL and "in crunch_when_told" in receipt["dump"]
    assert "oom_killer" not in receipt
    gone(pid)
    idle(driver)


@pytest.mark.parametrize("task", ["tidy", "tidy_later"])
def test_a_task_may_clean_up(driver: Driver, fifo: Fifo, tmp_path: Path, task: str) -> None:
    trace = tmp_path / "trace"
    driver.submit(call := Call(task, args(fifo.path, str(trace))))
    fifo.number(driver)
    assert cancelled(driver, call)["signal"] == signal.SIGTERM
    assert trace.read_text() == "tidied\n"


@pytest.mark.parametrize(
    ("how", "sig"),
    [("swallow", 9), ("ignore", 9), ("deaf", 9), ("default", 15)],
)
def test_a_task_that_does_not_stop_is_killed(driver: Driver, fifo: Fifo, how: str, sig: int) -> None:
    driver.submit(call := Call("stubborn", args(fifo.path, how)))
    fifo.number(driver)
    receipt = cancelled(driver, call)
    assert receipt["signal"] == sig
    assert ("dump" in receipt) == (how != "deaf")


def test_what_a_task_makes_of_its_end_is_not_the_outcome(driver: Driver, fifo: Fifo) -> None:
    driver.submit(call := Call("stubborn", args(fifo.path, "translate")))
    pid = fifo.number(driver)
    driver.cancel(call)
    assert isinstance(driver.finish(call)[0].error, CallCancelled)
    gone(pid)
    driver.ready()
    idle(driver)


def test_the_grace_is_what_was_set(fifo: Fifo) -> None:
    driver = start(1, graces=Graces(term=0.0))
    try:
        driver.submit(call := Call("hang", args(fifo.path)))
        fifo.number(driver)
        assert cancelled(driver, call)["signal"] in (signal.SIGTERM, signal.SIGKILL)
    finally:
        driver.close()


@pytest.mark.parametrize("step", [signal.SIGUSR1, signal.SIGTERM, signal.SIGKILL])
def test_a_death_at_each_step_of_an_end(fifo: Fifo, step: signal.Signals) -> None:
    """Somebody else kills it between our signals, or the worker is stopped while they come."""
    driver = start(1, graces=Graces(dump=30.0 if step == signal.SIGUSR1 else 0.05, term=30.0))
    try:
        driver.submit(call := Call("stubborn", args(fifo.path, "deaf")))
        pid = fifo.number(driver)
        driver.cancel(call)
        if step != signal.SIGKILL:
            wait_pending(pid, step)
        os.kill(pid, signal.SIGKILL)
        error, receipt = failure(driver, call)
        assert isinstance(error, CallCancelled) and receipt["signal"] == signal.SIGKILL
        driver.ready()
        assert driver.run(Call("add", b"[1,1]"))[0].result == b"2"
        idle(driver)
    finally:
        driver.close()


def wait_pending(pid: int, sig: signal.Signals) -> None:
    """Returns when the kernel holds the signal back for the process, which blocks it."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        with open(f"/proc/{pid}/status") as status:
            pending = next(int(line.split()[1], 16) for line in status if line.startswith("ShdPnd"))
        if pending >> (sig - 1) & 1:
            return
    raise AssertionError(f"{sig.name} was not sent")


@pytest.mark.parametrize("how", ["cancel", "exit"])
def test_no_descendant_survives(driver: Driver, fifo: Fifo, how: str) -> None:
    driver.submit(call := Call("family", args(fifo.path, how)))
    data = b""
    end = time.monotonic() + DEADLINE
    while not data.endswith(b"\n"):
        assert time.monotonic() < end
        if fifo._fd in select.select([fifo._fd, driver.pool.fileno()], [], [], 0.01)[0]:
            data += os.read(fifo._fd, 100)
        driver.take(driver.pool.process_events())
    pids = [int(pid) for pid in data.split()]
    assert len(pids) == 4
    if how == "cancel":
        driver.cancel(call)
    failure(driver, call)
    for pid in pids:
        gone(pid)
    idle(driver)


def test_a_worker_that_an_operator_ends(driver: Driver, fifo: Fifo) -> None:
    driver.submit(call := Call("hang", args(fifo.path)))
    os.kill(fifo.number(driver), signal.SIGTERM)
    error, receipt = failure(driver, call)
    assert isinstance(error, WorkerLost) and receipt["signal"] == signal.SIGTERM
    assert "was killed by SIGTERM" in str(error)


def test_workers_are_the_kernels_first_choice(driver: Driver) -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert driver.run(Call("score", None))[0].result == b"%d" % min(1000, own + 500)


# -- PoolExecutor


def loud(text: str, deadly: bool) -> None:
    print(text, flush=True)
    if deadly:
        os._exit(4)


@pytest.mark.parametrize("capture", [True, False])
def test_an_executors_workers_print(capfd: pytest.CaptureFixture[str], capture: bool) -> None:
    with PoolExecutor(1, capture=capture) as pool:
        pool.submit(loud, "hello", False).result(DEADLINE)
        with pytest.raises(CallLost) as caught:
            pool.submit(loud, "last words", True).result(DEADLINE)
    receipt = caught.value.receipt
    assert receipt is not None
    assert ("stdout" in receipt) == capture
    if capture:
        assert receipt["stdout"].endswith("last words\n")
    assert capfd.readouterr().out == "hello\nlast words\n"


def test_a_killed_future_tells_where_it_was(fifo: Fifo) -> None:
    with PoolExecutor(1) as pool:
        future = pool.submit(sleep_when_told, fifo.path)
        assert select.select([fifo._fd], [], [], DEADLINE)[0]
        pool.kill(future)
        with pytest.raises(CallCancelled) as caught:
            future.result(DEADLINE)
    assert caught.value.receipt is not None
    assert "in sleep_when_told" in caught.value.receipt["dump"]


def sleep_when_told(path: str) -> None:
    with open(path, "w") as file:
        file.write("1\n")
    time.sleep(10_000)


def test_an_error_that_is_no_death_has_no_receipt(driver: Driver) -> None:
    error = driver.run(Call("fail", b'["x"]'))[0].error
    assert isinstance(error, TaskError) and error.receipt is None


def test_a_death_that_was_likely_for_want_of_memory() -> None:
    worker = Worker(1, cast(Any, None), 0, 0.0)
    worker.pid, worker.status, worker.oom = 5, -signal.SIGKILL, True
    worker.running = {1: Slot(1, 10.0, 0.0, 0.0)}
    worker.said = (Said(STDERR, 9.0, b"of another"), Said(STDERR, 10.0, b"its \xff own"))
    lost = worker_lost(Call("greedy", None, number=1), worker, 12.0)
    assert str(lost) == (
        "worker 5 was killed by SIGKILL, likely by the kernel for want of memory, while it ran task greedy"
    )
    assert lost.receipt is not None
    assert (lost.receipt["oom_killer"], lost.receipt["stderr"]) == ("likely", "its \ufffd own")
    assert lost.receipt["ran_seconds"] == 2.0 and "stdout" not in lost.receipt
