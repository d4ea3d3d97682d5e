"""A takeover under load at the other doors: HTTP, and the sockets where coordinators look for tasks."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest
from doors import JSON, ServedDoor
from peers import WAIT, connected, frame, read_frame
from serving import Hook, Served, request

from workers.provider import socket_path

pytestmark = pytest.mark.process

TAKEOVERS = 3
PROVIDER = 50, "me"


class Callers:
    """Threads that never stop making calls: each `call(value)` has the task `noted` run with a new value."""

    def __init__(self, calls: list[Callable[[int], None]]) -> None:
        self.faults: list[BaseException] = []
        self.made: list[int] = []
        self._stop = threading.Event()
        self._told = threading.Condition()
        self._threads = [
            threading.Thread(target=self._run, args=(call, number, len(calls)))
            for number, call in enumerate(calls)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, call: Callable[[int], None], value: int, step: int) -> None:
        try:
            while not self._stop.is_set():
                call(value)
                with self._told:
                    self.made.append(value)
                    self._told.notify_all()
                value += step
        except BaseException as error:
            with self._told:
                self.faults.append(error)
                self._told.notify_all()

    def more(self, count: int) -> None:
        """Wait for so many answers more."""
        with self._told:
            goal = len(self.made) + count
            assert self._told.wait_for(lambda: len(self.made) >= goal or self.faults, WAIT), "stuck"
        assert not self.faults, self.faults

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT)

    def check(self, runs: Path) -> None:
        """No call was refused, lost or run twice."""
        self.stop()
        assert not self.faults, self.faults
        assert Counter(int(line.split()[1]) for line in runs.read_text().splitlines()) == Counter(self.made)


@contextmanager
def calling(calls: list[Callable[[int], None]]) -> Iterator[Callers]:
    callers = Callers(calls)
    try:
        yield callers
    finally:
        callers.stop()


@pytest.fixture(params=[False, True], ids=["memory", "journal"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ...]:
    tmp_path.chmod(0o700)
    return ("--journal", str(tmp_path / "j.db")) if request.param else ()


def test_http_callers_are_not_refused(rounds: range, tmp_path: Path, given: tuple[str, ...]) -> None:
    """Neither those that connect for each call, nor those that keep their connection."""
    runs = tmp_path / "runs"
    with ExitStack() as stack:
        served = stack.enter_context(ServedDoor(tmp_path, *given, modules=("durabletasks",)))
        http_url, headers = served.http_url, {**JSON, **served.headers()}

        def once(value: int) -> None:
            reply = served.call("noted", [str(runs), value])
            assert (reply.status, reply.json) == (200, value), reply

        def keeping() -> Callable[[int], None]:
            kept = HTTPConnection(served.host, served.port, timeout=WAIT)
            stack.callback(kept.close)

            def call(value: int) -> None:  # the library connects anew when it was told of the end
                kept.request("POST", "/call/noted", json.dumps([str(runs), value]).encode(), headers)
                reply = kept.getresponse()
                body = reply.read()
                assert (reply.status, json.loads(body)) == (200, value), body

            return call

        with calling([once, once, once, keeping(), keeping()]) as callers:
            callers.more(30)
            for _ in range(TAKEOVERS * len(rounds)):
                old = served
                served = stack.enter_context(
                    ServedDoor(tmp_path, "--takeover", *given, modules=("durabletasks",))
                )
                assert served.http_url == http_url
                callers.more(30)
                assert old.wait() == 0
            callers.check(runs)


def test_coordinators_always_find_a_provider(rounds: range, tmp_path: Path, given: tuple[str, ...]) -> None:
    runs, folder = tmp_path / "runs", tmp_path / "p"
    given = (*given, "--provider-dir", str(folder), "--provider-name", PROVIDER[1])
    path = socket_path(str(folder), "noted", *PROVIDER)
    with ExitStack() as stack:
        served = stack.enter_context(Served(tmp_path, *given, modules=("durabletasks",)))

        def coordinator(number: int) -> Callable[[int], None]:
            hook = stack.enter_context(Hook(tmp_path / f"hook{number}"))

            def ask(value: int) -> None:
                with connected(path) as sock:
                    sock.sendall(frame(request(f"r{value}", "noted", hook.url, [str(runs), value])))
                    acknowledged = json.loads(read_frame(sock))
                assert acknowledged["error"] == "", acknowledged
                assert hook.answer()["result"] == value

            return ask

        with calling([coordinator(number) for number in range(5)]) as callers:
            callers.more(30)
            for _ in range(TAKEOVERS * len(rounds)):
                old = served
                served = stack.enter_context(
                    Served(tmp_path, "--takeover", *given, modules=("durabletasks",))
                )
                callers.more(30)
                assert old.wait() == 0
            callers.check(runs)
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
        assert not [found for found in folder.rglob("*") if not found.is_dir()]
