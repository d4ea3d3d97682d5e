"""Streams: whole or known to be broken, in constant memory, for one consumer, and nothing left behind."""

from __future__ import annotations

import array
import asyncio
import contextlib
import gc
import gzip
import io
import itertools
import json
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pytest
from aiohttp import web
from serving import no_descriptors

from acomm.errors import BadRequest, Busy, ConfigError, ConnectionLost, Forbidden, TooLarge
from acomm.streams import StreamFile, StreamProxy, UnixStreams, decline, open_stream, stream

BOTH_LOOPS = True

MEBI = 1024 * 1024
DATA = random.Random(7).randbytes(MEBI)  # several times what a socket holds

as_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root to be somebody else")


@pytest.fixture
def folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime folder."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder))
    return short_folder / "acomm"


@pytest.fixture
async def streams(folder: Path) -> AsyncIterator[UnixStreams]:
    owner = UnixStreams()
    yield owner
    await owner.close()
    assert len(owner) == 0
    assert list(folder.iterdir()) == []


def path_of(url: str) -> str:
    return url.removeprefix("unix://")


def counts(streams: UnixStreams) -> dict[str, int]:
    found = {name: getattr(streams, name) for name in ("finished", "expired", "abandoned", "broken")}
    return {name: count for name, count in found.items() if count}


async def fetch(url: str, **options: Any) -> bytes:
    dest = io.BytesIO()
    assert await stream(dest, url, **options) == len(dest.getvalue())
    return dest.getvalue()


async def fetch_file(url: str) -> bytes:
    def read() -> bytes:
        with StreamFile(url) as file:
            return file.read()

    return await asyncio.to_thread(read)


async def fetch_plainly(url: str) -> bytes:
    """As a reader that knows nothing of our byte."""
    reader, writer = await asyncio.open_unix_connection(path_of(url))
    data = await reader.read()
    writer.close()
    await writer.wait_closed()
    return data


READERS = [fetch, fetch_file, fetch_plainly]
OUR_READERS = [fetch, fetch_file]


# -- sources --------------------------------------------------------------------------------------------


def from_bytes() -> Any:
    return DATA


def from_bytearray() -> Any:
    return bytearray(DATA)


def from_memoryview() -> Any:
    return memoryview(array.array("I", DATA))


def from_bytes_io() -> Any:
    return io.BytesIO(DATA)


def from_file() -> Any:
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(DATA)
    file.seek(0)
    return file


def from_raw_file() -> Any:
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
    file.write(DATA)
    file.seek(0)
    return file


def from_pipe() -> Any:
    reading, writing = os.pipe()

    def fill() -> None:
        with open(writing, "wb") as file:
            file.write(DATA)

    threading.Thread(target=fill).start()
    return open(reading, "rb")


def from_list() -> Any:
    return [DATA[:10], b"", DATA[10:100_000], bytearray(DATA[100_000:])]


def from_generator() -> Any:
    return (DATA[start : start + 1000] for start in range(0, len(DATA), 1000))


def from_tiny_pieces() -> Any:
    return (DATA[start : start + 16] for start in range(0, len(DATA), 16))


def from_a_reused_buffer() -> Any:
    buffer = bytearray(4096)
    for start in range(0, len(DATA), 4096):
        buffer[:] = DATA[start : start + 4096]
        yield memoryview(buffer)


async def from_async_generator() -> Any:
    for start in range(0, len(DATA), 100_000):
        await asyncio.sleep(0)
        yield DATA[start : start + 100_000]


def from_stream_reader() -> Any:
    reader = asyncio.StreamReader()
    reader.feed_data(DATA)
    reader.feed_eof()
    return reader


def from_huge_piece() -> Any:
    yield DATA


SOURCES: list[Callable[[], Any]] = [
    from_bytes,
    from_bytearray,
    from_memoryview,
    from_bytes_io,
    from_file,
    from_raw_file,
    from_pipe,
    from_list,
    from_generator,
    from_tiny_pieces,
    from_a_reused_buffer,
    from_huge_piece,
    from_async_generator,
    from_stream_reader,
]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("make", SOURCES)
async def test_every_kind_of_source_reaches_every_reader_whole(
    streams: UnixStreams, folder: Path, make: Callable[[], Any], read: Any
) -> None:
    source = make()
    url = await streams.new_stream_unix(source)
    assert len(streams) == 1
    assert await read(url) == DATA
    await streams.drained()
    assert counts(streams) == {"finished": 1}
    assert list(folder.iterdir()) == []
    if isinstance(source, io.IOBase):
        assert source.closed


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("source", [b"", io.BytesIO, list])
async def test_an_empty_stream_is_a_stream(streams: UnixStreams, source: Any, read: Any) -> None:
    url = await streams.new_stream_unix(source() if callable(source) else source)
    assert await read(url) == b""
    await streams.drained()
    assert counts(streams) == {"finished": 1}


@pytest.mark.parametrize("source", ["text", io.StringIO("text"), 5, None])
async def test_what_is_no_source_is_refused_and_leaves_nothing(
    streams: UnixStreams, folder: Path, source: Any
) -> None:
    folder.mkdir(exist_ok=True)
    with pytest.raises(TypeError):
        await streams.new_stream_unix(source)
    assert len(streams) == 0
    await streams.drained()


async def test_a_pipe_is_passed_on_as_it_comes(streams: UnixStreams) -> None:
    reading, writing = os.pipe()
    url = await streams.new_stream_unix(os.fdopen(reading, "rb"))
    async with contextlib.aclosing(open_stream(url)) as chunks:
        for number in range(10):
            os.write(writing, b"%d" % number)
            assert await anext(chunks) == b"%d" % number
        os.close(writing)
        assert await anext(chunks, None) is None


