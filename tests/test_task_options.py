"""What a supervisor makes of the options of its tasks, seen from a client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT
from serving import Fifo, Served

from acomm.client import Client, connect
from acomm.errors import CallCancelled, CallTimeout, ConnectionLost, TaskError
from workers import launch

pytestmark = pytest.mark.process


@contextmanager
def serving(folder: Path, tasks: str, **settings: Any) -> Iterator[Client]:
    """A client of a supervisor for the module that is written in `tasks`."""
    (folder / "option_tasks.py").write_text(tasks)
    with launch(str(folder / "option_tasks.py"), **{"workers": 1, **settings}) as client:
        yield client


def until(client: Client, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Wait for the supervisor's figures to fulfil a condition; each look is an exchange with it."""
    timer = threading.Event()
    for _ in range(int(WAIT / 0.01)):
        stats = client.stats()
        if condition(stats):
            return stats
        timer.wait(0.01)
    raise AssertionError(f"in vain: {stats}")


def pids(stats: dict[str, Any]) -> list[int]:
    return [worker["pid"] for worker in stats["workers"]]


SHARED = """
import os
from workers import context, task


@task(key="name", timeout=30)
def count(name: str, log: str, release: str) -> str:
    with open(log, "a") as file:
        file.write("x")
    with open(release) as fifo:
        fifo.read()
    return context().request_id


@task(key="name")
def fail(name: str) -> None:
    raise ValueError(name)
"""


class TestSharedRuns:
    @pytest.fixture
    def client(self, tmp_path: Path) -> Iterator[Client]:
        with serving(tmp_path, SHARED) as client:
            yield client

    def test_a_call_joins_the_run_of_its_key_and_each_has_the_answer(
        self, client: Client, tmp_path: Path
    ) -> None:
        log, release = tmp_path / "log", Fifo(tmp_path / "release")
        calls = [client.submit("count", "ann", str(log), release.path) for _ in range(20)]
        other = client.submit("count", "bob", str(log), "/dev/null")
        until(client, lambda stats: stats["counts"].get("joined") == 19 and log.exists())
        calls.append(client.submit("count", "ann", "ignored", "ignored"))
        stats = until(client, lambda stats: stats["counts"]["joined"] == 20)
        assert stats["assigned"] == stats["queued"] == 1
        calls[0].cancel()
        with pytest.raises(CallTimeout):
            client.using(timeout=0.05).call("count", "ann", "", "")
        release.close()
        results = {call.result(WAIT) for call in calls[1:]}
        assert results == {calls[0].id}
        assert other.result(WAIT) == other.id
        assert log.read_text() == "xx"

    def test_the_last_who_leaves_stops_the_run(self, client: Client, tmp_path: Path) -> None:
        log, release = tmp_path / "log", Fifo(tmp_path / "release")
        calls = [client.submit("count", "ann", str(log), release.path) for _ in range(3)]
        before = pids(until(client, lambda stats: log.exists()))
        for call in calls:
            assert client.cancel(call.id)
            with pytest.raises(CallCancelled):
                call.result(WAIT)
        until(client, lambda stats: pids(stats) not in ([], before))
        release.close()

    def test_a_failure_is_everybodys(self, client: Client) -> None:
        for call in [client.submit("fail", "no") for _ in range(50)]:
            with pytest.raises(TaskError, match="ValueError: no"):
                call.result(WAIT)


ISOLATED = """
import os
from collections.abc import Iterator
from workers import Retry, context, task

left = []


@task(isolated=True)
def alone(x: int) -> tuple[int, int]:
    left.append(x)
    return os.getpid(), len(left)


@task
def plain(x: int = 0) -> tuple[int, int]:
    return os.getpid(), len(left)


@task(isolated=True)
def numbers(count: int) -> Iterator[int]:
    left.append(count)
    yield from [os.getpid(), len(left)]


@task(isolated=True, retry=Retry(times=0, crashes=1))
def survive(x: int) -> tuple[int, int]:
    left.append(x)
    if context().attempt == 1:
        os._exit(3)
    return os.getpid(), len(left)
"""


