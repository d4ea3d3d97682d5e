"""Channels: one connection a message for strangers, one for thousands to our own kind, nothing lost."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from peers import WAIT, GoPeer, GrantingPeer, Peer, ack, frame, read_all, read_frame

from acomm import Request, Response, send, send_sync, unixchannel
from acomm.channel import Channels
from acomm.errors import AcommError, BadRequest, Busy, ConnectionLost, Forbidden, UnknownTask, Unreachable
from acomm.outgoing import Outgoing

BOTH_LOOPS = True


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer on a busy machine may take longer than we wait to hear whether it grants."""
    monkeypatch.setattr(unixchannel, "_VERDICT_WAIT", WAIT)


class Outcomes:
    """Callbacks for messages, which count how often each is called, and with what."""

    def __init__(self) -> None:
        self.seen: dict[str, list[AcommError | None]] = {}
        self._changed = asyncio.Event()

    def of(self, name: str) -> Callable[[AcommError | None], None]:
        def delivered(error: AcommError | None) -> None:
            self.seen.setdefault(name, []).append(error)
            self._changed.set()

        return delivered

    async def wait(self, count: int) -> dict[str, list[AcommError | None]]:
        async with asyncio.timeout(WAIT):
            while len(self.seen) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.seen


def message(id: str, delivered: Callable[[AcommError | None], None], *, extended: bool = True) -> Outgoing:
    return Outgoing(Request("t", id=id).encode(3, extended=extended), delivered, wire=3, extended=extended)


@asynccontextmanager
async def channels(timeout: float = WAIT) -> AsyncIterator[Channels]:
    made = Channels(timeout=timeout)
    try:
        yield made
    finally:
        async with asyncio.timeout(WAIT):
            await made.close()


# -- strangers --------------------------------------------------------------------------------------


async def test_a_go_peer_gets_one_connection_a_message_and_one_write_a_frame(tmp_path: Path) -> None:
    """It reads the header with one `Read`, the rest with another: `GoPeer` fails on split writes."""
    with GoPeer(tmp_path / "go.sock") as go:
        async with channels() as out:
            async with asyncio.timeout(WAIT):
                for number in range(3):
                    await out.send(go.url, Request("t", {"n": number}, id=f"{number}"))
                await asyncio.gather(*(out.send(go.url, Request("t", id=f"m{i}")) for i in range(200)))
        assert go.connections == 203
        assert {m["id"] for m in go.messages} == {*"012", *(f"m{i}" for i in range(200))}
        assert go.messages[0]["args"] == {"n": 0}
        assert "acomm" in go.messages[0]  # asked, and not granted


@pytest.mark.parametrize("wire", [2, 3])
async def test_a_peer_hears_the_generation_that_it_is_spoken_to_in(tmp_path: Path, wire: int) -> None:
    with GoPeer(tmp_path / "go.sock") as go:
        async with asyncio.timeout(WAIT):
            await send(go.url, Request("t", id="i", response_hook="unix:///h"), wire=wire)
            await send(go.url, Response("i", 5), wire=wire)
        hook, stream = ("responsehook", "stream_url") if wire == 2 else ("responseHook", "streamURL")
        assert go.messages[0][hook]["Path"] == "/h"
        assert go.messages[1] == {"error": "", "id": "i", "result": 5, stream: None}


async def test_no_more_connections_at_a_time_than_agreed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unixchannel, "_VERDICT_WAIT", 0.05)
    all_busy, lock = threading.Event(), threading.Lock()
    busy = most = 0

    def reply(received: dict[str, Any]) -> bytes:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
            if busy == unixchannel.PLAIN_CONNECTIONS:
                all_busy.set()
        all_busy.wait(WAIT)
        with lock:
            busy -= 1
        return ack(received["id"])

    with GoPeer(tmp_path / "go.sock", reply) as go:
        async with channels() as out:
            async with asyncio.timeout(WAIT):
                await asyncio.gather(*(out.send(go.url, Request("t", id=f"{i}")) for i in range(300)))
        assert most == unixchannel.PLAIN_CONNECTIONS
        assert go.connections == 300


