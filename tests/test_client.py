"""The client: calls from threads and event loops, what ends them, and what a client leaves behind."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import servedtasks
from peers import WAIT, GrantingPeer, ack
from serving import Fifo, Served, environment

import acomm
from acomm import errors
from acomm.client import Client
from acomm.messages import Response
from workers.registry import task

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("client")) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with acomm.connect(served.url, default_timeout=WAIT) as client:
        yield client


class TestCalls:
    def test_by_name(self, client: Client) -> None:
        assert client.call("add", 1, 2) == 3
        assert client.call("add", a=1, b=2) == 3
        assert client.call("echo") is None
        assert client.call("echo", {"nested": [1, None, "é"]}) == {"nested": [1, None, "é"]}

    def test_a_name_does_not_mix_positions_and_keywords(self, client: Client) -> None:
        with pytest.raises(TypeError, match="positional arguments or keywords"):
            client.submit("add", 1, b=2)

    def test_by_task(self, client: Client) -> None:
        assert client.call(servedtasks.add, 1, b=2) == 3
        assert client.call(servedtasks.reverse, b"\x00\xff") == b"\xff\x00"
        moved = client.call(servedtasks.shift, servedtasks.Point(1, 2), by=3)
        assert moved == servedtasks.Point(4, 5)
        assert type(moved) is servedtasks.Point

    def test_a_tasks_arguments_are_checked_here(self, client: Client) -> None:
        with pytest.raises(TypeError):
            client.submit(servedtasks.add)
        with pytest.raises(TypeError):
            client.submit(servedtasks.add, 1, c=3)

    def test_a_result_that_is_not_what_the_hint_says(self, client: Client) -> None:
        def echo(value: Any) -> int: ...

        with pytest.raises(errors.TaskError, match="not what its hint says"):
            client.call(task(echo), "text")

    @pytest.mark.parametrize("value", [object(), float("nan"), "\ud800", {1j: 1}], ids=repr)
    def test_arguments_that_json_cannot_express(self, client: Client, value: Any) -> None:
        with pytest.raises(TypeError, match="args"):
            client.submit("echo", value)

    def test_a_task_name_that_none_can_have(self, client: Client) -> None:
        for name in ("", "a\0b", "x" * 256):
            with pytest.raises(errors.BadRequest):
                client.submit(name)

    def test_from_many_threads(self, client: Client) -> None:
        def some(start: int) -> list[int]:
            return [client.call("add", number, 1) for number in range(start, start + 50)]

        with ThreadPoolExecutor(16) as threads:
            found = list(threads.map(some, range(0, 800, 50)))
        assert [number for numbers in found for number in numbers] == list(range(1, 801))

    async def test_from_an_event_loop(self, served: Served) -> None:
        async with acomm.connect(served.url, default_timeout=WAIT) as client:
            assert await client.submit("add", 1, 2) == 3
            calls = [client.submit("add", number) for number in range(100)]
            assert await asyncio.gather(*map(asyncio.wrap_future, calls)) == list(range(100))
            with pytest.raises(errors.TaskError):
                await client.submit("fail", "x")

    def test_from_several_event_loops(self, client: Client) -> None:
        async def one(number: int) -> Any:
            return await client.submit("add", number)

        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(lambda n: asyncio.run(one(n)), range(8))) == list(range(8))

    def test_a_call_is_a_future(self, client: Client, started: Fifo) -> None:
        call = client.submit("stay", started.path)
        assert not call.done()
        with pytest.raises(TimeoutError):
            call.result(0.01)
        done = threading.Event()
        call.add_done_callback(lambda call: done.set())
        call.cancel()
        assert done.wait(WAIT)

    def test_a_large_value(self, client: Client) -> None:
        text = "x" * 5_000_000
        assert client.call("echo", text) == text

    def test_one_that_is_too_large(self, served: Served, tmp_path: Path) -> None:
        with Served(tmp_path, "--max-frame", "10000") as small, acomm.connect(small.url) as client:
            with pytest.raises(errors.AcommError):
                client.using(timeout=WAIT).call("echo", "x" * 10_000)
            with pytest.raises(errors.TooLarge):
                client.call("text", "\x7f" * 3000)
            assert client.call("add", 1) == 1


class TestErrors:
    def test_by_class(self, client: Client, started: Fifo) -> None:
        with pytest.raises(errors.TaskError) as caught:
            client.call("fail", "on purpose")
        assert str(caught.value) == "ValueError: on purpose"
        assert caught.value.type == "ValueError"
        assert "servedtasks.py" in (caught.value.traceback or "")
        with pytest.raises(errors.UnknownTask, match="did you mean add"):
            client.call("ad")
        with pytest.raises(errors.BadArgs):
            client.call("add", "one")
        with pytest.raises(errors.WorkerLost):
            client.call("die", "x")
        with pytest.raises(errors.CallTimeout):
            client.using(timeout=0.1).call("stay", started.path)
        with pytest.raises(TimeoutError):  # it is one of those, too
            client.using(timeout=0.1).call("stay", started.path)

    def test_nobody_listens(self, tmp_path: Path) -> None:
        with acomm.connect(f"unix://{tmp_path}/nobody", wait=0) as client:
            with pytest.raises(errors.Unreachable, match="No such file"):
                client.call("add", 1)

    @pytest.mark.parametrize("url", ["tcp://x", "unix://relative", "nonsense", "http://"])
    def test_urls_that_lead_nowhere(self, url: str) -> None:
        with pytest.raises(errors.BadRequest, match="the supervisor's URL"):
            acomm.connect(url)

    def test_an_answer_that_cannot_be_read(self, tmp_path: Path) -> None:
        def answer(message: dict[str, Any]) -> bytes:
            threading.Thread(target=reply, args=(message,)).start()
            return ack(message["id"], acomm=1)

        def reply(message: dict[str, Any]) -> None:
            hook = message["responseHook"]["Path"]
            acomm.send_sync(f"unix://{hook}", b'{"error":"","id":"%b","result":1}' % message["id"].encode())

        def text() -> str: ...

        with GrantingPeer(tmp_path / "peer", answer) as peer:
            with acomm.connect(peer.url, default_timeout=WAIT) as client:
                assert client.call("text") == 1
                with pytest.raises(errors.TaskError, match="hint"):
                    client.call(task(text))

    def test_no_answer_at_all(self, tmp_path: Path) -> None:
        with GrantingPeer(tmp_path / "peer") as peer:
            with acomm.connect(peer.url, default_timeout=0.1) as client:
                with pytest.raises(errors.CallTimeout):
                    client.call("add", 1)


class TestOptions:
    def test_views_add_up(self, client: Client) -> None:
        view = client.using(timeout=5).using(priority=3)
        assert (view._options.timeout, view._options.priority) == (5, 3)
        assert view.call("add", 1) == 1
        assert client._options.timeout is None

    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
    def test_a_timeout_is_a_positive_number(self, client: Client, timeout: float) -> None:
        with pytest.raises(ValueError, match="positive"):
            client.using(timeout=timeout)

    def test_a_higher_priority_goes_first(self, client: Client, tmp_path: Path) -> None:
        kept, held, release = (Fifo(tmp_path / name) for name in ("kept", "held", "release"))
        keeping = client.submit("stay", kept.path)  # so that one worker runs them all, in their order
        kept.read()
        client.submit("hold", held.path, release.path)
        held.read()
        order: list[int] = []
        calls = []
        for priority in (-1, 0, 1):
            call = client.using(priority=priority).submit("spin", priority)
            call.add_done_callback(lambda call: order.append(call.result()))
            calls.append(call)
        client.stats()  # all of them have been taken
        release.close()
        wait(calls, WAIT)
        assert order == [1, 0, -1]
        keeping.cancel()
        kept.close()
        held.close()


class TestCancel:
    def test_stops_a_running_task(self, served: Served, client: Client, started: Fifo) -> None:
        call = client.submit("stay", started.path)
        pid = int(started.read())
        assert call.cancel()
        assert call.cancel()
        with pytest.raises(CancelledError):
            call.result(WAIT)
        stats = served.until(lambda stats: pid not in [worker["pid"] for worker in stats["workers"]])
        assert stats["tracked"] == 0

    def test_is_too_late_for_one_that_is_done(self, client: Client) -> None:
        call = client.submit("add", 1)
        assert call.result(WAIT) == 1
        assert not call.cancel()
        assert call.result() == 1

    async def test_of_whoever_awaits_it(self, served: Served, started: Fifo) -> None:
        async with acomm.connect(served.url, default_timeout=WAIT) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.submit("stay", started.path), 0.2)
            while client.stats()["tracked"]:
                await asyncio.sleep(0.01)


class TestClose:
    def test_waits_until_the_supervisor_has_it_all(self, served: Served) -> None:
        before = served.stats()["counts"].get("accepted", 0)
        client = acomm.connect(served.url)
        calls = [client.submit("spin", number) for number in range(500)]
        client.close()
        assert served.stats()["counts"]["accepted"] == before + 500
        assert all(call.done() for call in calls)
        for call in calls:
            assert isinstance(call.exception(), errors.ConnectionLost | None)
        served.until(lambda stats: stats["tracked"] == 0)

    def test_fails_what_has_no_answer(self, client: Client, started: Fifo) -> None:
        call = client.submit("stay", started.path)
        started.read()
        client.close()
        with pytest.raises(errors.ConnectionLost, match="the client was closed before the answer came"):
            call.result(0)
        assert not call.cancel()
        with acomm.connect(client.url) as other:
            assert other.cancel(call.id)

    def test_twice_and_unused(self, served: Served) -> None:
        client = acomm.connect(served.url)
        client.close()
        client.close()
        with acomm.connect(served.url) as client:
            pass

    def test_nothing_can_be_sent_afterwards(self, client: Client) -> None:
        view = client.using(timeout=1)
        client.close()
        for use in (client.submit, client.call, view.submit):
            with pytest.raises(RuntimeError, match="closed"):
                use("add", 1)
        with pytest.raises(RuntimeError):
            client.stats()

    def test_leaves_no_thread_and_no_file(self, served: Served, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        before = threading.active_count()
        with acomm.connect(served.url) as client:
            client.call("add", 1)
            assert len(list((tmp_path / "acomm").iterdir())) == 2  # its socket and the lock
        assert threading.active_count() == before
        assert list((tmp_path / "acomm").iterdir()) == []

    def test_from_a_callback(self, served: Served) -> None:
        client = acomm.connect(served.url)
        closed = threading.Event()
        call = client.submit("add", 1)
        call.add_done_callback(lambda call: (client.close(), closed.set()))
        assert closed.wait(WAIT)
        assert call.result() == 1
        assert client._thread is not None
        client._thread.join(WAIT)
        assert not client._thread.is_alive()


class TestMisuse:
    def test_a_callback_that_raises_whatever(self, client: Client, caplog: pytest.LogCaptureFixture) -> None:
        for error in (ValueError, SystemExit, KeyboardInterrupt):

            def raise_it(call: Any, error: type[BaseException] = error) -> None:
                raise error("on purpose")

            call = client.submit("add", 1)
            call.add_done_callback(raise_it)
            assert call.result(WAIT) == 1
            assert client.call("add", 2) == 2

    def test_a_callback_that_waits_for_another_call(self, client: Client) -> None:
        said: list[BaseException] = []
        done = threading.Event()

        def callback(call: Any) -> None:
            try:
                client.call("add", 1)
            except RuntimeError as error:
                said.append(error)
            done.set()

        client.submit("echo").add_done_callback(callback)
        assert done.wait(WAIT)
        assert "callback" in str(said[0])

    def test_a_client_whose_thread_fails_tells_all_its_calls(
        self, client: Client, started: Fifo, caplog: pytest.LogCaptureFixture
    ) -> None:
        call = client.submit("stay", started.path)
        started.read()
        assert client._loop is not None

        def die() -> None:
            raise SystemExit("the thread dies")

        client._loop.call_soon_threadsafe(die)
        with pytest.raises(errors.ConnectionLost):
            call.result(WAIT)
        with pytest.raises(RuntimeError, match="closed"):
            client.call("add", 1)
        assert client._thread is not None
        client._thread.join(WAIT)
        assert "the client's thread failed" in caplog.text
        with acomm.connect(client.url) as other:
            assert other.cancel(call.id)

    def test_after_a_fork(self, served: Served, tmp_path: Path) -> None:
        script = (
            "import acomm, os, sys\n"
            "client = acomm.connect(sys.argv[1])\n"
            "assert client.call('add', 1) == 1\n"
            "client._lock.acquire()  # as another thread may hold it just then\n"
            "pid = os.fork()\n"
            "if pid:\n"
            "    client._lock.release()\n"
            "else:\n"
            "    try:\n"
            "        client.call('add', 1)\n"
            "    except RuntimeError as error:\n"
            "        print(error, flush=True)\n"
            "    client.close()\n"
            "    with acomm.connect(sys.argv[1]) as new:\n"
            "        print(new.call('add', 2), flush=True)\n"
            "    os._exit(0)\n"
            "os.waitpid(pid, 0)\n"
            "print(client.call('add', 3))\n"
            "client.close()\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, served.url],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=WAIT,
        )
        assert done.returncode == 0, done.stderr
        refusal, *rest = done.stdout.splitlines()
        assert "fork" in refusal
        assert rest == ["2", "3"]

    def test_a_client_that_cannot_have_a_socket(
        self, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "acomm").write_text("a file in the folder's place")
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        with acomm.connect(served.url) as client:
            with pytest.raises(errors.ConfigError):
                client.call("add", 1)
            (tmp_path / "acomm").unlink()
            assert client.call("add", 1) == 1

    def test_a_timeout_that_makes_no_sense(self, served: Served) -> None:
        with acomm.connect(served.url, default_timeout=-1) as client:
            with pytest.raises(ValueError, match="default_timeout"):
                client.call("add", 1)


class TestHandlersOfACall:
    def test_they_run_in_the_supervisor_and_not_here(
        self, served: Served, client: Client, tmp_path: Path
    ) -> None:
        path = str(tmp_path / "pids")

        def note(request: Any, response: Response) -> None:
            with open(path, "a") as file:
                file.write(f"{os.getpid()}\n")

        assert client.using(on_success=note).call("add", 1) == 1
        client.call("add", 1)
        assert Path(path).read_text() == f"{served.pid}\n"


class TestUrl:
    def test_the_default(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv("ACOMM_URL", raising=False)
        monkeypatch.delenv("ACOMM_SOCKET", raising=False)
        monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/me")
        assert acomm.connect().url == "unix:///run/me/acomm/acomm.sock"
        monkeypatch.setenv("ACOMM_SOCKET", "/run/other.sock")
        assert acomm.connect().url == "unix:///run/other.sock"
        monkeypatch.setenv("ACOMM_URL", "http://localhost:1/")
        assert acomm.connect().url == "http://localhost:1/"
        assert repr(acomm.connect()) == "<Client http://localhost:1/, 0 calls>"