class TestIsolated:
    @pytest.fixture(params=[1, 3])
    def client(self, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Client]:
        with serving(tmp_path, ISOLATED, workers=request.param) as client:
            yield client

    def test_each_call_has_a_process_of_its_own(self, client: Client) -> None:
        found = []
        for number in range(60):
            name = ("alone", "plain", "survive")[number % 3]
            found.append((name, client.submit(name, number)))
        results = [(name, *call.result(WAIT)) for name, call in found]
        alone = [pid for name, pid, count in results if name != "plain"]
        assert len(set(alone)) == len(alone) == 40
        assert not set(alone) & {pid for name, pid, _ in results if name == "plain"}
        assert {(name, count) for name, _, count in results} == {("alone", 1), ("plain", 0), ("survive", 1)}
        pid, count = client.submit("numbers", 1)
        assert count == 1 and pid not in {pid for _, pid, _ in results}
        assert client.stats()["worker_restarts"] == 20  # those that died, and no other

    def test_neither_kind_waits_for_the_end_of_the_other(self, client: Client) -> None:
        """Streams of both kinds, kept going while the calls of the other kind are answered."""
        for mine, others in (("alone", "plain"), ("plain", "alone")):
            flood = [client.submit(mine, number) for number in range(100)]
            between = [client.submit(others, number) for number in range(5)]
            for call in between:
                call.result(WAIT)
            for call in flood:
                call.result(WAIT)


MEMORY = """
import os, subprocess, sys, time
from collections.abc import AsyncIterator, Iterator
from workers import Retry, context, task

MAX = 50_000_000
kept = []


@task(max_memory=MAX)
def take(size: int) -> int:
    return len(b"x" * size)


@task(max_memory=MAX)
def clean_up(size: int) -> str:
    try:
        return str(len([str(n) for n in range(size)]))
    except MemoryError:
        return "had to do with less"


@task(max_memory=MAX, retry=Retry(1, on=MemoryError, backoff=0))
def less_at_second(size: int) -> int:
    return len(b"x" * (size if context().attempt == 1 else 10))


@task(max_memory=MAX)
async def await_much(size: int) -> int:
    return len(b"x" * size)


@task(max_memory=MAX)
def items(size: int) -> Iterator[int]:
    yield 1
    yield len(b"x" * size)


@task(max_memory=MAX)
async def more_items(size: int) -> AsyncIterator[int]:
    yield 1
    yield len(b"x" * size)


@task(max_memory=MAX)
def family(size: int) -> int:
    half = "import sys, time; kept = b'x' * int(sys.argv[1]); time.sleep(1000)"
    for child in [subprocess.Popen([sys.executable, "-c", half, str(size)]) for _ in range(3)]:
        child.wait()
    return 0


@task
def keep(size: int) -> int:
    kept.append(b"x" * size)
    return os.getpid()


@task
def use_for_a_moment(size: int) -> int:
    len([bytes(1000) for _ in range(size // 1000)])
    return os.getpid()
"""


class TestMemory:
    @pytest.fixture
    def client(self, tmp_path: Path) -> Iterator[Client]:
        with serving(tmp_path, MEMORY, workers=1) as client:
            yield client

    @pytest.mark.parametrize("name", ["take", "await_much"])
    def test_a_call_that_wants_too_much_has_a_memory_error(self, client: Client, name: str) -> None:
        before = pids(client.stats())
        assert client.call(name, 10_000_000) == 10_000_000
        with pytest.raises(TaskError) as caught:
            client.call(name, 100_000_000)
        assert caught.value.type == "MemoryError"
        assert str(caught.value).startswith(
            f"MemoryError: task {name} may take 50.0 MB (max_memory), and wanted more when it had taken "
        )
        assert "option_tasks.py" in str(caught.value.traceback)
        assert client.call("keep", 100_000_000) == before[0]  # it lives, and others are not limited

    def test_a_task_can_clean_up_and_be_tried_again(self, client: Client) -> None:
        assert client.call("clean_up", 100) == "100"
        assert client.call("clean_up", 10_000_000) == "had to do with less"
        assert client.call("less_at_second", 100_000_000) == 10

    @pytest.mark.parametrize("name", ["items", "more_items"])
    def test_a_stream_is_limited_too(self, client: Client, name: str) -> None:
        assert list(client.submit(name, 10_000_000)) == [1, 10_000_000]
        with pytest.raises(ConnectionLost):
            list(client.submit(name, 100_000_000))
        until(client, lambda stats: stats["streams"].get("task_error") == 1)

    def test_a_family_that_takes_too_much_is_killed(self, client: Client) -> None:
        before = pids(client.stats())
        behind = client.submit("take", 1)
        call = client.submit("family", 25_000_000)  # each has room, all have not
        with pytest.raises(
            TaskError, match=r"task family may take 50.0 MB \(max_memory\), and has taken"
        ) as e:
            call.result(WAIT)
        assert e.value.type == "MemoryError"
        assert e.value.receipt is not None and e.value.receipt["max_memory"] == 50_000_000
        assert e.value.receipt["taken"] > 50_000_000
        assert behind.result(WAIT) == client.call("take", 1) == 1
        assert pids(client.stats()) != before

    def test_a_worker_that_has_grown_is_replaced_between_calls(self, tmp_path: Path) -> None:
        with serving(tmp_path, MEMORY, max_worker_growth=30_000_000) as client:
            first = client.call("keep", 1000)
            assert client.call("use_for_a_moment", 60_000_000) == first
            assert client.call("keep", 1000) == first  # what was used for a moment is given back
            assert [client.call("keep", 20_000_000) for _ in range(2)] == [first, first]
            until(client, lambda stats: pids(stats) not in ([], [first]))
            results = {call.result(WAIT) for call in [client.submit("keep", 10_000_000) for _ in range(40)]}
            assert len(results) >= 5
            assert client.stats()["worker_restarts"] == 0


