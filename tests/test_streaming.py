"""Generator tasks: whole or known to be broken, at their consumer's pace, and ended when it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from peers import WAIT, connected, read_all
from serving import Fifo, Hook, Served, environment, request

import acomm
from acomm import Request, Response, Tracker
from acomm.errors import BadArgs, ConfigError, Conflict, ConnectionLost, TaskError
from acomm.streams import StreamFile
from workers import Supervisor, streaming
from workers.calls import StreamPlace
from workers.streaming import ConsumerLeft, NoConsumer, Producer

MEBI = 1024 * 1024
HALF_WAY = 20_000  # items, more than a socket holds

as_root = pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
NOBODY = 65534


def path_of(url: str) -> str:
    return url.removeprefix("unix://")


# -- the producer, within this process ------------------------------------------------------------------


class Stage:
    """A producer whose generator runs in a thread, with what it ends with."""

    def __init__(self, items: Generator[Any, Any, Any], *, uid: int | None = None, **place: Any) -> None:
        self.left = threading.Event()
        self.abandoned = threading.Event()
        self.error: BaseException | None = None
        self.producer = Producer(StreamPlace(**place), uid, self.left.set, self.abandoned.set)
        self.url = self.producer.url
        self._items = items
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self.producer as producer:
                producer.accept()
                producer.send_items(self._items)
                producer.finish()
        except BaseException as error:
            self.error = error

    def end(self) -> BaseException | None:
        """What it ended with."""
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        return self.error


@pytest.fixture
def folder(folder_for_all: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime folder, whose path is short enough."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder_for_all))
    return folder_for_all / "acomm"


def counting(number: int) -> Generator[int, None, None]:
    yield from range(number)


def counted(number: int) -> bytes:
    return b"".join(b"%d\n" % n for n in range(number))


@pytest.mark.parametrize("number", [0, 1, HALF_WAY * 5])
def test_all_of_it_goes_to_the_first_who_comes(folder: Path, number: int) -> None:
    stage = Stage(counting(number))
    with StreamFile(stage.url) as file:
        assert file.read() == counted(number)
        assert not os.path.exists(path_of(stage.url)), "nobody else can connect"
    assert stage.end() is None
    assert not stage.left.is_set() and list(folder.iterdir()) == []


def test_a_plain_reader_gets_all_of_it_too(folder: Path) -> None:
    stage = Stage(counting(HALF_WAY))
    with connected(path_of(stage.url)) as sock:
        assert read_all(sock) == counted(HALF_WAY)
    assert stage.end() is None


def test_a_plain_reader_that_does_not_close_is_not_waited_for_long(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "LINGER", 0.01)
    stage = Stage(counting(3))
    with connected(path_of(stage.url)) as sock:
        assert read_all(sock) == counted(3)
        assert stage.end() is None


def test_an_item_does_not_wait_for_the_next(folder: Path) -> None:
    release = threading.Event()

    def items() -> Generator[bytes, None, None]:
        for n in range(3):
            yield b"%d" % n
            assert release.wait(WAIT)
            release.clear()

    stage = Stage(items())
    with StreamFile(stage.url) as file:
        for n in range(3):
            assert file.read1() == b"%d" % n
            release.set()
        assert file.read() == b""
    assert stage.end() is None


def test_a_generator_is_hardly_further_than_its_consumer(folder: Path) -> None:
    size, made = 10_000, 0

    def items() -> Generator[bytes, None, None]:
        nonlocal made
        for _ in range(64 * MEBI // size):
            made += size
            yield bytes(size)

    stage = Stage(items())
    read = 0
    with StreamFile(stage.url) as file:
        while data := file.read1():
            read += len(data)
            assert made - read < MEBI
    assert read == made
    assert stage.end() is None


def test_the_body_does_not_begin_before_somebody_is_there(folder: Path) -> None:
    begun: list[bool] = []

    def items() -> Generator[int, None, None]:
        begun.append(os.path.exists(path_of(stage.url)))
        yield 1

    stage = Stage(items())
    with StreamFile(stage.url) as file:
        assert file.read() == b"1\n"
    assert stage.end() is None and begun == [False]


def test_a_stream_that_nobody_wants_ends_unrun(folder: Path) -> None:
    begun: list[int] = []

    def items() -> Generator[int, None, None]:
        begun.append(1)
        yield 1

    stage = Stage(items(), expiry=0.01)
    error = stage.end()
    assert isinstance(error, NoConsumer) and str(error) == "nobody came for the stream within 0.01 seconds"
    assert not begun and list(folder.iterdir()) == []


def test_a_consumer_may_take_its_time(folder: Path) -> None:
    stage = Stage(counting(1), expiry=1e9)
    with StreamFile(stage.url) as file:
        assert file.read() == b"0\n"
    assert stage.end() is None


def test_who_came_in_time_is_served_though_we_were_stopped(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop that lasts past the expiry, told by a clock: the connection waits in the backlog by then."""
    producer = Producer(StreamPlace(expiry=60.0), None, lambda: None, lambda: None)
    times = itertools.chain([0.0], itertools.repeat(100.0))
    monkeypatch.setattr(streaming.time, "monotonic", lambda: next(times))
    with StreamFile(producer.url) as file, producer:
        producer.accept()
        producer.send_items(counting(2))
        producer.finish()
        assert file.read() == b"0\n1\n"


