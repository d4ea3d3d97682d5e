"""What others have chosen is judged wherever it is used: channels, streams, trackers, supervisors."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yarl
from aiohttp import web
from peers import WAIT, GoPeer, Peer, frame, read_frame
from serving import Hook, Served, request
from ssrf_corpus import CASES, HTTP, OTHER, OWN, Case
from watching import NOBODY, Names, Wire, as_root, stranger, watched

from acomm import ConnectionLost, Forbidden, Request, Response, Tracker
from acomm.channel import Channels
from acomm.egress import Guard, Policy
from acomm.origin import Origin
from acomm.outgoing import Outgoing
from acomm.streams import StreamFile, StreamProxy, open_stream, stream
from workers.calls import Job
from workers.running import Context, leave
from workers.scoreboard import Scoreboard

STRANGER = Origin.unix(NOBODY)


@pytest.fixture
async def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


async def outcome(channels: Channels, url: str, origin: Origin | None) -> Exception | None:
    """What a message to `url` comes to."""
    told: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    payload = Response("id", 1).encode(3)
    channels.post(url, Outgoing(payload, told.set_result, wire=3, extended=False), origin)
    return await asyncio.wait_for(told, WAIT)


# -- the corpus through a real channel -----------------------------------------------------------------


async def posted(case: Case, names: Names) -> tuple[Wire, Exception | None]:
    names.answers = {}
    if case.answers:
        names.answers = {str(yarl.URL(case.url).raw_host).lower(): [case.answers]}
    channels = Channels(policy=Policy(case.rules), timeout=5)
    try:
        with watched(sealed=True) as wire:
            try:
                error = await outcome(channels, case.url, case.origin)
            except ValueError as refused:  # a URL that nothing can be sent to
                error = refused
    finally:
        await channels.close()
    return wire, error


async def test_no_channel_connects_where_the_corpus_forbids(names: Names) -> None:
    for case in CASES:
        wire, error = await posted(case, names)
        assert error is not None
        if not case.allowed:
            assert wire.connects == [], case
            assert isinstance(error, Forbidden | ValueError), (case, error)


async def test_no_stream_is_read_where_the_corpus_forbids(names: Names) -> None:
    for case in CASES:
        if case.allowed or case.url.startswith("unix:"):
            continue
        guard = Guard(Policy(case.rules), case.origin)
        names.answers = {}
        with watched(sealed=True) as wire:
            with pytest.raises((Forbidden, ConnectionLost, ValueError)):
                async for _ in open_stream(case.url, guard=guard):
                    pass
            if not case.answers:  # blocking look-ups are not the loop's
                with pytest.raises((Forbidden, ConnectionLost, ValueError)):
                    StreamFile(case.url, guard=guard)
        assert wire.connects == [], case


def test_a_stream_file_connects_to_what_was_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["93.184.216.34", "10.0.0.1"]

    def getaddrinfo(host: str, port: int, *args: Any, **options: Any) -> list[Any]:
        address = host if host.replace(".", "").isdigit() else answers.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    guard = Guard(Policy(), HTTP)
    with watched(sealed=True) as wire:
        with pytest.raises(ConnectionLost):
            StreamFile("http://rebinding.example.com/x", guard=guard)
        assert wire.connects == [("93.184.216.34", 80)]
        with pytest.raises(Forbidden, match=r"10\.0\.0\.1"):
            StreamFile("http://rebinding.example.com/x", guard=guard)
    assert len(wire.connects) == 1


# -- channels ------------------------------------------------------------------------------------------


@as_root
async def test_a_hook_of_another_user_gets_nothing(folder_for_all: Path) -> None:
    folder_for_all.chmod(0o777)
    path = folder_for_all / "theirs.sock"
    channels = Channels(policy=Policy())
    with stranger(path, NOBODY):
        error = await outcome(channels, f"unix://{path}", Origin.unix(NOBODY - 1))
        assert isinstance(error, Forbidden)
        assert "--allow-hook unix:" in str(error)
    await channels.close()


async def test_channels_of_one_url_are_not_shared_between_origins(tmp_path: Path) -> None:
    channels = Channels(policy=Policy())
    with GoPeer(tmp_path / "hook.sock") as peer:
        assert await outcome(channels, peer.url, OWN) is None
        assert isinstance(await outcome(channels, peer.url, OTHER), Forbidden)
        assert await outcome(channels, peer.url, None) is None
        assert len(peer.messages) == 2
    await channels.close()


async def test_a_redirect_leads_nowhere(tmp_path: Path) -> None:
    asked: list[str] = []

    async def redirect(request: web.Request) -> web.Response:
        asked.append(request.path)
        raise web.HTTPTemporaryRedirect("/secret")

    async with served(redirect) as url:
        channels = Channels(policy=Policy())
        error = await outcome(channels, f"{url}/hook", OWN)
        await channels.close()
    assert isinstance(error, ConnectionLost)
    assert asked == ["/hook"]


@contextlib.asynccontextmanager
async def served(handler: Any) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_what_is_forbidden_is_not_tried_again() -> None:
    async with Tracker(policy=Policy()) as tracker:
        tracker.delivery.post("http://10.0.0.1/", Response("id", 1), 3, origin=OWN)
        await asyncio.wait_for(tracker.delivery.drained(), WAIT)
        assert (tracker.delivery.delivered, tracker.delivery.abandoned) == (0, 1)


async def test_hooks_that_are_forbidden_do_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with Tracker(policy=Policy()) as tracker:
        for number in range(200):
            tracker.delivery.post(f"http://10.0.0.{number}/", Response("id", 1), 3, origin=OWN)
        await asyncio.wait_for(tracker.delivery.drained(), WAIT)
        assert tracker.delivery.abandoned == 200
    assert 0 < len(caplog.records) < 20


# -- streams -------------------------------------------------------------------------------------------


async def test_a_stream_of_our_own_passes_and_one_of_others_does_not() -> None:
    async with Tracker() as tracker:
        received: list[bytes] = []
        url = tracker.new_stream_unix(b"data").result
        with pytest.raises(Forbidden):
            await stream(received.append, url, guard=Guard(Policy(), OTHER))
        await stream(received.append, url, guard=Guard(Policy(), OWN))
        assert b"".join(received) == b"data"


async def test_a_worker_judges_the_stream_that_a_request_brought() -> None:
    async with Tracker() as tracker:
        url = tracker.new_stream_unix(b"data").result
        slot = Scoreboard.create(1).writer(0)
        with pytest.raises(Forbidden):
            _ = Context(Job(1, "t", None, "id", 1, None, url, OTHER), slot, Policy()).stream
        context = Context(Job(1, "t", None, "id", 1, None, url, OWN), slot, Policy())
        assert await asyncio.to_thread(context.stream.read) == b"data"
        leave(context)


async def test_a_guarded_stream_file_reads_http() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=b"data")

    def read(url: str, guard: Guard) -> bytes:
        with StreamFile(url, guard=guard) as file:
            return file.read()

    async with served(answer) as url:
        assert await asyncio.to_thread(read, url, Guard(Policy(), OWN)) == b"data"
        with pytest.raises(Forbidden):
            await asyncio.to_thread(read, url, Guard(Policy(), OTHER))


async def test_a_signed_url_is_judged_once_more(tmp_path: Path) -> None:
    """What is at the path may have changed since it was signed."""
    proxy = StreamProxy("http://localhost/stream", guard=Guard(Policy(), OTHER))
    async with Tracker() as tracker, served(proxy.serve) as url:
        signed = proxy.sign(tracker.new_stream_unix(b"secret").result)
        with pytest.raises(ConnectionLost, match="502"):
            await stream(lambda data: None, signed.replace("http://localhost", url))
        await tracker.stop(0)  # nobody reads it


# -- trackers: forwarding and answers from outside -------------------------------------------------------


def a_request(hook: str | None, **more: Any) -> Request:
    return Request("work", {"n": 1}, response_hook=hook, **more)


async def test_a_request_is_forwarded_and_its_answer_comes_back(tmp_path: Path) -> None:
    def answers(conn: Any) -> None:
        message = json.loads(read_frame(conn))
        conn.sendall(frame(b'{"error":"","id":"","result":null,"streamURL":null}'))
        asked.append(message)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(message["responseHook"]["Path"])
            answer = {"error": "", "id": message["id"], "result": 7, "streamURL": None}
            sock.sendall(frame(json.dumps(answer).encode()))
            read_frame(sock)

    asked: list[dict[str, Any]] = []
    async with Peer(tmp_path / "next.sock", answers) as service, Tracker(policy=Policy()) as tracker:
        with Hook(tmp_path / "hook.sock") as hook:
            wanted = a_request(hook.url, task_url=service.url)
            tracker.forward(wanted, 10, origin=OWN)
            answer = await asyncio.to_thread(hook.answer)
        assert (answer["id"], answer["result"]) == (wanted.id, 7)
        assert asked[0]["taskURL"] is None
        assert asked[0]["responseHook"]["Path"] == tracker.addr
        assert tracker.num_requests == 0


async def test_the_refusal_of_the_next_service_is_the_answer(tmp_path: Path) -> None:
    refusal = b'{"error":"no such task","id":"","result":null,"streamURL":null}'
    async with Tracker(policy=Policy()) as tracker:
        with GoPeer(tmp_path / "next.sock", lambda message: refusal) as service:
            answers: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
            tracker.forward(a_request(None, task_url=service.url), 10, resolve=answers.set_result)
            answer = await asyncio.wait_for(answers, WAIT)
            assert str(answer.error) == "no such task"


async def test_a_service_that_is_not_there_is_an_answer(tmp_path: Path) -> None:
    async with Tracker(policy=Policy()) as tracker:
        for url in (f"unix://{tmp_path}/nobody.sock", "http://10.0.0.1/"):
            answers: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
            tracker.external_proxy_url = "http://localhost:1/proxy"
            tracker.forward(a_request(None, task_url=url), 10, origin=OWN, resolve=answers.set_result)
            answer = await asyncio.wait_for(answers, WAIT)
            assert isinstance(answer.error, ConnectionLost | Forbidden)


async def test_the_stream_of_a_request_that_fails_does_not_wait_for_a_reader(tmp_path: Path) -> None:
    async with Tracker(policy=Policy()) as tracker:
        open_before = len(os.listdir("/proc/self/fd"))
        answers: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        wanted = a_request(None, task_url=f"unix://{tmp_path}/nobody.sock", stream_url=f"unix://{tmp_path}/s")
        tracker.forward(wanted, 1000, origin=OWN, resolve=answers.set_result)
        assert (await asyncio.wait_for(answers, WAIT)).error is not None
        assert tracker._streams is not None
        await asyncio.wait_for(tracker._streams.drained(), WAIT)
        assert len(os.listdir("/proc/self/fd")) == open_before


async def test_only_what_was_sent_outside_is_answered_from_outside(tmp_path: Path) -> None:
    async with Tracker(external_proxy_url="http://localhost:1/proxy") as tracker:
        inner, outer = a_request("unix:///a"), a_request("unix:///b")
        tracker.track_request(inner)
        sent = await tracker.proxy_external(outer)
        assert sent.response_hook == "http://localhost:1/proxy"
        for wanted in (inner, outer):
            ack = json.loads(tracker.handle_external(Response(wanted.id, 1).encode(3)))
            assert ack == {"error": "", "id": "", "result": None, "streamURL": None}
        assert tracker.tracked(inner.id) is not None
        assert tracker.tracked(outer.id) is None
        tracker.remove_request(inner)


@pytest.mark.parametrize("base", ["http://localhost:1/proxy", "http://localhost:1/?to=proxy"])
async def test_what_was_forwarded_is_answered_by_who_was_told_the_key(base: str) -> None:
    """The id is the requester's choice, and may be easy to guess."""
    asked: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def service(request: web.Request) -> web.Response:
        asked.set_result(Request.decode(await request.read()).response_hook or "")
        return web.Response(body=b'{"error":"","id":"1","result":null,"streamURL":null}')

    async with served(service) as url, Tracker(external_proxy_url=base) as tracker:
        answers: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        wanted = Request("work", id="1", task_url=url)
        tracker.forward(wanted, 1000, resolve=answers.set_result)
        hook, separator, key = (await asyncio.wait_for(asked, WAIT)).partition("key=")
        assert (hook, separator, len(key)) == (f"{base}{'&' if '?' in base else '?'}", "key=", 32)
        for wrong in ("", "0" * 32, "é\udc80"):
            tracker.handle_external(Response("1", "forged").encode(3), None, wrong)
        assert tracker.tracked("1") is not None
        tracker.handle_external(Response("1", 7).encode(3), None, key)
        assert (await asyncio.wait_for(answers, WAIT)).result_as(int) == 7