async def test_a_source_is_not_touched_before_somebody_wants_it(streams: UnixStreams) -> None:
    began = threading.Event()

    def source() -> Generator[bytes, None, None]:
        began.set()
        yield b"x"

    url = await streams.new_stream_unix(source())
    await asyncio.sleep(0)
    assert not began.is_set()
    assert await fetch(url) == b"x"
    assert began.is_set()


async def test_a_generator_runs_in_one_thread_that_is_not_the_loops(streams: UnixStreams) -> None:
    threads: list[int] = []

    def source() -> Generator[bytes, None, None]:
        try:
            for _ in range(100):
                threads.append(threading.get_ident())
                yield bytes(10_000)
        finally:
            threads.append(threading.get_ident())

    assert len(await fetch(await streams.new_stream_unix(source()))) == 1_000_000
    await streams.drained()
    assert len(threads) == 101
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_a_producer_is_never_far_ahead_of_its_consumer(streams: UnixStreams) -> None:
    produced = 0

    def source() -> Generator[bytes, None, None]:
        nonlocal produced
        for _ in range(4096):
            produced += 8192
            yield bytes(8192)

    read = furthest = 0
    async with contextlib.aclosing(open_stream(await streams.new_stream_unix(source()))) as chunks:
        async for chunk in chunks:
            read += len(chunk)
            furthest = max(furthest, produced - read)
    assert read == produced == 32 * MEBI
    assert furthest < 2 * MEBI


async def test_other_tasks_have_their_turn(streams: UnixStreams) -> None:
    """Neither the source nor the socket makes the stream wait here."""
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def source() -> AsyncGenerator[bytes, None]:
        for _ in range(100):
            yield b"x"

    url = await streams.new_stream_unix(source())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path_of(url))
        client.send(b"\n")
        task = asyncio.get_running_loop().create_task(others())
        await streams.drained()
    task.cancel()
    assert turns >= 100


# -- broken streams -------------------------------------------------------------------------------------


def fails_in_a_generator() -> Any:
    yield DATA
    raise ValueError("no more")


def fails_at_once() -> Any:
    yield from (1 // 0 for _ in "x")


def exits() -> Any:
    yield DATA
    sys.exit(0)


class StopsAsync:
    """Raises what an asynchronous iterator ends with."""

    def read(self, size: int) -> bytes:
        raise StopAsyncIteration


async def fails_in_an_async_generator() -> Any:
    yield DATA
    raise ValueError("no more")


async def exits_on_the_loop() -> Any:
    try:
        yield DATA
        sys.exit(0)
    finally:
        sys.exit(1)


async def is_cancelled_within() -> Any:
    yield DATA
    raise asyncio.CancelledError


async def yields_text() -> Any:
    yield DATA
    yield "text"


def yields_numbers() -> Any:
    yield DATA
    yield 5


def fails_in_a_stream_reader() -> Any:
    reader = asyncio.StreamReader()
    reader.feed_data(DATA)
    reader.set_exception(ConnectionResetError())
    return reader


FAILURES: list[Callable[[], Any]] = [
    fails_in_a_generator,
    fails_at_once,
    exits,
    StopsAsync,
    fails_in_an_async_generator,
    exits_on_the_loop,
    is_cancelled_within,
    yields_text,
    yields_numbers,
    fails_in_a_stream_reader,
]


@pytest.mark.parametrize("read", OUR_READERS)
@pytest.mark.parametrize("make", FAILURES)
async def test_a_source_that_fails_breaks_the_stream_for_our_readers(
    streams: UnixStreams, make: Callable[[], Any], read: Any
) -> None:
    url = await streams.new_stream_unix(make())
    with pytest.raises(ConnectionLost, match="was broken off"):
        await read(url)
    await streams.drained()
    assert counts(streams) == {"broken": 1}


async def test_what_came_before_the_failure_is_delivered_first(streams: UnixStreams) -> None:
    dest = io.BytesIO()
    with pytest.raises(ConnectionLost):
        await stream(dest, await streams.new_stream_unix(fails_in_a_generator()))
    assert dest.getvalue() == DATA


async def test_a_stream_of_a_broken_stream_is_no_fault_of_ours(
    streams: UnixStreams, caplog: pytest.LogCaptureFixture
) -> None:
    url = await streams.new_stream_unix(open_stream("unix:///nowhere/s.sock"))
    with pytest.raises(ConnectionLost):
        await stream(io.BytesIO(), url)
    await streams.drained()
    assert counts(streams) == {"broken": 1}
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("WARNING", None)]


@pytest.mark.parametrize("read", OUR_READERS)
async def test_no_order_of_events_makes_a_failure_look_like_an_end(streams: UnixStreams, read: Any) -> None:
    """The byte may come before or after the failure."""
    for _ in range(200):
        url = await streams.new_stream_unix(fails_at_once())
        with pytest.raises(ConnectionLost):
            await read(url)
    await streams.drained()
    assert counts(streams) == {"broken": 200}


@pytest.mark.parametrize("read", OUR_READERS)
async def test_no_order_of_events_makes_an_end_look_like_a_failure(streams: UnixStreams, read: Any) -> None:
    for number in range(200):
        assert await read(await streams.new_stream_unix(b"%d" % number)) == b"%d" % number
    await streams.drained()
    assert counts(streams) == {"finished": 200}


async def test_a_reader_that_sends_its_byte_late_is_waited_for(streams: UnixStreams) -> None:
    url = await streams.new_stream_unix(b"data")
    with socket.socket(socket.AF_UNIX) as late:
        late.connect(path_of(url))
        received = b""
        while chunk := await asyncio.to_thread(late.recv, 100):
            received += chunk
        assert received == b"data"
        assert len(streams) == 1
        late.send(b"\n")
        await streams.drained()
        assert late.recv(100) == b""
    assert counts(streams) == {"finished": 1}


