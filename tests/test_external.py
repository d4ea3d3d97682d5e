"""Requests to services beyond this host: what goes there, and how answers and streams come back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import ClientSession, web
from peers import WAIT, GoPeer, ack
from serving import Served, request

from acomm import Request, Tracker
from acomm.errors import ConfigError, Conflict
from acomm.urls import replace_localhost

ACK = b'{"error":"","id":"","result":null,"streamURL":null}'


class Door(NamedTuple):
    """A tracker, and its handlers at a port of its own."""

    tracker: Tracker
    url: str

    async def post(self, body: bytes) -> bytes:
        async with ClientSession() as session, session.post(f"{self.url}/proxy", data=body) as response:
            assert response.status == 200
            return await response.read()

    async def get(self, url: str) -> tuple[int, bytes]:
        async with ClientSession() as session, session.get(url) as response:
            return response.status, await response.read()


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async def stream(asked: web.Request) -> web.StreamResponse:
        return await tracker.stream_proxy.serve(asked)

    async with Tracker(tmp_path / "t.sock") as tracker:
        app = web.Application()
        app.router.add_post("/proxy", tracker.external_handler)
        app.router.add_get("/stream", stream)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        tracker.external_proxy_url = f"{url}/proxy"
        tracker.http_stream_url = f"{url}/stream"
        yield Door(tracker, url)
        await runner.cleanup()


async def test_an_answer_from_outside_is_passed_on_to_the_hook(tmp_path: Path, door: Door) -> None:
    async with GoPeer(tmp_path / "hook.sock", lambda message: ack(), generation=2) as hook:
        asked = Request("t", [1], id="i", response_hook=hook.url, wire=2)
        outgoing = await door.tracker.proxy_external(asked, timeout=WAIT)
        assert (outgoing.id, outgoing.task, outgoing.args) == ("i", "t", [1])
        assert (outgoing.response_hook, outgoing.stream_url) == (f"{door.url}/proxy", None)
        with pytest.raises(Conflict):
            await door.tracker.proxy_external(asked)
        assert door.tracker.num_requests == 1
        assert await door.post(b'{"id":"i","result":{"a": 1}}') == ACK
        await door.tracker.delivery.drained()
        assert hook.messages == [{"error": "", "id": "i", "result": {"a": 1}, "stream_url": None}]
        assert door.tracker.num_requests == 0
        # A late or repeated one is acknowledged, as the original does, and goes nowhere.
        assert await door.post(b'{"id":"i","result":2}') == ACK
        assert len(hook.messages) == 1


async def test_only_what_went_outside_is_answered_from_outside(tmp_path: Path, door: Door) -> None:
    handled: list[Any] = []
    inside = Request("t", id="i", on_success=lambda *seen: handled.append(seen))
    door.tracker.track_request(inside, WAIT)
    assert await door.post(b'{"id":"i","result":"forged"}') == ACK
    assert (door.tracker.num_requests, handled) == (1, [])
    door.tracker.remove_request(inside)


@pytest.mark.parametrize("body", [b"null", b"", b"{", b"[]", b'{"id":7}', b'{"id":"i","error":{}}'])
async def test_what_is_no_response_is_refused_by_an_object(door: Door, body: bytes) -> None:
    answer = json.loads(await door.post(body))
    assert list(answer) == ["error", "id", "result", "streamURL"]
    assert answer["error"]
    assert answer["id"] == ""


async def test_a_stream_from_outside_keeps_its_way(tmp_path: Path, door: Door) -> None:
    """In the mouth of another host, localhost is that host."""
    async with GoPeer(tmp_path / "hook.sock", lambda message: ack()) as hook:
        await door.tracker.proxy_external(Request("t", id="i", response_hook=hook.url), timeout=WAIT)
        assert await door.post(b'{"id":"i","streamURL":"http://localhost:9/stream?addr=x"}') == ACK
        await door.tracker.delivery.drained()
        (message,) = hook.messages
        assert (message["streamURL"]["Host"], message["streamURL"]["RawQuery"]) == ("127.0.0.1:9", "addr=x")


async def test_a_stream_of_ours_is_read_over_http_once(door: Door) -> None:
    inside = await door.tracker.new_stream_unix(b"some data")
    outgoing = await door.tracker.proxy_external(Request("t", stream_url=inside), timeout=WAIT)
    assert outgoing.stream_url is not None
    assert outgoing.stream_url.startswith(f"{door.url}/stream?")
    assert await door.get(outgoing.stream_url) == (200, b"some data")
    assert (await door.get(outgoing.stream_url))[0] != 200
    door.tracker.remove_request(outgoing)


async def test_a_streams_url_is_one_that_was_signed(door: Door) -> None:
    inside = await door.tracker.new_stream_unix(b"some data")
    url = door.tracker.proxy_stream_http_url(inside)
    plain = f"{door.url}/stream?addr={inside}"  # what the original serves to anybody
    assert (await door.get(plain))[0] in (400, 403)
    assert await door.get(url) == (200, b"some data")


async def test_without_a_door_nothing_goes_outside(tmp_path: Path) -> None:
    async with Tracker(tmp_path / "t.sock") as tracker:
        with pytest.raises(ConfigError):
            await tracker.proxy_external(Request("t"))
        with pytest.raises(ConfigError):
            tracker.proxy_stream_http_url("unix:///run/x.sock")
        assert tracker.num_requests == 0


@pytest.mark.parametrize(
    ("url", "address", "replaced"),
    [
        ("http://localhost:80/a?b=c", "10.0.0.7", "http://10.0.0.7:80/a?b=c"),
        ("http://LOCALHOST/a", "10.0.0.7", "http://10.0.0.7/a"),
        ("https://127.0.0.1:8443/a", "10.0.0.7", "https://10.0.0.7:8443/a"),
        ("http://127.9.8.7/a", "10.0.0.7", "http://10.0.0.7/a"),
        ("http://[::1]:80/a", "10.0.0.7", "http://10.0.0.7:80/a"),
        ("http://[::1]/a", "fe80::1", "http://[fe80::1]/a"),
        ("http://:4080/response", "10.0.0.7", "http://10.0.0.7:4080/response"),
        ("http://localhost#x", "10.0.0.7", "http://10.0.0.7#x"),
        # Hosts of any other name are theirs; the original refuses those without a port.
        ("http://example.com/a", "10.0.0.7", "http://example.com/a"),
        ("http://example.com:80/localhost", "10.0.0.7", "http://example.com:80/localhost"),
        ("http://localhost.example.com/", "10.0.0.7", "http://localhost.example.com/"),
        ("http://10.127.0.1/", "10.0.0.7", "http://10.127.0.1/"),
        ("unix:///run/localhost.sock", "10.0.0.7", "unix:///run/localhost.sock"),
    ],
)
def test_localhost_is_whoever_says_it(url: str, address: str, replaced: str) -> None:
    assert replace_localhost(url, address) == replaced


@pytest.mark.process
def test_a_request_passed_on_without_a_timeout_has_the_supervisors(tmp_path: Path) -> None:
    with (
        GoPeer(tmp_path / "silent.sock") as silent,  # acknowledges, and never answers
        GoPeer(tmp_path / "hook.sock", lambda message: ack()) as hook,
        Served(tmp_path, "-w", "1", "--forward-timeout", "0.2") as served,
    ):
        message = request("i", "anything", hook.url, [1], taskURL=silent.url)
        assert json.loads(served.ask(message))["error"] == ""
        with hook.changed:
            assert hook.changed.wait_for(lambda: hook.messages, WAIT)
        (answer,) = hook.messages
        assert (answer["id"], answer["result"]) == ("i", None)
        assert answer["error"] == "no response in time"
        (passed,) = silent.messages
        assert (passed["id"], passed["task"], passed["taskURL"], passed["args"]) == (
            "i",
            "anything",
            None,
            [1],
        )
