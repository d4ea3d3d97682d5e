"""A client of an HTTP door on its own host: posts with a token, answers at its own socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from peers import WAIT, ack

import acomm
from acomm import errors
from acomm.streams import UnixStreams


@pytest.fixture(autouse=True)
def folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder))
    monkeypatch.delenv("ACOMM_TOKEN", raising=False)
    return short_folder


class Door:
    """Takes requests by POST, and answers them at their hooks. Without the token it takes none."""

    def __init__(self, token: str | None = "secret") -> None:
        self.token = token
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.streams = UnixStreams()
        self.url = ""
        self._answering: set[asyncio.Task[None]] = set()

    async def take(self, http: web.Request) -> web.Response:
        request = json.loads(await http.read())
        self.headers.append(dict(http.headers))
        if self.token is not None and http.headers.get("Authorization") != f"Bearer {self.token}":
            refusal = ack(request["id"], "who are you?", error_info={"code": "forbidden"})
            return web.Response(status=401, body=refusal)
        self.requests.append(request)
        if request["task"] == "unknown":
            refusal = ack(request["id"], "no such task", error_info={"code": "unknown_task"})
            return web.Response(status=404, body=refusal)
        task = asyncio.get_running_loop().create_task(self.answer(request))
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)
        return web.Response(body=ack(request["id"], acomm=1))

    async def answer(self, request: dict[str, Any]) -> None:
        hook = f"unix://{request['responseHook']['Path']}"
        response = acomm.Response(request["id"], request["args"], extended=True)
        if request["task"] == "stream":
            url = self.streams.new_stream_unix(b"1\n2\n").result
            response = acomm.Response(request["id"], stream_url=url, stream_format="lines", extended=True)
        await acomm.send(hook, response)

    async def start(self, port: int = 0) -> web.AppRunner:
        app = web.Application()
        app.router.add_post("/", self.take)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, reuse_address=True).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    door = Door()
    runner = await door.start()
    yield door
    await runner.cleanup()
    await door.streams.close()


async def test_calls_and_streams(door: Door) -> None:
    async with acomm.connect(door.url, token="secret", default_timeout=WAIT) as client:
        assert await client.submit("echo", 1, 2) == [1, 2]
        assert [item async for item in client.submit("stream")] == [1, 2]
        calls = [client.submit("echo", number) for number in range(300)]
        assert await asyncio.gather(*calls) == [[number] for number in range(300)]
        with pytest.raises(errors.UnknownTask, match="no such task"):
            await client.submit("unknown")
        assert "secret" not in repr(client)
    assert door.headers[0]["Content-Type"] == "application/json"
    assert door.requests[0]["responseHook"]["Scheme"] == "unix"


async def test_a_token_of_the_environment_or_a_file(
    door: Door, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("secret\n")
    async with acomm.connect(door.url, token_file=tmp_path / "token") as client:
        assert await client.submit("echo", 1) == [1]
    monkeypatch.setenv("ACOMM_TOKEN", "secret")
    async with acomm.connect(door.url) as client:
        assert await client.submit("echo", 1) == [1]
    monkeypatch.setenv("ACOMM_TOKEN", "wrong")
    async with acomm.connect(door.url) as client:
        with pytest.raises(errors.Forbidden, match="who are you"):
            await client.submit("echo", 1)


async def test_without_a_token_none_is_sent() -> None:
    door = Door(token=None)
    runner = await door.start()
    async with acomm.connect(door.url) as client:
        assert await client.submit("echo", 1) == [1]
    assert "Authorization" not in door.headers[0]
    await runner.cleanup()


async def test_a_door_that_opens_later_is_waited_for() -> None:
    door = Door()
    runner = await door.start()
    port = int(door.url.rpartition(":")[2])
    await runner.cleanup()
    async with acomm.connect(door.url, token="secret", wait=WAIT) as client:
        calls = [client.submit("echo", number) for number in range(100)]
        with pytest.raises(TimeoutError):
            await asyncio.to_thread(calls[0].result, 0.1)
        runner = await door.start(port)
        assert await asyncio.gather(*calls) == [[number] for number in range(100)]
    await runner.cleanup()
    async with acomm.connect(door.url, token="secret", wait=0.1) as client:
        with pytest.raises(errors.Unreachable) as caught:
            await client.submit("echo")
    assert str(caught.value) == f"cannot reach {door.url}: Connection refused (for 0.1 s)"
