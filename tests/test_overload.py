"""More than there is room for: connections, messages that do not end, requests, and no descriptors."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from peers import WAIT, connected, frame, read_all, read_frame
from serving import Fifo, Hook, Served, request

import acomm
from acomm import Request, Response, UnixListener, listener, room
from acomm.connection import Connection
from acomm.errors import Busy
from acomm.room import Room
from workers.config import Config
from workers.errors import ConfigError

BOTH_LOOPS = True


def acknowledging(conn: Connection, message: bytes) -> None:
    request = Request.decode(message, raw=conn.raw)
    if request.task != "silence":
        conn.acknowledge(
            Response(request.id).encode(request.wire, extended=request.extended), grants=request.extended
        )


async def blocking(function: Any, *args: Any) -> Any:
    async with asyncio.timeout(WAIT):
        return await asyncio.to_thread(function, *args)


async def until(condition: Any) -> None:
    async with asyncio.timeout(WAIT):
        while not condition():
            await asyncio.sleep(0.001)


def message(id: str, task: str = "echo", size: int = 0) -> bytes:
    return Request(task, ["x" * size], id=id).encode(3, extended=True)


def ask(path: str, id: str) -> dict[str, Any]:
    with connected(path) as sock:
        sock.sendall(frame(message(id)))
        answer: dict[str, Any] = json.loads(read_frame(sock))
        return answer


def serving(tmp_path: Path, place: Room[Connection]) -> UnixListener:
    return UnixListener(tmp_path / "s.sock", on_message=acknowledging, room=place)


@asynccontextmanager
async def crowded(tmp_path: Path) -> AsyncIterator[tuple[UnixListener, socket.socket]]:
    """A listener whose one place is taken, by somebody who is not slow, and a connection beyond that."""
    place = Room[Connection](1)
    async with serving(tmp_path, place) as served:
        with connected(served.addr) as first:
            first.sendall(frame(message("quiet", "silence")))
            await until(lambda: len(place) == 1 and not place._waiting)
            with connected(served.addr) as sock:
                yield served, sock


class TestConnections:
    @pytest.fixture(autouse=True)
    def _impatient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(room, "PATIENCE", 0.005)

    async def test_the_slowest_goes_for_a_new_one_and_is_told(self, tmp_path: Path) -> None:
        place = Room[Connection](2)
        async with serving(tmp_path, place) as served:
            with connected(served.addr) as slow, connected(served.addr) as other:
                slow.sendall(b"\0\0")
                other.sendall(b"\0\0")
                await until(lambda: len(place) == 2)
                now = asyncio.get_running_loop().time()
                await until(lambda: asyncio.get_running_loop().time() > now + 0.01)
                assert (await blocking(ask, served.addr, "new"))["error"] == ""
                told = json.loads((await blocking(read_all, slow))[4:])
                assert told["error"] == "there are 2 connections, and more are not taken"
                assert (place.shed, place.refused) == (1, 0)
                other.setblocking(False)
                with pytest.raises(BlockingIOError):
                    other.recv(1)
            await until(lambda: not len(place))

    async def test_where_nobody_is_slow_the_new_one_is_refused_by_its_id(self, tmp_path: Path) -> None:
        place = Room[Connection](2)
        async with serving(tmp_path, place) as served:
            with connected(served.addr) as first, connected(served.addr) as second:
                for sock in (first, second):
                    sock.sendall(frame(message("quiet", "silence")))
                await until(lambda: len(place) == 2 and not place._waiting)
                told = await blocking(ask, served.addr, "new")
                assert told["id"] == "new"
                assert told["error_info"]["code"] == "busy"
                assert told["error_info"]["retry_after"] == 1
                assert place.refused == 1

    async def test_when_many_are_refused_they_are_told_at_once(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "_MAX_TURNED_AWAY", 0)
        async with crowded(tmp_path) as (_, sock):
            told = json.loads((await blocking(read_all, sock))[4:])
            assert (told["id"], told["error"]) == ("", "there are 1 connections, and more are not taken")

    async def test_who_is_turned_away_and_says_nothing_is_closed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(listener, "PATIENCE", 0.01)
        async with crowded(tmp_path) as (served, sock):
            assert b"more are not taken" in await blocking(read_all, sock)
            await until(lambda: served.connections == 1)


class TestLargeMessages:
    async def test_one_waits_until_there_is_room(self, tmp_path: Path) -> None:
        place = Room[Connection](unread=60_000)
        large = frame(message("large", size=40_000))
        async with serving(tmp_path, place) as served:
            with connected(served.addr) as first, connected(served.addr) as second:
                first.sendall(large[:5000])
                await until(lambda: place.used == len(large))
                second.sendall(large[:5000])
                await until(lambda: place._held)
                rest = asyncio.create_task(blocking(second.sendall, large[5000:]))
                # Small ones are no part of it.
                assert (await blocking(ask, served.addr, "small"))["error"] == ""
                first.sendall(large[5000:])
                for sock in (first, second):
                    assert json.loads(await blocking(read_frame, sock))["error"] == ""
                await rest
            assert place.used == 0

    async def test_what_was_reserved_is_free_when_its_sender_leaves(self, tmp_path: Path) -> None:
        place = Room[Connection](unread=60_000)
        large = frame(message("large", size=40_000))
        async with serving(tmp_path, place) as served:
            with connected(served.addr) as second:
                with connected(served.addr) as first:
                    first.sendall(large[:5000])
                    await until(lambda: place.used)
                    second.sendall(large[:5000])
                    await until(lambda: place._held)
                await blocking(second.sendall, large[5000:])
                assert json.loads(await blocking(read_frame, second))["error"] == ""
            assert place.used == 0

    async def test_when_too_many_wait_they_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(room, "MAX_HELD", 0)
        place = Room[Connection](unread=60_000)
        large = frame(message("large", size=40_000))
        async with serving(tmp_path, place) as served:
            with connected(served.addr) as first, connected(served.addr) as second:
                first.sendall(large[:5000])
                await until(lambda: place.used)
                second.sendall(large[:5000])
                told = json.loads(await blocking(read_frame, second))
                assert told["error"] == "too many large messages are on their way in"
                assert place.refused == 1


# -- a supervisor -----------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize("journal", [False, True])
def test_a_call_tells_where_it_stood(tmp_path: Path, fifos: tuple[Fifo, Fifo], journal: bool) -> None:
    started, release = fifos
    more = ("--journal", str(tmp_path / "j.db")) if journal else ()
    with (
        Served(tmp_path, "--workers", "1", *more) as served,
        acomm.connect(served.url, default_timeout=WAIT) as client,
    ):
        runs = client.submit("hold", started.path, release.path)
        started.read()
        waiting = [client.submit("add", number, 1) for number in range(3)]
        stats = client.stats()
        moment = threading.Event()
        for _ in range(int(WAIT / 0.01)):  # an acknowledgement is no event for a caller
            if waiting[-1].position is not None:
                break
            moment.wait(0.01)
        assert [call.position for call in (runs, *waiting)] == [0, 0, 1, 2]
        assert runs.expected_wait == 0.0
        assert stats["admission"]["requests"] == 4
        release.close()
        assert [call.result(WAIT) for call in waiting] == [1, 2, 3]
        runs.result(WAIT)
        assert client.stats()["admission"]["requests"] == 0


@pytest.mark.process
def test_what_has_no_room_is_busy_and_says_when_to_come_back(
    tmp_path: Path, fifos: tuple[Fifo, Fifo]
) -> None:
    started, release = fifos
    arguments = (
        "--workers",
        "1",
        "--max-queued",
        "2",
        "--max-queued-bytes",
        "200",
        "--max-connections",
        "50",
    )
    with (
        Served(tmp_path, *arguments, "--max-share", "1") as served,
        acomm.connect(served.url, default_timeout=WAIT) as client,
    ):
        client.submit("hold", started.path, release.path)
        started.read()
        waits = client.submit("add", 1)
        with pytest.raises(
            Busy, match=r"2 requests are under way, and 2 is the most \(max_queued\)"
        ) as caught:
            client.call("add", 2)
        assert caught.value.retry_after
        told = client.stats()
        assert told["admission"]["refused"] == 1
        assert (told["admission"]["max_queued"], told["admission"]["max_queued_bytes"]) == (2, 200)
        assert told["room"]["max_connections"] == 50
        release.close()
        waits.result(WAIT)
        with pytest.raises(acomm.AcommError, match=r"may have 200 \(max_queued_bytes\)"):
            client.call("echo", "x" * 300)


@pytest.mark.process
def test_who_is_patient_comes_back_when_told(tmp_path: Path, fifos: tuple[Fifo, Fifo]) -> None:
    started, release = fifos
    arguments = ("--workers", "1", "--max-queued", "4", "--max-share", "1")
    with (
        Served(tmp_path, *arguments) as served,
        acomm.connect(served.url, default_timeout=WAIT) as client,
    ):
        patient = client.using(patience=WAIT)
        client.submit("hold", started.path, release.path)
        started.read()
        calls = [patient.submit("add", number) for number in range(20)]
        while client.stats()["admission"]["refused"] < 17:
            pass
        with pytest.raises(Busy):
            client.using(patience=0.001).call("add", 0)
        withdrawn = patient.submit("add", 100)
        assert withdrawn.cancel()
        release.close()
        assert [call.result(WAIT) for call in calls] == list(range(20))


@pytest.mark.process
def test_closing_waits_for_those_who_come_back(tmp_path: Path, fifos: tuple[Fifo, Fifo]) -> None:
    started, release = fifos
    arguments = ("--workers", "1", "--max-queued", "1", "--max-share", "1")
    with Served(tmp_path, *arguments) as served, acomm.connect(served.url) as other:
        with acomm.connect(served.url) as client:
            other.submit("hold", started.path, release.path)
            started.read()
            client.using(patience=WAIT).submit("add", 1)
            while not other.stats()["admission"]["refused"]:
                pass
            release.close()
        while other.stats()["counts"].get("ok", 0) < 2:  # it was taken before the end of `with`
            pass


@pytest.mark.process
def test_what_an_earlier_supervisor_left_takes_room(tmp_path: Path, fifos: tuple[Fifo, Fifo]) -> None:
    tmp_path.chmod(0o700)
    started, release = fifos
    arguments = ("--workers", "1", "--max-queued", "2", "--journal", str(tmp_path / "j.db"))

    def offered(served: Served, id: str, task: str, *args: Any) -> str:
        error: str = json.loads(served.ask(request(id, task, hook.url, list(args))))["error"]
        return error

    with Hook(tmp_path / "hook.sock") as hook:
        with Served(tmp_path, *arguments) as served:
            assert offered(served, "a", "hold", started.path, release.path) == ""
            started.read()
            assert offered(served, "b", "add", 1) == ""
            assert "(max_queued)" in offered(served, "c", "add", 1)
            served.signal(signal.SIGKILL)
            served.wait()
        with Served(tmp_path, "--max-queued", "1", *arguments[:2], *arguments[4:]) as served:
            started.read()
            assert served.stats()["admission"]["requests"] == 2, "promised is promised"
            assert "(max_queued)" in offered(served, "c", "add", 1)
            release.close()
            assert {hook.answer()["id"], hook.answer()["id"]} == {"a", "b"}
            served.until(lambda stats: stats["admission"]["requests"] == 0)
            assert offered(served, "c", "add", 1) == ""


@pytest.mark.process
@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_without_descriptors_it_neither_spins_nor_dies(tmp_path: Path, loop: str) -> None:
    if loop == "asyncio":
        (tmp_path / "uvloop.py").write_text("raise ImportError\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    try:
        with Served(tmp_path, "--workers", "1") as served, ExitStack() as knocking:
            process = psutil.Process(served.pid)
            limits = process.rlimit(psutil.RLIMIT_NOFILE)
            resource.prlimit(served.pid, resource.RLIMIT_NOFILE, (process.num_fds() + 20, limits[1]))
            for _ in range(2000):
                knocking.enter_context(connected(served.path))
            before = sum(process.cpu_times()[:2])
            threading.Event().wait(2.0)  # the span in which it may have spun
            assert sum(process.cpu_times()[:2]) - before < 0.5
            assert len(served.stderr()) < 20_000
            knocking.close()
            assert served.stats()["state"] == "serving"
            resource.prlimit(served.pid, resource.RLIMIT_NOFILE, limits)
            assert served.process.poll() is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.process
def test_slow_peers_do_not_keep_honest_ones_out(tmp_path: Path) -> None:
    with Served(tmp_path, "--workers", "1", "--max-connections", "20") as served, ExitStack() as slow:
        for _ in range(60):
            slow.enter_context(connected(served.path)).sendall(b"\0")
        # Within their first second nobody is shed: the newcomer is told to come back.
        answer: dict[str, Any] = {"error": "busy"}
        with Hook(tmp_path / "hook.sock") as hook:
            deadline = threading.Event()
            for number in range(int(WAIT / 0.1)):
                # Who is one too many of those that are told to come back is cut off instead.
                with suppress(OSError, EOFError):
                    answer = json.loads(served.ask(request(f"honest-{number}", "add", hook.url, [1])))
                if not answer["error"]:
                    break
                deadline.wait(0.1)
            assert answer["error"] == ""
            assert hook.answer()["result"] == 1
        slow.close()
        told = served.until(lambda stats: stats["room"]["connections"] <= 2)["room"]
        assert told["shed"]
        assert told["refused"]


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="max_unread_bytes is 5, less than max_frame"):
        Config.load({"max_unread_bytes": 5}, environ={})
    assert Config.load({}, environ={"ACOMM_MAX_QUEUED": "7"}).max_queued == 7
    assert Config.load({"allow_uid": (1,)}, environ={}).share == 0.5
    assert Config.load({}, environ={}).share == 1.0