async def test_a_plain_reader_sees_a_broken_stream_end(streams: UnixStreams) -> None:
    """It cannot be told; this is what the documentation promises, and no more."""
    url = await streams.new_stream_unix(fails_in_a_generator())
    assert await fetch_plainly(url) == DATA


PRODUCER = """
import asyncio, sys
from acomm.streams import UnixStreams

async def endless():
    while True:
        yield bytes(1000)
        await asyncio.sleep(0 if sys.argv[1] == "busy" else 3600)

async def main():
    print(await UnixStreams().new_stream_unix(endless()), flush=True)
    await asyncio.sleep(3600)

asyncio.run(main())
"""


@pytest.mark.process
@pytest.mark.parametrize("how", ["busy", "silent"])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_a_killed_producer_is_noticed(folder: Path, kind: str, how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PRODUCER, how], stdout=subprocess.PIPE, text=True
    ) as producer:
        assert producer.stdout is not None
        url = (await asyncio.to_thread(producer.stdout.readline)).strip()
        with pytest.raises(ConnectionLost, match="was broken off"):
            if kind == "async":
                async with contextlib.aclosing(open_stream(url)) as chunks:
                    await anext(chunks)
                    producer.send_signal(signal.SIGKILL)
                    async for _ in chunks:
                        pass
            else:
                with StreamFile(url) as file:
                    assert await asyncio.to_thread(file.read, 1000) == bytes(1000)
                    producer.send_signal(signal.SIGKILL)
                    await asyncio.to_thread(file.read)
        with pytest.raises(ConnectionLost, match="cannot reach"):
            await fetch(url)


async def test_a_producer_that_never_reads_our_byte_is_not_thought_broken(folder: Path) -> None:
    """The original writes and closes. A byte that it leaves unread would look like a failure."""
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "acomm123.sock"))
        listener.listen()

        def produce() -> None:
            conn, _ = listener.accept()
            with conn:
                conn.sendall(DATA)

        for read in OUR_READERS:
            thread = threading.Thread(target=produce)
            thread.start()
            assert await read(f"unix://{folder}/acomm123.sock") == DATA
            await asyncio.to_thread(thread.join)


# -- consumers ------------------------------------------------------------------------------------------


def announced(event: asyncio.Event) -> Callable[[], object]:
    loop = asyncio.get_running_loop()
    return lambda: loop.call_soon_threadsafe(event.set)


def endless(closed: Callable[[], object]) -> Generator[bytes, None, None]:
    try:
        while True:
            yield bytes(10_000)
    finally:
        closed()


async def endless_async(closed: Callable[[], object]) -> AsyncGenerator[bytes, None]:
    try:
        while True:
            yield bytes(10_000)
    finally:
        closed()


async def silent(closed: Callable[[], object]) -> AsyncGenerator[bytes, None]:
    try:
        yield b"first"
        await asyncio.Event().wait()
    finally:
        closed()


@pytest.mark.parametrize("byte", [b"", b"\n"])
@pytest.mark.parametrize("source", [endless, endless_async, silent])
async def test_a_consumer_that_leaves_ends_the_source(streams: UnixStreams, source: Any, byte: bytes) -> None:
    closed = asyncio.Event()
    url = await streams.new_stream_unix(source(announced(closed)))
    reader, writer = await asyncio.open_unix_connection(path_of(url))
    writer.write(byte)
    assert await reader.read(5)
    writer.close()
    await closed.wait()
    await streams.drained()
    assert counts(streams) == {"abandoned": 1}


async def test_a_reader_of_ours_that_breaks_off_ends_the_source(streams: UnixStreams) -> None:
    url = await streams.new_stream_unix(endless(lambda: None))
    async with contextlib.aclosing(open_stream(url)) as chunks:
        await anext(chunks)
    await streams.drained()
    url = await streams.new_stream_unix(endless(lambda: None))
    with StreamFile(url) as file:
        assert await asyncio.to_thread(file.read, 10) == bytes(10)
    await streams.drained()
    assert counts(streams) == {"abandoned": 2}


async def test_a_consumer_that_closes_its_half_still_gets_everything(streams: UnixStreams) -> None:
    """As socat and nc do when their own input ends."""
    url = await streams.new_stream_unix(from_async_generator())
    reader, writer = await asyncio.open_unix_connection(path_of(url))
    writer.write_eof()
    assert await reader.read() == DATA
    writer.close()
    await streams.drained()
    assert counts(streams) == {"finished": 1}


async def test_without_a_consumer_a_stream_expires(streams: UnixStreams, folder: Path) -> None:
    file, gen, agen = io.BytesIO(DATA), from_generator(), from_async_generator()
    urls = [await streams.new_stream_unix(source, expiry=0.01) for source in (file, gen, agen, DATA)]
    await streams.drained()
    assert counts(streams) == {"expired": 4}
    assert file.closed
    assert gen.gi_frame is None
    assert [chunk async for chunk in agen] == []
    assert list(folder.iterdir()) == []
    with pytest.raises(ConnectionLost, match="cannot reach"):
        await fetch(urls[0])


async def test_a_consumer_in_time_is_served_however_long_it_takes(streams: UnixStreams) -> None:
    go_on = asyncio.Event()
    expired = asyncio.Event()

    async def source() -> AsyncGenerator[bytes, None]:
        yield b"first "
        await go_on.wait()
        yield b"last"

    url = await streams.new_stream_unix(source(), expiry=0.05)
    asyncio.get_running_loop().call_later(0.06, expired.set)
    async with contextlib.aclosing(open_stream(url)) as chunks:
        assert await anext(chunks) == b"first "
        await expired.wait()
        go_on.set()
        assert await anext(chunks) == b"last"