async def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    """asyncio takes EAGAIN of a unix connect for "under way", uvloop for a failure."""
    with GoPeer(tmp_path / "go.sock", backlog=0) as go:
        async with channels() as out:
            async with asyncio.timeout(WAIT):
                await asyncio.gather(*(out.send(go.url, Request("t", id=f"{i}")) for i in range(60)))
        assert len(go.messages) == 60


async def test_a_generation_1_peer_gets_all_of_a_large_message(tmp_path: Path) -> None:
    got: list[bytes] = []
    with Peer(tmp_path / "g1.sock", lambda conn: got.append(slowly(conn))) as peer:
        async with asyncio.timeout(WAIT):
            await send(peer.url, Request("t", "x" * 3_000_000, id="i", response_hook="unix:///h"), wire=1)
    assert len(json.loads(got[0])["args"]) == 3_000_000


def slowly(conn: socket.socket) -> bytes:
    time.sleep(0.1)
    return read_all(conn)


def test_without_a_loop_a_generation_1_message_is_not_cut_by_its_end(tmp_path: Path) -> None:
    got: list[bytes] = []
    with Peer(tmp_path / "g1.sock", lambda conn: got.append(slowly(conn))) as peer:
        send_sync(peer.url, Request("t", "x" * 3_000_000, id="i"), wire=1)
    assert len(json.loads(got[0])["args"]) == 3_000_000


async def test_a_generation_1_peer_that_leaves_early_is_a_failure(tmp_path: Path) -> None:
    with Peer(tmp_path / "g1.sock", lambda conn: None) as peer:
        with pytest.raises(ConnectionLost):
            async with asyncio.timeout(WAIT):
                await send(peer.url, Request("t", "x" * 3_000_000), wire=1)


# -- our own kind -----------------------------------------------------------------------------------


async def test_a_peer_that_grants_gets_a_thousand_messages_on_one_connection(tmp_path: Path) -> None:
    with GrantingPeer(tmp_path / "s.sock") as peer:
        async with channels() as out:
            outcomes = Outcomes()
            for number in range(1000):
                out.post(peer.url, message(f"{number}", outcomes.of(f"{number}")))
            assert await outcomes.wait(1000) == {f"{i}": [None] for i in range(1000)}
            assert peer.connections == 1
            assert [m["id"] for m in peer.messages] == [f"{i}" for i in range(1000)]


async def test_messages_that_may_not_be_extended_do_not_use_the_granted_connection(tmp_path: Path) -> None:
    with GrantingPeer(tmp_path / "s.sock") as peer:
        async with channels() as out, asyncio.timeout(WAIT):
            await out.send(peer.url, Request("t"))
            await out.send(peer.url, Response("i", 1))
            await out.send(peer.url, {"any": "value"})
            assert peer.connections == 3
            assert "acomm" not in peer.messages[1]
            await out.send(peer.url, Response("i", 1, extended=True))
            assert peer.connections == 3


@pytest.mark.parametrize("after", [1, 2, 10, 400])
async def test_a_broken_connection_loses_nothing_and_delivers_nothing_twice(
    tmp_path: Path, after: int
) -> None:
    """What was not acknowledged is sent again; each callback hears of it once."""
    taken: list[str] = []

    def decide(received: dict[str, Any]) -> bytes | None:
        taken.append(received["id"])
        return None if len(taken) == after + 1 else ack(received["id"], acomm=1)

    with GrantingPeer(tmp_path / "s.sock", decide) as peer:
        async with channels() as out:
            outcomes = Outcomes()
            for number in range(500):
                out.post(peer.url, message(f"{number}", outcomes.of(f"{number}")))
            assert await outcomes.wait(500) == {f"{i}": [None] for i in range(500)}
        assert peer.connections == 2
        assert set(taken) == {f"{i}" for i in range(500)}
        assert len(taken) == 501  # the one that broke it was taken twice