@pytest.mark.parametrize("body", [b"null", b"{", b"[]", b'{"error":1}', b"\xff"])
async def test_what_is_no_answer_is_refused_and_never_null(body: bytes) -> None:
    async with Tracker() as tracker:
        ack = json.loads(tracker.handle_external(body))
        assert ack["error"]
        assert ack["id"] == ""


async def test_a_stream_from_outside_is_read_at_its_own_host(tmp_path: Path) -> None:
    """A coordinator calls its own stream proxy "localhost"; a unix socket it cannot mean."""
    async with Tracker(external_proxy_url="http://localhost:1/proxy") as tracker:
        for url, expected in (
            ("http://localhost:18510/stream?addr=x", "http://192.0.2.7:18510/stream?addr=x"),
            ("unix:///run/secret.sock", None),
        ):
            with Hook(tmp_path / "hook.sock") as hook:
                wanted = await tracker.proxy_external(a_request(hook.url))
                data = Response(wanted.id, stream_url=url).encode(3)
                tracker.handle_external(data, "192.0.2.7")
                answer = await asyncio.to_thread(hook.answer)
            if expected is None:
                assert "unix socket" in answer["error"]
                assert answer["streamURL"] is None
            else:
                assert answer["streamURL"]["Host"] == "192.0.2.7:18510"