async def test_a_consumer_in_time_is_served_even_if_the_timer_is_seen_first(streams: UnixStreams) -> None:
    """As when the process was stopped for longer than that."""
    url = await streams.new_stream_unix(b"data")
    (waiting,) = streams._streams
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path_of(url))
        waiting._time_out()
        client.send(b"\n")
        await streams.drained()
        assert client.recv(100) == b"data"
    assert counts(streams) == {"finished": 1}


async def test_only_the_first_connection_is_served(streams: UnixStreams) -> None:
    url = await streams.new_stream_unix(DATA)
    # Both are in the socket's queue before the event loop has had a look.
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        first.connect(path_of(url))
        second.connect(path_of(url))
        received = b""
        while chunk := await asyncio.to_thread(first.recv, MEBI):
            received += chunk
        assert received == DATA
        with pytest.raises(ConnectionResetError):
            second.recv(1)
    with pytest.raises(ConnectionLost, match="cannot reach"):
        await fetch(url)
    with pytest.raises(ConnectionLost, match="cannot reach"):
        await fetch_file(url)


async def test_of_many_readers_exactly_one_has_it(streams: UnixStreams) -> None:
    url = await streams.new_stream_unix(DATA)
    outcomes = await asyncio.gather(*(fetch(url) for _ in range(20)), return_exceptions=True)
    assert outcomes.count(DATA) == 1
    assert sum(isinstance(outcome, ConnectionLost) for outcome in outcomes) == 19


async def test_the_socket_is_ours_alone(streams: UnixStreams) -> None:
    url = await streams.new_stream_unix(b"x")
    assert stat.S_IMODE(os.stat(path_of(url)).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(Path(path_of(url)).parent).st_mode) == 0o700


STRANGER = """
import os, socket, sys
os.setresuid(65534, 65534, 65534)
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    try:
        sock.sendall(b"x")
        print(sum(map(len, iter(lambda: sock.recv(100), b""))))
    except ConnectionError:
        print("refused")
"""


@pytest.mark.process
@as_root
@pytest.mark.parametrize("allowed", [False, True])
async def test_another_user_gets_nothing_unless_allowed(folder: Path, allowed: bool) -> None:
    folder.mkdir(mode=0o755)
    folder.parent.chmod(0o755)
    async with contextlib.AsyncExitStack() as stack:
        streams = UnixStreams(mode=0o666, allow_uids=[65534] if allowed else [])
        stack.push_async_callback(streams.close)
        url = await streams.new_stream_unix(b"secret")
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-S", "-c", STRANGER, path_of(url), stdout=subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert output == (b"6\n" if allowed else b"refused\n")
        if not allowed:  # it is still there for whoever may have it
            assert await fetch(url) == b"secret"
        await streams.drained()
        assert counts(streams) == {"finished": 1}


# -- the owner ------------------------------------------------------------------------------------------


async def test_close_ends_what_waits_and_what_runs(streams: UnixStreams) -> None:
    closed = asyncio.Event()
    waiting = io.BytesIO(DATA)
    await streams.new_stream_unix(waiting)
    url = await streams.new_stream_unix(silent(announced(closed)))
    async with contextlib.aclosing(open_stream(url)) as chunks:
        assert await anext(chunks) == b"first"
        await streams.close()
        assert closed.is_set()
        assert waiting.closed
        with pytest.raises(ConnectionLost, match="was broken off"):
            await anext(chunks)
    assert counts(streams) == {"expired": 1, "broken": 1}
    assert repr(streams) == "<UnixStreams 0 open, 0 finished, 1 expired, 0 abandoned, 1 broken>"
    with pytest.raises(RuntimeError, match="closed"):
        await streams.new_stream_unix(b"x")


async def test_close_right_after_a_consumer_has_come_loses_nothing(streams: UnixStreams) -> None:
    for _ in range(5):
        await streams.new_stream_unix(endless(lambda: None))
    clients = []
    for waiting in streams._streams:
        client = socket.socket(socket.AF_UNIX)
        client.connect(waiting._bound.path)
        clients.append(client)
        waiting._accept()
    await streams.close()
    assert len(streams) == 0
    assert counts(streams) == {"broken": 5}
    for client in clients:
        client.close()


async def test_close_does_not_wait_for_a_source_that_blocks(folder: Path) -> None:
    streams = UnixStreams()
    reading, writing = os.pipe()
    url = await streams.new_stream_unix(os.fdopen(reading, "rb"))
    async with contextlib.aclosing(open_stream(url)) as chunks:
        os.write(writing, b"x")
        assert await anext(chunks) == b"x"
        await streams.close(timeout=0.01)
        with pytest.raises(ConnectionLost):  # the consumer knows at once all the same
            await anext(chunks)
    assert len(streams) == 1
    os.close(writing)  # this wakes it
    await streams.drained()


async def test_too_many_streams_are_refused(folder: Path) -> None:
    streams = UnixStreams(max_open=2)
    urls = [await streams.new_stream_unix(b"x") for _ in range(2)]
    source = io.BytesIO(b"mine")
    with pytest.raises(Busy) as refusal:
        await streams.new_stream_unix(source)
    assert refusal.value.retry_after == 1.0
    assert not source.closed
    for url in urls:
        assert await fetch(url) == b"x"
    await streams.drained()
    await streams.new_stream_unix(source)
    await streams.close()


async def test_a_folder_of_the_callers_choice(folder: Path) -> None:
    streams = UnixStreams(folder / "deeper")
    url = await streams.new_stream_unix(b"x")
    assert Path(path_of(url)).parent == folder / "deeper"
    assert await fetch(url) == b"x"
    await streams.close()
    (folder / "open").mkdir()
    (folder / "open").chmod(0o777)
    with pytest.raises(ConfigError):
        await UnixStreams(folder / "open").new_stream_unix(b"x")