async def test_a_peer_that_always_breaks_is_not_tried_for_ever(tmp_path: Path) -> None:
    count = [0]

    def decide(received: dict[str, Any]) -> bytes | None:
        count[0] += 1
        return ack(received["id"], acomm=1) if received["id"].startswith("first") else None

    with GrantingPeer(tmp_path / "s.sock", decide) as peer:
        async with channels() as out:
            async with asyncio.timeout(WAIT):
                await out.send(peer.url, Request("t", id="first"))
            outcomes = Outcomes()
            for number in range(20):
                out.post(peer.url, message(f"{number}", outcomes.of(f"{number}")))
            seen = await outcomes.wait(20)
            assert all(len(errors) == 1 and isinstance(errors[0], ConnectionLost) for errors in seen.values())


async def test_a_granting_peer_that_became_a_plain_one(tmp_path: Path) -> None:
    async with channels() as out, asyncio.timeout(WAIT):
        # A peer that has granted nothing learns of the wish to with each message, on that one's connection.
        for kind, connections in ((GrantingPeer, 1), (GoPeer, 10), (GrantingPeer, 2)):
            with kind(tmp_path / "s.sock") as peer:
                for number in range(10):
                    await out.send(peer.url, Request("t", id=f"{number}"))
                assert peer.connections == connections
                assert len(peer.messages) == 10


async def test_messages_under_way_when_a_granting_peer_becomes_a_plain_one(tmp_path: Path) -> None:
    held = threading.Event()

    def decide(received: dict[str, Any]) -> bytes | None:
        if received["id"] == "first":
            return ack("first", acomm=1)
        held.set()
        return None if gone.wait(WAIT) else ack()

    gone = threading.Event()
    async with channels() as out, asyncio.timeout(WAIT):
        old = GrantingPeer(tmp_path / "s.sock", decide)
        await out.send(old.url, Request("t", id="first"))
        outcomes = Outcomes()
        for number in range(20):
            out.post(old.url, message(f"{number}", outcomes.of(f"{number}")))
        await asyncio.to_thread(held.wait, WAIT)
        Path(old.path).rename(tmp_path / "old.sock")
        old.path = str(tmp_path / "old.sock")
        with GoPeer(tmp_path / "s.sock") as new:
            gone.set()
            assert await outcomes.wait(20) == {f"{i}": [None] for i in range(20)}
            assert sorted(m["id"] for m in new.messages) == sorted(f"{i}" for i in range(20))
        await asyncio.to_thread(old.close)


async def test_a_channel_is_forgotten_when_its_peer_is_gone(tmp_path: Path) -> None:
    async with channels() as out, asyncio.timeout(WAIT):
        for kind in (GoPeer, GrantingPeer):
            with kind(tmp_path / "s.sock") as peer:
                await out.send(peer.url, Request("t"))
            while len(out):
                await asyncio.sleep(0.001)
        assert repr(out) == "<Channels 0 open>"
        with pytest.raises(ConnectionLost, match="No such file"):
            await out.send(f"unix://{tmp_path}/s.sock", Request("t"))
        while len(out):
            await asyncio.sleep(0)


# -- faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [GoPeer, GrantingPeer])
async def test_a_refusal_raises_its_class(tmp_path: Path, kind: type[GoPeer]) -> None:
    def reply(received: dict[str, Any]) -> bytes:
        if received["task"] == "known":
            return ack(received["id"], acomm=1)
        info = {"code": "busy", "message": "full", "retry_after": 1.5}
        return ack(received["id"], "full", acomm=1, error_info=info)

    with kind(tmp_path / "s.sock", reply) as peer:
        async with channels() as out, asyncio.timeout(WAIT):
            for task in ("x", "known", "x", "known"):
                if task == "known":
                    await out.send(peer.url, Request(task))
                else:
                    with pytest.raises(Busy, match="full") as caught:
                        await out.send(peer.url, Request(task))
                    assert caught.value.retry_after == 1.5


