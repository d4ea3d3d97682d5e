"""Tracker: each tracked request has exactly one outcome, and its handlers hear of it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, GoPeer, GrantingPeer, Peer, ack, connected, frame, read_all, read_frame

from acomm import Handlers, Request, Response, Tracker, UnixListener, detached, unixchannel, within
from acomm.acks import ok_ack
from acomm.channel import Channels
from acomm.connection import Connection
from acomm.delivery import Delivery
from acomm.errors import (
    AcommError,
    Busy,
    CallTimeout,
    Conflict,
    ConnectionLost,
    ShuttingDown,
    TaskError,
    UnknownTask,
)

BOTH_LOOPS = True


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer on a busy machine may take longer than we wait to hear whether it grants."""
    monkeypatch.setattr(unixchannel, "_VERDICT_WAIT", WAIT)


@pytest.fixture
async def tracking(tmp_path: Path) -> AsyncIterator[Tracker]:
    made = Tracker(tmp_path / "tracker.sock", default_timeout=WAIT)
    async with asyncio.timeout(2 * WAIT):
        await made.start()
        yield made
        await made.stop(0)


class Service:
    """An echo service on a UnixListener, as a supervisor is: acknowledges, then posts to the hook."""

    def __init__(self, path: Path) -> None:
        self.listener = UnixListener(path, on_message=self.take)
        self.channels = Channels()
        self.delivery = Delivery(self.channels)
        self.requests: list[Request] = []
        self.answer: Callable[[Request], Response | None] = lambda request: Response.to(request, request.args)
        self.refuse: AcommError | None = None

    @property
    def url(self) -> str:
        return self.listener.url

    def take(self, conn: Connection, data: bytes) -> None:
        request = Request.decode(data, raw=conn.raw)
        self.requests.append(request)
        if not conn.raw:
            text = Response(request.id, error=self.refuse).encode(request.wire, extended=request.extended)
            conn.acknowledge(text, grants=request.extended)
        if self.refuse is None and (response := self.answer(request)) is not None:
            assert request.response_hook is not None
            self.delivery.post(request.response_hook, response, request.wire)


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[Service]:
    made = Service(tmp_path / "service.sock")
    async with made.listener:
        yield made
        made.delivery.stop()
        await made.channels.close()


def push(path: str, *messages: bytes) -> list[bytes]:
    """Deliver responses as a stranger does, a connection each; the acknowledgements."""
    answers = []
    for data in messages:
        with connected(path) as sock:
            sock.sendall(frame(data))
            answers.append(read_frame(sock))
            assert read_all(sock) == b""
    return answers


