"""Task.submit and Task.using: typed as the function is, through one client a process."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import calledtasks
import pytest
import servedtasks
from peers import WAIT
from serving import PROJECT, Served, environment

import acomm
from acomm import defaultclient, errors
from acomm.defaultclient import default_client

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("taskview"), modules=("calledtasks",)) as served:
        yield served


@pytest.fixture(autouse=True)
def default(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACOMM_URL", served.url)
    yield
    defaultclient._close_default()


class TestSubmit:
    def test_is_a_call_of_the_task(self) -> None:
        assert servedtasks.add.submit(1, b=2).result(WAIT) == 3
        assert servedtasks.add(1, b=2) == 3
        assert list(calledtasks.squares.submit(2)) == [calledtasks.Square(0, 0), calledtasks.Square(1, 1)]
        with pytest.raises(TypeError, match="add"):
            servedtasks.add.submit(1, c=2)  # type: ignore[call-arg]
        with pytest.raises(errors.TaskError, match="on purpose"):
            servedtasks.fail.submit("on purpose").result(WAIT)

    async def test_in_an_event_loop(self) -> None:
        assert await servedtasks.add.submit(1, 2) == 3
        results = await acomm.gather(a=servedtasks.add.submit(1), b=servedtasks.add.submit(2))
        assert results == {"a": 1, "b": 2}

    def test_a_task_submits_another_to_its_own_supervisor(
        self, served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert calledtasks.nested.submit(4).result(WAIT) == 5
        assert calledtasks.default_url.submit().result(WAIT) == served.url


class TestUsing:
    def test_options_are_those_of_its_calls(self, tmp_path: Path) -> None:
        fifo = servedtasks.stay.using(timeout=0.2)
        with pytest.raises(errors.CallTimeout):
            fifo.submit("/dev/null").result(WAIT)
        assert calledtasks.digest.using(stream=b"x").submit().result(WAIT) == hashlib.sha256(b"x").hexdigest()
        path = tmp_path / "said"

        def note(request: Any, response: Any) -> None:
            with open(path, "w") as file:
                file.write(response.result_as(str))

        view = calledtasks.digest.using(on_success=note).using(stream=b"y").using(timeout=WAIT)
        assert view.submit().result(WAIT) == path.read_text()

    def test_it_is_still_the_function_and_its_name(self) -> None:
        view = servedtasks.add.using(priority=3)
        assert view(1, b=2) == 3
        assert view.name == "add"
        assert repr(view) == f"<TaskView of {servedtasks.add!r}>"
        assert view.submit(1).result(WAIT) == 1

    def test_a_client_and_what_it_is_set_to(self, served: Served) -> None:
        with acomm.connect(served.url) as client:
            patient = client.using(timeout=0.2, priority=1)
            view = servedtasks.stay.using(client=patient)
            with pytest.raises(errors.CallTimeout):
                view.submit("/dev/null").result(WAIT)
            call = view.using(timeout=WAIT).submit("/dev/null")
            with pytest.raises(TimeoutError):
                call.result(0.5)
            call.cancel()
        with pytest.raises(RuntimeError, match="closed"):
            view.submit("/dev/null")

    def test_what_is_wrong_is_said_at_once(self) -> None:
        with pytest.raises(ValueError, match="timeout must be"):
            servedtasks.add.using(timeout=-1)
        with pytest.raises(TypeError, match="stream"):
            servedtasks.add.using(stream="text")  # type: ignore[arg-type]
        with pytest.raises(errors.HandlerError):
            servedtasks.add.using(on_success=threading.Lock().__enter__)  # type: ignore[arg-type]


class TestDefaultClient:
    def test_there_is_one(self) -> None:
        with ThreadPoolExecutor(8) as threads:
            clients = set(threads.map(lambda _: default_client(), range(64)))
        assert clients == {default_client()}
        assert acomm.default_client is default_client

    def test_it_is_made_anew_when_it_was_closed(self) -> None:
        first = default_client()
        first.close()
        assert default_client() is not first
        assert servedtasks.add.submit(1).result(WAIT) == 1

    def test_after_a_fork_and_at_exit(self, served: Served, tmp_path: Path) -> None:
        """The child has a client of its own, while the parent's threads use theirs; neither leaves a file."""
        script = """
            import os, sys, threading
            from servedtasks import add

            assert add.submit(1).result(20) == 1
            stop = threading.Event()
            def go_on():
                while not stop.is_set():
                    assert add.submit(5).result(20) == 5
            threads = [threading.Thread(target=go_on) for _ in range(2)]
            for thread in threads:
                thread.start()
            for number in range(5):
                if (pid := os.fork()) == 0:
                    stop.set()
                    print("child", add.submit(2).result(20), flush=True)
                    sys.exit(0)
                assert os.waitpid(pid, 0)[1] == 0
            stop.set()
            for thread in threads:
                thread.join()
            print("parent", add.submit(3).result(20), flush=True)
            last = add.submit(4)
        """
        done = subprocess.run(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(script)],
            env=environment(tmp_path, ACOMM_URL=served.url),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["child 2"] * 5 + ["parent 3"]
        assert done.stderr == ""
        assert list((tmp_path / "acomm").iterdir()) == []

    def test_asyncio_programs_end_with_it_open(self, served: Served, tmp_path: Path) -> None:
        script = """
            import asyncio
            from calledtasks import squares

            async def main():
                async for item in squares.submit(10):
                    print(item.square, flush=True)

            asyncio.run(main())
        """
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
            env=environment(tmp_path, ACOMM_URL=served.url),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split() == [str(number * number) for number in range(10)]


def test_types_are_those_of_the_function(tmp_path: Path) -> None:
    """By mypy: arguments are checked as in a call of the function."""
    (tmp_path / "user.py").write_text(
        textwrap.dedent(
            """
            from acomm import Call
            from workers import task

            @task
            def add(a: int, b: int = 0) -> int:
                return a + b

            call: Call = add.submit(1, b=2)
            number: int = add.using(timeout=5)(1)
            call = add.using(timeout=5).using(priority=1).submit(1)
            add.submit("x")
            add.submit()
            add.using(timeout=5).submit(1, c=2)
            add.using(deadline=5)
            call.progress.done
            for item in call:
                pass
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", str(tmp_path / "user.py")],
        cwd=PROJECT,  # with its settings, and what it knows of our modules from earlier runs
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = [line.partition(": error: ")[::2] for line in done.stdout.splitlines() if ": error: " in line]
    assert [(Path(place).name, error.rpartition("[")[2]) for place, error in found] == [
        ("user.py:12", "arg-type]"),
        ("user.py:13", "call-arg]"),
        ("user.py:14", "call-arg]"),
        ("user.py:15", "call-arg]"),
        ("user.py:16", "union-attr]"),
    ], done.stdout


async def test_a_call_that_is_awaited_by_a_task_that_is_cancelled(served: Served) -> None:
    task = asyncio.ensure_future(asyncio.wait_for(servedtasks.stay.submit("/dev/null"), 0.2))
    with pytest.raises(TimeoutError):
        await task
    await asyncio.to_thread(served.until, lambda stats: not stats["tracked"])