async def test_a_refusal_that_comes_before_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that turns strangers away does so when they connect, and closes."""

    def turn_away(conn: socket.socket) -> None:
        conn.sendall(frame(Response("", error=Forbidden("not you")).encode(2)))

    connect = unixchannel._connect

    async def connect_late(*args: Any) -> Any:
        connection = await connect(*args)
        async with asyncio.timeout(WAIT):
            while not connection.closed:
                await asyncio.sleep(0.001)
        return connection

    monkeypatch.setattr(unixchannel, "_connect", connect_late)
    async with Peer(tmp_path / "s.sock", turn_away) as peer:
        with pytest.raises(AcommError, match=r"^not you$"):
            await send(peer.url, Request("x"))


async def test_a_go_refusal_has_a_text_alone(tmp_path: Path) -> None:
    with GoPeer(tmp_path / "s.sock", lambda received: ack(received["id"], "no such task")) as go:
        with pytest.raises(AcommError) as caught:
            async with asyncio.timeout(WAIT):
                await send(go.url, Request("t"))
    assert caught.value == AcommError("no such task")
    assert not isinstance(caught.value, UnknownTask)


@pytest.mark.parametrize("answer", [b"null", b"[]", b"hello", b'{"error":5}', b"\xff", b""])
@pytest.mark.parametrize("granted", [False, True])
async def test_an_unreadable_acknowledgement_is_none(tmp_path: Path, answer: bytes, granted: bool) -> None:
    """`null` kills a Go sender."""

    def decide(received: dict[str, Any]) -> bytes:
        return ack(received["id"], acomm=1) if received["task"] == "good" else answer

    with GrantingPeer(tmp_path / "s.sock", decide) as peer:
        async with channels() as out, asyncio.timeout(WAIT):
            if granted:
                await out.send(peer.url, Request("good"))
            with pytest.raises(ConnectionLost, match="not readable"):
                await out.send(peer.url, Request("bad"))
            await out.send(peer.url, Request("good"))
            assert peer.connections == (1 if granted else 2)


@pytest.mark.parametrize(
    "serve",
    [
        lambda conn: None,  # closes at once
        lambda conn: conn.recv(10),  # closes with unread data
        lambda conn: read_frame(conn) and None,  # closes after the request
        lambda conn: read_frame(conn) and conn.sendall(b"\x00\x00\x00\x40{"),  # inside its acknowledgement
        lambda conn: conn.sendall(b"\xff\xff\xff\xff" + b"x" * 100) or read_all(conn),  # too large
    ],
)
async def test_a_peer_that_does_not_acknowledge_is_a_connection_lost(tmp_path: Path, serve: Any) -> None:
    with Peer(tmp_path / "s.sock", serve) as peer:
        with pytest.raises(ConnectionLost):
            async with asyncio.timeout(WAIT):
                await send(peer.url, Request("t", "x" * 300))


@pytest.mark.parametrize("granted", [False, True])
async def test_a_silent_peer_is_given_up_in_time_and_others_do_not_wait(
    tmp_path: Path, granted: bool
) -> None:
    def decide(received: dict[str, Any]) -> bytes | None:
        if received["id"] == "first":
            return ack("first", acomm=1)
        done.wait(WAIT)
        return None

    done = threading.Event()
    with (
        GrantingPeer(tmp_path / "silent.sock", decide) as silent,
        GrantingPeer(tmp_path / "good.sock") as good,
    ):
        async with channels(timeout=1.0) as out:
            if granted:
                await out.send(silent.url, Request("t", id="first"))
            outcomes = Outcomes()
            for number in range(100):
                out.post(silent.url, message(f"{number}", outcomes.of(f"{number}")))
            async with asyncio.timeout(WAIT):
                for _ in range(10):
                    await out.send(good.url, Request("t"))
            assert outcomes.seen == {}  # nothing was given up before its time
            seen = await outcomes.wait(100)
            assert all(len(errors) == 1 and isinstance(errors[0], ConnectionLost) for errors in seen.values())
            done.set()


async def test_a_callback_that_raises_harms_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(error: AcommError | None) -> None:
        raise RuntimeError("a bug")

    with GrantingPeer(tmp_path / "s.sock") as peer:
        async with channels() as out:
            outcomes = Outcomes()
            for number in range(6):
                out.post(peer.url, message(f"{number}", bad if number % 2 else outcomes.of(f"{number}")))
            await outcomes.wait(3)
            out.post(peer.url, message("last", outcomes.of("last")))
            await outcomes.wait(4)
            assert peer.connections == 1
    assert caplog.text.count("RuntimeError: a bug") == 3


@pytest.mark.parametrize("url", ["tcp://h:1", "unix://relative", "http://", "nonsense", ""])
async def test_a_url_that_nothing_can_be_sent_to_is_refused(url: str) -> None:
    with pytest.raises(BadRequest):
        await send(url, Request("t"))


async def test_a_null_is_not_sent(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null"):
        await send(f"unix://{tmp_path}/s.sock", None)


# -- the end ----------------------------------------------------------------------------------------


async def test_closing_fails_what_is_under_way_wherever_it_is(tmp_path: Path) -> None:
    """Waiting for a verdict, on a granted connection, not even begun: each hears of it once."""
    done, held = threading.Event(), threading.Event()

    def decide(received: dict[str, Any]) -> bytes | None:
        if received["id"] == "first":
            return ack("first", acomm=1)
        held.set()
        done.wait(WAIT)
        return None

    with GrantingPeer(tmp_path / "a.sock", decide) as live, GoPeer(tmp_path / "b.sock", decide) as plain:  # type: ignore[arg-type]
        out = Channels()
        outcomes = Outcomes()
        async with asyncio.timeout(WAIT):
            await out.send(live.url, Request("t", id="first"))
            for number in range(100):
                out.post(live.url, message(f"a{number}", outcomes.of(f"a{number}")))
                out.post(plain.url, message(f"b{number}", outcomes.of(f"b{number}")))
            await asyncio.to_thread(held.wait, WAIT)
            out.post(f"unix://{tmp_path}/c.sock", message("c", outcomes.of("c")))
            await out.close()  # before the task for c has had its first turn
        done.set()
        out.post(live.url, message("late", outcomes.of("late")))
        seen = await outcomes.wait(202)
        assert all(len(errors) == 1 and isinstance(errors[0], ConnectionLost) for errors in seen.values())
        assert len(out) == 0


async def test_a_cancelled_send_leaves_nothing_behind(tmp_path: Path) -> None:
    arrived, done = threading.Event(), threading.Event()

    def serve(conn: socket.socket) -> None:
        read_frame(conn)
        arrived.set()
        done.wait(WAIT)
        conn.sendall(frame(ack()))

    with Peer(tmp_path / "s.sock", serve) as peer:
        task = asyncio.create_task(send(peer.url, Request("t")))
        await asyncio.to_thread(arrived.wait, WAIT)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        done.set()
    assert asyncio.all_tasks() == {asyncio.current_task()}


def test_send_sync_sends_and_raises_like_send(tmp_path: Path) -> None:
    with GoPeer(tmp_path / "s.sock") as go:
        send_sync(go.url, Request("t", id="i"))
        assert go.messages[0]["id"] == "i"
    with pytest.raises(ConnectionLost):
        send_sync(go.url, Request("t"))


async def test_send_sync_inside_a_loop_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="await send instead"):
        send_sync("unix:///nowhere", Request("t"))


async def test_what_was_never_sent_is_told_apart_from_what_may_have_been_taken(tmp_path: Path) -> None:
    """A socket that is not there, one that a dead process left, and a peer that dies with a message."""
    with pytest.raises(Unreachable, match="No such file"):
        await send(f"unix://{tmp_path}/nobody", Request("t"))
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "left"))
    with pytest.raises(Unreachable, match="refused"):
        await send(f"unix://{tmp_path}/left", Request("t"))

    outcomes = Outcomes()
    first = threading.Event()

    def decide(message: dict[str, Any]) -> bytes | None:
        if message["id"] == "first":
            return ack("first", acomm=1)
        first.wait(WAIT)
        Path(peer.path).unlink()
        return None

    with GrantingPeer(tmp_path / "dies", decide) as peer:
        async with channels() as out:
            out.post(peer.url, message("first", outcomes.of("first")))
            await outcomes.wait(1)
            out.post(peer.url, message("lost", outcomes.of("lost")))
            first.set()
            seen = await outcomes.wait(2)
        Path(peer.path).touch()  # for the peer to remove
    assert seen["first"] == [None]
    (error,) = seen["lost"]
    assert isinstance(error, ConnectionLost)
    assert not isinstance(error, Unreachable)


# -- http -------------------------------------------------------------------------------------------


class Web:
    """A real HTTP server; `answer` makes each reply."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.answer: Callable[[web.Request], Any] = lambda request: web.Response(body=ack("i"))
        self.url = ""

    async def handle(self, request: web.Request) -> Any:
        self.requests.append(
            (f"{request.method} {request.path_qs}", dict(request.headers), await request.read())
        )
        made = self.answer(request)
        return await made if asyncio.iscoroutine(made) else made


