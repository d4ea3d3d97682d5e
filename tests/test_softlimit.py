"""Soft time limits: what is interrupted, and that nothing of it is left behind for the next call."""

import asyncio
import gc
import os
import signal
import subprocess
import time

import pytest

from workers.errors import SoftTimeout
from workers.softlimit import limited, limited_coroutine

SHORT = 0.02


def spin() -> None:
    while True:
        pass


def child() -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            process.wait()
        finally:
            process.kill()


def read() -> None:
    out, into = os.pipe()
    try:
        os.read(out, 1)
    finally:
        os.close(out)
        os.close(into)


@pytest.fixture(autouse=True)
def as_before():
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("function", [spin, lambda: time.sleep(1000), child, read])
def test_what_lasts_is_interrupted(function):
    with pytest.raises(SoftTimeout, match=r"task t ran longer than its soft limit of 0\.02 seconds"):
        limited(function, "t", SHORT)()


def test_a_task_may_answer_with_what_it_has():
    def collect():
        found = []
        try:
            while True:
                found.append(len(found))
        except TimeoutError:
            time.sleep(SHORT * 2)  # it comes once
            return len(found) > 0

    assert limited(collect, "t", SHORT)() is True


def test_a_call_in_time_is_left_alone():
    run = limited(lambda a, b=1: a + b, "t", 1000.0)
    assert run(1) == 2 and run(1, b=2) == 3
    with pytest.raises(ValueError, match="own"):
        limited(lambda: (_ for _ in ()).throw(ValueError("own")), "t", 1000.0)()


@pytest.fixture
def _no_collections():
    """A collection may run callbacks of others, as Hypothesis has one; what those raise goes nowhere."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collections")
def test_an_alarm_at_the_very_end_leaves_nothing_behind():
    """The alarm comes at all possible moments around the end of a call."""
    late = 0
    for step in range(300):
        try:
            limited(time.sleep, "t", 0.0005)(0.00045 + step * 0.0000005)
        except SoftTimeout:
            late += 1
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        assert signal.getsignal(signal.SIGALRM) in (signal.SIG_DFL, signal.SIG_IGN)
    assert 0 <= late <= 300


def test_a_coroutine_is_cancelled():
    seen = []

    async def sleeper():
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    with pytest.raises(SoftTimeout, match="task t ran"):
        asyncio.run(limited_coroutine(sleeper, "t", SHORT)())
    assert seen == ["cancelled"]


def test_a_coroutines_own_timeout_is_its_own():
    async def impatient():
        async with asyncio.timeout(0):
            await asyncio.sleep(1000)

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(limited_coroutine(impatient, "t", 1000.0)())
    assert type(caught.value) is TimeoutError