async def test_a_unix_stream_reaches_a_hook_over_http_through_the_proxy() -> None:
    bodies: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def hook(request: web.Request) -> web.Response:
        bodies.put_nowait(await request.json())
        return web.Response(body=b'{"error":"","id":"","result":null,"streamURL":null}')

    async with served(hook) as url, Tracker(policy=Policy()) as tracker:
        for base in (None, f"{url}/stream"):
            tracker.http_stream_url = base
            wanted = a_request(url)
            tracker.track(wanted, 10, proxied=True, origin=OWN)
            data = tracker.new_stream_unix(b"data").result
            tracker.settle(Response(wanted.id, stream_url=data))
            body = await asyncio.wait_for(bodies.get(), WAIT)
            if base is None:
                assert "http_stream_url" in body["error"]
            else:
                assert body["streamURL"]["Path"] == "/stream"
                assert "sig=" in body["streamURL"]["RawQuery"]
        await tracker.stop(0)  # nobody reads them


async def test_proxy_unix_reads_a_stream_from_elsewhere() -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=b"data")

    async with served(answer) as url, Tracker() as tracker:
        local = await tracker.proxy_unix(Request("work", stream_url=f"{url}/s"))
        assert local.stream_url is not None
        assert local.stream_url.startswith("unix://")
        received: list[bytes] = []
        await stream(received.append, local.stream_url)
        assert received == [b"data"]


