"""Delivery: a response is tried until its hook has acknowledged it, or until there is no hope."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, GoPeer, GrantingPeer, Peer, ack, read_all

from acomm import Response, delivery, unixchannel
from acomm.channel import Channels
from acomm.delivery import Delivery
from acomm.errors import AcommError, ConnectionLost, TaskError

BOTH_LOOPS = True


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer on a busy machine may take longer than we wait to hear whether it grants."""
    monkeypatch.setattr(unixchannel, "_VERDICT_WAIT", WAIT)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "FIRST_BACKOFF", 0.01)
    monkeypatch.setattr(delivery, "LONGEST_BACKOFF", 0.04)


@pytest.fixture
async def channels() -> AsyncIterator[Channels]:
    made = Channels(timeout=WAIT)
    yield made
    await made.close()


async def drained(deliveries: Delivery) -> None:
    async with asyncio.timeout(WAIT):
        await deliveries.drained()


@pytest.mark.parametrize("wire", [2, 3])
async def test_a_response_arrives_in_the_generation_asked_for(
    tmp_path: Path, channels: Channels, wire: int
) -> None:
    deliveries = Delivery(channels)
    with GoPeer(tmp_path / "hook.sock", lambda received: ack()) as hook:
        deliveries.post(hook.url, Response("i", {"n": 1}), wire)
        deliveries.post(hook.url, Response("i", error=TaskError("no"), extended=True), wire, extended=False)
        await drained(deliveries)
        key = "stream_url" if wire == 2 else "streamURL"
        assert sorted(hook.messages, key=lambda m: m["error"]) == [
            {"error": "", "id": "i", "result": {"n": 1}, key: None},
            {"error": "no", "id": "i", "result": None, key: None},
        ]
    assert (deliveries.delivered, deliveries.abandoned, deliveries.pending) == (2, 0, 0)


async def test_who_asked_hears_more_on_one_connection(tmp_path: Path, channels: Channels) -> None:
    deliveries = Delivery(channels)
    with GrantingPeer(tmp_path / "hook.sock", lambda received: ack(acomm=1)) as hook:
        for number in range(500):
            deliveries.post(hook.url, Response(f"{number}", error=TaskError("x"), extended=True), 3)
        await drained(deliveries)
        assert [m["id"] for m in hook.messages] == [f"{i}" for i in range(500)]
        assert hook.messages[0]["error_info"]["code"] == "task_error"
        assert hook.connections == 1


async def test_generation_1_hears_no_more_even_if_it_asked(tmp_path: Path, channels: Channels) -> None:
    got: list[bytes] = []
    deliveries = Delivery(channels)
    with Peer(tmp_path / "hook.sock", lambda conn: got.append(read_all(conn))) as hook:
        deliveries.post(hook.url, Response("i", 1, extended=True), 1)
        await drained(deliveries)
        async with asyncio.timeout(WAIT):
            while not got:
                await asyncio.sleep(0.001)
    assert got == [b'{"error":"","id":"i","result":1}']


async def test_a_hook_that_is_down_gets_it_when_it_comes_up(
    tmp_path: Path, channels: Channels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "acomm.delivery")
    deliveries = Delivery(channels)
    for number in range(10):
        deliveries.post(f"unix://{tmp_path}/hook.sock", Response(f"{number}"), 3)
    async with asyncio.timeout(WAIT):
        while caplog.text.count("did not take a response") < 50:
            await asyncio.sleep(0.001)
    assert deliveries.pending == 10
    with GoPeer(tmp_path / "hook.sock", lambda received: ack()) as hook:
        await drained(deliveries)
        assert {m["id"] for m in hook.messages} == {f"{i}" for i in range(10)}
    assert deliveries.delivered == 10
    levels = [record.levelno for record in caplog.records if "did not take" in record.message]
    assert (
        levels.count(logging.WARNING) == 1
    )  # of the hook, not of each response; the rest is for the curious


async def test_an_acknowledgement_with_an_error_is_no_delivery(tmp_path: Path, channels: Channels) -> None:
    seen: list[dict[str, Any]] = []

    def reply(received: dict[str, Any]) -> bytes:
        seen.append(received)
        return ack(error="" if len(seen) == 3 else "not now")

    deliveries = Delivery(channels)
    with GoPeer(tmp_path / "hook.sock", reply) as hook:
        deliveries.post(hook.url, Response("i", 1), 2)
        await drained(deliveries)
    assert len(seen) == 3
    assert deliveries.delivered == 1


