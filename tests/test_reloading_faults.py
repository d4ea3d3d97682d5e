"""Reloads in which somebody dies, and with a journal under load: nothing is lost, the new code is served."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from changing import App, settled, versions
from peers import WAIT
from promised import Promised
from serving import Fifo, Served, kill

from acomm.client import Client, connect
from acomm.errors import AcommError, WorkerLost

pytestmark = pytest.mark.process

STUBBORN = """
from workers import Retry
from durabletasks import note as leave

@task(retry=Retry(0, crashes=1000))
def noted(path: str, value: int) -> int:
    leave(path, f"r {value}")
    return value
"""


@pytest.fixture
def app(tmp_path: Path) -> App:
    app = App(tmp_path)
    app.write(1, STUBBORN)
    return app


@pytest.fixture
def served(tmp_path: Path, app: App) -> Iterator[Served]:
    with Served(tmp_path, modules=("app",)) as supervisor:
        yield supervisor


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with connect(served.url) as client:
        yield client


def templates(served: Served) -> list[int]:
    """The processes that workers are forked from, the oldest first."""
    children = psutil.Process(served.pid).children()
    return [child.pid for child in sorted(children, key=lambda child: child.create_time())]


class TestATemplateIsKilled:
    def test_that_of_the_old_code_while_a_call_runs_on_it(
        self, served: Served, client: Client, app: App, started: Fifo, release: Fifo
    ) -> None:
        """The call is lost with its worker; nobody else notices."""
        runs = client.submit("hold", started.path, release.path)
        started.read()
        app.write(2, STUBBORN)
        client.call("acomm.reload")
        served.until(lambda stats: sum(worker["state"] == "ready" for worker in stats["workers"]) >= 2)
        old, _ = templates(served)
        kill(old)
        with pytest.raises(WorkerLost):
            runs.result(WAIT)
        assert "version 2" in versions(client)
        settled(served)
        assert versions(client) == {"version 2"}

    def test_that_of_the_new_code_while_the_old_is_left(
        self, served: Served, client: Client, app: App, started: Fifo, release: Fifo
    ) -> None:
        """Another is started, of the new code; what runs on the old code is no part of it."""
        runs = client.submit("hold", started.path, release.path)
        started.read()
        app.write(2, STUBBORN)
        client.call("acomm.reload")
        served.until(lambda stats: sum(worker["state"] == "ready" for worker in stats["workers"]) >= 2)
        _, new = templates(served)
        kill(new)
        served.until(lambda stats: len(set(templates(served)) - {new}) == 2)
        assert "version 2" in {client.submit("version").result(WAIT) for _ in range(20)}
        assert not runs.done()
        release.close()
        assert runs.result(WAIT) == "1"
        settled(served)
        assert versions(client) == {"version 2"}

    def test_that_of_the_new_code_while_it_loads(
        self, served: Served, client: Client, app: App, started: Fifo, release: Fifo
    ) -> None:
        """Then nothing has changed, and the next reload does what this one was to do."""
        told = f"open({started.path!r}, 'w').write('loading'); open({release.path!r}).read(1)"
        app.write(2, STUBBORN + told)
        reload = client.submit("acomm.reload")
        started.read()
        (_, trial) = templates(served)
        kill(trial)
        with pytest.raises(AcommError, match="template died"):
            reload.result(WAIT)
        assert versions(client) == {"version 1"}
        settled(served)
        app.write(3, STUBBORN)
        client.call("acomm.reload")
        settled(served)
        assert versions(client) == {"version 3"}

    def test_any_at_any_moment_under_load(
        self, rounds: range, served: Served, client: Client, app: App, tmp_path: Path
    ) -> None:
        moments = random.Random(len(rounds))
        kills = 3 * len(rounds)
        with Promised(served.path, tmp_path) as clients:
            clients.more(20)
            began = time.monotonic()
            client.call("acomm.reload")
            settled(served)
            lasts = time.monotonic() - began
            for number in range(2, 2 + kills):
                app.write(number, STUBBORN)
                reload = client.submit("acomm.reload")
                threading.Event().wait(moments.uniform(0, lasts))
                kill(moments.choice(templates(served)))
                clients.more(20)
                try:
                    reload.result(WAIT)
                except AcommError:  # it was on trial; the next try finds nobody who kills
                    client.call("acomm.reload")
                settled(served)
                assert versions(client) == {f"version {number}"}
            clients.check(deaths=kills)


@pytest.fixture
def start(tmp_path: Path, app: App) -> Iterator[Callable[[], Served]]:
    """Start a supervisor with a journal; call it again for its successor."""
    tmp_path.chmod(0o700)
    with ExitStack() as stack:
        yield lambda: stack.enter_context(
            Served(tmp_path, "--journal", str(tmp_path / "j.db"), modules=("app",))
        )


class TestWithAJournal:
    def test_reloads_under_load(
        self, rounds: range, start: Callable[[], Served], app: App, tmp_path: Path
    ) -> None:
        served = start()
        with Promised(served.path, tmp_path) as clients, connect(served.url) as client:
            for number in range(2, 2 + 5 * len(rounds)):
                clients.more(20)
                app.write(number, STUBBORN)
                client.call("acomm.reload")
            clients.more(20)
            clients.check(deaths=0)
            settled(served)
            assert versions(client) == {f"version {number}"}

    def test_the_supervisor_is_killed_in_the_middle_of_one(
        self, rounds: range, start: Callable[[], Served], app: App, tmp_path: Path
    ) -> None:
        """Its successor has the new code, and what was promised on the old."""
        served = start()
        moments = random.Random(len(rounds))
        kills = 3 * len(rounds)
        with Promised(served.path, tmp_path) as clients:
            clients.more(20)
            began = time.monotonic()
            served.verb("acomm.reload")
            settled(served)
            lasts = time.monotonic() - began
            for number in range(2, 2 + kills):
                clients.more(20)
                app.write(number, STUBBORN)
                served.signal(signal.SIGHUP)
                threading.Event().wait(moments.uniform(0, lasts))
                served.signal(signal.SIGKILL)
                served.wait()
                served = start()
                with connect(served.url) as client:
                    assert versions(client) == {f"version {number}"}
            clients.more(20)
            clients.check(deaths=kills)