# -- supervisors ---------------------------------------------------------------------------------------


@pytest.mark.process
class TestSupervisor:
    def test_a_hook_must_be_the_requesters_own(self, tmp_path: Path) -> None:
        with Served(tmp_path) as served:
            for hook, word in (
                ("http://10.1.2.3/hook", "private"),
                ("http://169.254.169.254/latest", "metadata"),
                ("http://2130706433/", "disguised"),
                (f"unix://{tmp_path}/../x.sock", "'..'"),
            ):
                ack = json.loads(served.ask(request(os.urandom(4).hex(), "add", hook, [1])))
                assert word in ack["error"], ack
            counts = served.stats()["counts"]
            assert counts["forbidden"] == 4
            assert "accepted" not in counts

    def test_a_rule_widens_it(self, tmp_path: Path) -> None:
        with Served(tmp_path, "--allow-hook", "10.1.2.3:8080") as served:
            ack = json.loads(served.ask(request("a", "add", "http://10.1.2.3:8080/hook", [1])))
            assert ack["error"] == ""

    @as_root
    def test_another_user_may_not_name_our_sockets(self, folder_for_all: Path) -> None:
        ours = folder_for_all / "ours.sock"
        with Served(folder_for_all, "--allow-uid", str(NOBODY)) as served, Hook(ours) as hook:
            os.chmod(ours, 0o666)
            told = as_nobody(served.path, request("a", "add", hook.url, [1], acomm=1))
            assert told["error_info"]["code"] == "forbidden"
            for key in ("taskURL", "streamURL"):
                told = as_nobody(served.path, request(key, "add", None, [1], **{key: hook.url, "acomm": 1}))
                assert told["error_info"]["code"] == "forbidden"
            assert hook.received.empty()
            assert hook.connections == 0

    @as_root
    def test_another_user_may_name_us_as_the_service(self, folder_for_all: Path) -> None:
        with Served(folder_for_all, "--allow-uid", str(NOBODY)) as served:
            asked = request("a", "add", None, [1], taskURL=served.url)
            assert as_nobody(served.path, asked)["error"] == ""

    def test_a_task_url_is_followed(self, tmp_path: Path) -> None:
        first, second = tmp_path / "1", tmp_path / "2"
        first.mkdir()
        second.mkdir()
        with Served(first) as here, Served(second) as there, Hook(tmp_path / "h.sock") as hook:
            here.ask(request("a", "add", hook.url, [1, 2], taskURL=there.url))
            assert (hook.answer()["result"], there.stats()["counts"]["accepted"]) == (3, 1)
            here.ask(request("b", "nothing", hook.url, None, taskURL=there.url))
            assert "no task nothing" in hook.answer()["error"]
            here.ask(request("c", "add", hook.url, [1, 2], taskURL=f"unix://{tmp_path}/none.sock"))
            assert "cannot reach" in hook.answer()["error"]
            assert here.stats()["forwarded"] == 0
            # To itself is no detour, and a loop under another name ends at the first repeat.
            here.ask(request("d", "add", hook.url, [1, 2], taskURL=here.url))
            assert hook.answer()["result"] == 3
            os.symlink(here.path, tmp_path / "again.sock")
            here.ask(request("e", "add", hook.url, [1, 2], taskURL=f"unix://{tmp_path}/again.sock"))
            assert "was used for another request" in hook.answer()["error"]

    @pytest.mark.parametrize(
        ("more", "word"),
        [
            ({"taskURL": "http://127.0.0.1:9999/"}, "--http"),
            (
                {"taskURL": "unix:///tmp/a.sock", "handlers": {"success": "", "python": "3", "dill": "1"}},
                "handlers",
            ),
        ],
    )
    def test_what_cannot_be_forwarded_is_refused(
        self, tmp_path: Path, more: dict[str, Any], word: str
    ) -> None:
        with Served(tmp_path) as served:
            ack = json.loads(served.ask(request("a", "add", f"unix://{tmp_path}/h", [1], **more)))
            assert word in ack["error"]


def as_nobody(path: str, message: bytes) -> dict[str, Any]:
    """The acknowledgement of a message that another user sends."""
    code = (
        "import os, socket, sys\n"
        f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n"
        "sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1])\n"
        "data = sys.stdin.buffer.read()\n"
        "sock.sendall(len(data).to_bytes(4, 'big') + data)\n"
        "size = int.from_bytes(sock.recv(4, socket.MSG_WAITALL), 'big')\n"
        "sys.stdout.buffer.write(sock.recv(size, socket.MSG_WAITALL))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], input=message, capture_output=True, timeout=WAIT, check=True
    )
    told: dict[str, Any] = json.loads(done.stdout)
    return told