async def test_the_pauses_double_to_a_limit(
    tmp_path: Path, channels: Channels, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    caplog.set_level(logging.DEBUG, "acomm.delivery")
    monkeypatch.setattr(delivery, "FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(delivery, "LONGEST_BACKOFF", 0.01)
    deliveries = Delivery(channels)
    deliveries.post(f"unix://{tmp_path}/no.sock", Response("i"), 3)
    async with asyncio.timeout(WAIT):
        while len(caplog.records) < 8:
            await asyncio.sleep(0.001)
    deliveries.stop()
    pauses = [record.args[2] for record in caplog.records if "trying again" in record.msg]  # type: ignore[index]
    assert pauses[:7] == pytest.approx([0.001, 0.002, 0.004, 0.008, 0.01, 0.01, 0.01])


async def test_a_hook_that_stays_down_is_given_up(
    tmp_path: Path, channels: Channels, caplog: pytest.LogCaptureFixture
) -> None:
    deliveries = Delivery(channels, give_up_after=0.05)
    deliveries.post(f"unix://{tmp_path}/hook.sock", Response("i"), 3)
    await drained(deliveries)
    assert (deliveries.delivered, deliveries.abandoned, deliveries.pending) == (0, 1, 0)
    assert "gave up on the hook" in caplog.text


async def test_a_url_that_leads_nowhere_is_given_up_at_once(channels: Channels) -> None:
    deliveries = Delivery(channels)
    deliveries.post("tcp://somewhere", Response("i"), 3)
    await drained(deliveries)
    assert deliveries.abandoned == 1


async def test_a_result_that_json_cannot_express_is_the_posters_error(channels: Channels) -> None:
    deliveries = Delivery(channels)
    with pytest.raises(TypeError, match="result is of type object"):
        deliveries.post("unix:///nowhere", Response("i", object()), 3)
    assert deliveries.pending == 0


async def test_a_stop_ends_the_trying(
    tmp_path: Path, channels: Channels, caplog: pytest.LogCaptureFixture
) -> None:
    deliveries = Delivery(channels)
    for number in range(3):
        deliveries.post(f"unix://{tmp_path}/hook.sock", Response(f"{number}"), 3)
    async with asyncio.timeout(WAIT):
        while not deliveries.troubled() or deliveries.troubled()[0]["waiting"] < 3:
            await asyncio.sleep(0)
    deliveries.stop()
    assert "3 responses were not delivered" in caplog.text
    await drained(deliveries)
    assert (deliveries.abandoned, deliveries.pending) == (3, 0)
    # One that fails only now is not tried again, either.
    deliveries.post(f"unix://{tmp_path}/hook.sock", Response("late"), 3)
    await drained(deliveries)
    assert (deliveries.abandoned, deliveries.troubled()) == (4, [])


async def test_closing_the_channels_ends_what_is_under_way(
    tmp_path: Path, channels: Channels, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()
    deliveries = Delivery(channels)
    with GoPeer(tmp_path / "hook.sock", lambda received: done.wait(WAIT) and ack()) as hook:
        for number in range(3):
            deliveries.post(hook.url, Response(f"{number}"), 3)
        async with asyncio.timeout(WAIT):
            while len(hook.messages) < 3:
                await asyncio.sleep(0.001)
            deliveries.stop()
            await channels.close()
        await drained(deliveries)
        assert deliveries.abandoned == 3
        # The log tells of it once, not for each.
        assert [record.getMessage() for record in caplog.records] == ["3 responses were not delivered"]
        done.set()


async def test_the_log_tells_once_of_a_hook_whatever_number_of_responses_it_refuses(
    tmp_path: Path, channels: Channels, caplog: pytest.LogCaptureFixture
) -> None:
    deliveries = Delivery(channels, give_up_after=0.2)
    for number in range(50):
        deliveries.post(f"unix://{tmp_path}/{number % 2}.sock", Response(f"{number}"), 3)
    await drained(deliveries)
    assert deliveries.abandoned == 50
    assert [record.levelno for record in caplog.records].count(logging.WARNING) == 2
    assert [record.levelno for record in caplog.records].count(logging.ERROR) == 2


# -- generation 2, whose peers read a body with one call ---------------------------------------------

LARGE = "x" * 1_000_000


async def test_what_a_generation_2_hook_cannot_read_becomes_an_error(
    tmp_path: Path, channels: Channels, caplog: pytest.LogCaptureFixture
) -> None:
    deliveries = Delivery(channels)
    with GoPeer(tmp_path / "hook.sock", lambda received: ack(), generation=2) as hook:
        deliveries.post(hook.url, Response("i", LARGE), 2)
        await drained(deliveries)
        size = len(Response("i", LARGE).encode(2))
        assert hook.unreadable == [size, size]
        (message,) = hook.messages
    assert (message["id"], message["result"], message["stream_url"]) == ("i", None, None)
    assert f"{size} bytes" in message["error"]
    assert f"{size} bytes; it gets an error" in caplog.text
    assert deliveries.delivered == 1


async def test_it_becomes_one_where_the_hook_says_that_it_cannot_read_it(
    tmp_path: Path, channels: Channels
) -> None:
    got: list[Any] = []

    def reply(received: dict[str, Any]) -> bytes:
        got.append(received["result"])
        return ack(error="invalid character '\\x00' in string literal" if received["result"] else "")

    deliveries = Delivery(channels)
    with GoPeer(tmp_path / "hook.sock", reply) as hook:
        deliveries.post(hook.url, Response("i", "x" * 70_000), 2)
        await drained(deliveries)
    assert [result and len(result) for result in got] == [70_000, 70_000, None]


@pytest.mark.parametrize(("size", "wire"), [(60_000, 2), (1_000_000, 3)])
async def test_what_a_hook_can_read_is_tried_for_longer(
    tmp_path: Path, channels: Channels, size: int, wire: int
) -> None:
    seen: list[Any] = []

    def reply(received: dict[str, Any]) -> bytes:
        seen.append(received["result"])
        return b"" if len(seen) < 5 else ack()

    deliveries = Delivery(channels)
    with GoPeer(tmp_path / "hook.sock", reply) as hook:
        deliveries.post(hook.url, Response("i", "x" * size), wire)
        await drained(deliveries)
    assert seen == ["x" * size] * 5


async def test_a_hook_that_is_down_has_not_failed_to_read(
    tmp_path: Path, channels: Channels, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "acomm.delivery")
    deliveries = Delivery(channels)
    deliveries.post(f"unix://{tmp_path}/hook.sock", Response("i", LARGE), 2)
    async with asyncio.timeout(WAIT):
        while caplog.text.count("did not take a response") < 5:
            await asyncio.sleep(0.001)
    with GoPeer(tmp_path / "hook.sock", lambda received: ack()) as hook:
        await drained(deliveries)
        assert [message["result"] for message in hook.messages] == [LARGE]


# -- who is told how it ended -------------------------------------------------------------------------


async def test_whoever_posted_is_told_once_how_it_ended(tmp_path: Path, channels: Channels) -> None:
    told: list[tuple[str, AcommError | None]] = []
    deliveries = Delivery(channels, give_up_after=0.05)
    with GoPeer(tmp_path / "hook.sock", lambda received: ack()) as hook:
        deliveries.post(hook.url, Response("a"), 3, finished=lambda error: told.append(("a", error)))
        url = f"unix://{tmp_path}/nobody.sock"
        deliveries.post(url, Response("b"), 3, finished=lambda error: told.append(("b", error)))
        await drained(deliveries)
    outcome = dict(told)
    assert len(told) == 2
    assert outcome["a"] is None
    assert isinstance(outcome["b"], ConnectionLost)


async def test_what_a_stop_leaves_stays_owed(tmp_path: Path, channels: Channels) -> None:
    told: list[AcommError | None] = []
    deliveries = Delivery(channels)
    for number in range(3):
        url = f"unix://{tmp_path}/nobody.sock"
        deliveries.post(url, Response(f"{number}"), 3, finished=told.append)
    async with asyncio.timeout(WAIT):
        while not deliveries.troubled():
            await asyncio.sleep(0)
    deliveries.stop()
    await channels.close()
    await drained(deliveries)
    assert told == []


async def test_what_is_stored_is_loaded_when_its_hook_comes_up(tmp_path: Path, channels: Channels) -> None:
    deliveries = Delivery(channels, max_pending_bytes=30_000)
    loads: list[str] = []

    def post(id: str) -> None:
        response = Response(id, "x" * 5000)

        def reload(loaded: Callable[[bytes | None], None]) -> None:
            loads.append(id)
            asyncio.get_running_loop().call_soon(loaded, response.encode(3))

        deliveries.post(f"unix://{tmp_path}/hook.sock", response, 3, reload=reload)

    for number in range(20):
        post(f"{number}")
    async with asyncio.timeout(WAIT):
        while not deliveries.troubled() or deliveries.troubled()[0]["failures"] < 2:
            await asyncio.sleep(0.001)
    assert deliveries.pending_bytes <= 30_000
    with GoPeer(tmp_path / "hook.sock", lambda received: ack()) as hook:
        await drained(deliveries)
        assert {message["id"] for message in hook.messages} == {f"{number}" for number in range(20)}
        assert {message["result"] for message in hook.messages} == {"x" * 5000}
    assert len(loads) >= 10
    assert deliveries.pending_bytes == 0


async def test_a_troubled_hook_is_told_of_without_its_secrets(channels: Channels) -> None:
    deliveries = Delivery(channels)
    deliveries.post("http://127.0.0.1:9/hook?key=secret&x", Response("i"), 3)
    async with asyncio.timeout(WAIT):
        while not deliveries.troubled():
            await asyncio.sleep(0.001)
    (hook,) = deliveries.troubled()
    assert hook["url"] == "http://127.0.0.1:9/hook?key=...&x=..."
    assert hook["failures"] >= 1
    deliveries.stop()
