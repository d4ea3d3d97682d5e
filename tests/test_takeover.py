"""`acomm serve --takeover`: a new supervisor in the place of a live one, under load and half-way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from peers import WAIT, connected, frame, read_frame
from serving import Fifo, Hook, Served, environment, request

from acomm import connect, errors

pytestmark = pytest.mark.process


class Load:
    """Clients of ours and plain ones, which never stop calling a task that notes each of its runs."""

    def __init__(self, url: str, path: str, folder: Path, *, own: int = 4, plain: int = 4) -> None:
        self.faults: list[BaseException] = []
        self.called: list[int] = []
        self._url, self._path, self._folder = url, path, folder
        self._runs = str(folder / "runs")
        self._stop = threading.Event()
        self._told = threading.Condition()
        works = [self._call] * own + [self._ask] * plain
        self._threads = [threading.Thread(target=self._guard, args=(w, n)) for n, w in enumerate(works)]
        for thread in self._threads:
            thread.start()

    def _guard(self, work: object, number: int) -> None:
        try:
            work(number)  # type: ignore[operator]
        except BaseException as error:
            self.faults.append(error)
        with self._told:
            self._told.notify_all()

    def _numbers(self, number: int) -> Iterator[int]:
        value = number
        while not self._stop.is_set():
            yield value
            with self._told:
                self.called.append(value)
                self._told.notify_all()
            value += len(self._threads)

    def _call(self, number: int) -> None:
        with connect(self._url, wait=WAIT) as client:
            for value in self._numbers(number):
                assert client.submit("noted", self._runs, value).result(WAIT) == value

    def _ask(self, number: int) -> None:
        with Hook(self._folder / f"hook{number}") as hook:
            for value in self._numbers(number):
                with connected(self._path) as sock:
                    sock.settimeout(WAIT)
                    sock.sendall(frame(request(f"plain-{value}", "noted", hook.url, [self._runs, value])))
                    ack = json.loads(read_frame(sock))
                assert ack["error"] == "", ack
                assert hook.answer()["result"] == value

    def more(self, count: int) -> None:
        """Wait for so many answers more."""
        with self._told:
            goal = len(self.called) + count
            assert self._told.wait_for(lambda: len(self.called) >= goal or self.faults, WAIT), "stuck"
        assert not self.faults, self.faults

    def end(self) -> None:
        """No call is lost, refused or run twice."""
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT)
        assert not self.faults, self.faults
        runs = Counter(int(line.split()[1]) for line in Path(self._runs).read_text().splitlines())
        assert runs == Counter(self.called)


def arguments(folder: Path, journal: bool) -> tuple[str, ...]:
    folder.chmod(0o700)
    return ("--journal", str(folder / "j.db")) if journal else ()


@pytest.mark.parametrize("journal", [False, True], ids=["memory", "journal"])
def test_under_load(rounds: range, tmp_path: Path, journal: bool) -> None:
    given = arguments(tmp_path, journal)
    with ExitStack() as stack:
        served = stack.enter_context(Served(tmp_path, *given, modules=("durabletasks",)))
        load = Load(served.url, served.path, tmp_path)
        stack.callback(load._stop.set)
        load.more(50)
        for _ in range(3 if len(rounds) == 1 else 10):
            old = served
            served = stack.enter_context(Served(tmp_path, "--takeover", *given, modules=("durabletasks",)))
            load.more(50)
            assert old.wait() == 0
        load.end()
        assert served.stats()["pid"] == served.pid
        served.signal(signal.SIGTERM)
        assert served.wait() == 0
        assert not os.path.exists(served.path)
        assert not os.path.exists(served.path + ".lock")


def test_nobody_is_there(tmp_path: Path) -> None:
    with Served(tmp_path, "--takeover") as served, connect(served.url) as client:
        assert client.call("add", 1, 2) == 3


@pytest.mark.parametrize("journal", [False, True], ids=["memory", "journal"])
def test_a_call_that_runs_is_answered(tmp_path: Path, started: Fifo, journal: bool) -> None:
    """By the old one; with a journal within its drain timeout, or else by the new one."""
    given = arguments(tmp_path, journal)
    os.mkfifo(tmp_path / "release")
    with Served(tmp_path, *given, "--drain-timeout", "0.1") as old, connect(old.url, wait=WAIT) as client:
        call = client.submit("hold", started.path, f"{tmp_path}/release")
        started.read()
        with Served(tmp_path, "--takeover", *given) as new:
            assert client.call("acomm.stats")["pid"] == new.pid
            assert client.call("add", 1, 2) == 3
            with pytest.raises(TimeoutError):
                call.result(1.5)  # it is asked for meanwhile
            if journal:
                started.read()
            (tmp_path / "release").write_text("")
            call.result(WAIT)
            assert old.wait() == 0


def test_repeats_are_known(tmp_path: Path) -> None:
    with Served(tmp_path) as old, Hook(tmp_path / "hook") as hook:
        first = request("x", "add", hook.url, [1, 2])
        old.ask(first)
        assert hook.answer()["result"] == 3
        with Served(tmp_path, "--takeover") as new:
            assert old.wait() == 0
            assert json.loads(new.ask(first))["error"] == ""
            other = json.loads(new.ask(request("x", "add", hook.url, [1, 3])))
            assert "was used for another request" in str(other["error"])
            assert new.stats()["counts"].get("accepted", 0) == 0


class TestOneThatDoesNotTakeOver:
    """The old one goes on."""

    def fail(self, old: Served, *more: str) -> str:
        command = [sys.executable, "-m", "workers", "servedtasks", "--socket", old.path, "--takeover", *more]
        done = subprocess.run(
            command, env=environment(old.folder), capture_output=True, text=True, timeout=WAIT, check=False
        )
        assert done.returncode != 0
        return done.stderr

    @pytest.mark.parametrize("step", [1, 2])
    def test_it_dies(self, tmp_path: Path, step: int) -> None:
        """Before it has the sockets, and with them."""
        with Served(tmp_path) as old, connect(old.url, wait=WAIT) as client:
            assert client.call("add", 1) == 1
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as here:
                here.bind(str(tmp_path / "here"))
                here.listen()
                here.settimeout(WAIT)
                client.call("acomm.takeover", str(tmp_path / "here"), None)
                line, _ = here.accept()
                with line:
                    line.settimeout(WAIT)
                    socket.recv_fds(line, 4, 0)
                    if step == 2:
                        line.sendall(b'["ready",null]\n')
                        head = bytearray()
                        while b'["go"' not in head:
                            head += line.recv(4096)
            for number in range(100):
                assert client.call("add", number) == number
            with connect(old.url) as another:
                assert another.call("add", 1) == 1
            old.until(lambda stats: stats["state"] == "serving")

    def test_it_cannot_start(self, tmp_path: Path) -> None:
        with Served(tmp_path) as old, connect(old.url) as client:
            self.fail(old, "--workers", "nonsense")
            assert client.call("add", 1) == 1

    def test_its_journal_is_another(self, tmp_path: Path) -> None:
        given = arguments(tmp_path, journal=True)
        with Served(tmp_path, *given) as old, connect(old.url) as client:
            assert "take over with the same one" in self.fail(old, "--workers", "1")
            assert client.call("add", 1) == 1

    def test_what_it_is_told_is_checked(self, tmp_path: Path) -> None:
        with Served(tmp_path) as old, connect(old.url) as client:
            with pytest.raises(errors.BadArgs):
                client.call("acomm.takeover", 1)
            client.call("acomm.takeover", str(tmp_path / "nobody"), None)
            assert client.call("add", 1) == 1