@pytest.fixture
async def server() -> AsyncIterator[Web]:
    made = Web()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", made.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook?x=1"
    yield made
    await runner.cleanup()


async def test_http_posts_json_and_reads_the_acknowledgement(server: Web) -> None:
    request = Request("t", [1], id="i", response_hook="http://h/p")
    async with asyncio.timeout(WAIT):
        await send(server.url, request)
    line, headers, body = server.requests[0]
    assert line == "POST /hook?x=1"
    assert headers["Content-Type"] == "application/json"
    assert headers["Content-Length"] == str(len(body))
    assert body == request.encode(3, extended=True)


async def test_http_headers_are_those_of_their_url_alone(server: Web) -> None:
    other = server.url + "&y=2"
    async with channels() as out, asyncio.timeout(WAIT):
        out.headers[server.url] = {"Authorization": "Bearer secret"}
        await out.send(server.url, Request("t"))
        await out.send(other, Request("t"))
    sent = {line: headers for line, headers, _ in server.requests}
    assert sent["POST /hook?x=1"]["Authorization"] == "Bearer secret"
    assert sent["POST /hook?x=1"]["Content-Type"] == "application/json"
    assert "Authorization" not in sent["POST /hook?x=1&y=2"]


async def test_http_keeps_its_connection(server: Web) -> None:
    ports: set[Any] = set()

    def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        ports.add(request.transport.get_extra_info("peername"))
        return web.Response(body=ack())

    server.answer = answer
    async with channels() as out, asyncio.timeout(WAIT):
        for _ in range(20):
            await out.send(server.url, Response("i", 1))
        assert len(ports) == 1
        await asyncio.gather(*(out.send(server.url, Response("i", 1)) for _ in range(200)))
        assert len(ports) <= 33