async def test_a_source_that_cannot_be_closed_does_no_harm(
    streams: UnixStreams, caplog: pytest.LogCaptureFixture
) -> None:
    class Stubborn(io.BytesIO):
        def close(self) -> None:
            if not self.closed:
                super().close()
                raise OSError("disk full")

    assert await fetch(await streams.new_stream_unix(Stubborn(DATA))) == DATA
    await streams.drained()
    assert counts(streams) == {"finished": 1}
    assert "could not be closed" in caplog.text


@pytest.mark.parametrize("expiry", [0, -1, float("nan")])
async def test_an_expiry_that_makes_no_sense_is_refused(
    streams: UnixStreams, folder: Path, expiry: float
) -> None:
    folder.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="expiry"):
        await streams.new_stream_unix(b"x", expiry=expiry)


async def test_a_process_out_of_descriptors_serves_its_consumer_later(
    streams: UnixStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = itertools.count()

    class Full:
        def __init__(self, sock: socket.socket) -> None:
            self.sock = sock

        def accept(self) -> Any:
            if next(refusals) < 2:
                raise OSError(24, "Too many open files")
            return self.sock.accept()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sock, name)

    monkeypatch.setattr("acomm.unixstreams.ACCEPT_PAUSE", 0.001)
    url = await streams.new_stream_unix(b"x")
    (waiting,) = streams._streams
    waiting._bound.socket = Full(waiting._bound.socket)  # type: ignore[assignment]
    assert await fetch(url) == b"x"
    assert next(refusals) == 3


# -- destinations ---------------------------------------------------------------------------------------


async def test_every_kind_of_destination_gets_everything(streams: UnixStreams, tmp_path: Path) -> None:
    async def new() -> str:
        return await streams.new_stream_unix(DATA)

    with open(tmp_path / "buffered", "wb") as file:
        assert await stream(file, await new()) == len(DATA)
    with open(tmp_path / "raw", "wb", buffering=0) as raw:
        assert await stream(raw, await new()) == len(DATA)
    assert (tmp_path / "buffered").read_bytes() == (tmp_path / "raw").read_bytes() == DATA

    pieces: list[bytes] = []
    assert await stream(pieces.append, await new()) == len(DATA)
    assert b"".join(pieces) == DATA

    class AsyncFile:
        def __init__(self) -> None:
            self.data = b""

        async def write(self, chunk: bytes) -> None:
            await asyncio.sleep(0)
            self.data += chunk

    target = AsyncFile()
    assert await stream(target, await new()) == len(DATA)
    assert target.data == DATA
    target = AsyncFile()
    assert await stream(target.write, await new()) == len(DATA)
    assert target.data == DATA


async def test_a_stream_writer_is_a_destination(streams: UnixStreams) -> None:
    ours, theirs = socket.socketpair()
    _, writer = await asyncio.open_connection(sock=ours)
    reader, other = await asyncio.open_connection(sock=theirs)

    async def send() -> None:
        await stream(writer, await streams.new_stream_unix(DATA))
        writer.close()

    sending = asyncio.get_running_loop().create_task(send())
    assert await reader.read() == DATA
    await sending
    other.close()


async def test_a_raw_destination_that_takes_a_part_gets_the_rest_too(streams: UnixStreams) -> None:
    class Part(io.RawIOBase):
        data = b""

        def write(self, data: Any, /) -> int:
            piece = bytes(data[:1000])
            self.data += piece
            return len(piece)

    dest = Part()
    await stream(dest, await streams.new_stream_unix(DATA))
    assert dest.data == DATA


async def test_a_destination_that_fails_ends_the_stream(streams: UnixStreams) -> None:
    def full(chunk: bytes) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        await stream(full, await streams.new_stream_unix(endless(lambda: None)))
    await streams.drained()
    assert counts(streams) == {"abandoned": 1}


@pytest.mark.parametrize("dest", [io.StringIO(), None, "name"])
async def test_what_is_no_destination_is_refused_before_the_stream_is_used_up(
    streams: UnixStreams, dest: Any
) -> None:
    url = await streams.new_stream_unix(b"x")
    with pytest.raises(TypeError):
        await stream(dest, url)
    assert await fetch(url) == b"x"


async def test_a_limit_is_the_most_that_is_taken(streams: UnixStreams) -> None:
    assert len(await fetch(await streams.new_stream_unix(DATA), limit=len(DATA))) == len(DATA)
    dest = io.BytesIO()
    with pytest.raises(TooLarge, match="longer than 1000000 bytes"):
        await stream(dest, await streams.new_stream_unix(DATA), limit=1_000_000)
    assert len(dest.getvalue()) <= 1_000_000


# -- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "ftp://host/x", "unix://relative", "http://", "/run/x.sock"])
async def test_what_is_no_stream_url_is_refused(url: str) -> None:
    with pytest.raises(BadRequest):
        await fetch(url)
    with pytest.raises(BadRequest):
        open_stream(url)
    with pytest.raises(BadRequest):
        StreamFile(url)


async def test_a_reader_without_descriptors(folder: Path) -> None:
    url = f"unix://{folder}/s.sock"
    with no_descriptors():
        for reader in (fetch(url), asyncio.to_thread(StreamFile, url)):
            with pytest.raises(ConnectionLost, match="Too many open files"):
                await reader
        decline(url)


@pytest.mark.parametrize("read", OUR_READERS)
async def test_a_stream_that_is_not_there_is_unreachable(folder: Path, read: Any) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for url in (f"unix://{folder}/none.sock", f"http://127.0.0.1:{unused.getsockname()[1]}/"):
            with pytest.raises(ConnectionLost, match="cannot reach"):
                await read(url)


