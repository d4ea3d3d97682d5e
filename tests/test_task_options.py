"""What a supervisor makes of the options of its tasks, seen from a client."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT
from serving import Fifo

from acomm.client import Client
from acomm.errors import CallCancelled, CallTimeout, TaskError
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
