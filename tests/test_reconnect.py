"""A client whose supervisor is away: it restarts, starts late, dies with calls, or never comes."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from peers import WAIT, GrantingPeer, ack
from serving import Fifo, Served, kill, no_descriptors

import acomm
from acomm import errors

pytestmark = pytest.mark.process


def notices(client: acomm.Client) -> None:
    """Wait until the client has seen its connection end: what is written to it before may have been taken."""
    pause = threading.Event()
    for _ in range(int(WAIT / 0.01)):
        if not client._tracker.channels.connected(client.url, None):
            return
        pause.wait(0.01)
    raise AssertionError("the connection to a dead supervisor stays")


def test_calls_wait_for_a_supervisor_that_starts(tmp_path: Path) -> None:
    with acomm.connect(f"unix://{tmp_path}/s.sock", wait=WAIT) as client:
        early = [client.submit("add", number) for number in range(100)]
        with Served(tmp_path):
            late = [client.submit("add", number) for number in range(100, 200)]
            assert [call.result(WAIT) for call in early + late] == list(range(200))


def test_a_client_goes_on_when_its_supervisor_was_killed_and_restarts(tmp_path: Path, started: Fifo) -> None:
    with Served(tmp_path) as first, acomm.connect(first.url, wait=WAIT) as client:
        lost = client.submit("stay", started.path)
        started.read()
        assert client.call("add", 1) == 1
        kill(first.pid)
        first.wait()
        with pytest.raises(errors.ConnectionLost, match="went away before it answered"):
            lost.result(WAIT)
        waiting = [client.submit("add", number) for number in range(10)]
        with pytest.raises(TimeoutError):
            waiting[0].result(0.05)
        with Served(tmp_path):
            assert [call.result(WAIT) for call in waiting] == list(range(10))
            assert client.call("add", 2) == 2


def test_threads_that_never_stop_calling_see_no_wrong_answer(tmp_path: Path) -> None:
    """Three supervisors in a row, each killed. What was under way then is lost, and says so; nothing hangs,
    and each answer is that of its own call.
    """
    stop = threading.Event()
    counts = {"answered": 0, "lost": 0}
    told = threading.Condition()

    def call_on(client: acomm.Client, first: int) -> None:
        number = first
        while not stop.is_set():
            number += 8
            call = client.submit("add", number, 1)
            try:
                assert call.result(WAIT) == number + 1
                outcome = "answered"
            except errors.ConnectionLost as error:
                assert not isinstance(error, errors.Unreachable)
                outcome = "lost"
            with told:
                counts[outcome] += 1
                told.notify_all()

    def answered(more: int) -> None:
        with told:
            goal = counts["answered"] + more
            assert told.wait_for(lambda: counts["answered"] >= goal, WAIT)

    with ThreadPoolExecutor(8) as threads:
        with acomm.connect(f"unix://{tmp_path}/s.sock", wait=WAIT) as client:
            running = [threads.submit(call_on, client, first) for first in range(8)]
            for _ in range(3):
                with Served(tmp_path) as served:
                    answered(500)
                    kill(served.pid)
                    served.wait()
            with Served(tmp_path):
                answered(500)
                stop.set()
                for thread in running:
                    thread.result(WAIT)
    assert counts["lost"] <= 3 * 8


async def test_in_an_event_loop(tmp_path: Path) -> None:
    async with acomm.connect(f"unix://{tmp_path}/s.sock", wait=WAIT) as client:
        for round in range(2):
            calls = [client.submit("add", number, round) for number in range(100)]
            served = await asyncio.to_thread(Served, tmp_path)
            async with asyncio.timeout(WAIT):
                assert await asyncio.gather(*calls) == [number + round for number in range(100)]
            kill(served.pid)
            await asyncio.to_thread(served.wait)
            served.close()
            await asyncio.to_thread(notices, client)


def test_an_orderly_restart(tmp_path: Path) -> None:
    with Served(tmp_path) as served, acomm.connect(served.url, wait=WAIT) as client:
        assert client.call("add", 1) == 1
        served.process.terminate()
        served.wait()  # its socket's file is gone now
        notices(client)
        call = client.submit("add", 2)
        with Served(tmp_path):
            assert call.result(WAIT) == 2


class TestOneThatStops:
    """It finishes what it has, and refuses what comes: nothing was done, so the next one may do it."""

    @pytest.fixture
    def stopping(self, tmp_path: Path, started: Fifo) -> Iterator[Served]:
        """Until `release` is opened."""
        os.mkfifo(tmp_path / "release")
        with Served(tmp_path) as served, acomm.connect(served.url) as other:
            other.submit("hold", started.path, f"{tmp_path}/release")
            started.read()
            served.process.terminate()
            served.until(lambda stats: stats["state"] == "draining")
            yield served

    def test_calls_wait_for_the_next(self, tmp_path: Path, stopping: Served) -> None:
        with acomm.connect(stopping.url, wait=WAIT) as client:
            calls = [client.submit("add", number) for number in range(1000)]
            with pytest.raises(TimeoutError):
                calls[0].result(0.05)
            (tmp_path / "release").write_text("")
            assert stopping.wait() == 0
            with Served(tmp_path):
                assert [call.result(WAIT) for call in calls] == list(range(1000))

    def test_in_vain(self, stopping: Served) -> None:
        with acomm.connect(stopping.url, wait=0.1) as client:
            with pytest.raises(errors.ShuttingDown, match=r"stopping \(for 0.1 s\)$"):
                client.call("add", 1)
        with acomm.connect(stopping.url, wait=0) as client:
            with pytest.raises(errors.ShuttingDown, match=r"stopping$"):
                client.call("add", 1)


def test_a_stream_waits_too(tmp_path: Path) -> None:
    with acomm.connect(f"unix://{tmp_path}/s.sock", wait=WAIT) as client:
        call = client.using(stream=b"x").submit("digest")
        with Served(tmp_path, modules=("calledtasks",)):
            assert len(call.result(WAIT)) == 64


class TestInVain:
    def test_nobody_comes(self, tmp_path: Path) -> None:
        with acomm.connect(f"unix://{tmp_path}/s.sock", wait=0.2) as client:
            before = time.monotonic()
            calls = [client.submit("add", number) for number in range(1000)]
            for call in calls:
                with pytest.raises(errors.Unreachable, match=r"No such file or directory \(for 0.2 s\)"):
                    call.result(WAIT)
            assert time.monotonic() - before >= 0.2

    def test_without_descriptors(self, tmp_path: Path) -> None:
        with acomm.connect(f"unix://{tmp_path}/s.sock", wait=0.5) as client:
            call = client.submit("add", 1)
            with pytest.raises(TimeoutError):
                call.result(0.1)  # it waits, and its supervisor is looked for
            with no_descriptors(), pytest.raises(errors.Unreachable):
                call.result(WAIT)

    def test_no_wait_at_all(self, tmp_path: Path) -> None:
        with acomm.connect(f"unix://{tmp_path}/s.sock", wait=0) as client:
            with pytest.raises(errors.Unreachable, match=r"No such file or directory$"):
                client.call("add", 1)

    def test_closing_waits_as_long_as_calls_do(self, tmp_path: Path) -> None:
        client = acomm.connect(f"unix://{tmp_path}/s.sock", wait=0.1)
        call = client.submit("add", 1)
        client.close()
        assert isinstance(call.exception(0), errors.Unreachable)

        client = acomm.connect(f"unix://{tmp_path}/s.sock", wait=WAIT)
        call = client.submit("add", 1)
        closing = threading.Thread(target=client.close)
        closing.start()
        with Served(tmp_path) as served:
            closing.join(WAIT)  # the supervisor has it now
            served.until(lambda stats: stats["counts"].get("accepted"))

    def test_a_call_that_is_cancelled_meanwhile_is_not_sent(self, tmp_path: Path) -> None:
        with acomm.connect(f"unix://{tmp_path}/peer", wait=WAIT) as client:
            cancelled, kept = client.submit("first"), client.submit("second")
            with pytest.raises(TimeoutError):
                cancelled.result(0.05)  # it has been tried
            assert cancelled.cancel()
            taken = threading.Event()

            def decide(message: dict[str, Any]) -> bytes:
                taken.set()
                return ack(message["id"], acomm=1)

            with GrantingPeer(tmp_path / "peer", decide) as peer:
                assert taken.wait(WAIT)
                kept.cancel()
                client.close()
                assert "first" not in [message["task"] for message in peer.messages]

    def test_a_client_whose_thread_fails_leaves_none_waiting(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        client = acomm.connect(f"unix://{tmp_path}/s.sock", wait=WAIT)
        call = client.submit("add", 1)
        with pytest.raises(TimeoutError):
            call.result(0.05)

        def die() -> None:
            raise SystemExit

        assert client._loop is not None
        client._loop.call_soon_threadsafe(die)
        with pytest.raises(errors.ConnectionLost, match="thread failed"):
            call.result(WAIT)

    @pytest.mark.parametrize("wait", [-1, float("nan"), float("inf")])
    def test_a_wait_that_makes_no_sense(self, wait: float) -> None:
        with pytest.raises(ValueError, match="wait must be"):
            acomm.connect(wait=wait)


def test_a_supervisor_that_dies_with_a_call_that_it_has_not_acknowledged(tmp_path: Path) -> None:
    """It may have begun it, so the call is not sent to the next one."""
    path = tmp_path / "peer"
    got = threading.Event()

    def decide(message: dict[str, Any]) -> bytes | None:
        if message["task"] == "first":
            return ack(message["id"], acomm=1)
        path.unlink()
        got.set()
        return None

    with GrantingPeer(path, decide) as peer:
        with acomm.connect(peer.url, wait=WAIT, default_timeout=WAIT) as client:
            first = client.submit("first")
            second = client.submit("second")
            assert got.wait(WAIT)
            with pytest.raises(errors.ConnectionLost) as caught:
                second.result(WAIT)
            assert not isinstance(caught.value, errors.Unreachable)
            assert isinstance(first.exception(WAIT), errors.ConnectionLost)
        path.touch()  # for the peer to remove