class Heard:
    """Handlers that remember, and an event for each call."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[tuple[str, Request, Response, threading.Thread]] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def on_success(self, request: Request, response: Response) -> None:
        called = ("success", request, response, threading.current_thread())
        self.loop.call_soon_threadsafe(self.calls.put_nowait, called)

    async def on_error(self, request: Request, response: Response) -> None:
        self.calls.put_nowait(("error", request, response, threading.current_thread()))

    async def next(self) -> tuple[str, Request, Response, threading.Thread]:
        async with asyncio.timeout(WAIT):
            return await self.calls.get()


# -- calls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wire", [1, 2, 3])
async def test_a_call_in_every_generation(tmp_path: Path, service: Service, wire: int) -> None:
    async with Tracker(tmp_path / "t.sock", wire=wire, default_timeout=WAIT) as tracking:
        responses = await asyncio.gather(
            *(tracking.call(service.url, Request("echo", [i])) for i in range(100))
        )
        assert [response.result_as(list[int]) for response in responses] == [[i] for i in range(100)]
        assert {request.wire for request in service.requests} == {wire}
        assert {request.response_hook for request in service.requests} == {tracking.url}
        assert tracking.num_requests == 0
        if wire > 1:
            assert service.listener.connections == 1


async def test_a_call_to_a_go_peer_whose_answer_comes_before_its_acknowledgement(
    tmp_path: Path, tracking: Tracker
) -> None:
    def reply(received: dict[str, Any]) -> bytes:
        hook = received["responseHook"]["Path"]
        push(hook, b'{"error":"","id":"%b","result":7,"streamURL":null}' % received["id"].encode())
        return ack(received["id"])

    async with GoPeer(tmp_path / "go.sock", reply) as go:
        assert (await tracking.call(go.url, Request("t"))).result_as(int) == 7


async def test_a_response_with_an_error_is_returned(service: Service, tracking: Tracker) -> None:
    service.answer = lambda request: Response.to(request, error=TaskError("boom", traceback="tb"))
    response = await tracking.call(service.url, Request("t"))
    assert response.error == TaskError("boom", traceback="tb")
    service.answer = lambda request: Response.to(request, error=CallTimeout("the service's own"))
    assert (await tracking.call(service.url, Request("t"))).error == CallTimeout("the service's own")


async def test_a_refused_call_raises_the_refusal(service: Service, tracking: Tracker) -> None:
    for refusal in (UnknownTask("no such task"), Busy("full", retry_after=1.0), ShuttingDown("bye")):
        service.refuse = refusal
        with pytest.raises(type(refusal)) as caught:
            await tracking.call(service.url, Request("t"))
        assert caught.value == refusal
    assert tracking.num_requests == 0


async def test_a_call_to_nobody_raises_connection_lost(tmp_path: Path, tracking: Tracker) -> None:
    with pytest.raises(ConnectionLost, match="No such file"):
        await tracking.call(f"unix://{tmp_path}/nobody.sock", Request("t"))
    assert tracking.num_requests == 0


async def test_a_call_ends_at_its_timeout(service: Service, tracking: Tracker) -> None:
    service.answer = lambda request: None
    with pytest.raises(CallTimeout, match="no response in time"):
        await tracking.call(service.url, Request("t"), 0.05)
    assert tracking.num_requests == 0


async def test_a_call_within_a_task_has_at_most_what_that_has_left(
    service: Service, tracking: Tracker
) -> None:
    class Work:
        answer_due = time.monotonic() + WAIT

    token = within.current.set(Work())
    try:
        await tracking.call(service.url, Request("t"))
        await tracking.call(service.url, Request("t", timeout=1000.0))
        await tracking.call(service.url, Request("t", timeout=1.0))
        with detached():
            await tracking.call(service.url, Request("t"))
        Work.answer_due = time.monotonic() + 0.05
        service.answer = lambda request: None
        with pytest.raises(CallTimeout, match="no response in time"):
            await tracking.call(service.url, Request("t"))
        Work.answer_due = 0.0
        with pytest.raises(CallTimeout, match="no time left"):
            await tracking.call(service.url, Request("t"))
    finally:
        within.current.reset(token)
    timeouts = [request.timeout for request in service.requests]
    assert all(timeout is not None and 0 < timeout < WAIT for timeout in (*timeouts[:2], timeouts[4]))
    assert timeouts[2:4] == [1.0, None]
    assert tracking.num_requests == 0


async def test_an_acknowledgement_that_comes_after_the_response_changes_nothing(
    tmp_path: Path, tracking: Tracker
) -> None:
    """Its error comes too late: the request has had its outcome."""

    def reply(received: dict[str, Any]) -> bytes:
        push(received["responseHook"]["Path"], b'{"id":"%b","result":1}' % received["id"].encode())
        return ack(received["id"], "too late")

    async with GoPeer(tmp_path / "go.sock", reply) as go:
        assert (await tracking.call(go.url, Request("t"))).result_as(int) == 1


async def test_a_cancelled_call_is_forgotten(service: Service, tracking: Tracker) -> None:
    service.answer = lambda request: None
    task = asyncio.create_task(tracking.call(service.url, Request("t", id="i")))
    while tracking.num_requests == 0:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert tracking.num_requests == 0


async def test_an_id_in_use_is_a_conflict_and_the_first_is_undisturbed(
    service: Service, tracking: Tracker
) -> None:
    """The original drops the first one then, and neither hook hears anything."""
    service.answer = lambda request: None
    first = asyncio.create_task(tracking.call(service.url, Request("t", id="same")))
    while not service.requests:
        await asyncio.sleep(0)
    with pytest.raises(Conflict, match="same"):
        await tracking.call(service.url, Request("t", id="same"))
    with pytest.raises(Conflict):
        tracking.track_request(Request("t", id="same"))
    await asyncio.to_thread(push, tracking.addr, Response("same", 5).encode())
    assert (await first).result_as(int) == 5
    await asyncio.sleep(0)
    tracking.track_request(Request("t", id="same"))  # free again


async def test_a_call_that_cannot_be_sent_is_not_tracked(tracking: Tracker) -> None:
    for url, request in (("tcp://x", Request("t")), ("unix:///x", Request("t", object()))):
        with pytest.raises((AcommError, TypeError)):
            await tracking.call(url, request)
    assert tracking.num_requests == 0


async def test_a_call_survives_the_services_restart(tmp_path: Path, tracking: Tracker) -> None:
    for _ in range(2):
        service = Service(tmp_path / "again.sock")
        async with service.listener:
            for _ in range(5):
                await tracking.call(service.url, Request("t"))
            await service.channels.close()


# -- handlers ---------------------------------------------------------------------------------------


async def test_the_handler_that_fits_runs_once_where_it_may_block(tracking: Tracker) -> None:
    heard = Heard()
    good = Request("t", id="good", on_success=heard.on_success, on_error=heard.on_error)
    bad = Request("t", id="bad", on_success=heard.on_success, on_error=heard.on_error)
    await tracking.track_request(good)
    tracking.track_request(bad)  # awaiting it is optional
    assert tracking.num_requests == 2
    await asyncio.to_thread(push, tracking.addr, b'{"id":"good","result":[1]}', b'{"id":"bad","error":"x"}')
    outcomes = {
        name: (request, response, thread)
        for name, request, response, thread in [await heard.next(), await heard.next()]
    }
    assert outcomes["success"][0] is good
    assert outcomes["success"][1].result_as(list[int]) == [1]
    assert outcomes["success"][2] is not threading.current_thread()
    assert outcomes["error"][0] is bad
    assert outcomes["error"][1].error == AcommError("x")
    assert outcomes["error"][2] is threading.current_thread()
    assert tracking.num_requests == 0
    assert heard.calls.empty()


async def test_a_timeout_is_the_error_handlers(tracking: Tracker) -> None:
    heard = Heard()
    for id, timeout in (("late", 0.15), ("soon", 0.05), ("never", 60.0)):
        tracking.track_request(
            Request("t", id=id, on_success=heard.on_success, on_error=heard.on_error), timeout
        )
    for id in ("soon", "late"):
        name, request, response, _ = await heard.next()
        assert (name, request.id, response.id) == ("error", id, id)
        assert isinstance(response.error, CallTimeout)
    assert tracking.num_requests == 1
    # The response that comes after all is acknowledged, and that is all.
    assert await asyncio.to_thread(push, tracking.addr, b'{"id":"soon"}')
    assert tracking.remove_request("never")
    assert heard.calls.empty()


async def test_late_and_repeated_and_unknown_responses_are_acknowledged_and_dropped(
    tracking: Tracker,
) -> None:
    heard = Heard()
    tracking.track_request(Request("t", id="i", on_success=heard.on_success, on_error=heard.on_error))
    same = b'{"error":"","id":"i","result":1,"streamURL":null}'
    answers = await asyncio.to_thread(push, tracking.addr, same, same, b'{"error":"x","id":"unknown"}')
    assert answers == [ack()] * 3
    assert (await heard.next())[0] == "success"
    assert heard.calls.empty()


async def test_a_removed_request_is_not_handled(tracking: Tracker) -> None:
    heard = Heard()
    request = Request("t", on_success=heard.on_success, on_error=heard.on_error)
    tracking.track_request(request, 0.05)
    assert tracking.tracked(request.id) is request
    assert await tracking.remove_request(request) is True
    assert await tracking.remove_request(request) is False
    assert not tracking.remove_request(request.id)
    await asyncio.to_thread(push, tracking.addr, Response(request.id).encode())
    await asyncio.sleep(0.1)
    assert heard.calls.empty()


async def test_handle_response_returns_when_the_handlers_have_run(tracking: Tracker) -> None:
    ran: list[str] = []
    tracking.track_request(Request("t", id="i", on_success=lambda *_: (time.sleep(0.05), ran.append("done"))))
    await tracking.handle_response(Response("i", 1))
    assert ran == ["done"]
    await tracking.handle_response(Response("i", 1))  # not tracked any more
    assert ran == ["done"]


def unforgiving(request: Any, response: Any) -> None:
    raise ValueError("a bug in the handler")


async def test_a_handler_that_raises_is_counted_and_the_next_one_runs(
    tracking: Tracker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mark = str(tmp_path / "mark")
    pickled = Handlers.pack(lambda request, response: open(mark, "w").close(), None)
    answer: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
    for handler in (unforgiving, lambda *_: sys.exit(1), lambda *_: next(iter(()))):
        request = Request("t", id="i", on_success=handler, handlers=pickled)
        answer = asyncio.get_running_loop().create_future()
        tracking.track(request, resolve=answer.set_result, unpickle=True)
        await tracking.handle_response(Response("i", 1))
        assert answer.result().result == 1
        assert os.path.exists(mark)
        os.unlink(mark)
    assert tracking.handler_errors == 3
    assert "a bug in the handler" in caplog.text


async def test_what_came_pickled_is_not_unpickled_unless_told_to(tracking: Tracker, tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    pickled = Handlers.pack(lambda request, response: open(mark, "w").close(), None)
    tracking.track_request(Request("t", id="i", handlers=pickled))
    await tracking.handle_response(Response("i", 1))
    assert not os.path.exists(mark)


async def test_a_slow_handler_holds_up_the_response_only_so_long(
    tracking: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("acomm.tracking.HANDLER_WAIT", 0.05)
    release, answer = asyncio.Event(), asyncio.get_running_loop().create_future()

    async def handler(request: Request, response: Response) -> None:
        await release.wait()

    tracking.track(Request("t", id="i", on_success=handler), resolve=answer.set_result)
    task = tracking.settle(Response("i", 1))
    assert (await answer).id == "i"
    assert task is not None
    assert not task.done()
    release.set()
    await task


async def test_a_callback_that_raises_harms_no_other(
    tracking: Tracker, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(response: Response) -> None:
        raise RuntimeError("a bug")

    answers = [asyncio.get_running_loop().create_future() for _ in range(4)]
    for number, answer in enumerate(answers):
        tracking.track(Request("t", id=f"{number}"), 0.05, resolve=bad if number % 2 else answer.set_result)
    assert isinstance((await answers[0]).error, CallTimeout)
    assert isinstance((await answers[2]).error, CallTimeout)
    assert tracking.num_requests == 0
    assert caplog.text.count("RuntimeError: a bug") == 2


# -- the wire ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (b'{"error":"","id":"x","result":null,"stream_url":null}', ok_ack(b'""', 2, False)),
        (b'{"error":"","id":"x","result":null,"streamURL":null}', ok_ack(b'""', 3, False)),
        (b'{"error":"","id":"x","result":null}', ok_ack(b'""', 3, False)),
    ],
)
async def test_an_acknowledgement_is_spelled_as_the_response(
    tracking: Tracker, response: bytes, answer: bytes
) -> None:
    assert await asyncio.to_thread(push, tracking.addr, response) == [answer]


async def test_who_asks_may_push_many_responses_on_one_connection(tracking: Tracker) -> None:
    heard = Heard()

    def client() -> None:
        with connected(tracking.addr) as sock:
            for number in range(3):
                sock.sendall(frame(Response(f"{number}", number).encode(3, extended=True)))
            for _ in range(3):
                assert read_frame(sock) == ok_ack(b'""', 3, True)

    for number in range(3):
        tracking.track_request(Request("t", id=f"{number}", on_success=heard.on_success))
    await asyncio.to_thread(client)
    assert {(await heard.next())[1].id for _ in range(3)} == set("012")


async def test_a_generation_1_response_is_taken(tracking: Tracker) -> None:
    heard = Heard()
    tracking.track_request(Request("t", id="i", on_success=heard.on_success))

    def client() -> None:
        with connected(tracking.addr) as sock:
            sock.sendall(b'{"error":"","id":"i","result":{"a":1}}')

    await asyncio.to_thread(client)
    assert (await heard.next())[2].result_as(dict[str, int]) == {"a": 1}


@pytest.mark.parametrize("data", [b"null", b"[]", b"", b"\xff", b'{"id":5}', b"[" * 10_000])
async def test_a_response_that_cannot_be_read_is_refused(tracking: Tracker, data: bytes) -> None:
    (answer,) = await asyncio.to_thread(push, tracking.addr, data)
    assert json.loads(answer)["error"].startswith(("response is not a JSON object", "id: "))


# -- time -------------------------------------------------------------------------------------------


async def test_time_in_which_we_stood_still_does_not_count(service: Service, tracking: Tracker) -> None:
    """After a SIGSTOP the timer fires before the answers that came meanwhile have been read."""
    calls = [asyncio.create_task(tracking.call(service.url, Request("t", i), 0.4)) for i in range(5)]
    while tracking.num_requests < 5:
        await asyncio.sleep(0)
    time.sleep(1.5)
    assert [(await call).result_as(int) for call in calls] == list(range(5))
    assert tracking.num_requests == 0


@pytest.mark.process
async def test_a_stopped_process_has_no_false_timeout(tmp_path: Path, service: Service) -> None:
    code = (
        "import asyncio, sys\n"
        "from acomm import Request, Tracker\n"
        "async def main():\n"
        "    async with Tracker(sys.argv[2]) as tracker:\n"
        "        call = asyncio.create_task(tracker.call(sys.argv[1], Request('slow'), 1.0))\n"
        "        print('called', flush=True)\n"
        "        print(await call)\n"
        "asyncio.run(main())\n"
    )
    arrived: asyncio.Future[Request] = asyncio.get_running_loop().create_future()

    def answer(request: Request) -> None:
        arrived.set_result(request)

    service.answer = answer
    client = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, service.url, str(tmp_path / "c.sock"), stdout=subprocess.PIPE
    )
    async with asyncio.timeout(WAIT):
        request = await arrived
        client.send_signal(signal.SIGSTOP)
        service.delivery.post(f"unix://{tmp_path}/c.sock", Response.to(request, 7), 3)
        await asyncio.sleep(2.0)
        client.send_signal(signal.SIGCONT)
        out, _ = await client.communicate()
    assert client.returncode == 0
    assert b"result=" in out


@pytest.mark.parametrize("timeout", [0, -1, math.nan])
async def test_a_timeout_is_positive(tracking: Tracker, timeout: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        tracking.track_request(Request("t"), timeout)
    with pytest.raises(ValueError, match="positive"):
        Tracker(default_timeout=timeout)


async def test_without_a_limit_there_is_no_timer(tracking: Tracker) -> None:
    tracking.track(Request("t", id="i"), math.inf)
    assert tracking._timer is None
    assert tracking.remove_request("i")


# -- proxying ---------------------------------------------------------------------------------------


async def test_a_request_for_local_services_comes_back_through_us(tmp_path: Path, tracking: Tracker) -> None:
    got: asyncio.Queue[bytes] = asyncio.Queue()
    from aiohttp import web

    async def hook(request: web.Request) -> web.Response:
        got.put_nowait(await request.read())
        return web.Response(body=ack())

    app = web.Application()
    app.router.add_post("/hook", hook)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook"

    # As a Go program sent it: the answer may carry no extension, whatever the local service says.
    request = Request("t", [1], id="i", response_hook=url, wire=2)
    local = await tracking.proxy_unix(request)
    assert (local.id, local.args, local.response_hook) == ("i", [1], tracking.url)
    assert tracking.num_requests == 1
    await asyncio.to_thread(push, tracking.addr, b'{"id":"i","result":{"a": 1}}')
    assert await got.get() == b'{"error":"","id":"i","result":{"a": 1},"stream_url":null}'

    await tracking.proxy_unix(request)

    def extended() -> None:
        with connected(tracking.addr) as sock:
            sock.sendall(frame(Response("i", error=TaskError("no")).encode(3, extended=True)))
            read_frame(sock)

    await asyncio.to_thread(extended)
    assert await got.get() == b'{"error":"no","id":"i","result":null,"stream_url":null}'

    # And one that asked hears of our timeout in full.
    asked = Request("t", id="j", response_hook=url, wire=3, extended=True)
    await tracking.proxy_unix(asked, 0.05)
    answer = json.loads(await got.get())
    assert (answer["error_info"]["code"], answer["acomm"]) == ("timeout", 1)
    async with asyncio.timeout(WAIT):
        await tracking.delivery.drained()
    await runner.cleanup()


async def test_a_request_with_a_unix_hook_needs_no_proxy(tracking: Tracker) -> None:
    for request in (Request("t", response_hook="unix:///x.sock"), Request("t")):
        assert await tracking.proxy_unix(request) is request
    assert tracking.num_requests == 0


async def test_a_result_that_cannot_be_sent_is_an_error_for_the_hook(
    tmp_path: Path, tracking: Tracker
) -> None:
    """The original sends null as a success then."""
    with GrantingPeer(tmp_path / "hook.sock", lambda received: ack()) as hook:
        tracking.track(Request("t", id="i", response_hook=hook.url), proxied=True)
        tracking.settle(Response("i", object()))
        async with asyncio.timeout(WAIT):
            await tracking.delivery.drained()
        assert "JSON cannot express" in hook.messages[0]["error"]
        assert tracking.num_requests == 0


async def test_who_tracks_is_told_when_the_response_is_no_longer_owed(
    tmp_path: Path, tracking: Tracker
) -> None:
    told: list[str] = []
    with GrantingPeer(tmp_path / "hook.sock", lambda received: ack()) as hook:
        hooked = Request("t", id="i", response_hook=hook.url)
        tracking.track(hooked, proxied=True, delivered=lambda error: told.append(f"hook {error}"))
        tracking.settle(Response("i", 1))
        assert told == []
        async with asyncio.timeout(WAIT):
            await tracking.delivery.drained()
    assert told == ["hook None"]
    handled = Request("t", id="j", on_success=lambda request, response: told.append("handler"))
    tracking.track(handled, proxied=True, delivered=lambda error: told.append(f"handled {error}"))
    async with asyncio.timeout(WAIT):
        await tracking.handle_response(Response("j", 1))
    assert told == ["hook None", "handler", "handled None"]


# -- life -------------------------------------------------------------------------------------------


async def test_a_tracker_that_is_not_running_tracks_nothing(tmp_path: Path) -> None:
    tracking = Tracker(tmp_path / "t.sock")
    with pytest.raises(RuntimeError, match="start it first"):
        tracking.track_request(Request("t"))
    async with tracking:
        assert repr(tracking) == f"<Tracker {tmp_path}/t.sock, 0 requests>"
    with pytest.raises(RuntimeError, match="start it first"):
        tracking.track_request(Request("t"))
    await tracking.stop()  # once more does no harm
    assert list(tmp_path.iterdir()) == []


async def test_a_stop_waits_for_what_is_tracked(tmp_path: Path) -> None:
    heard = Heard()
    async with asyncio.timeout(WAIT):
        tracking = Tracker(tmp_path / "t.sock")
        await tracking.start()
        path = tracking.addr
        tracking.track_request(Request("t", id="i", on_success=heard.on_success))
        stopping = asyncio.create_task(tracking.stop())
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="start it first"):
            tracking.track_request(Request("t"))
        assert not stopping.done()
        await asyncio.to_thread(push, path, b'{"id":"i","result":1}')
        await stopping
    assert (await heard.next())[0] == "success"


@pytest.mark.parametrize("timeout", [0, 0.05])
async def test_what_is_left_at_the_stop_hears_of_it(tmp_path: Path, timeout: float) -> None:
    heard = Heard()
    tracking = Tracker(tmp_path / "t.sock")
    await tracking.start()
    tracking.track_request(Request("t", id="i", on_error=heard.on_error))
    with Peer(tmp_path / "s.sock", lambda conn: conn.recv(1000) and conn.recv(1)) as silent:  # type: ignore[func-returns-value]
        call = asyncio.create_task(tracking.call(silent.url, Request("t")))
        while tracking.num_requests < 2:
            await asyncio.sleep(0)
        async with asyncio.timeout(WAIT):
            await tracking.stop(timeout)
            with pytest.raises(ConnectionLost, match="stopped"):
                await call
    assert isinstance((await heard.next())[2].error, ConnectionLost)
    assert tracking.num_requests == 0


async def test_leaving_by_an_exception_does_not_wait(tmp_path: Path) -> None:
    async with asyncio.timeout(WAIT):
        with pytest.raises(KeyError):
            async with Tracker(tmp_path / "t.sock", default_timeout=3600) as tracking:
                tracking.track_request(Request("t"))
                raise KeyError


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="wire must be"):
        Tracker(wire=4)


async def test_nothing_is_left_behind(tmp_path: Path, service: Service) -> None:
    """No task, no descriptor, whatever happened."""
    before = len(os.listdir("/proc/self/fd"))
    tasks = asyncio.all_tasks()
    for _ in range(3):
        async with Tracker(tmp_path / "t.sock") as tracking:
            await asyncio.gather(*(tracking.call(service.url, Request("t", i)) for i in range(50)))
            with pytest.raises(ConnectionLost):
                await tracking.call(f"unix://{tmp_path}/no.sock", Request("t"))
    await service.channels.close()
    async with asyncio.timeout(WAIT):
        while service.listener.connections or len(os.listdir("/proc/self/fd")) > before:
            await asyncio.sleep(0.001)
    assert asyncio.all_tasks() == tasks


async def test_a_stream_of_a_tracker_is_read_once_and_ends_with_it(tracking: Tracker) -> None:
    from acomm import stream

    got = bytearray()
    url = await tracking.new_stream_unix([b"one", b"two"])
    assert await stream(got.extend, url) == 6
    assert bytes(got) == b"onetwo"
    with pytest.raises(ConnectionLost):
        await stream(got.extend, url)
    waiting = await tracking.new_stream_unix(b"nobody comes")
    await tracking.stop(0)
    with pytest.raises(ConnectionLost):
        await stream(got.extend, waiting)
    with pytest.raises(RuntimeError):
        await tracking.new_stream_unix(b"")