async def fetch_file_soon(url: str, *, timeout: float) -> bytes:
    def read() -> bytes:
        with StreamFile(url, timeout=timeout) as file:
            return file.read()

    return await asyncio.to_thread(read)


@pytest.mark.parametrize("read", [fetch, fetch_file_soon])
async def test_a_silent_producer_is_given_up(streams: UnixStreams, read: Any) -> None:
    url = await streams.new_stream_unix(silent(lambda: None))
    with pytest.raises(ConnectionLost, match="in time"):
        await read(url, timeout=0.01)
    await streams.drained()
    assert counts(streams) == {"abandoned": 1}


async def test_a_stream_file_that_is_forgotten_lets_its_producer_go(streams: UnixStreams) -> None:
    url = await streams.new_stream_unix(silent(lambda: None))
    assert await asyncio.to_thread(lambda: StreamFile(url).read(5)) == b"first"
    gc.collect()
    await streams.drained()
    assert counts(streams) == {"abandoned": 1}


async def test_a_stream_file_is_a_file(streams: UnixStreams) -> None:
    url = await streams.new_stream_unix([b"one\ntwo", b"\nthree\n", b"rest"])

    def use() -> None:
        with StreamFile(url) as file:
            assert file.readable()
            assert file.read(2) == b"on"
            assert list(file) == [b"e\n", b"two\n", b"three\n", b"rest"]
            assert file.read() == b""
        assert file.closed

    await asyncio.to_thread(use)


async def test_a_broken_stream_file_stays_broken(streams: UnixStreams) -> None:
    url = await streams.new_stream_unix(fails_at_once())

    def use() -> None:
        with StreamFile(url) as file:
            for _ in range(3):
                with pytest.raises(ConnectionLost):
                    file.read(1)

    with contextlib.suppress(ConnectionLost):  # it may be too late to open it even
        await asyncio.to_thread(use)


async def test_a_read_that_waits_is_ended_from_another_thread(streams: UnixStreams) -> None:
    url = await streams.new_stream_unix(silent(lambda: None))
    reading = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read(file: StreamFile) -> None:
        assert file.read(5) == b"first"
        loop.call_soon_threadsafe(reading.set)
        for _ in range(2):
            with pytest.raises(ConnectionLost, match="closed here"):
                file.read(1)
        file.close()

    with await asyncio.to_thread(StreamFile, url) as file:
        ending = asyncio.create_task(asyncio.to_thread(read, file))
        await reading.wait()
        file.abort()
        file.abort()
        await ending
        file.abort()
    await streams.drained()
    assert counts(streams) == {"abandoned": 1}


async def test_a_stream_that_nobody_wants_is_declined(streams: UnixStreams) -> None:
    closed: list[bool] = []
    url = await streams.new_stream_unix(silent(lambda: closed.append(True)))
    decline(url)
    await streams.drained()
    assert counts(streams) == {"abandoned": 1}
    decline(url)  # nothing is left to decline
    decline("http://127.0.0.1:1/")


# -- HTTP -----------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


@contextlib.asynccontextmanager
async def answering(answer: bytes, *, keep: bool = False) -> AsyncIterator[str]:
    """A server that gives each request the same bytes. `keep`: and keeps the connection open."""
    open_ones: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.append(writer)
        with contextlib.suppress(ConnectionError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        if not keep:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/a%20b?c=d"
    finally:
        server.close()
        for writer in open_ones:
            writer.close()


@pytest.mark.parametrize("read", OUR_READERS)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 1048576\r\n\r\n" + DATA,
        CHUNKED + b"100000\r\n" + DATA + b"\r\n0\r\n\r\n",
        CHUNKED + b"1\r\n" + DATA[:1] + b"\r\nfffff\r\n" + DATA[1:] + b"\r\n0\r\n\r\n",
    ],
    ids=["length", "one chunk", "two chunks"],
)
async def test_http_streams_are_read_whole(answer: bytes, keep: bool, read: Any) -> None:
    async with answering(answer, keep=keep) as url:
        assert await read(url) == DATA


@pytest.mark.parametrize("read", OUR_READERS)
@pytest.mark.parametrize("body", [b"", DATA])
async def test_a_body_of_unknown_length_ends_with_its_connection(body: bytes, read: Any) -> None:
    async with answering(b"HTTP/1.0 200 OK\r\n\r\n" + body) as url:
        assert await read(url) == body


@pytest.mark.parametrize("read", OUR_READERS)
@pytest.mark.parametrize(
    "answer",
    [
        OK + b"Content-Length: 1048577\r\n\r\n" + DATA,
        OK + b"Content-Length: 1\r\n\r\n",
        CHUNKED + b"100000\r\n" + DATA + b"\r\n",
        CHUNKED + b"100001\r\n" + DATA,
        CHUNKED + b"100000\r\n" + DATA + b"\r\n1",
        CHUNKED,
        CHUNKED + b"4\r\ndata\r\nnonsense\r\n",
    ],
)
async def test_short_http_streams_are_known_to_be(answer: bytes, read: Any) -> None:
    async with answering(answer) as url:
        with pytest.raises(ConnectionLost):
            await read(url)


@pytest.mark.parametrize("read", OUR_READERS)
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno", "status 403"),
        (b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", "status 302"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 2\r\n\r\nno", "status 206"),
        (OK + b"Content-Encoding: gzip\r\nConnection: close\r\n\r\n" + gzip.compress(DATA), "compressed"),
        (b"no HTTP at all\r\n\r\n", "cannot reach"),
        (b"", "cannot reach"),
    ],
)
async def test_only_a_plain_200_is_a_stream(answer: bytes, words: str, read: Any) -> None:
    async with answering(answer) as url:
        with pytest.raises(ConnectionLost, match=words):
            await read(url)


