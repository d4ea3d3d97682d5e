"""Many at once: any number of requests and calls, each with an outcome under its name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
import pytest

from acomm.acks import ok_ack
from acomm.calls import Call
from acomm.channel import Channels
from acomm.client import connect
from acomm.connection import Connection
from acomm.delivery import Delivery
from acomm.errors import (
    CallCancelled,
    CallTimeout,
    Conflict,
    ConnectionLost,
    TaskError,
    UnknownTask,
)
from acomm.listener import UnixListener
from acomm.messages import Request, Response
from acomm.multi import Gathered, MultiRequest, gather
from acomm.tracker import Tracker

BOTH_LOOPS = True


@pytest.fixture(autouse=True)
def folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder))


@pytest.fixture
async def tracker() -> AsyncIterator[Tracker]:
    async with Tracker() as tracker:
        yield tracker
        for id in list(tracker._table):
            tracker.remove_request(id)


class Service:
    """Answers `echo` with its arguments, `fail` with an error, `wait` never, and refuses all others."""

    def __init__(self) -> None:
        self.listener = UnixListener(on_message=self.message)
        self.channels = Channels()
        self.delivery = Delivery(self.channels)

    async def __aenter__(self) -> Service:
        await self.listener.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.listener.stop(0)
        self.delivery.stop()
        await self.channels.close()

    def message(self, conn: Connection, data: bytes) -> None:
        request = Request.decode(data)
        known = request.task in ("echo", "fail", "wait", "acomm.cancel")
        if known:
            ack = ok_ack(msgspec.json.encode(request.id), 3, request.extended)
        else:
            ack = Response(request.id, error=UnknownTask("no such task")).encode(extended=request.extended)
        conn.acknowledge(ack, grants=request.extended)
        if request.task == "echo":
            self.respond(request, Response.to(request, request.args))
        elif request.task == "fail":
            self.respond(request, Response.to(request, error=TaskError("as asked")))

    def respond(self, request: Request, response: Response) -> None:
        assert request.response_hook is not None
        self.delivery.post(request.response_hook, response, request.wire)


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    async with Service() as service:
        yield service


# -- MultiRequest ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 100, 101, 10_000])
async def test_any_number_of_requests_over_real_sockets(
    tracker: Tracker, service: Service, count: int
) -> None:
    multi = MultiRequest(tracker)
    sending = []
    for number in range(count):
        request = await multi.add_request(f"request {number}", Request("echo", {"n": number}))
        assert request.response_hook == tracker.url
        sending.append(tracker.channels.send(service.listener.url, request))
    assert len(multi) == count
    await asyncio.gather(*sending)
    responses = await multi.responses()
    assert list(responses) == [f"request {number}" for number in range(count)]
    assert [response.result_as(dict[str, int]) for response in responses.values()] == [
        {"n": number} for number in range(count)
    ]
    assert tracker.num_requests == 0
    assert repr(multi) == f"<MultiRequest {count} requests, 0 unanswered>"


async def test_responses_that_come_before_anybody_waits_are_kept(tracker: Tracker) -> None:
    multi = MultiRequest(tracker)
    for number in range(1000):
        request = multi.add_request(str(number), Request("echo")).result
        await tracker.handle_response(Response(request.id, number))
    assert {name: response.result for name, response in (await multi.responses()).items()} == {
        str(number): number for number in range(1000)
    }


async def test_errors_are_responses(tracker: Tracker, service: Service) -> None:
    multi = MultiRequest(tracker)
    for name, task in (("good", "echo"), ("bad", "fail")):
        await tracker.channels.send(service.listener.url, await multi.add_request(name, Request(task, 1)))
    responses = await multi.responses()
    assert responses["good"].error is None
    assert responses["bad"].error == TaskError("as asked")


async def test_a_request_without_a_response_in_time_has_one_that_says_so(tracker: Tracker) -> None:
    multi = MultiRequest(tracker, timeout=0.01)
    await multi.add_request("late", Request("wait"))
    answered = await multi.add_request("in time", Request("echo"))
    await tracker.handle_response(Response(answered.id, "x"))
    responses = await multi.responses()
    assert isinstance(responses["late"].error, CallTimeout)
    assert responses["in time"].error is None


async def test_a_stopped_tracker_leaves_nobody_waiting() -> None:
    async with Tracker() as tracker:
        multi = MultiRequest(tracker)
        await multi.add_request("a", Request("wait"))
        await tracker.stop(0)
        assert isinstance((await multi.responses())["a"].error, ConnectionLost)


async def test_an_add_that_fails_is_undone(tracker: Tracker) -> None:
    multi = MultiRequest(tracker)
    tracked = Request("echo")
    tracker.track_request(tracked)
    with pytest.raises(Conflict, match="already tracked"):
        await multi.add_request("a", tracked)
    assert len(multi) == 0
    assert await multi.responses() == {}
    assert tracker.num_requests == 1  # the first one is not disturbed
    request = await multi.add_request("a", Request("echo"))  # the name is free again
    with pytest.raises(Conflict, match="named a"):
        await multi.add_request("a", Request("echo"))
    await tracker.handle_response(Response(request.id, 1))
    assert list(await multi.responses()) == ["a"]
    with pytest.raises(Conflict, match="named a"):  # a response is not overwritten either
        await multi.add_request("a", Request("echo"))


async def test_an_add_to_a_stopped_tracker_is_undone(tracker: Tracker) -> None:
    await tracker.stop()
    multi = MultiRequest(tracker)
    with pytest.raises(RuntimeError, match="not running"):
        await multi.add_request("a", Request("echo"))
    assert await multi.responses() == {}


@pytest.mark.parametrize("how", ["name", "request", "both"])
async def test_a_removed_request_is_waited_for_no_longer(tracker: Tracker, how: str) -> None:
    multi = MultiRequest(tracker)
    kept = await multi.add_request("kept", Request("echo"))
    gone = await multi.add_request("gone", Request("echo"))
    waiting = asyncio.get_running_loop().create_task(multi.responses())
    await asyncio.sleep(0)
    await tracker.handle_response(Response(kept.id, 1))
    assert not waiting.done()
    removed = {
        "name": lambda: multi.remove_request("gone"),
        "request": lambda: multi.remove_request(gone),
        "both": lambda: multi.remove_request("gone", gone),
    }[how]()
    assert await removed
    assert list(await waiting) == ["kept"]
    assert tracker.num_requests == 0
    assert not await multi.remove_request("gone")
    assert not await multi.remove_request(gone)
    assert not await multi.remove_request("kept")  # it has its response
    await multi.add_request("gone", Request("echo"))


async def test_a_name_and_a_request_that_do_not_belong_together_remove_nothing(tracker: Tracker) -> None:
    multi = MultiRequest(tracker)
    await multi.add_request("a", Request("echo"))
    other = await multi.add_request("b", Request("echo"))
    assert not multi.remove_request("a", other)
    assert not multi.remove_request("c", other)
    assert len(multi) == tracker.num_requests == 2


async def test_the_requests_own_handlers_run_first(tracker: Tracker) -> None:
    multi = MultiRequest(tracker)
    handled: list[Any] = []
    release = asyncio.Event()

    async def handler(request: Request, response: Response) -> None:
        await release.wait()
        handled.append(response.result)

    request = await multi.add_request("a", Request("echo", on_success=handler))
    task = tracker.settle(Response(request.id, 7))
    assert task is not None
    await asyncio.sleep(0)
    assert not await multi.remove_request("a")  # too late: its response is being handled
    release.set()
    assert (await multi.responses())["a"].result == 7
    assert handled == [7]
    await task


async def test_one_may_add_while_another_waits_and_wait_twice(tracker: Tracker) -> None:
    multi = MultiRequest(tracker)
    first = await multi.add_request("first", Request("echo"))
    waiters = [asyncio.get_running_loop().create_task(multi.responses()) for _ in range(3)]
    await asyncio.sleep(0)
    await tracker.handle_response(Response(first.id, 1))
    second = await multi.add_request("second", Request("echo"))  # before they have had a look
    await asyncio.sleep(0)
    await tracker.handle_response(Response(second.id, 2))
    for waiter in waiters:
        assert list(await waiter) == ["first", "second"]
    assert list(await multi.responses()) == ["first", "second"]


# -- gather ---------------------------------------------------------------------------------------------


def call_of() -> Future[Any]:
    return Future()


async def test_calls_of_a_client_are_gathered_by_name(service: Service) -> None:
    async with connect(service.listener.url) as client:
        results = await gather(b=client.submit("echo", 2), a=client.submit("echo", 1))
        assert list(results.items()) == [("b", [2]), ("a", [1])]

        def without_a_loop() -> dict[str, Any]:
            return gather({"x y": client.submit("echo", 3)}, z=client.submit("echo", z=4)).result(30)

        assert await asyncio.to_thread(without_a_loop) == {"x y": [3], "z": {"z": 4}}


async def test_the_first_error_is_raised_at_once_and_the_others_go_on(service: Service) -> None:
    async with connect(service.listener.url) as client:
        waiting = client.submit("wait")
        with pytest.raises(TaskError, match="as asked"):
            await gather(a=waiting, b=client.submit("fail"), c=client.submit("echo"))
        assert not waiting.done()
        with pytest.raises(UnknownTask):
            await asyncio.to_thread(gather(a=waiting, b=client.submit("nothing")).result, 30)
        assert not waiting.done()


async def test_errors_may_be_results(service: Service) -> None:
    async with connect(service.listener.url) as client:
        results = await gather(
            return_exceptions=True, bad=client.submit("fail"), good=client.submit("echo", 1)
        )
        assert results == {"bad": TaskError("as asked"), "good": [1]}


async def test_whoever_stops_waiting_cancels_the_calls(service: Service) -> None:
    async with connect(service.listener.url) as client:
        calls = {str(number): client.submit("wait") for number in range(3)}
        calls["done"] = client.submit("echo", 1)
        await calls["done"]
        task = asyncio.ensure_future(asyncio.wait_for(gather(calls), 0.01))
        with pytest.raises(TimeoutError):
            await task
        assert [call.cancelled() for call in calls.values()] == [True, True, True, False]


def test_cancelling_cancels_what_is_not_done() -> None:
    calls = {"a": call_of(), "b": call_of(), "c": call_of()}
    calls["a"].set_result(1)
    together = gather(calls)
    assert together.cancel()
    assert [call.cancelled() for call in calls.values()] == [False, True, True]
    assert together.cancelled()
    assert together.cancel()  # as a Future's
    finished = gather({"a": calls["a"]})
    assert not finished.cancel()
    assert finished.result() == {"a": 1}


def test_a_result_that_does_not_come_in_time_leaves_the_calls_alone() -> None:
    call = call_of()
    together = gather(a=call)
    with pytest.raises(TimeoutError):
        together.result(0.01)
    call.set_result(1)
    assert together.result(0) == {"a": 1}


@pytest.mark.parametrize("return_exceptions", [False, True])
async def test_a_call_that_others_cancelled_is_an_error_and_no_cancellation_of_ours(
    return_exceptions: bool,
) -> None:
    calls = {"a": call_of(), "b": call_of()}
    together = gather(calls, return_exceptions=return_exceptions)
    calls["a"].cancel()
    calls["b"].set_result(1)
    if return_exceptions:
        assert await together == {"a": CallCancelled("the call a was cancelled"), "b": 1}
    else:
        with pytest.raises(CallCancelled, match="the call a was cancelled"):
            await together


def test_nothing_gathered_is_done() -> None:
    assert gather().result(0) == {}
    assert gather({}, return_exceptions=True).result(0) == {}


async def test_nothing_gathered_can_be_awaited() -> None:
    assert await gather() == {}


def test_only_calls_can_be_gathered() -> None:
    with pytest.raises(TypeError, match="a is a int"):
        gather(a=5)  # type: ignore[arg-type]


def test_one_call_may_have_two_names() -> None:
    call = call_of()
    together = gather(a=call, b=call)
    call.set_result(1)
    assert together.result(0) == {"a": 1, "b": 1}


@pytest.mark.parametrize("fail", [False, True])
def test_calls_that_end_in_many_threads_settle_it_once(fail: bool, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(50):
        calls = {str(number): call_of() for number in range(16)}
        together: Gathered = gather(calls)
        told: list[object] = []
        together.add_done_callback(told.append)
        start = threading.Barrier(len(calls))

        def end(name: str, calls: dict[str, Future[Any]] = calls, start: threading.Barrier = start) -> None:
            start.wait()
            if fail and int(name) % 2:
                calls[name].set_exception(ValueError(name))
            else:
                calls[name].set_result(int(name))

        threads = [threading.Thread(target=end, args=(name,)) for name in calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(told) == 1
        assert caplog.records == []  # what a callback raises is logged
        if fail:
            assert isinstance(together.exception(0), ValueError)
        else:
            assert together.result(0) == {name: int(name) for name in calls}


def test_a_call_is_what_gather_takes() -> None:
    assert issubclass(Call, Future)
