"""The door of a supervisor within this process: its limits, streams, and answers from elsewhere."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
from collections.abc import AsyncIterator, Callable
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest
from doors import JSON, SECURITY, Caller, HttpHook, Reply
from peers import WAIT

from acomm.errors import WIRE_ERRORS, AcommError, BadRequest, Busy, ShuttingDown
from acomm.messages import Request, Response
from acomm.origin import Origin
from workers import Supervisor, config, door, httpaccess
from workers.httpaccess import bracketed
from workers.httpreplies import STATUSES

pytestmark = pytest.mark.process

BOTH_LOOPS = True


class Within:
    """A supervisor of this process, and a caller that is run in threads."""

    def __init__(self, supervisor: Supervisor) -> None:
        assert supervisor.door is not None
        self.supervisor = supervisor
        self.door = supervisor.door
        token = Path(f"{supervisor.config.socket}.token").read_text().strip()
        self.caller = Caller(self.door.url, token)

    async def __call__(self, method: Callable[..., Reply], *args: Any, **more: Any) -> Reply:
        return await asyncio.wait_for(asyncio.to_thread(method, *args, **more), WAIT)

    async def opened(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.caller.port)

    def head(self, line: str, *headers: str) -> bytes:
        """The head of a request."""
        given = [f"{name}: {value}" for name, value in {**JSON, **self.caller.headers()}.items()]
        return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", *given, *headers, "", ""]).encode()

    async def empty(self) -> None:
        """Wait until no connection is left."""
        async with asyncio.timeout(WAIT):
            while self.door.connections:
                await asyncio.sleep(0.001)


@pytest.fixture
async def within(tmp_path: Path) -> AsyncIterator[Within]:
    settings = {"workers": 1, "socket": tmp_path / "s.sock", "max_frame": 100_000}
    async with Supervisor("servedtasks", http="127.0.0.1:0", **settings) as supervisor:
        yield Within(supervisor)


@pytest.fixture
def answers(within: Within, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """Has the supervisor answer whatever it is asked with a response or a refusal."""

    def answer(given: Response | AcommError) -> None:
        def offer(request: Request, origin: Origin, decided: Any, resolve: Any = None) -> None:
            if isinstance(given, AcommError):
                decided(given)
                return
            resolve(given)
            decided(None)

        monkeypatch.setattr(within.supervisor, "offer", offer)

    return answer


class TestStatuses:
    @pytest.mark.parametrize("code", [*WIRE_ERRORS, "error"])
    @pytest.mark.parametrize("accepted", [True, False])
    async def test_every_error_has_one(
        self, within: Within, answers: Callable[[Any], None], code: str, accepted: bool
    ) -> None:
        error = WIRE_ERRORS.get(code, AcommError)("lone \udc80 surrogate", traceback="t", receipt={"a": {1}})
        answers(Response("1", error=error) if accepted else error)
        reply = await within(within.caller.call, "add", [1])
        assert reply.status == STATUSES.get(code, 503)
        assert (reply.error["code"], reply.error["traceback"]) == (code, "t")
        assert reply.error["message"] == "lone ? surrogate"

    @pytest.mark.parametrize(
        ("error", "pause"),
        [
            (Busy("x", retry_after=2.1), "3"),
            (Busy("x"), "1"),
            (ShuttingDown("x"), "1"),
            (BadRequest("x"), None),
        ],
    )
    async def test_when_to_come_back(
        self, within: Within, answers: Callable[[Any], None], error: AcommError, pause: str | None
    ) -> None:
        answers(error)
        assert (await within(within.caller.call, "add")).headers.get("Retry-After") == pause

    async def test_a_fault_of_ours(
        self, within: Within, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(within.supervisor, "offer", lambda *args: 1 / 0)
        reply = await within(within.caller.call, "add")
        assert (reply.status, reply.error["code"]) == (503, "error")
        assert "its log tells why" in reply.error["message"]
        assert "division" not in reply.body.decode()
        assert [record.exc_info is not None for record in caplog.records] == [True]

    async def test_workers_that_cannot_start(self, within: Within, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(within.supervisor.pool), "healthy", False)
        ready = await within(within.caller.get, "/readyz")
        assert (ready.status, ready.body) == (503, b"unhealthy: the workers die while they start\n")
        reply = await within(within.caller.call, "add", [1])
        assert (reply.status, reply.headers["Retry-After"]) == (429, "10")

    async def test_refusals_are_counted(self, within: Within) -> None:
        await within(within.caller.call, "add", ["x"])
        await within(within.caller.call, "add", [1], token=False)
        await within(within.caller.post, b"hello")
        counts = within.supervisor.stats()["counts"]
        assert (counts["bad_args"], counts["forbidden"], counts["bad_request"]) == (1, 1, 1)


class TestLimits:
    @pytest.fixture(autouse=True)
    def short(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(door, "READ_TIMEOUT", 0.2)
        monkeypatch.setitem(door._CONNECTION, "keepalive_timeout", 0.2)

    async def test_a_body_that_does_not_come(self, within: Within) -> None:
        reader, writer = await within.opened()
        writer.write(within.head("POST /call/add", "Content-Length: 10", "Connection: close") + b"[1")
        status = await asyncio.wait_for(reader.readline(), WAIT)
        assert status.split()[1] == b"400"
        assert b"the body did not come within 0.2 seconds" in await asyncio.wait_for(
            reader.readuntil(b"}}"), WAIT
        )
        writer.close()
        await within.empty()

    async def test_a_body_that_is_cut_off(self, within: Within) -> None:
        _, writer = await within.opened()
        writer.write(within.head("POST /call/add", "Content-Length: 10") + b"[1")
        await writer.drain()
        writer.close()
        await within.empty()
        assert within.supervisor.stats()["counts"] == {}

    @pytest.mark.parametrize("begun", [b"", b"GET /hea", b"GET /healthz HTTP/1.1\r\nHost: local"])
    async def test_a_connection_that_asks_for_nothing(self, within: Within, begun: bytes) -> None:
        reader, writer = await within.opened()
        writer.write(begun)
        assert await asyncio.wait_for(reader.read(), WAIT) == b""
        writer.close()
        await within.empty()

    async def test_one_that_was_used_and_asks_for_no_more(self, within: Within) -> None:
        reader, writer = await within.opened()
        writer.write(within.head("POST /call/add", "Content-Length: 3") + b"[1]GET /hea")
        assert (await asyncio.wait_for(reader.read(), WAIT)).endswith(b"\r\n\r\n1")
        writer.close()

    async def test_connections_have_an_end(self, within: Within, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(door, "HTTP_CONNECTIONS", 1)
        _, first = await within.opened()
        async with asyncio.timeout(WAIT):
            while not within.door.connections:
                await asyncio.sleep(0.001)
        reader, second = await within.opened()
        head, _, body = (await asyncio.wait_for(reader.read(), WAIT)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert f"Content-Length: {len(body)}".encode() in head
        assert json.loads(body)["error"]["code"] == "busy"
        first.close()
        second.close()
        await within.empty()
        assert (await within(within.caller.call, "add", [1])).json == 1

    async def test_large_bodies_on_their_way_in_have_an_end(
        self, within: Within, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(config, "UNREAD_FRAMES", 1)
        monkeypatch.setattr(door, "READ_TIMEOUT", WAIT)
        begun = within.head("POST /call/echo", "Content-Length: 90000", "Connection: close") + b"["
        _, first = await within.opened()
        first.write(begun)
        async with asyncio.timeout(WAIT):
            while not within.door._reading[True]:
                await asyncio.sleep(0.001)
        reader, second = await within.opened()
        second.write(begun)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), WAIT)
        assert head.startswith(b"HTTP/1.1 429 ") and b"Retry-After: 1\r\n" in head
        first.close()
        second.close()
        await within.empty()
        assert within.door._reading == {True: 0, False: 0}
        assert (await within(within.caller.call, "echo", ["x" * 90_000])).status == 200

    async def test_strangers_take_no_room_from_callers(
        self, within: Within, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(config, "UNREAD_FRAMES", 1)
        monkeypatch.setattr(door, "READ_TIMEOUT", WAIT)
        _, writer = await within.opened()
        announced = ("Host: localhost", "Content-Type: application/json", "Content-Length: 90000")
        writer.write("\r\n".join(("POST /proxy HTTP/1.1", *announced, "", "{")).encode())
        async with asyncio.timeout(WAIT):
            while not within.door._reading[False]:
                await asyncio.sleep(0.001)
        assert (await within(within.caller.call, "echo", ["x" * 90_000])).status == 200
        writer.close()
        await within.empty()

    async def test_who_sends_and_does_not_read_is_waited_for(
        self, within: Within, answers: Callable[[Any], None]
    ) -> None:
        answers(Response("1", "x" * 10_000))
        reader, writer = await within.opened()
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        call = within.head("POST /call/add", "Content-Length: 0")
        writer.write(call * 5000)
        protocol = await self.stuck(within)
        held = protocol.transport.get_write_buffer_size()
        assert 0 < held < 1_000_000
        writer.transport.abort()
        await within.empty()
        del reader

    async def stuck(self, within: Within) -> Any:
        """The connection, when it waits for its peer to read."""
        assert within.door._server is not None
        async with asyncio.timeout(WAIT):
            while not (found := within.door._server.connections) or not found[0]._paused:
                await asyncio.sleep(0.001)
        return found[0]

    async def test_who_reads_nothing_is_cut_off_by_the_kernel(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(httpaccess, "_USER_TIMEOUT", 300)
        settings = {"workers": 1, "socket": tmp_path / "t.sock"}
        async with Supervisor("servedtasks", http="127.0.0.1:0", **settings) as supervisor:
            within = Within(supervisor)
            body = json.dumps(["x" * 20_000_000]).encode()
            with socket.socket() as sock:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                await asyncio.to_thread(sock.connect, ("127.0.0.1", within.caller.port))
                head = within.head("POST /call/echo", f"Content-Length: {len(body)}")
                await asyncio.to_thread(sock.sendall, head + body)
                async with asyncio.timeout(WAIT):
                    while supervisor.stats()["counts"].get("ok") != 1:
                        await asyncio.sleep(0.01)
                await within.empty()


class TestStreams:
    @pytest.mark.parametrize(
        ("form", "kind"),
        [("lines", "application/x-ndjson"), ("bytes", "application/octet-stream"), (None, None)],
    )
    async def test_a_call_that_streams(
        self,
        within: Within,
        answers: Callable[[Any], None],
        form: str | None,
        kind: str | None,
    ) -> None:
        url = await within.supervisor.tracker.new_stream_unix(iter([b"1\n", b"2\n", b"x" * 300_000]))
        answers(Response("1", stream_url=url, stream_format=form))
        reply = await within(within.caller.call, "add", [1])
        assert reply.status == 200
        assert reply.headers["Content-Type"] == (kind or "application/octet-stream")
        assert reply.headers["Transfer-Encoding"] == "chunked"
        assert SECURITY.items() <= reply.headers.items()
        assert reply.body == b"1\n2\n" + b"x" * 300_000

    async def test_one_that_breaks(self, within: Within, answers: Callable[[Any], None]) -> None:
        def source() -> Any:
            yield b"x" * 300_000
            raise ValueError("no more")

        answers(Response("1", stream_url=await within.supervisor.tracker.new_stream_unix(source())))
        with pytest.raises((IncompleteRead, ConnectionResetError)):
            await within(within.caller.call, "add", [1])

    async def test_one_that_breaks_at_once(self, within: Within, answers: Callable[[Any], None]) -> None:
        answers(Response("1", stream_url="unix:///nowhere/checked-stream-1.sock"))
        reply = await within(within.caller.call, "add", [1])
        assert (reply.status, reply.error["code"]) == (503, "worker_lost")

    async def test_whose_reader_leaves(self, within: Within, answers: Callable[[Any], None]) -> None:
        closed = asyncio.Event()

        async def source() -> AsyncIterator[bytes]:
            try:
                while True:
                    yield b"x" * 100_000
            finally:
                closed.set()

        answers(Response("1", stream_url=await within.supervisor.tracker.new_stream_unix(source())))
        reader, writer = await within.opened()
        writer.write(within.head("POST /call/add", "Content-Length: 0"))
        await asyncio.wait_for(reader.readexactly(100_000), WAIT)
        writer.transport.abort()
        await asyncio.wait_for(closed.wait(), WAIT)
        await within.empty()

    async def test_a_signed_url_is_good_once_and_for_anybody(self, within: Within) -> None:
        tracker = within.supervisor.tracker
        url = tracker.proxy_stream_http_url(await tracker.new_stream_unix(b"y" * 300_000))
        start = f"http://localhost:{within.caller.port}/stream?"
        assert url.startswith(start)
        path = url.removeprefix(start.removesuffix("/stream?"))
        reply = await within(within.caller.get, path, token=False)
        assert (reply.status, reply.body) == (200, b"y" * 300_000)
        assert SECURITY.items() <= reply.headers.items()
        again = await within(within.caller.get, path, token=False)
        assert (again.status, again.body) == (403, b"the stream's URL was used before\n")
        assert SECURITY.items() <= again.headers.items()

    async def test_a_signed_url_of_a_stream_that_is_gone(self, within: Within) -> None:
        url = within.supervisor.tracker.proxy_stream_http_url("unix:///nowhere/s.sock")
        reply = await within(within.caller.get, url.partition(str(within.caller.port))[2])
        assert (reply.status, reply.error["code"]) == (404, "bad_request")

    @pytest.mark.parametrize("query", ["", "?addr=unix:///etc/x", "?addr=x&expires=1&nonce=2&sig=3"])
    async def test_urls_that_were_not_signed(self, within: Within, query: str) -> None:
        reply = await within(within.caller.get, f"/stream{query}")
        assert reply.status == 403
        assert b"not signed" in reply.body


class TestElsewhere:
    async def test_an_answer_from_elsewhere(self, within: Within) -> None:
        tracker = within.supervisor.tracker
        got: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        request = Request("x", id="there", on_success=lambda request, response: resolve(response))
        loop = asyncio.get_running_loop()

        def resolve(response: Response) -> None:
            loop.call_soon_threadsafe(got.set_result, response)

        sent = await tracker.proxy_external(request)
        assert sent.response_hook == f"http://localhost:{within.caller.port}/proxy"
        body = Response("there", 7).encode(3)
        reply = await within(within.caller.post, body, token=False, path="/proxy")
        assert (reply.status, reply.json["error"]) == (200, "")
        assert (await asyncio.wait_for(got, WAIT)).result_as(int) == 7

    @pytest.mark.parametrize("body", [b"", b"null", b"hello", b"[]"])
    async def test_what_is_no_answer(self, within: Within, body: bytes) -> None:
        reply = await within(within.caller.post, body, token=False, path="/proxy")
        assert (reply.status, reply.json["id"]) == (200, "")
        assert "not a JSON object" in reply.json["error"]

    async def test_an_answer_to_what_runs_here_is_not_taken(self, within: Within) -> None:
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        within.supervisor.tracker.track(Request("x", id="mine"), math.inf, resolve=answer.set_result)
        reply = await within(
            within.caller.post, Response("mine", "forged").encode(3), token=False, path="/proxy"
        )
        assert reply.json["error"] == ""
        assert not answer.done()
        within.supervisor.tracker.settle(Response("mine", 1))
        assert answer.result().result == 1

    async def test_an_answer_to_what_was_passed_on_shows_the_key(self, within: Within) -> None:
        answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        with HttpHook() as service:
            asked = Request("x", id="1", task_url=f"http://127.0.0.1:{service.port}/")
            within.supervisor.tracker.forward(asked, 1000, resolve=answer.set_result)
            _, message = await asyncio.to_thread(service.next)
        forged, body = Response("1", "forged").encode(3), Response("1", 7).encode(3)
        path = f"/proxy?{message['responseHook']['RawQuery']}"
        for wrong in ("/proxy", "/proxy?key=", f"{path}x"):
            reply = await within(within.caller.post, forged, token=False, path=wrong)
            assert reply.json["error"] == ""
        assert not answer.done()
        await within(within.caller.post, body, token=False, path=path)
        assert (await asyncio.wait_for(answer, WAIT)).result_as(int) == 7

    async def test_behind_a_proxy_it_goes_by_the_public_name(self, tmp_path: Path) -> None:
        settings = {"workers": 1, "socket": tmp_path / "t.sock", "http_url": "https://api.example.org/a/"}
        async with Supervisor("servedtasks", http="127.0.0.1:0", **settings) as supervisor:
            tracker = supervisor.tracker
            assert tracker.external_proxy_url == "https://api.example.org/a/proxy"
            assert tracker.http_stream_url == "https://api.example.org/a/stream"
            within = Within(supervisor)
            origin = "https://api.example.org"
            reply = await within(within.caller.call, "add", [1], Host="api.example.org", Origin=origin)
            assert reply.json == 1

    @pytest.mark.parametrize(
        ("bound", "host"),
        [
            ("127.0.0.1", "localhost"),
            ("127.9.9.9", "localhost"),
            ("0.0.0.0", "localhost"),
            ("::", "localhost"),
            ("192.0.2.7", "192.0.2.7"),
            ("2001:db8::7", "[2001:db8::7]"),
        ],
    )
    async def test_it_goes_by_the_address_that_it_listens_at(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, host: str
    ) -> None:
        """At that alone: there is nothing of ours at the loopback then."""

        def listen(family: int, address: tuple[str, int]) -> socket.socket:
            return httpaccess.listen(socket.AF_INET, ("127.0.0.1", 0))

        monkeypatch.setattr(door, "listen", listen)
        settings = {"workers": 1, "socket": tmp_path / "t.sock"}
        async with Supervisor("servedtasks", http=f"{bracketed(bound)}:0", **settings) as supervisor:
            assert supervisor.door is not None
            port = supervisor.door.url.rpartition(":")[2]
            assert supervisor.tracker.http_stream_url == f"http://{host}:{port}/stream"
            assert supervisor.tracker.external_proxy_url == f"http://{host}:{port}/proxy"


class TestLife:
    async def test_who_finds_the_socket_finds_the_door(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        supervisor = Supervisor("servedtasks", workers=1, socket=tmp_path / "s.sock", http="127.0.0.1:0")
        statuses: list[int] = []
        start = supervisor.unix.listener.start

        async def starting() -> None:
            within = Within(supervisor)
            statuses.append((await within(within.caller.get, "/readyz")).status)
            await start()

        monkeypatch.setattr(supervisor.unix.listener, "start", starting)
        async with supervisor:
            assert statuses == [200]

    async def test_when_the_socket_is_taken_the_door_is_closed_again(self, within: Within) -> None:
        config = within.supervisor.config
        other = Supervisor("servedtasks", workers=1, socket=config.socket, http="127.0.0.1:0")
        with pytest.raises(AcommError, match="in use"):
            await other.start()
        assert other.door is not None
        with pytest.raises(ConnectionRefusedError):
            await within(Caller(other.door.url, None).get, "/healthz")

    async def test_it_logs_nothing_of_what_is_usual(
        self, within: Within, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO):
            await within(within.caller.call, "add", [1])
            await within(within.caller.call, "nothing", [1], token=False)
            await asyncio.to_thread(within.caller.raw, b"GARBAGE\r\n\r\n")
        assert caplog.records == []
