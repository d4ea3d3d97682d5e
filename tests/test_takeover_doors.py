"""A takeover under load at the other doors: HTTP, and the sockets where coordinators look for tasks."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, RemoteDisconnected
from pathlib import Path

import pytest
from doors import JSON, ServedDoor
from peers import WAIT, connected, frame, read_all, read_frame
from serving import Fifo, Hook, Served, request

from workers.provider import socket_path

pytestmark = pytest.mark.process

TAKEOVERS = 3
PROVIDER = 50, "me"
RESTS = 0.5
"""Seconds: about what a caller over HTTP may rest at a takeover without being closed."""


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

            rested = time.monotonic()

            def call(value: int) -> None:  # the library connects anew when it was told of the end
                nonlocal rested
                for _ in range(2):
                    try:
                        kept.request("POST", "/call/noted", json.dumps([str(runs), value]).encode(), headers)
                        reply = kept.getresponse()
                        break
                    except (RemoteDisconnected, BrokenPipeError, ConnectionResetError):
                        # Kept from the processor for so long that it was closed as one that rests.
                        assert time.monotonic() - rested > RESTS
                        kept.close()
                body = reply.read()
                rested = time.monotonic()
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


def test_callers_who_rest_do_not_hold_it_up(tmp_path: Path, started: Fifo, release: Fifo) -> None:
    """One that has called before is closed; one that waits has its answer, and hears that it is the last."""
    with ServedDoor(tmp_path) as old:
        rests, waits = old.connect(), old.connect()
        with rests, waits:
            for sock, task, args in (rests, "add", [1]), (waits, "hold", [started.path, release.path]):
                body = json.dumps(args).encode()
                told = {**JSON, **old.headers(), "Host": "localhost", "Content-Length": len(body)}
                head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
                sock.sendall(f"POST /call/{task} HTTP/1.1\r\n{head}\r\n".encode() + body)
            assert rests.recv(4096).endswith(b"\r\n\r\n1")
            started.read()
            with ServedDoor(tmp_path, "--takeover") as new:
                assert rests.recv(1) == b""
                assert new.call("add", [1, 2]).json == 3
                release.close()
                answer = read_all(waits)
                assert answer.startswith(b"HTTP/1.1 200 ")
                assert b"Connection: close" in answer
                assert old.wait() == 0


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
