"""Calls that end with their callers, and time that passes on to the calls of a task."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from doors import JSON, ServedDoor
from peers import WAIT, connected, frame, read_frame
from serving import Fifo, Hook, request

import acomm
from acomm import within
from acomm.errors import CallTimeout
from workers.callers import Callers

TASKS = """
import asyncio
import os
import threading
import time
import acomm
from workers import context, task


def told(started):
    with open(started, "w") as fifo:
        fifo.write(str(os.getpid()))


@task(cancel_on_disconnect=True)
def stay(started: str) -> None:
    told(started)
    time.sleep(10_000)


@task(cancel_on_disconnect=True, key="name")
def shared(name: str, started: str, release: str) -> int:
    told(started)
    with open(release) as fifo:
        fifo.read()
    return 1


@task
def left() -> float | None:
    due = context().deadline
    return None if due is None else due - time.monotonic()


@task
def below(asks: float | None, way: str = "plain") -> float | None:
    sub = left.using(timeout=asks)
    if way == "detached":
        with acomm.detached():
            return sub.submit().result()
    if way == "thread":
        found = []
        thread = threading.Thread(target=lambda: found.append(sub.submit().result()))
        thread.start()
        thread.join()
        return found[0]
    return sub.submit().result()


@task
async def below_too(asks: float | None) -> float | None:
    async def ask():
        return await left.using(timeout=asks).submit()
    return await asyncio.create_task(ask())
"""


class TestCallers:
    def test_a_call_is_unwanted_when_the_last_who_waits_has_left(self) -> None:
        callers = Callers()
        callers.add("a", 1)
        callers.add("a", 2)
        callers.add("b", 1)
        assert callers.left(1) == ["b"]
        assert callers.left(2) == ["a"]
        assert not callers.waiting and not callers._calls

    def test_what_has_ended_is_nobodys(self) -> None:
        callers = Callers()
        callers.add("a", 1)
        callers.ended("a")
        callers.ended("never")
        assert callers.left(1) == []
        assert not callers.waiting and not callers._calls


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDoor]:
    (tmp_path / "calling.py").write_text(TASKS)
    with ServedDoor(tmp_path, "--workers", "3", modules=(str(tmp_path / "calling.py"),)) as served:
        yield served


@pytest.mark.process
class TestDisconnects:
    def test_all_calls_of_a_kept_connection_end_with_it(
        self, served: ServedDoor, tmp_path: Path, started: Fifo
    ) -> None:
        with Hook(tmp_path / "hook") as hook:
            with connected(served.path) as sock:
                for id in "ab":
                    sock.sendall(frame(request(id, "stay", hook.url, [started.path], acomm=1)))
                    assert json.loads(read_frame(sock))["error"] == ""
                    started.read()
            assert {hook.answer()["id"] for _ in "ab"} == {"a", "b"}
        stats = served.until(lambda stats: not stats["assigned"])
        assert stats["counts"]["deserted"] == stats["counts"]["cancelled"] == 2

    def test_one_who_comes_back_with_the_same_request_still_waits(
        self, served: ServedDoor, tmp_path: Path, started: Fifo
    ) -> None:
        message = frame(request("a", "stay", None, [started.path], acomm=1))
        with connected(served.path) as again:
            with connected(served.path) as sock:
                for each in (sock, again):
                    each.sendall(message)
                    assert json.loads(read_frame(each))["error"] == ""
                started.read()
            with Hook(tmp_path / "hook") as hook, connected(served.path) as other:
                # Left later, so its end is seen when the first connection's grace is over.
                started.drain()
                other.sendall(frame(request("b", "stay", hook.url, [started.path], acomm=1)))
                read_frame(other)
                started.read()
                other.close()
                assert hook.answer()["id"] == "b"
            assert served.stats()["assigned"] == 1
        served.until(lambda stats: not stats["assigned"])

    def test_a_sender_of_one_message_is_not_meant(
        self, served: ServedDoor, tmp_path: Path, started: Fifo
    ) -> None:
        plain = request("plain", "stay", None, [started.path])
        served.ask(plain)
        started.read()
        acomm.send_sync(served.url, acomm.Request("stay", [started.path], id="sent"))
        started.read()
        with Hook(tmp_path / "hook") as hook, connected(served.path) as sock:
            sock.sendall(frame(request("kept", "stay", hook.url, [started.path], acomm=1)))
            read_frame(sock)
            started.read()
            sock.close()
            assert hook.answer()["id"] == "kept"
        assert served.stats()["assigned"] == 2

    def test_of_calls_that_share_a_run_each_leaves_for_itself(
        self, served: ServedDoor, tmp_path: Path, started: Fifo, release: Fifo
    ) -> None:
        args = ["x", started.path, release.path]
        with Hook(tmp_path / "hook") as hook, connected(served.path) as stays:
            stays.sendall(frame(request("stays", "shared", hook.url, args, acomm=1)))
            read_frame(stays)
            started.read()
            with connected(served.path) as leaves:
                leaves.sendall(frame(request("leaves", "shared", hook.url, args, acomm=1)))
                read_frame(leaves)
            assert hook.answer()["id"] == "leaves"
            os.close(os.open(release.path, os.O_WRONLY))
            release.close()
            answer = hook.answer()
            assert (answer["id"], answer["result"]) == ("stays", 1)

    def test_http_callers_who_leave(self, served: ServedDoor, started: Fifo) -> None:
        body = json.dumps([started.path]).encode()
        headers = "".join(f"{n}: {v}\r\n" for n, v in {**JSON, **served.headers()}.items())
        head = f"POST /call/stay HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {len(body)}\r\n\r\n"
        with served.connect() as sock:
            sock.sendall(head.encode() + body)
            started.read()
        stats = served.until(lambda stats: not stats["assigned"])
        assert stats["counts"]["deserted"] == 1


@pytest.mark.process
class TestTimeLeft:
    @pytest.fixture
    def client(self, served: ServedDoor) -> Iterator[acomm.Client]:
        with acomm.connect(served.url, default_timeout=WAIT) as client:
            yield client

    @pytest.mark.parametrize("task", ["below", "below_too"])
    def test_a_call_within_a_task_has_what_is_left(self, client: acomm.Client, task: str) -> None:
        limited = client.using(timeout=15)
        assert limited.call(task, 100.0) < 15
        assert limited.call(task, None) < 15
        assert limited.call(task, 5.0) < 5
        assert client.call(task, None) is None
        assert client.call(task, 30.0) > 15

    def test_what_is_detached_has_what_it_asks_for(self, client: acomm.Client) -> None:
        assert client.using(timeout=15).call("below", 100.0, "detached") > 15
        assert client.using(timeout=15).call("below", 100.0, "thread") > 15

    def test_a_call_that_comes_too_late_is_not_sent(self, client: acomm.Client) -> None:
        class Over:
            answer_due = 1.0

        assert client.call("left") is None
        token = within.current.set(Over())
        try:
            with pytest.raises(CallTimeout, match="no time left"):
                client.call("left")
            with acomm.detached():
                assert client.call("left") is None
        finally:
            within.current.reset(token)
        assert client.stats()["counts"]["accepted"] == 2
