"""The supervisor: handlers and who may send them, control verbs, and faults within."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import dill
import pytest
from peers import WAIT, connected, frame, read_all, read_frame
from serving import Family, Fifo, Hook, Served, environment, request

import acomm
from acomm import handlers
from acomm.client import Client
from acomm.errors import (
    AcommError,
    AddressInUse,
    BadArgs,
    BadRequest,
    CallCancelled,
    CallTimeout,
    ConfigError,
    HandlerError,
    TaskError,
    UnknownTask,
)
from workers import Supervisor

pytestmark = pytest.mark.process

as_root = pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
NOBODY = 65534


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("supervisor")) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[Client]:
    with acomm.connect(served.url, default_timeout=WAIT) as client:
        client.stats()  # its thread and socket are there from the first call on
        yield client


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    """One within this process, whose parts a test can reach."""
    async with Supervisor("servedtasks", workers=1, socket=tmp_path / "s.sock") as supervisor:
        yield supervisor


async def call(supervisor: Supervisor, task: str, *args: Any) -> Any:
    async with acomm.connect(supervisor.url, default_timeout=WAIT) as client:
        return await asyncio.wait_for(client.submit(task, *args), WAIT)


class TestHandlers:
    def test_a_closure_runs_in_the_supervisor_when_its_client_is_long_gone(
        self, served: Served, tmp_path: Path, started: Fifo
    ) -> None:
        release = Fifo(tmp_path / "release")
        told = Fifo(tmp_path / "told")
        script = (
            "import acomm, os, sys\n"
            "url, started, release, told = sys.argv[1:]\n"
            "mine = os.getpid()\n"
            "with acomm.connect(url) as client:\n"
            "    client.using(on_success=lambda request, response: open(told, 'w').write(\n"
            "        f'{mine} {os.getpid()} {request.task} {response.result_as(int)}'\n"
            "    )).submit('hold', started, release)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, served.url, started.path, release.path, told.path],
            env=environment(tmp_path),
            timeout=WAIT,
            check=True,
        )
        assert done.returncode == 0
        worker = started.read()
        release.close()
        theirs, pid, task, result = told.read().split()
        assert int(theirs) not in (int(pid), os.getpid())
        assert (int(pid), task, result) == (served.pid, "hold", worker)
        told.close()

    def test_the_error_handler_runs_for_an_error_and_no_other(self, client: Client, tmp_path: Path) -> None:
        told = Fifo(tmp_path / "told")
        path = told.path

        def on_success(request: Any, response: Any) -> None:
            Path(path).write_text("success")

        def on_error(request: Any, response: Any) -> None:
            Path(path).write_text(f"{response.error.code}: {response.error}")

        with pytest.raises(TaskError):
            client.using(on_success=on_success, on_error=on_error).call("fail", "no")
        assert told.read() == "task_error: ValueError: no"
        told.close()

    def test_an_unpicklable_one_fails_at_submit_and_names_what_is_in_the_way(self, client: Client) -> None:
        lock = threading.Lock()
        with pytest.raises(HandlerError, match=r"closure variable 'lock' is a lock"):
            client.using(on_success=lambda request, response: lock.release())

    @pytest.mark.parametrize("how", ["raise", "exit", "sys.exit", "interrupt", "stop iteration", "unpickle"])
    def test_one_that_fails_harms_nobody(self, served: Served, client: Client, how: str) -> None:
        before = client.stats()["handler_errors"]
        assert client.using(on_success=failing(how)).call("add", 1, 2) == 3
        assert client.stats()["handler_errors"] == before + 1
        assert served.process.poll() is None

    def test_a_coroutine_function_is_one_too(self, client: Client, tmp_path: Path) -> None:
        told = Fifo(tmp_path / "told")
        path = told.path

        async def on_success(request: Any, response: Any) -> None:
            await asyncio.sleep(0)
            Path(path).write_text("ran")

        client.using(on_success=on_success).call("add", 1)
        assert told.read() == "ran"
        told.close()

    def test_a_request_with_handlers_needs_no_hook_even_in_generation_2(
        self, served: Served, tmp_path: Path
    ) -> None:
        told = Fifo(tmp_path / "told")
        path = told.path
        packed = acomm.messages.Handlers.pack(lambda q, r: Path(path).write_text("ran") and None, None)
        message = {
            "id": os.urandom(8).hex(),
            "task": "add",
            "responsehook": None,
            "args": [1],
            "handlers": {"success": packed.success, "python": packed.python, "dill": packed.dill},
        }
        assert json.loads(served.ask(json.dumps(message).encode()))["error"] == ""
        assert told.read() == "ran"
        told.close()

    @pytest.mark.parametrize(
        "versions",
        [
            {"python": "3.10", "dill": dill.__version__},
            {"python": "2.7", "dill": dill.__version__},
            {"python": handlers.python_version(), "dill": "0.1.0"},
            {"python": handlers.python_version()},
            {},
        ],
        ids=str,
    )
    def test_of_other_versions_are_refused_unread(
        self, served: Served, tmp_path: Path, versions: dict[str, str]
    ) -> None:
        mark = tmp_path / "mark"
        with connected(served.path) as sock:
            sock.sendall(frame(marking(mark, versions)))
            assert json.loads(read_frame(sock))["error_info"]["code"] == "bad_request"
        assert not mark.exists()

    async def test_that_payload_leaves_its_mark_where_it_is_accepted(
        self, supervisor: Supervisor, tmp_path: Path
    ) -> None:
        mark = tmp_path / "mark"
        versions = {"python": handlers.python_version(), "dill": dill.__version__}
        async with acomm.connect(supervisor.url, default_timeout=WAIT):
            reader, writer = await asyncio.open_unix_connection(supervisor.config.socket)
            writer.write(frame(marking(mark, versions)))
            header = await reader.readexactly(4)
            assert b'"error":""' in await reader.readexactly(int.from_bytes(header, "big"))
            writer.close()
            await writer.wait_closed()
            while not mark.exists():
                await asyncio.sleep(0.01)

    async def test_one_that_blocks_delays_its_answer_for_a_while_and_no_other(
        self, supervisor: Supervisor, tmp_path: Path, started: Fifo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("acomm.tracking.HANDLER_WAIT", 0.5)
        path = started.path

        def block(request: Any, response: Any) -> None:
            with open(path) as fifo:  # which is open for writing, too, until the test's end
                fifo.read()

        async with acomm.connect(supervisor.url, default_timeout=WAIT) as client:
            blocked = client.using(on_success=block).submit("add", 1)
            others = [client.submit("add", number) for number in range(100)]
            assert await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, others)), WAIT)
            assert not blocked.done()
            assert await asyncio.wait_for(blocked, WAIT) == 1
        started.close()

    def test_a_stream_is_among_what_a_drain_waits_for(self, short_folder: Path) -> None:
        settings = ("-w", "1", "--drain-timeout", "0.1")
        served = Served(short_folder, *settings, modules=("streamtasks",))
        with served, Hook(short_folder / "h") as hook:
            served.ask(request("i", "count", hook.url, [3]))
            assert hook.answer()["streamURL"] is not None
            served.process.terminate()
            assert served.wait() == 0
            assert "stopping: 1 calls to finish" in served.stderr()

    def test_those_that_block_for_ever_hold_up_neither_answers_nor_the_end(
        self, tmp_path: Path, started: Fifo
    ) -> None:
        path = started.path

        def block(request: Any, response: Any) -> None:
            with open(path) as fifo:
                fifo.read()

        with Served(tmp_path, "--drain-timeout", "0.5") as served:
            with acomm.connect(served.url, default_timeout=WAIT) as client:
                blocking = client.using(on_success=block)
                calls = [blocking.submit("add", number) for number in range(40)]
                assert client.call("add", 1) == 1
                served.process.terminate()
                # Their answers are given without the handlers when the time is up.
                assert [call.result(WAIT) for call in calls] == list(range(40))
            assert served.process.wait(10) == 0
            assert "Traceback" not in served.stderr()


def failing(how: str) -> Any:
    if how == "unpickle":
        return Unpicklable()

    def handler(request: Any, response: Any) -> None:
        if how == "raise":
            raise ValueError("on purpose")
        if how == "exit":
            raise SystemExit(3)
        if how == "sys.exit":
            sys.exit("bye")
        if how == "interrupt":
            raise KeyboardInterrupt
        raise StopIteration

    return handler


class Unpicklable:
    """Pickles, and fails where it is loaded."""

    def __call__(self, request: Any, response: Any) -> None: ...

    def __reduce__(self) -> Any:
        return int, ("not a number",)


class Marking:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def marking(mark: Path, versions: dict[str, str]) -> bytes:
    """A request whose handler leaves a file behind as soon as it is unpickled."""
    payload = base64.b64encode(pickle.dumps(Marking(mark))).decode()
    return request(os.urandom(8).hex(), "add", None, [1], acomm=1, handlers={"success": payload, **versions})


class TestOtherUsers:
    """The other user is a process that becomes nobody once it has loaded all that it needs."""

    SCRIPT = (
        "import json, os, random, sys, uuid\n"
        "import acomm, acomm.messages, dill, uvloop\n"
        "packed = acomm.messages.Handlers.pack(lambda request, response: open(sys.argv[2], 'w'), None)\n"
        "os.setgroups([]); os.setgid({gid}); os.setuid({uid})\n"
        "with acomm.connect(sys.argv[1]) as client:\n"
        "    for options in ({{}}, {{'handlers': packed}}):\n"
        "        try:\n"
        "            view = client.using()\n"
        "            view._options = acomm.client.Options(**options)\n"
        "            print('result', view.call('add', 1, 2))\n"
        "        except acomm.AcommError as error:\n"
        "            print(type(error).__name__, error.code, error)\n"
    )

    def run(self, served: Served, folder: Path, uid: int = NOBODY, gid: int = NOBODY) -> list[str]:
        runtime = folder / f"runtime-{uid}"
        runtime.mkdir()
        os.chown(runtime, uid, gid)
        done = subprocess.run(
            [sys.executable, "-c", self.SCRIPT.format(uid=uid, gid=gid), served.url, str(folder / "mark")],
            env=environment(runtime),
            capture_output=True,
            text=True,
            timeout=WAIT,
        )
        assert done.returncode == 0, done.stderr
        assert not (folder / "mark").exists()
        return done.stdout.splitlines()

    @as_root
    def test_one_who_is_allowed_may_call_but_send_no_handlers(self, folder_for_all: Path) -> None:
        with Served(folder_for_all, "--allow-uid", str(NOBODY)) as served:
            result, refusal = self.run(served, folder_for_all)
            assert result == "result 3"
            assert refusal.startswith("Forbidden forbidden handlers are taken from")

    @as_root
    def test_one_who_is_not_is_turned_away(self, folder_for_all: Path) -> None:
        with Served(folder_for_all, "--allow-uid", str(NOBODY)) as served:
            told = f"uid {NOBODY - 1} may not use this socket"
            for line in self.run(served, folder_for_all, uid=NOBODY - 1):
                assert told in line
            assert served.stats()["counts"].get("accepted", 0) == 0

    @as_root
    def test_by_default_nobody_else_gets_even_that_far(self, folder_for_all: Path) -> None:
        with Served(folder_for_all) as served:
            assert os.stat(served.path).st_mode & 0o777 == 0o600
            for line in self.run(served, folder_for_all):
                assert "Permission denied" in line

    @as_root
    def test_a_group_may_be_allowed(self, folder_for_all: Path) -> None:
        with Served(folder_for_all, "--allow-group", str(NOBODY)) as served:
            info = os.stat(served.path)
            assert (info.st_mode & 0o777, info.st_gid) == (0o660, NOBODY)
            assert self.run(served, folder_for_all, uid=NOBODY - 2)[0] == "result 3"

    @as_root
    def test_several_groups_may_be_allowed(self, folder_for_all: Path) -> None:
        with Served(folder_for_all, "--allow-group", "12345", "--allow-group", str(NOBODY)) as served:
            assert self.run(served, folder_for_all)[0] == "result 3"


class TestVerbs:
    def test_tasks(self, client: Client) -> None:
        tasks = {task["name"]: task for task in client.tasks()}
        assert tasks["add"]["doc"] == "Add two numbers."
        assert tasks["add"]["args"]["required"] == ["a"]
        assert "acomm.tasks" not in tasks

    def test_stats(self, served: Served, client: Client) -> None:
        stats = client.stats()
        assert (stats["pid"], stats["socket"], stats["state"]) == (served.pid, served.path, "serving")
        assert [worker["state"] for worker in stats["workers"]] == ["ready", "ready"]

    def test_stats_of_odd_progress(self, client: Client) -> None:
        client.call("progress", 1e308)
        assert client.stats()["pid"]

    def test_cancel_a_running_call(self, client: Client, started: Fifo) -> None:
        call = client.submit("stay", started.path)
        started.read()
        assert client.cancel(call.id)
        with pytest.raises(CallCancelled):
            call.result(WAIT)
        assert not client.cancel(call.id)

    def test_cancel_a_queued_call(self, client: Client, tmp_path: Path) -> None:
        fifos = [Fifo(tmp_path / name) for name in ("a", "b")]
        running = [client.submit("stay", fifo.path) for fifo in fifos]
        for fifo in fifos:
            fifo.read()
        queued = client.submit("add", 1)
        assert client.cancel(queued.id)
        with pytest.raises(CallCancelled):
            queued.result(WAIT)
        for call, fifo in zip(running, fifos, strict=True):
            assert client.cancel(call.id)
            with pytest.raises(CallCancelled):
                call.result(WAIT)
            fifo.close()

    def test_cancel_what_is_unknown(self, client: Client) -> None:
        assert not client.cancel("nothing")
        with pytest.raises(BadArgs):
            client.call("acomm.cancel", 7)
        with pytest.raises(UnknownTask):
            client.call("acomm.nothing")

    @pytest.mark.parametrize("args", ['["{id}"]', '{{"id":"{id}"}}', '"{id}"'])
    def test_the_id_may_be_given_in_any_form(
        self, served: Served, tmp_path: Path, started: Fifo, args: str
    ) -> None:
        with Hook(tmp_path / "hook") as hook:
            id = os.urandom(4).hex()
            served.ask(request(id, "stay", hook.url, [started.path]))
            started.read()
            with Hook(tmp_path / "verb") as verb:
                served.ask(request("verb-" + id, "acomm.cancel", verb.url, json.loads(args.format(id=id))))
                assert verb.answer()["result"] is True
            assert hook.answer()["error"] == "call of task stay was cancelled"


class TestTime:
    def test_of_the_request_includes_the_queue(self, client: Client, tmp_path: Path) -> None:
        fifos = [Fifo(tmp_path / name) for name in ("a", "b")]
        running = [client.submit("stay", fifo.path) for fifo in fifos]
        for fifo in fifos:
            fifo.read()
        with pytest.raises(CallTimeout):
            client.using(timeout=0.1).call("add", 1)
        for call, fifo in zip(running, fifos, strict=True):
            call.cancel()
            fifo.close()

    def test_of_the_request_kills_a_running_task(self, client: Client, started: Fifo) -> None:
        with pytest.raises(CallTimeout, match="the request timed out"):
            client.using(timeout=0.2).call("stay", started.path)

    def test_of_the_task(self, client: Client, started: Fifo) -> None:
        with pytest.raises(CallTimeout, match=r"longer than its limit of 0\.2 seconds"):
            client.call("limited", started.path)

    def test_that_never_comes(self, client: Client) -> None:
        assert client.using(timeout=1e300).call("add", 1) == 1


class TestFaultsWithin:
    async def test_the_pool_raises(
        self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        faults = iter([RuntimeError("a bug"), OSError("another"), ValueError("and one more")])
        real = supervisor.pool.process_events

        def faulty() -> Any:
            for fault in faults:
                raise fault
            return real()

        monkeypatch.setattr(supervisor.pool, "process_events", faulty)
        assert await call(supervisor, "add", 1, 2) == 3
        assert "a bug" in caplog.text

    async def test_the_pool_raises_when_a_call_has_ended(
        self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = supervisor.pool.process_events
        faults = iter([RuntimeError("a bug")])

        def faulty() -> Any:
            outcomes = real()
            if outcomes:
                for fault in faults:
                    raise fault
            return outcomes

        monkeypatch.setattr(supervisor.pool, "process_events", faulty)
        with pytest.raises(AcommError, match="the supervisor failed"):
            await call(supervisor, "add", 1, 2)
        # In the pause after a fault, as any other time.
        assert not await call(supervisor, "acomm.cancel", "nothing")
        assert await call(supervisor, "add", 1, 2) == 3

    async def test_an_answer_cannot_be_passed_on(
        self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with acomm.connect(supervisor.url, default_timeout=WAIT) as client:
            await client.submit("add", 1)
            with monkeypatch.context() as patch:
                patch.setattr(supervisor.tracker, "settle", lambda response: 1 / 0)
                lost = client.submit("add", 1)
                while "could not be passed on" not in caplog.text:
                    await asyncio.sleep(0.01)
            assert await client.submit("add", 2) == 2
            assert not lost.done()

    async def test_a_request_cannot_be_taken(
        self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(supervisor.pool, "submit", lambda call: 1 / 0)
            with pytest.raises(AcommError, match="the supervisor failed at this request") as caught:
                await call(supervisor, "add", 1)
            assert caught.value.code == "error"
        assert await call(supervisor, "add", 2) == 2

    async def test_a_verb_cannot_be_answered(
        self, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(supervisor, "stats", lambda: {"x": object()})
            with pytest.raises(AcommError, match="the supervisor failed"):
                await call(supervisor, "acomm.stats")
        assert (await call(supervisor, "acomm.stats"))["pid"] == os.getpid()


class TestLife:
    async def test_with_no_modules(self) -> None:
        with pytest.raises(ConfigError, match="no modules"):
            Supervisor()

    async def test_two_at_one_path(self, supervisor: Supervisor) -> None:
        with pytest.raises(AddressInUse):
            async with Supervisor("servedtasks", workers=1, socket=supervisor.config.socket):
                pass
        assert await call(supervisor, "add", 1) == 1

    @as_root
    async def test_a_start_that_fails_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*args: Any) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr("os.chown", refuse)
        with pytest.raises(ConfigError, match=r"cannot give the socket .*s to group 7"):
            async with Supervisor("servedtasks", workers=1, socket=tmp_path / "s", allow_gid=(7,)):
                pass
        assert list(tmp_path.iterdir()) == []

    async def test_two_after_each_other(self, tmp_path: Path) -> None:
        for number in range(2):
            async with Supervisor("servedtasks", workers=1, socket=tmp_path / "s") as supervisor:
                assert repr(supervisor) == f"<Supervisor {tmp_path}/s, {supervisor.pool!r}>"
                assert await call(supervisor, "add", number) == number

    async def test_the_end_right_after_a_request(self, tmp_path: Path) -> None:
        async with Supervisor("servedtasks", workers=1, socket=tmp_path / "s") as supervisor:
            client = acomm.connect(supervisor.url, default_timeout=WAIT)
            ended = client.submit("add", 1)
            while not supervisor._calls and not ended.done():
                await asyncio.sleep(0)
        assert await ended == 1
        await asyncio.to_thread(client.close)

    async def test_a_fault_at_the_end(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        others = Family(os.getpid())
        supervisor = Supervisor("servedtasks", workers=1, socket=tmp_path / "s")
        await supervisor.start()
        family = Family(os.getpid(), besides=others.fds)
        others.close()
        assert len(family.fds) >= 2
        monkeypatch.setattr(supervisor.pool, "stop_workers", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await supervisor.stop()
        assert await asyncio.to_thread(family.survivors, WAIT) == []
        family.close()
        assert list(tmp_path.iterdir()) == []
        await supervisor.stop()  # there is nothing left to do

    async def test_the_end_without_patience(self, tmp_path: Path, started: Fifo) -> None:
        supervisor = Supervisor("servedtasks", workers=1, socket=tmp_path / "s")
        await supervisor.start()
        async with acomm.connect(supervisor.url, default_timeout=WAIT) as client:
            calls = [client.submit("stay", started.path), client.submit("add", 1)]
            while len(supervisor._calls) < 2:
                await asyncio.sleep(0.001)
            await supervisor.stop(0)
            for call in calls:
                with pytest.raises(acomm.errors.ShuttingDown):
                    await call

    def test_a_listener_that_does_not_read(self, tmp_path: Path) -> None:
        """Its acknowledgements fill the connection; nobody else is held up, and the end is not."""
        with Served(tmp_path) as served, connected(served.path) as sock:
            sock.settimeout(0.2)
            message = frame(request("x" * 1000, "nowhere", None, acomm=1)) * 100
            with pytest.raises(TimeoutError):
                while True:
                    sock.sendall(message)
            assert served.stats()["connections"] == 2
            served.process.terminate()
            assert served.process.wait(10) == 0
            sock.settimeout(WAIT)
            with pytest.raises(ConnectionResetError):
                while read_all(sock):
                    pass
                raise ConnectionResetError

    def test_bad_requests_are_errors_of_ours(self) -> None:
        assert issubclass(BadRequest, AcommError)