async def test_an_acknowledgement_that_comes_in_pieces_is_whole(server: Web) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        reply = web.StreamResponse()
        await reply.prepare(request)
        whole = ack("i", comment="x" * 1000)
        for start in range(0, len(whole), 100):
            await reply.write(whole[start : start + 100])
            await asyncio.sleep(0.005)
        return reply

    server.answer = answer
    async with asyncio.timeout(WAIT):
        await send(server.url, Request("t"))


@pytest.mark.parametrize(
    ("status", "body", "wire", "error"),
    [
        (200, ack("i"), 2, None),
        (200, b'{"error":""}\n', 2, None),
        (202, ack("i"), 2, None),
        (200, ack("i", "no"), 2, AcommError("no")),
        (400, ack("i", "bad"), 2, AcommError("bad")),
        (503, ack("i", "full", error_info={"code": "busy"}), 3, Busy("full")),
        (500, ack("i"), 2, "status 500"),
        (500, b"oops", 2, "status 500 without an acknowledgement"),
        (404, b"", 2, "status 404 without"),
        (200, b"", 2, "status 200 without"),
        (200, b"null", 2, "status 200 without"),
        (200, b" " * 1_100_000, 2, "longer than"),
        (302, ack("i"), 2, "status 302"),
        (307, ack("i"), 3, "status 307"),
        # Generation 1 looks at the status alone.
        (200, b"", 1, None),
        (200, b"anything", 1, None),
        (202, ack("i"), 1, "status 202"),
        (500, ack("i"), 1, "status 500"),
    ],
)
async def test_http_outcomes(
    server: Web, status: int, body: bytes, wire: int, error: AcommError | str | None
) -> None:
    headers = {"Location": "/elsewhere", "Set-Cookie": "a=b"}
    server.answer = lambda request: web.Response(status=status, body=body, headers=headers)
    async with channels() as out, asyncio.timeout(WAIT):
        for _ in range(2):
            if error is None:
                await out.send(server.url, Response("i", 1), wire)
            else:
                with pytest.raises(AcommError, match=error if isinstance(error, str) else None) as caught:
                    await out.send(server.url, Response("i", 1), wire)
                assert isinstance(caught.value, ConnectionLost) == isinstance(error, str)
                assert isinstance(error, str) or caught.value == error
    assert [line for line, _, _ in server.requests] == ["POST /hook?x=1"] * 2  # no redirect was followed
    assert all("Cookie" not in headers for _, headers, _ in server.requests)