SLOW = """
import time
from workers import task


@task
def wait(path: str, log: str) -> None:
    with open(path) as fifo, open(log, "a") as file:
        file.write("x")
        file.flush()
        fifo.read()
"""


def test_workers_come_when_calls_wait(tmp_path: Path) -> None:
    with serving(tmp_path, SLOW, workers="1:3") as client:
        assert client.stats()["pool"] == {"workers": 1, "min": 1, "max": 3}
        log, release = tmp_path / "log", Fifo(tmp_path / "release")
        calls = [client.submit("wait", release.path, str(log)) for _ in range(3)]
        until(client, lambda stats: log.exists() and log.read_text() == "xxx")
        assert client.stats()["pool"]["workers"] == 3
        release.close()
        for call in calls:
            call.result(WAIT)


COROUTINES = """
import asyncio, os
from workers import task

running = most = 0
kept = []


@task
async def count() -> int:
    return await together()


@task(max_memory=500_000_000)
async def limited() -> int:
    return await together()


@task(isolated=True)
async def alone() -> int:
    assert not kept
    kept.append(1)
    return os.getpid()


@task(key="name")
async def last(name: str, log: str) -> None:
    with open(log, "a") as file:
        file.write("begun ")
    try:
        await asyncio.sleep(1000)
    except asyncio.CancelledError:
        with open(log, "a") as file:
            file.write("cancelled ")
        raise


@task
async def keep(size: int) -> int:
    kept.append(b"x" * size)
    return os.getpid()


async def together() -> int:
    global running, most
    running += 1
    most = max(most, running)
    await asyncio.sleep(0.005)
    running -= 1
    return most
"""


class TestCoroutines:
    def test_as_many_overlap_as_the_command_line_says(self, tmp_path: Path) -> None:
        (tmp_path / "co_tasks.py").write_text(COROUTINES)
        module = str(tmp_path / "co_tasks.py")
        with (
            Served(tmp_path, "-w", "1", "--coroutines", "3", modules=(module,)) as served,
            connect(served.url) as client,
        ):
            assert max(call.result(WAIT) for call in [client.submit("count") for _ in range(30)]) == 3

    def test_what_is_about_a_process_is_alone_there(self, tmp_path: Path) -> None:
        with serving(tmp_path, COROUTINES) as client:
            limited = [client.submit("limited") for _ in range(5)]
            assert {call.result(WAIT) for call in limited} == {1}
            many = [client.submit(("count", "alone", "limited")[number % 3]) for number in range(30)]
            results = [call.result(WAIT) for call in many]
            assert len(set(results[1::3])) == 10
            assert client.stats()["worker_restarts"] == 0

    def test_a_run_that_is_shared_is_cancelled_with_the_last_of_its_calls(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        with serving(tmp_path, COROUTINES) as client:
            before = pids(client.stats())
            calls = [client.submit("last", "ann", str(log)) for _ in range(3)]
            until(client, lambda stats: stats["counts"].get("joined") == 2 and log.exists())
            (worker,) = client.stats()["workers"]
            assert [call["task"] for call in worker["calls"]] == ["last"]
            for call in calls:
                assert client.cancel(call.id)
                with pytest.raises(CallCancelled):
                    call.result(WAIT)
            assert log.read_text() == "begun cancelled "
            assert pids(client.stats()) == before

    def test_a_worker_that_has_grown_is_replaced(self, tmp_path: Path) -> None:
        with serving(tmp_path, COROUTINES, max_worker_growth=30_000_000) as client:
            results = {call.result(WAIT) for call in [client.submit("keep", 10_000_000) for _ in range(8)]}
            until(client, lambda stats: not results & set(pids(stats)) and pids(stats))
            assert client.stats()["worker_restarts"] == 0