@pytest.mark.parametrize("rest", [b"", b"1\r\n"])
async def test_a_read_of_http_that_waits_is_ended_from_another_thread(rest: bytes) -> None:
    reading = asyncio.Event()
    loop = asyncio.get_running_loop()

    def read(file: StreamFile) -> None:
        assert file.read1() == b"first"
        loop.call_soon_threadsafe(reading.set)
        with pytest.raises(ConnectionLost, match="closed here"):
            file.read(1)

    async with answering(CHUNKED + b"5\r\nfirst\r\n" + rest, keep=True) as url:
        with await asyncio.to_thread(StreamFile, url) as file:
            ending = asyncio.create_task(asyncio.to_thread(read, file))
            await reading.wait()
            file.abort()
            await ending


@pytest.mark.parametrize("read", OUR_READERS)
async def test_the_environments_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1/")
    async with answering(OK + b"Content-Length: 2\r\n\r\nok") as url:
        assert await read(url) == b"ok"


@pytest.mark.parametrize("read", [fetch, fetch_file_soon])
@pytest.mark.parametrize("answer", [b"", OK, CHUNKED + b"4\r\ndata\r\n"])
async def test_a_silent_http_server_is_given_up(answer: bytes, read: Any) -> None:
    async with answering(answer, keep=True) as url:
        with pytest.raises(ConnectionLost, match="in time"):
            await read(url, timeout=0.05)


async def test_a_session_of_the_callers_is_used_and_left_open() -> None:
    import aiohttp

    async with aiohttp.ClientSession(headers={"X-Mark": "1"}) as session:
        async with answering(OK + b"Content-Length: 2\r\n\r\nok") as url:
            assert await fetch(url, session=session) == b"ok"
            assert await fetch(url, session=session) == b"ok"
        assert not session.closed


# -- the proxy ------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def proxying(**options: Any) -> AsyncIterator[StreamProxy]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        proxy = StreamProxy(f"http://127.0.0.1:{sock.getsockname()[1]}/stream", **options)
        app = web.Application()
        app.router.add_get("/stream", proxy.serve)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
        await runner.setup()
        await web.SockSite(runner, sock).start()
        try:
            yield proxy
        finally:
            await runner.cleanup()


def query_of(url: str) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlsplit(url).query).items()}


@pytest.mark.parametrize("read", OUR_READERS)
async def test_a_signed_url_gives_its_stream_once(streams: UnixStreams, read: Any) -> None:
    async with proxying() as proxy:
        url = proxy.sign(await streams.new_stream_unix(from_generator()))
        assert await read(url) == DATA
        with pytest.raises(ConnectionLost, match="status 403"):
            await read(url)
    await streams.drained()
    assert counts(streams) == {"finished": 1}


async def test_an_http_stream_is_proxied_too_and_may_be_signed_again() -> None:
    async with answering(OK + b"Content-Length: 0\r\n\r\n") as upstream, proxying() as proxy:
        for _ in range(3):
            assert await fetch(proxy.sign(upstream)) == b""


async def test_only_what_was_signed_is_served(streams: UnixStreams) -> None:
    secret = await streams.new_stream_unix(b"secret")
    proxy = StreamProxy("http://host/stream")
    good = query_of(proxy.sign("unix:///run/mine.sock"))
    changed: list[dict[str, str]] = [
        {},
        {"addr": secret},
        {**good, "addr": secret},
        {**good, "expires": str(float(good["expires"]) + 1)},
        {**good, "nonce": "0" * 16},
        {**good, "sig": good["sig"][:-1]},
        {**good, "sig": good["sig"].upper()},
        {**good, "sig": ""},
        {**good, "sig": "é\ud800"},
        {**good, "addr": good["addr"] + "\n" + good["expires"], "expires": good["nonce"], "nonce": ""},
        query_of(StreamProxy("http://host/stream").sign(secret)),
        {key: value for key, value in good.items() if key != "nonce"},
    ]
    for query in changed:
        with pytest.raises(Forbidden, match="not signed"):
            proxy.verify(query)
    assert proxy.verify(good) == "unix:///run/mine.sock"
    with pytest.raises(Forbidden, match="used before"):
        proxy.verify(good)
    async with proxying() as proxy:
        for query in changed:
            query.pop("sig", None)
            with pytest.raises(ConnectionLost, match="status 403"):
                await fetch(f"{proxy.base_url}?{urlencode(query, errors='replace')}")
    assert await fetch(secret) == b"secret"


def test_a_signature_expires_and_is_then_forgotten() -> None:
    clock = Clock()
    proxy = StreamProxy("http://host/stream", clock=clock)
    urls = [query_of(proxy.sign("unix:///a", lifetime=10)) for _ in range(100)]
    clock.now += 9.9
    for query in urls[1:]:
        proxy.verify(query)
    assert len(proxy._used) == 99
    clock.now += 0.2
    with pytest.raises(Forbidden, match="expired"):
        proxy.verify(urls[0])
    with pytest.raises(Forbidden, match="expired"):
        proxy.verify(urls[1])
    proxy.verify(query_of(proxy.sign("unix:///a")))
    assert len(proxy._used) == 1


def test_processes_that_share_a_secret_verify_each_others_urls() -> None:
    ours, theirs = (StreamProxy("http://host/stream?x=1", b"s" * 32) for _ in range(2))
    url = ours.sign("http://127.0.0.1:80/a?b=c&d=é")
    assert url.startswith("http://host/stream?x=1&addr=")
    assert theirs.verify(query_of(url)) == "http://127.0.0.1:80/a?b=c&d=é"


def test_a_proxy_that_cannot_work_is_refused() -> None:
    with pytest.raises(BadRequest):
        StreamProxy("unix:///run/x.sock")
    with pytest.raises(ValueError, match="16 bytes"):
        StreamProxy("http://host/", b"short")
    proxy = StreamProxy("http://host/")
    with pytest.raises(BadRequest):
        proxy.sign("ftp://host/")
    for lifetime in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="lifetime"):
            proxy.sign("unix:///a", lifetime=lifetime)