async def test_http_proxies_of_the_environment_are_not_asked(
    server: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    async with asyncio.timeout(WAIT):
        await send(server.url, Request("t"))


async def test_the_error_of_a_message_does_not_keep_it() -> None:
    """It may be an answer, which a supervisor remembers for minutes, and the message have many MB."""
    channels = Channels()
    outcomes = Outcomes()
    channels.post("http://127.0.0.1:1/", message("a", outcomes.of("a")))
    (error,) = (await outcomes.wait(1))["a"]
    assert isinstance(error, Unreachable)
    assert error.__traceback__ is None
    assert error.__context__ is None
    await channels.close()


async def test_an_http_server_that_is_silent_or_gone_is_a_connection_lost(server: Web) -> None:
    never = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        await never.wait()
        return web.Response()

    server.answer = answer
    async with asyncio.timeout(WAIT):
        with pytest.raises(ConnectionLost, match="in time") as caught:
            await send(server.url, Request("t"), timeout=0.2)
        assert not isinstance(caught.value, Unreachable)  # it may have been taken
        with pytest.raises(Unreachable, match="cannot reach"):
            await send("http://127.0.0.1:1/", Request("t"))
        with pytest.raises(ConnectionLost):
            await send(f"http://{'x' * 70}.invalid/", Request("t"))  # no such label
    never.set()


async def test_closing_ends_http_sends(server: Web, caplog: pytest.LogCaptureFixture) -> None:
    arrived, never = asyncio.Event(), asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        arrived.set()
        await never.wait()
        return web.Response()

    server.answer = answer
    out = Channels()
    outcomes = Outcomes()
    async with asyncio.timeout(WAIT):
        for number in range(100):
            out.post(server.url, message(f"{number}", outcomes.of(f"{number}")))
        await arrived.wait()
        await out.close()
    seen = await outcomes.wait(100)
    assert all(len(errors) == 1 and isinstance(errors[0], ConnectionLost) for errors in seen.values())
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    never.set()


async def test_a_close_at_once_behind_a_hook_that_is_not_there(tmp_path: Path) -> None:
    """Its failure is on its way to the sender when the channels close. It is told once."""
    told: list[object] = []
    async with channels() as out:
        message = Outgoing(b"{}", told.append, wire=3, extended=False)
        out.post(f"unix://{tmp_path}/nobody.sock", message)
        await out.close()
        await asyncio.sleep(0)
    assert len(told) == 1
    assert isinstance(told[0], ConnectionLost)