def test_strangers_are_sent_away(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uids = iter([4242, 77])
    monkeypatch.setattr("acomm.streamsocket.peer", lambda sock: (1, next(uids)))
    stage = Stage(counting(2), uid=77)
    with connected(path_of(stage.url)) as sock:
        assert read_all(sock) == b""
    with StreamFile(stage.url) as file:
        assert file.read() == b"0\n1\n"
    assert stage.end() is None


def test_out_of_descriptors_a_consumer_waits_a_moment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accept, failures = socket.socket.accept, iter([OSError(24, "Too many open files")])

    def failing(sock: socket.socket) -> Any:
        for error in failures:
            raise error
        return accept(sock)

    monkeypatch.setattr(streaming, "ACCEPT_PAUSE", 0.001)
    monkeypatch.setattr(socket.socket, "accept", failing)
    stage = Stage(counting(2))
    with StreamFile(stage.url) as file:
        assert file.read() == b"0\n1\n"
    assert stage.end() is None


@pytest.mark.parametrize("number", [0, 3, HALF_WAY])
def test_what_was_yielded_arrives_and_then_it_is_known_to_be_broken(folder: Path, number: int) -> None:
    def items() -> Generator[int, None, None]:
        yield from counting(number)
        raise ValueError("half-way")

    stage = Stage(items())
    got = bytearray()
    with StreamFile(stage.url) as file, pytest.raises(ConnectionLost, match="broken off"):
        while data := file.read1():
            got += data
    assert got == counted(number)
    assert isinstance(stage.end(), ValueError)


def test_a_consumer_that_leaves_is_noticed_at_a_write(folder: Path) -> None:
    closed = threading.Event()

    def items() -> Generator[bytes, None, None]:
        try:
            while True:
                yield bytes(1000)
        finally:
            closed.set()

    stage = Stage(items())
    with StreamFile(stage.url) as file:
        assert file.read(1)
    assert isinstance(stage.end(), ConsumerLeft) and closed.is_set()
    assert not stage.abandoned.is_set()


def test_a_consumer_that_leaves_is_noticed_between_writes(folder: Path) -> None:
    def items() -> Generator[bytes, None, None]:
        yield b"1"
        assert stage.left.wait(WAIT)
        yield b"2"
        raise AssertionError("there is nobody to yield to")

    stage = Stage(items())
    with StreamFile(stage.url) as file:
        assert file.read(1) == b"1"
    assert isinstance(stage.end(), ConsumerLeft)


def test_a_generator_that_ends_because_its_consumer_left_has_not_been_taken_whole(folder: Path) -> None:
    def items() -> Generator[bytes, None, None]:
        yield b"1"
        assert stage.left.wait(WAIT)

    stage = Stage(items())
    with StreamFile(stage.url) as file:
        assert file.read(1) == b"1"
    assert isinstance(stage.end(), ConsumerLeft)


async def test_an_asynchronous_generator_that_nobody_is_left_for_does_not_begin(folder: Path) -> None:
    left = threading.Event()

    async def items() -> Any:
        raise AssertionError("there is nobody to begin for")
        yield 1

    with Producer(StreamPlace(), None, left.set, lambda: None) as producer:
        StreamFile(producer.url).close()
        producer.accept()
        assert left.wait(WAIT)
        with pytest.raises(ConsumerLeft):
            await producer.send_async_items(items())


def test_a_call_that_does_not_end_when_its_consumer_has_left_is_given_up(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "GRACE", 0.01)

    def items() -> Generator[bytes, None, None]:
        yield b"1"
        assert stage.abandoned.wait(WAIT)

    stage = Stage(items())
    with StreamFile(stage.url) as file:
        assert file.read(1) == b"1"
    assert isinstance(stage.end(), ConsumerLeft)


def test_a_reader_that_takes_all_and_closes_has_not_left(folder: Path) -> None:
    for _ in range(50):
        stage = Stage(counting(100))
        with StreamFile(stage.url) as file:
            assert file.read() == counted(100)
        assert stage.end() is None and not stage.left.is_set()


def test_a_generator_that_does_not_let_itself_be_closed_is_an_error(folder: Path) -> None:
    def items() -> Generator[bytes, None, None]:
        with contextlib.suppress(GeneratorExit):
            while True:
                yield bytes(1000)
        yield b"one more"

    stage = Stage(items())
    with StreamFile(stage.url) as file:
        assert file.read(1)
    error = stage.end()
    assert isinstance(error, RuntimeError) and "ignored GeneratorExit" in str(error)


def test_nothing_is_left_open(folder: Path) -> None:
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for items in (counting(3), counting(HALF_WAY)):
        stage = Stage(items)
        with StreamFile(stage.url) as file:
            file.read(1)
        stage.end()
    Stage(counting(1), expiry=0.001).end()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert list(folder.iterdir()) == []


def test_a_place_for_a_group(folder_for_all: Path) -> None:
    stage = Stage(counting(1), folder=str(folder_for_all), mode=0o660, group=os.getgid())
    info = os.stat(path_of(stage.url))
    assert (info.st_mode & 0o777, info.st_gid) == (0o660, os.getgid())
    assert os.path.dirname(path_of(stage.url)) == str(folder_for_all)
    with StreamFile(stage.url) as file:
        assert file.read() == b"0\n"
    assert stage.end() is None and list(folder_for_all.iterdir()) == []


def test_a_group_that_cannot_be_given_the_socket(
    folder_for_all: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.chown", refuse)
    with pytest.raises(ConfigError, match="cannot give a stream to group 7: Operation not permitted"):
        Producer(StreamPlace(str(folder_for_all), 0o660, 7), None, lambda: None, lambda: None)
    assert list(folder_for_all.iterdir()) == []


async def test_an_asynchronous_generator_leaves_its_event_loop_to_others(folder: Path) -> None:
    """While the consumer reads nothing, the loop turns: it is what makes the consumer read."""

    async def items() -> Any:
        for _ in range(64):
            yield bytes(MEBI)

    producer = Producer(StreamPlace(), None, lambda: None, lambda: None)
    with StreamFile(producer.url) as file, producer:
        producer.accept()
        sending = asyncio.create_task(producer.send_async_items(items()))
        size = 0
        while size < 64 * MEBI:
            size += len(await asyncio.to_thread(file.read1))
        await asyncio.wait_for(sending, WAIT)
        producer.finish()
        assert file.read() == b""


# -- through a supervisor -------------------------------------------------------------------------------


class Caller:
    """Asks a supervisor for streams, from a test without an event loop."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self._runner = asyncio.Runner()
        self._tracker = Tracker()
        self._runner.run(self._tracker.start())

    def ask(self, task: str, *args: Any, **options: Any) -> Response:
        message = Request(task, list(args), **options)
        call = self._tracker.call(self.served.url, message, timeout=WAIT)
        return self._runner.run(call)

    def url(self, task: str, *args: Any, **options: Any) -> str:
        response = self.ask(task, *args, **options)
        assert response.error is None and response.result is None
        assert response.stream_url is not None
        return response.stream_url

    def open(self, task: str, *args: Any, **options: Any) -> StreamFile:
        return StreamFile(self.url(task, *args, **options), timeout=WAIT)

    def make(self, source: Any) -> str:
        """The URL of a stream of ours."""

        async def make() -> str:
            return await self._tracker.new_stream_unix(source)

        return self._runner.run(make())

    def result(self, task: str, *args: Any, **options: Any) -> Any:
        return self.ask(task, *args, **options).result_as(object)

    def close(self) -> None:
        self._runner.run(self._tracker.stop(0))
        self._runner.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("streaming")
    with Served(folder, "--workers", "1", modules=("streamtasks", "servedtasks")) as served:
        yield served


@pytest.fixture
def caller(served: Served) -> Iterator[Caller]:
    """With the supervisor idle before and after."""
    caller = Caller(served)
    yield caller
    caller.close()
    served.until(lambda stats: not stats["streams"]["open"] and not stats["assigned"])


def ends(served: Served) -> dict[str, int]:
    return {how: number for how, number in served.stats()["streams"].items() if how != "open"}


def one_more(before: dict[str, int], how: str) -> Callable[[dict[str, Any]], bool]:
    def condition(stats: dict[str, Any]) -> bool:
        after = {name: number for name, number in stats["streams"].items() if name != "open"}
        return after == {**before, how: before.get(how, 0) + 1}

    return condition


@pytest.mark.process
class TestItems:
    @pytest.mark.parametrize("task", ["count", "count_async"])
    def test_lines_in_order(self, caller: Caller, task: str) -> None:
        response = caller.ask(task, HALF_WAY)
        assert (response.result, response.error, response.stream_format) == (None, None, "lines")
        assert response.stream_url
        with StreamFile(response.stream_url) as file:
            assert file.read() == counted(HALF_WAY)

    @pytest.mark.parametrize("task", ["chunks", "chunks_async"])
    @pytest.mark.parametrize(("number", "size"), [(1000, 1000), (5, MEBI), (3, 0)])
    def test_bytes_as_they_are(self, caller: Caller, task: str, number: int, size: int) -> None:
        response = caller.ask(task, number, size)
        assert response.stream_format == "bytes" and response.stream_url
        with StreamFile(response.stream_url) as file:
            assert file.read() == b"".join(bytes([n % 256]) * size for n in range(number))

    def test_a_mixture(self, caller: Caller) -> None:
        with caller.open("mixed") as file:
            assert file.read() == b'{"a":[1,null]}\n"text\\n"\nraw bytes\nnull\n'

    def test_nothing_at_all(self, caller: Caller) -> None:
        with caller.open("nothing") as file:
            assert file.read() == b""

    def test_a_call_knows_itself_and_begins_when_its_consumer_comes(
        self, caller: Caller, started: Fifo
    ) -> None:
        url = caller.url("whose", started.path, id="an id of one's own")
        with pytest.raises(BlockingIOError):
            os.read(started._fd, 1)
        with StreamFile(url) as file:
            assert file.read() == b'"an id of one\'s own"\n'
        assert started.read()

    def test_an_item_does_not_wait_for_the_next(self, caller: Caller, started: Fifo, release: Fifo) -> None:
        with caller.open("step", started.path, release.path) as file:
            assert file.readline() == b'"first"\n'
            started.read()
            Path(release.path).write_text("\n")
            assert file.read() == b'"second"\n'

    def test_a_peer_of_the_original_finds_the_stream(self, served: Served, tmp_path: Path) -> None:
        with Hook(tmp_path / "hook") as hook:
            served.ask(request("plain", "count", hook.url, [3]))
            answer = hook.answer()
        assert list(answer) == ["error", "id", "result", "streamURL"]
        assert answer["streamURL"]["Scheme"] == "unix" and answer["result"] is None
        with connected(answer["streamURL"]["Path"]) as sock:
            assert read_all(sock) == b"0\n1\n2\n"

    def test_the_schema_tells(self, served: Served) -> None:
        schemas = {schema["name"]: schema for schema in served.verb("acomm.tasks")}
        assert schemas["count"]["stream"] == {"format": "lines", "items": {"type": "integer"}}
        assert schemas["chunks"]["stream"] == {"format": "bytes"}
        assert schemas["digest"]["stream"] is None


@pytest.mark.process
class TestRefusals:
    def test_a_request_whose_sender_could_not_learn_the_url(self, served: Served) -> None:
        answer = json.loads(served.ask(request("hookless", "count", None, [3], acomm=1)))
        assert answer["error_info"]["code"] == "bad_request"
        assert answer["error"].startswith("task count streams, and nobody could learn where")

    def test_a_generation_that_knows_no_streams(self, served: Served, tmp_path: Path) -> None:
        with Hook(tmp_path / "hook", raw=True) as hook:
            hook_url = {"Scheme": "unix", "Path": hook.path}
            message = {"id": "old", "task": "count", "responsehook": hook_url, "args": [3]}
            with connected(served.path) as sock:
                sock.sendall(json.dumps(message).encode())
                sock.shutdown(socket.SHUT_WR)
                assert read_all(sock) == b""
            assert "nobody could learn where" in json.loads(hook.next())["error"]

    def test_bad_arguments_are_the_acknowledgements(self, caller: Caller) -> None:
        with pytest.raises(BadArgs):
            caller.ask("count", "many")

    def test_the_id_of_a_stream_under_way(self, caller: Caller, started: Fifo) -> None:
        with caller.open("stubborn", started.path, id="taken") as file:
            assert file.readline() == b"1\n"
            started.read()
            with pytest.raises(Conflict):
                caller.ask("count", 3, id="taken")
            assert caller.result("acomm.cancel", "taken") is True


@pytest.mark.process
class TestBroken:
    @pytest.mark.parametrize(("how", "status"), [("yield", 0), ("return", 0), ("raise", 1)])
    def test_a_copy_that_a_generator_forks_sends_nothing(self, caller: Caller, how: str, status: int) -> None:
        with caller.open("forks", how) as file:
            assert file.read() == b"1\n%d\n" % (status << 8)

    @pytest.mark.parametrize("task", ["raises", "raises_async"])
    def test_a_generator_that_raises(self, served: Served, caller: Caller, task: str) -> None:
        before = ends(served)
        got = bytearray()
        with caller.open(task, HALF_WAY) as file, pytest.raises(ConnectionLost, match="broken off"):
            while data := file.read1():
                got += data
        assert got == counted(HALF_WAY)
        served.until(one_more(before, "task_error"))

    def test_it_is_logged_once(self, served: Served, caller: Caller) -> None:
        with caller.open("raises", 0, id="to be logged") as file, pytest.raises(ConnectionLost):
            file.read()
        served.until(lambda stats: not stats["streams"]["open"])
        (line,) = [line for line in served.stderr().splitlines() if "to be logged" in line]
        assert "ERROR" in line and "task raises" in line and "ValueError: half-way [task_error]" in line

    def test_an_item_that_json_cannot_express(self, served: Served, caller: Caller, started: Fifo) -> None:
        before = ends(served)
        got = bytearray()
        with caller.open("odd", started.path, id="an odd one") as file, pytest.raises(ConnectionLost):
            while data := file.read1():
                got += data
        assert got == b"1\n" and started.read()
        served.until(one_more(before, "task_error"))
        assert "item 1 of the stream cannot be sent: it.set is of type object" in served.stderr()

    def test_a_worker_that_dies(self, served: Served, caller: Caller) -> None:
        before = ends(served)
        got = bytearray()
        with caller.open("dies", HALF_WAY) as file, pytest.raises(ConnectionLost, match="broken off"):
            while data := file.read1():
                got += data
        assert counted(HALF_WAY).startswith(got)
        served.until(one_more(before, "worker_lost"))

    def test_a_limit_of_the_task(self, served: Served, caller: Caller, started: Fifo) -> None:
        before = ends(served)
        with caller.open("limited_stream", started.path) as file:
            assert file.readline() == b"1\n"
            with pytest.raises(ConnectionLost):
                file.read()
        served.until(one_more(before, "timeout"))

    def test_cancelled(self, served: Served, caller: Caller, started: Fifo) -> None:
        before = ends(served)
        with caller.open("stubborn", started.path, id="mine") as file:
            assert file.readline() == b"1\n"
            pid = int(started.read())
            assert caller.result("acomm.cancel", "mine") is True
            with pytest.raises(ConnectionLost):
                file.read()
        served.until(one_more(before, "cancelled"))
        assert caller.result("acomm.cancel", "mine") is False
        assert not psutil.pid_exists(pid)

    def test_cancelled_before_its_consumer_came(self, served: Served, caller: Caller) -> None:
        before = ends(served)
        url = caller.url("count", 3, id="unread")
        assert caller.result("acomm.cancel", "unread") is True
        served.until(one_more(before, "cancelled"))
        with pytest.raises(ConnectionLost, match="cannot reach"):
            StreamFile(url)
        assert not os.path.exists(path_of(url)) and not os.path.exists(path_of(url) + ".lock")


@pytest.mark.process
class TestAConsumerThatLeaves:
    @pytest.mark.parametrize("task", ["endless", "endless_wait", "attentive"])
    def test_the_generator_is_closed_and_its_worker_goes_on(
        self, served: Served, caller: Caller, started: Fifo, task: str
    ) -> None:
        before = ends(served)
        pid = caller.result("worker_pid")
        with caller.open(task, started.path) as file:
            assert file.read(1) == b"1"
            assert int(started.read()) == pid
        assert int(started.read()) == pid, "told as it was closed"
        served.until(one_more(before, "cancelled"))
        assert caller.result("worker_pid") == pid

    def test_one_that_does_not_stop_is_killed(self, served: Served, caller: Caller, started: Fifo) -> None:
        before = ends(served)
        with caller.open("stubborn", started.path) as file:
            assert file.read(1) == b"1"
            pid = int(started.read())
        served.until(one_more(before, "cancelled"))
        assert caller.result("worker_pid") != pid

    def test_it_is_no_error_in_the_log(self, served: Served, caller: Caller, started: Fifo) -> None:
        with caller.open("endless", started.path, id="left early") as file:
            assert file.read(1)
        served.until(lambda stats: not stats["streams"]["open"])
        (line,) = [line for line in served.stderr().splitlines() if "left early" in line]
        assert "INFO" in line and "the consumer of the stream left before its end" in line


@pytest.mark.process
def test_a_large_stream_in_constant_memory(served: Served, caller: Caller) -> None:
    def sizes() -> list[int]:
        return [psutil.Process(pid).memory_info().rss for pid in (served.pid, worker)]

    worker = caller.result("worker_pid")
    with caller.open("chunks", 64, MEBI) as file:  # what is allocated once
        file.read()
    before = sizes()
    read = 0
    with caller.open("chunks", 256, MEBI) as file:
        while data := file.read1():
            read += len(data)
    assert read == 256 * MEBI
    assert caller.result("worker_pid") == worker
    grown = [after - then for after, then in zip(sizes(), before, strict=True)]
    assert max(grown) < 16 * MEBI, grown


@pytest.mark.process
class TestStreamsOfRequests:
    def test_a_task_reads_the_stream_of_its_request(self, caller: Caller) -> None:
        data = os.urandom(3 * MEBI)
        got = caller._runner.run(self._digest(caller, data))
        assert got.result_as(object) == [len(data), hashlib.sha256(data).hexdigest()]

    async def _digest(self, caller: Caller, source: Any) -> Response:
        url = await caller._tracker.new_stream_unix(source)
        message = Request("digest", stream_url=url)
        return await caller._tracker.call(caller.served.url, message, timeout=WAIT)

    def test_one_that_breaks_is_no_shorter_one(self, caller: Caller) -> None:
        def source() -> Iterator[bytes]:
            yield bytes(MEBI)
            raise ValueError("no more")

        error = caller._runner.run(self._digest(caller, source())).error
        assert isinstance(error, TaskError) and error.type == "ConnectionLost"
        assert "was broken off" in str(error)

    def test_one_that_is_not_there(self, caller: Caller, tmp_path: Path) -> None:
        error = caller.ask("digest", stream_url=f"unix://{tmp_path}/missing").error
        assert isinstance(error, TaskError) and error.type == "ConnectionLost"
        assert "cannot reach the stream" in str(error)

    def test_none(self, caller: Caller) -> None:
        error = caller.ask("digest").error
        assert isinstance(error, TaskError) and error.type == "LookupError"
        assert str(error).endswith("the request brought no stream: its sender must set a stream URL")

    def test_what_a_call_opened_is_closed_with_it(self, caller: Caller) -> None:
        before = caller.result("open_files")

        async def call() -> Response:
            url = await caller._tracker.new_stream_unix(b"line\n" * MEBI)
            message = Request("first_line", stream_url=url)
            return await caller._tracker.call(caller.served.url, message, timeout=WAIT)

        assert caller._runner.run(call()).result_as(str) == "line\n"
        assert caller.result("open_files") == before

    def test_a_stream_of_a_stream(self, caller: Caller) -> None:
        async def call() -> bytes:
            url = await caller._tracker.new_stream_unix(b"one\ntwo\n" * 100_000)
            message = Request("upper", stream_url=url)
            response = await caller._tracker.call(caller.served.url, message, timeout=WAIT)
            assert response.stream_url
            dest = io.BytesIO()
            await acomm.stream(dest, response.stream_url)
            return dest.getvalue()

        assert caller._runner.run(call()) == b"ONE\nTWO\n" * 100_000


@pytest.mark.process
class TestProgress:
    def test_of_calls_under_way(
        self, served: Served, caller: Caller, started: Fifo, release: Fifo, tmp_path: Path
    ) -> None:
        with Hook(tmp_path / "hook") as hook:
            served.ask(request("runs", "noted", hook.url, [started.path, release.path]))
            started.read()
            served.ask(request("waits", "add", hook.url, [1, 2]))
            told = served.verb("acomm.progress", ["runs", "waits", "unknown"])
            assert set(told) == {"runs", "waits"}
            assert told["runs"].pop("seconds") >= 0
            assert told["runs"] == {
                "state": "running", "task": "noted", "done": 3.0, "total": 10.0, "note": "häuser"
            }  # fmt: skip
            assert told["waits"] == {
                "state": "queued", "task": "add", "seconds": 0.0, "done": 0.0, "total": 0.0, "note": ""
            }  # fmt: skip
            assert [worker["note"] for worker in served.stats()["workers"]] == ["häuser"]
            Path(release.path).write_text("\n")
            assert {hook.answer()["id"], hook.answer()["id"]} == {"runs", "waits"}
        assert served.verb("acomm.progress", ["runs", "waits"]) == {}

    def test_of_a_stream(self, served: Served, caller: Caller, started: Fifo) -> None:
        url = caller.url("stubborn", started.path, id="a stream")
        assert served.verb("acomm.progress", ["a stream"])["a stream"]["state"] == "streaming"
        with StreamFile(url) as file:
            file.read(1)
            started.read()
            assert served.verb("acomm.progress", {"ids": ["a stream"]})["a stream"]["task"] == "stubborn"
            assert served.stats()["streams"]["open"] == 1
            assert caller.result("acomm.cancel", "a stream")

    def test_a_note_of_noise_is_one_safe_line(
        self, served: Served, caller: Caller, started: Fifo, release: Fifo, tmp_path: Path
    ) -> None:
        with Hook(tmp_path / "hook") as hook:
            served.ask(request("noise", "note_of_noise", hook.url, [started.path, release.path]))
            started.read()
            note = served.verb("acomm.progress", ["noise"])["noise"]["note"]
            assert note.startswith("\\x1b[31m?xxx") and len(note) < 120
            Path(release.path).write_text("\n")
            hook.answer()

    @pytest.mark.parametrize("args", [[1], [["a", 2]], {"ids": "a", "b": 1}, 7, ["x"] * 10_001])
    def test_what_is_no_list_of_ids(self, caller: Caller, args: Any) -> None:
        message = Request("acomm.progress", args)
        with pytest.raises(BadArgs, match="a list of ids"):
            caller._runner.run(caller._tracker.call(caller.served.url, message, timeout=WAIT))


@pytest.mark.process
class TestEnds:
    """Of a supervisor that has streams: in a process of its own, or with settings of its own."""

    @pytest.fixture
    async def tracker(self) -> AsyncIterator[Tracker]:
        async with Tracker() as tracker:
            yield tracker

    async def url(self, tracker: Tracker, supervisor: Supervisor, task: str, *args: Any) -> str:
        response = await tracker.call(supervisor.url, Request(task, list(args)), timeout=WAIT)
        assert response.stream_url is not None
        return response.stream_url

    async def test_a_stream_that_nobody_wants(self, tmp_path: Path, tracker: Tracker) -> None:
        socket = tmp_path / "s"
        async with Supervisor("streamtasks", workers=1, socket=socket, stream_expiry=0.01) as supervisor:
            await self.url(tracker, supervisor, "count", 1)
            while not supervisor.stats()["streams"].get("timeout"):
                await asyncio.sleep(0)
            assert supervisor.stats()["streams"] == {"open": 0, "timeout": 1}

    async def test_a_stop_waits_for_streams(
        self, tmp_path: Path, tracker: Tracker, started: Fifo, release: Fifo
    ) -> None:
        supervisor = Supervisor("streamtasks", workers=1, socket=tmp_path / "s")
        await supervisor.start()
        url = await self.url(tracker, supervisor, "step", started.path, release.path)
        file = await asyncio.to_thread(StreamFile, url)
        await asyncio.to_thread(started.read)
        stopping = asyncio.create_task(supervisor.stop(WAIT))
        while not supervisor.draining:
            await asyncio.sleep(0)
        Path(release.path).write_text("\n")
        assert await asyncio.to_thread(file.read) == b'"first"\n"second"\n'
        file.close()
        await asyncio.wait_for(stopping, WAIT)
        assert supervisor._stream_ends == {"ok": 1}

    async def test_a_stop_breaks_off_those_that_last(
        self, tmp_path: Path, tracker: Tracker, started: Fifo
    ) -> None:
        supervisor = Supervisor("streamtasks", workers=1, socket=tmp_path / "s")
        await supervisor.start()
        url = await self.url(tracker, supervisor, "stubborn", started.path)
        file = await asyncio.to_thread(StreamFile, url)
        await asyncio.to_thread(started.read)
        await asyncio.wait_for(supervisor.stop(0.01), WAIT)
        with file, pytest.raises(ConnectionLost):
            await asyncio.to_thread(file.read)
        assert supervisor._stream_ends == {"shutting_down": 1}

    async def test_a_fault_of_the_pool_leaves_no_stream_behind(
        self, tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async with Supervisor("streamtasks", workers=1, socket=tmp_path / "s") as supervisor:
            process_events, faults = supervisor.pool.process_events, [1]

            def failing() -> Any:
                outcomes = process_events()
                if outcomes and faults:
                    faults.pop()
                    raise RuntimeError("a fault")
                return outcomes

            monkeypatch.setattr(supervisor.pool, "process_events", failing)
            response = await tracker.call(supervisor.url, Request("count", [1]), timeout=WAIT)
            assert response.error is not None and "the supervisor failed" in str(response.error)
            assert supervisor.stats()["streams"] == {"open": 0}


@pytest.mark.process
class TestOtherUsers:
    """Other users are processes that become them once they have loaded all that they need."""

    BECOME = "os.setgroups([]); os.setgid({gid}); os.setuid({uid})\n"
    CALLER = (
        "import asyncio, io, os, sys\n"
        "import acomm, acomm.messages, acomm.streams, acomm.tracker, acomm.httpegress\n"
        + BECOME
        + "async def main():\n"
        "    async with acomm.Tracker() as tracker:\n"
        "        message = acomm.Request('count', [3])\n"
        "        response = await tracker.call(sys.argv[1], message, timeout=20)\n"
        "        print(response.stream_url, flush=True)\n"
        "        sys.stdin.readline()\n"
        "        dest = io.BytesIO()\n"
        "        await acomm.stream(dest, response.stream_url)\n"
        "        print(dest.getvalue())\n"
        "asyncio.run(main())\n"
    )
    STRANGER = (
        "import os, socket, sys\n" + BECOME + "with socket.socket(socket.AF_UNIX) as sock:\n"
        "    sock.connect(sys.argv[1])\n"
        "    print(sock.recv(100))\n"
    )

    def command(self, script: str, uid: int, argument: str) -> list[str]:
        return [sys.executable, "-c", script.format(uid=uid, gid=NOBODY), argument]

    @as_root
    @pytest.mark.parametrize("options", [("--allow-uid", str(NOBODY)), ("--allow-group", str(NOBODY))])
    def test_who_asked_may_read_and_nobody_else(self, folder_for_all: Path, options: tuple[str, str]) -> None:
        runtime = folder_for_all / "runtime"
        runtime.mkdir()
        os.chown(runtime, NOBODY, NOBODY)
        with (
            Served(folder_for_all, *options, modules=("streamtasks",)) as served,
            subprocess.Popen(
                self.command(self.CALLER, NOBODY, served.url),
                env=environment(runtime),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as process,
        ):
            assert process.stdout is not None
            path = path_of(process.stdout.readline().strip())
            assert os.path.dirname(path) == str(folder_for_all)
            # One who may connect to the supervisor, and to the file, but has not asked.
            stranger = subprocess.run(
                self.command(self.STRANGER, NOBODY - 1, path),
                env=environment(runtime),
                stdout=subprocess.PIPE,
                text=True,
                timeout=WAIT,
                check=True,
            )
            assert stranger.stdout == "b''\n"
            told, _ = process.communicate("\n", WAIT)
            assert told == "b'0\\n1\\n2\\n'\n"
            served.until(lambda stats: stats["streams"] == {"open": 0, "ok": 1})
            assert not os.path.exists(path)
            assert f"refused a stream to uid {NOBODY - 1}" in served.stderr()
