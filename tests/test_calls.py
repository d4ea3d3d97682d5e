"""Calls that stream, either way; their progress; what ends them; many of them, from everywhere."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import calledtasks
import pytest
from peers import WAIT, GrantingPeer, Peer, ack, answering, url_object
from serving import Fifo, Served

import acomm
from acomm import errors
from acomm.calls import Call, Progress
from acomm.client import Client
from acomm.itemstream import Stream

pytestmark = pytest.mark.process

DATA = os.urandom(3_000_000)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with Served(tmp_path_factory.mktemp("calls"), modules=("calledtasks",)) as served:
        yield served


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with acomm.connect(served.url, default_timeout=WAIT) as client:
        yield client


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "marker")
    yield fifo
    fifo.close()


def idle(served: Served) -> None:
    served.until(lambda stats: not stats["tracked"] and not stats["streams"]["open"])


class TestStreams:
    def test_the_answer_is_a_stream(self, client: Client) -> None:
        stream = client.call("squares", 3)
        assert isinstance(stream, Stream)
        assert stream.format == "lines"
        assert list(stream) == [{"number": n, "square": n * n} for n in range(3)]

    def test_items_are_typed_as_the_task_says(self, client: Client) -> None:
        assert list(client.submit(calledtasks.squares, 2)) == [
            calledtasks.Square(0, 0),
            calledtasks.Square(1, 1),
        ]

    def test_an_item_that_is_not_what_the_task_says(self, client: Client) -> None:
        from workers.registry import task

        def squares(count: int) -> Iterator[str]:
            yield ""

        with pytest.raises(errors.TaskError, match="an item is not what its hint says"):
            list(client.submit(task(squares), 2))

    async def test_a_call_is_iterated_over_in_its_streams_place(self, client: Client) -> None:
        assert [item["number"] async for item in client.submit("squares", 1000)] == list(range(1000))
        chunks = [chunk async for chunk in client.submit("letters", "streams")]
        assert b"".join(chunks) == b"streams"
        stream = await client.submit("letters", "again")
        assert stream.format == "bytes"
        assert b"".join([chunk async for chunk in stream]) == b"again"

    async def test_an_answer_that_is_no_stream(self, client: Client) -> None:
        call = client.submit("add", 1, 2)
        with pytest.raises(TypeError, match="the answer of add is no stream"):
            iter(call)
        with pytest.raises(TypeError, match="the answer of add is no stream"):
            async for _ in call:
                pass
        assert call.result() == 3
        with pytest.raises(errors.TaskError, match="on purpose"):
            iter(client.submit("fail", "on purpose"))

    def test_a_call_is_read_once(self, client: Client) -> None:
        call = client.submit("squares", 1)
        assert len(list(call)) == 1
        with pytest.raises(RuntimeError, match="read once"):
            iter(call)

    async def test_a_task_that_fails_in_its_midst_breaks_the_stream(self, client: Client) -> None:
        got: list[int] = []
        with pytest.raises(errors.ConnectionLost):
            got.extend(item for item in client.submit("breaks", 5))
        with pytest.raises(errors.ConnectionLost):
            async for item in client.submit("breaks", 5):
                got.append(item)
        assert got == [*range(5), *range(5)]

    def test_leaving_early_stops_the_task(self, served: Served, client: Client, marker: Fifo) -> None:
        for item in client.submit("endless", marker.path):
            if item == 1000:
                break
        assert marker.read()
        idle(served)

    async def test_leaving_early_stops_the_task_in_a_loop_too(
        self, served: Served, client: Client, marker: Fifo
    ) -> None:
        async for item in client.submit("endless", marker.path):
            if item == 1000:
                break
        assert await asyncio.to_thread(marker.read)
        async with await client.submit("endless", marker.path):
            pass
        await asyncio.to_thread(idle, served)

    def test_cancel_closes_a_stream_that_has_not_ended(
        self, served: Served, client: Client, marker: Fifo
    ) -> None:
        call = client.submit("endless", marker.path)
        items = iter(call)
        assert next(items) == 0
        assert call.cancel()
        with pytest.raises(errors.ConnectionLost, match="closed here"):
            for _ in items:
                pass
        assert marker.read()
        assert not call.cancel()
        assert not call.cancelled()
        idle(served)

    def test_an_unread_stream_can_be_cancelled(self, served: Served, client: Client, marker: Fifo) -> None:
        call = client.submit("endless", marker.path)
        assert isinstance(call.result(), Stream)
        assert call.cancel()
        idle(served)

    def test_a_stream_outlives_its_client(self, served: Served, marker: Fifo) -> None:
        with acomm.connect(served.url) as client:
            items = iter(client.submit("endless", marker.path))
        assert [next(items) for _ in range(10_000)] == list(range(10_000))
        del items
        idle(served)

    def test_a_stream_that_comes_for_a_cancelled_call_is_declined(
        self, served: Served, client: Client, marker: Fifo
    ) -> None:
        held = threading.Event()
        resolve = Call.resolve

        def late(call: Call, response: Any) -> None:
            held.wait(WAIT)
            resolve(call, response)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Call, "resolve", late)
            call = client.submit("endless", marker.path)
            served.until(lambda stats: stats["streams"]["open"])
            with pytest.MonkeyPatch.context() as inner:  # only the stream itself tells it to stop
                inner.setattr(Client, "stop_remote", lambda *args: None)
                assert call.cancel()
                held.set()
                idle(served)

    def test_a_killed_worker_breaks_its_stream(self, served: Served, client: Client, marker: Fifo) -> None:
        items = iter(client.submit("endless", marker.path))
        assert next(items) == 0
        (pid,) = [w["pid"] for w in served.stats()["workers"] if w["task"] == "endless"]
        os.kill(pid, 9)
        with pytest.raises(errors.ConnectionLost, match="broken off"):
            for _ in items:
                pass

    def test_a_stream_of_a_stranger_is_bytes(self, tmp_path: Path) -> None:
        """As the original answers: an unchecked socket, and no word on what is in it."""
        path = str(tmp_path / "stream.sock")

        def produce(conn: socket.socket) -> None:
            conn.sendall(b'{"a":1}\nrest')

        def answer(message: dict[str, Any]) -> dict[str, Any]:
            return {"error": "", "id": message["id"], "result": {"size": 12}, "streamURL": url_object(path)}

        with Peer(path, produce), answering(tmp_path, answer) as peer:
            with acomm.connect(peer.url, default_timeout=WAIT) as client:
                stream = client.call("get")
                assert stream.format is None
                assert stream.result == {"size": 12}
                assert b"".join(stream) == b'{"a":1}\nrest'


class TestSentStreams:
    def sources(self, tmp_path: Path) -> list[Any]:
        (tmp_path / "file").write_bytes(DATA)
        return [
            DATA,
            bytearray(DATA),
            memoryview(DATA),
            open(tmp_path / "file", "rb"),
            io.BytesIO(DATA),
            [DATA[:1_000_000], DATA[1_000_000:]],
            (DATA[start : start + 100_000] for start in range(0, len(DATA), 100_000)),
        ]

    def test_what_can_be_sent(self, client: Client, tmp_path: Path) -> None:
        expected = hashlib.sha256(DATA).hexdigest()
        for source in self.sources(tmp_path):
            assert client.using(stream=source).call("digest") == expected

    async def test_an_asynchronous_source_is_read_in_its_own_loop(self, client: Client) -> None:
        loops: set[Any] = set()

        async def source() -> AsyncIterator[bytes]:
            for start in range(0, len(DATA), 100_000):
                loops.add(asyncio.get_running_loop())
                await asyncio.sleep(0)
                yield DATA[start : start + 100_000]

        expected = hashlib.sha256(DATA).hexdigest()
        assert await client.using(stream=source()).submit("digest") == expected
        assert loops == {asyncio.get_running_loop()}

        reader = asyncio.StreamReader()
        reader.feed_data(DATA)
        reader.feed_eof()
        assert await client.using(stream=reader).submit("digest") == expected

    def test_an_asynchronous_source_of_a_program_without_a_loop(self, client: Client) -> None:
        async def source() -> AsyncIterator[bytes]:
            yield b"abc"

        assert client.using(stream=source()).call("digest") == hashlib.sha256(b"abc").hexdigest()

    async def test_one_that_is_left_while_it_waits_is_closed(self, client: Client) -> None:
        closed = asyncio.Event()

        async def source() -> AsyncIterator[bytes]:
            try:
                yield b"one\n"
                await asyncio.Event().wait()
            finally:
                await asyncio.sleep(0)
                closed.set()

        async for line in client.using(stream=source()).submit("lines_upper"):
            assert line == "ONE"
            break
        async with asyncio.timeout(WAIT):
            await closed.wait()

    def test_both_ways_at_once(self, client: Client) -> None:
        go = threading.Semaphore(1)

        def source() -> Iterator[bytes]:
            for number in range(20):
                assert go.acquire(timeout=WAIT)
                yield b"line %d\n" % number

        for number, line in enumerate(client.using(stream=source()).submit("lines_upper")):
            assert line == f"LINE {number}"
            go.release()
        assert number == 19

    def test_a_source_goes_along_once_and_bytes_any_number_of_times(self, client: Client) -> None:
        view = client.using(stream=io.BytesIO(b"x"))
        assert view.call("digest") == hashlib.sha256(b"x").hexdigest()
        with pytest.raises(RuntimeError, match="another call"):
            view.submit("digest")
        view = client.using(stream=b"x")
        assert view.call("digest") == view.using(timeout=WAIT).call("digest")

    @pytest.mark.parametrize("source", ["text", io.StringIO("text"), 5, object()], ids=repr)
    def test_what_is_no_source(self, client: Client, source: Any) -> None:
        with pytest.raises(TypeError, match="stream"):
            client.using(stream=source)

    def test_a_source_that_fails_breaks_the_tasks_stream(
        self, client: Client, caplog: pytest.LogCaptureFixture
    ) -> None:
        def source() -> Iterator[bytes]:
            yield b"x"
            raise ValueError("on purpose")

        with pytest.raises(errors.TaskError, match="ConnectionLost"):
            client.using(stream=source()).call("digest")

    def test_a_stream_that_its_task_does_not_read_is_let_go(self, client: Client) -> None:
        closed = threading.Event()

        class Source(io.BytesIO):
            def close(self) -> None:
                super().close()
                closed.set()

        assert client.using(stream=Source(b"x")).call("ignore_stream") == 1
        assert closed.wait(WAIT)
        closed.clear()
        assert len(list(client.using(stream=Source(b"x")).submit("squares", 3))) == 3
        assert closed.wait(WAIT)
        closed.clear()
        with pytest.raises(errors.UnknownTask):
            client.using(stream=Source(b"x")).call("nothing of the kind")
        assert closed.wait(WAIT)

    def test_closing_breaks_what_is_being_sent(self, served: Served, marker: Fifo) -> None:
        sent, over = threading.Event(), threading.Event()

        def source() -> Iterator[bytes]:
            yield b"one\n"
            sent.set()
            over.wait(WAIT)

        client = acomm.connect(served.url)
        items = iter(client.using(stream=source()).submit("lines_upper"))
        assert next(items) == "ONE"
        assert sent.wait(WAIT)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("acomm.unixstreams.log.warning", lambda *args: None)
            client.close()
        with pytest.raises(errors.ConnectionLost):
            list(items)
        over.set()


class TestProgress:
    def test_of_a_running_call(self, client: Client, started: Fifo, release: Fifo) -> None:
        call = client.submit("advance", started.path, release.path)
        started.read()
        progress = eventually(lambda: call.progress)
        assert progress == Progress(3.0, 10.0, "a third", "running")
        release.close()
        assert call.result(WAIT) > 0
        assert call.progress is not None  # the last that was heard of it

    def test_of_a_stream(self, client: Client, marker: Fifo) -> None:
        call = client.submit("endless", marker.path)
        with call.result():
            found = eventually(lambda: call.progress)
            assert found.state == "streaming"
            assert found.total is None
            assert call.under_way()
        assert not call.under_way()

    def test_nobody_asks_unless_somebody_looks(self, tmp_path: Path) -> None:
        with Progressing(tmp_path, {}) as peer:
            with acomm.connect(peer.url, default_timeout=WAIT) as client:
                calls = [client.submit("stay") for _ in range(3)]
                client.cancel(calls[2].id)
                assert peer.asked == []
                assert calls[0].progress is None
                eventually(lambda: len(peer.asked) > 1)
                assert peer.asked[0] == peer.asked[1] == [calls[0].id]
                assert calls[1].progress is None
                eventually(lambda: peer.asked[-1] == [calls[0].id, calls[1].id])
                calls[0].cancel()
                eventually(lambda: peer.asked[-1] == [calls[1].id])
                calls[1].cancel()
        assert calls[1].progress is None

    def test_what_it_tells_of_other_calls_or_wrongly(self, tmp_path: Path) -> None:
        told: dict[str, Any] = {"stranger": {"done": 1}}
        with Progressing(tmp_path, told) as peer:
            with acomm.connect(peer.url, default_timeout=WAIT) as client:
                call = client.submit("stay")
                told[call.id] = {"done": 1, "new": "key"}
                assert eventually(lambda: call.progress) == Progress(1.0)
                told[call.id] = {"done": "text"}
                count = len(peer.asked)
                eventually(lambda: len(peer.asked) > count)
                other = client.submit("stay")
                assert other.progress is None  # it is asked no more
                client.cancel("x")
                assert call.progress == Progress(1.0)

    @pytest.mark.parametrize("code", ["unknown_task", "error"])
    def test_a_supervisor_that_does_not_know_it_is_asked_once(self, tmp_path: Path, code: str) -> None:
        error = json.loads(ack("x", "no", error_info={"code": code}))
        with Progressing(tmp_path, {}, refusal=error) as peer:
            with acomm.connect(peer.url, default_timeout=WAIT) as client:
                call = client.submit("stay")
                assert call.progress is None
                eventually(lambda: peer.asked)
                client.cancel("x")  # whose answer comes behind the refusal
                for _ in range(10):
                    assert call.progress is None
                    client.cancel("x")
                assert len(peer.asked) == 1

    def test_of_a_client_that_is_closed_or_was_never_used(self, served: Served, marker: Fifo) -> None:
        with acomm.connect(served.url) as client:
            call = client.submit("stay", marker.path)
            marker.read()
        assert call.progress is None
        call = Call(acomm.connect(served.url), "id", "task")
        assert call.progress is None
        with acomm.connect(served.url) as client:
            client.cancel(call.id)


class Progressing(GrantingPeer):
    """Takes calls and never answers them, but tells `told` of their progress. `asked` are the ids."""

    def __init__(self, tmp_path: Path, told: dict[str, Any], refusal: dict[str, Any] | None = None) -> None:
        self.asked: list[Any] = []
        self.told = told
        self.refusal = refusal
        super().__init__(tmp_path / "peer", self.take)

    def take(self, message: dict[str, Any]) -> bytes:
        result = True
        if message["task"] == "acomm.progress":
            self.asked.append(message["args"])
            if self.refusal is not None:
                return json.dumps({**self.refusal, "id": message["id"], "acomm": 1}).encode()
            result = self.told  # type: ignore[assignment]
        if message["task"].startswith("acomm."):
            threading.Thread(target=self.respond, args=(message, result)).start()
        return ack(message["id"], acomm=1)

    def respond(self, message: dict[str, Any], result: Any) -> None:
        url = f"unix://{message['responseHook']['Path']}"
        with suppress(errors.ConnectionLost):  # a client that is being closed
            acomm.send_sync(url, acomm.Response(message["id"], result))


def eventually(look: Callable[[], Any]) -> Any:
    """What `look` gives as soon as it is something; each look is some 10 ms after the last."""
    pause = threading.Event()
    for _ in range(int(WAIT / 0.01)):
        if found := look():
            return found
        pause.wait(0.01)
    raise AssertionError("in vain")


class TestFromEverywhere:
    def test_ten_thousand_calls_from_eight_threads(self, client: Client) -> None:
        def some(first: int) -> list[int]:
            return [call.result() for call in [client.submit("add", n, 1) for n in range(first, 10_000, 8)]]

        with ThreadPoolExecutor(8) as threads:
            results = list(threads.map(some, range(8)))
        assert sorted(n for found in results for n in found) == list(range(1, 10_001))

    def test_ten_thousand_gathered(self, client: Client) -> None:
        calls = {str(n): client.submit("add", n) for n in range(10_000)}
        assert acomm.gather(calls).result(WAIT) == {str(n): n for n in range(10_000)}

    async def test_thousands_gathered_in_a_loop(self, client: Client) -> None:
        calls = {str(n): client.submit("add", n) for n in range(2000)}
        async with asyncio.timeout(WAIT):
            assert await acomm.gather(calls) == {str(n): n for n in range(2000)}

    async def test_threads_and_loops_share_a_client(self, client: Client) -> None:
        async def awaiting(first: int) -> int:
            return sum(await asyncio.gather(*(client.submit("add", n) for n in range(first, first + 100))))

        def waiting(first: int) -> int:
            return sum(client.call("add", n) for n in range(first, first + 100))

        def another_loop(first: int) -> int:
            return asyncio.run(awaiting(first))

        def streaming(first: int) -> int:
            return sum(item["number"] for item in client.submit("squares", first))

        tasks = [awaiting(0), *(asyncio.to_thread(way, 100) for way in (waiting, another_loop, streaming))]
        assert await asyncio.gather(*tasks) == [4950, 14950, 14950, 4950]

    def test_a_callback_submits_streams_and_looks_at_progress(self, client: Client) -> None:
        done = threading.Event()
        found: list[Any] = []

        def second(call: Any) -> None:
            found.append(call.result())
            done.set()

        def first(call: Any) -> None:
            other = client.using(stream=b"x").submit("digest")
            found.append(other.progress)
            try:
                other.result()
            except RuntimeError as error:
                found.append(str(error))
            other.add_done_callback(second)

        client.submit("add", 1).add_done_callback(first)
        assert done.wait(WAIT)
        assert found[0] is None
        assert "callback" in found[1]
        assert found[2] == hashlib.sha256(b"x").hexdigest()

    def test_a_client_closed_by_another_thread_fails_all_who_submit(self, served: Served) -> None:
        client = acomm.connect(served.url)
        client.call("add", 1)
        calls: list[Call] = []

        def submit() -> None:
            try:
                while True:
                    calls.append(client.submit("add", 1))
            except RuntimeError as error:
                assert "closed" in str(error)

        threads = [threading.Thread(target=submit) for _ in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(calls) > 1000)
        client.close()
        for thread in threads:
            thread.join(WAIT)
        done, late = wait(calls, WAIT)
        assert not late
        for call in done:
            assert isinstance(call.exception(), errors.ConnectionLost | None)