@pytest.mark.parametrize("read", OUR_READERS)
async def test_a_proxied_stream_that_breaks_is_known_to_be(streams: UnixStreams, read: Any) -> None:
    async with proxying() as proxy:
        with pytest.raises(ConnectionLost, match="broken off"):
            await read(proxy.sign(await streams.new_stream_unix(fails_in_a_generator())))


@pytest.mark.parametrize("read", OUR_READERS)
async def test_a_stream_that_fails_before_its_first_byte_is_a_bad_gateway(
    streams: UnixStreams, folder: Path, read: Any
) -> None:
    async with proxying() as proxy, answering(b"HTTP/1.1 403 No\r\n\r\n") as forbidden:
        for url in (
            await streams.new_stream_unix(fails_at_once()),
            f"unix://{folder}/none.sock",
            forbidden,
        ):
            with pytest.raises(ConnectionLost, match="status 502"):
                await read(proxy.sign(url))


async def request(url: str, first_line: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(f"{first_line.format(f'{parts.path}?{parts.query}')}\r\nHost: x\r\n\r\n".encode())
    return reader, writer


async def test_an_old_http_reader_is_told_of_a_broken_stream_by_a_reset(streams: UnixStreams) -> None:
    async with proxying() as proxy:
        url = proxy.sign(await streams.new_stream_unix(from_generator()))
        reader, writer = await request(url, "GET {} HTTP/1.0")
        assert (await reader.read()).endswith(DATA)
        writer.close()
        url = proxy.sign(await streams.new_stream_unix(fails_in_a_generator()))
        reader, writer = await request(url, "GET {} HTTP/1.0")
        with pytest.raises(ConnectionResetError):
            await reader.read()
        writer.close()


@pytest.mark.parametrize("method", ["HEAD", "POST"])
async def test_only_a_get_uses_a_stream_up(streams: UnixStreams, method: str) -> None:
    async with proxying() as proxy:
        url = proxy.sign(await streams.new_stream_unix(b"x"))
        reader, writer = await request(url, method + " {} HTTP/1.0")
        assert b" 405 " in await reader.readline()
        writer.close()
        assert await fetch(url) == b"x"


@pytest.mark.parametrize("source", [endless, endless_async, silent])
async def test_an_http_reader_that_leaves_ends_the_source(streams: UnixStreams, source: Any) -> None:
    closed = asyncio.Event()
    async with proxying() as proxy:
        url = proxy.sign(await streams.new_stream_unix(source(announced(closed))))
        async with contextlib.aclosing(open_stream(url)) as chunks:
            assert await anext(chunks)
        await closed.wait()
    await streams.drained()
    assert counts(streams) == {"abandoned": 1}


async def test_an_http_reader_that_takes_nothing_is_cut_off(streams: UnixStreams) -> None:
    closed = asyncio.Event()
    async with proxying(stall=0.05) as proxy:
        url = proxy.sign(await streams.new_stream_unix(endless(announced(closed))))
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port)) as sock:
            sock.sendall(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await closed.wait()
    await streams.drained()
    assert counts(streams) == {"abandoned": 1}


# -- memory ---------------------------------------------------------------------------------------------

MEMORY = """
import asyncio, hashlib, json, os, socket, sys, tempfile
from aiohttp import web
from acomm.streams import StreamFile, StreamProxy, UnixStreams, stream

MEBI = 1024 * 1024

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

def generator(size):
    for _ in range(size // 65536):
        yield bytes(65536)

async def agenerator(size):
    for _ in range(size // 65536):
        yield bytes(65536)

def file(size):
    made = tempfile.TemporaryFile()
    made.truncate(size)
    return made

async def main(loop_name):
    streams = UnixStreams()
    sock = socket.create_server(("127.0.0.1", 0))
    proxy = StreamProxy(f"http://127.0.0.1:{sock.getsockname()[1]}/stream")
    app = web.Application()
    app.router.add_get("/stream", proxy.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.SockSite(runner, sock).start()

    async def to_nowhere(url):
        return await stream(lambda chunk: None, url)

    async def to_file(url):
        with open("/dev/null", "wb") as dest:
            return await stream(dest, url)

    def read_all(url):
        with StreamFile(url) as file:
            return sum(len(chunk) for chunk in iter(lambda: file.read(65536), b""))

    async def by_file(url):
        return await asyncio.to_thread(read_all, url)

    async def run(make, read, proxied, size):
        url = await streams.new_stream_unix(make(size))
        assert await read(proxy.sign(url) if proxied else url) == size

    ways = [(generator, to_nowhere, False), (agenerator, to_file, False), (file, by_file, False),
            (generator, to_nowhere, True), (agenerator, by_file, True)]
    growth = {}
    for make, read, proxied in ways:
        await run(make, read, proxied, 4 * MEBI)
        before = peak()
        await run(make, read, proxied, 256 * MEBI)
        growth[f"{make.__name__} {read.__name__} {proxied}"] = peak() - before
    await streams.close()
    await runner.cleanup()
    print(json.dumps(growth))

import uvloop
(asyncio if sys.argv[1] == "asyncio" else uvloop).run(main(sys.argv[1]))
"""


@pytest.mark.process
async def test_streams_need_the_same_memory_whatever_their_length(folder: Path) -> None:
    name = "uvloop" if "uvloop" in type(asyncio.get_running_loop()).__module__ else "asyncio"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", MEMORY, name, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert process.returncode == 0
    growth = json.loads(output)
    assert {way: grown for way, grown in growth.items() if grown > 16 * MEBI} == {}
