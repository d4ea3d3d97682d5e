"""Stream: an answer in parts, read by threads and by event loops, left early, broken, and read once."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from peers import WAIT

from acomm import itemstream
from acomm.errors import BadRequest, ConnectionLost, TooLarge
from acomm.itemstream import Stream
from acomm.streams import UnixStreams

BOTH_LOOPS = True
LINES = b'{"n":1}\n[2,"\xc3\xa9"]\nnull\n'
ITEMS = [{"n": 1}, [2, "é"], None]


@pytest.fixture(autouse=True)
def folder(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder))
    return short_folder / "acomm"


@pytest.fixture
async def streams(folder: Path) -> AsyncIterator[UnixStreams]:
    owner = UnixStreams()
    yield owner
    await owner.close()
    assert list(folder.iterdir()) == []


def ends(streams: UnixStreams) -> tuple[int, int, int, int]:
    return streams.finished, streams.expired, streams.abandoned, streams.broken


FINISHED, ABANDONED, BROKEN = (1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)


async def in_thread(stream: Stream) -> list[Any]:
    return await asyncio.to_thread(lambda: list(stream))


async def in_loop(stream: Stream) -> list[Any]:
    return [item async for item in stream]


READ = [in_thread, in_loop]


class Steps:
    """A source that gives its chunks one by one, each when it is let go; the last step is the end."""

    def __init__(self, *chunks: bytes) -> None:
        self.chunks = chunks
        self.go = asyncio.Semaphore(0)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            await self.go.acquire()
            yield chunk
        await self.go.acquire()


async def fails_after(chunk: bytes) -> AsyncIterator[bytes]:
    yield chunk
    raise ValueError("on purpose")


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("size", [1, 5, 1000])
async def test_lines_are_items(streams: UnixStreams, read: Any, size: int) -> None:
    chunks = [LINES[start : start + size] for start in range(0, len(LINES), size)]
    stream = Stream(await streams.new_stream_unix(chunks), format="lines")
    assert not stream.closed
    assert await read(stream) == ITEMS
    assert stream.closed
    await streams.drained()
    assert ends(streams) == FINISHED


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("format", ["bytes", None, "something new"])
async def test_anything_else_is_bytes(streams: UnixStreams, read: Any, format: str | None) -> None:
    data = LINES * 50_000
    chunks = await read(Stream(await streams.new_stream_unix(data), format=format))
    assert all(type(chunk) is bytes for chunk in chunks)
    assert b"".join(chunks) == data


@pytest.mark.parametrize("read", READ)
async def test_items_as_a_task_types_them(streams: UnixStreams, read: Any) -> None:
    decode = msgspec.json.Decoder(frozenset[int]).decode
    url = await streams.new_stream_unix(b"[1,1]\n[]\n")
    assert await read(Stream(url, format="lines", decode=decode)) == [{1}, set()]


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("format", ["lines", "bytes"])
async def test_an_empty_stream_has_no_items(streams: UnixStreams, read: Any, format: str) -> None:
    assert await read(Stream(await streams.new_stream_unix(b""), format=format)) == []


async def test_items_come_as_soon_as_they_are_there(streams: UnixStreams) -> None:
    source = Steps(b"1\n2", b"\n")
    stream = Stream(await streams.new_stream_unix(source), format="lines")
    items = aiter(stream)
    source.go.release()
    assert await anext(items) == 1
    source.go.release()
    assert await anext(items) == 2
    source.go.release()
    with pytest.raises(StopAsyncIteration):
        await anext(items)

    source = Steps(b"1\n2", b"\n")
    iterator = iter(Stream(await streams.new_stream_unix(source), format="lines"))
    for number in (1, 2):
        source.go.release()
        assert await asyncio.to_thread(next, iterator) == number
    source.go.release()
    assert await asyncio.to_thread(next, iterator, "end") == "end"


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("format", ["lines", "bytes"])
async def test_a_broken_stream_is_no_short_one(streams: UnixStreams, read: Any, format: str) -> None:
    stream = Stream(await streams.new_stream_unix(fails_after(LINES)), format=format)
    with pytest.raises(ConnectionLost, match="broken off"):
        await read(stream)
    assert stream.closed


async def test_what_came_before_the_break_is_given(streams: UnixStreams) -> None:
    got: list[Any] = []
    stream = Stream(await streams.new_stream_unix(fails_after(LINES)), format="lines")
    with pytest.raises(ConnectionLost):
        async for item in stream:
            got.append(item)
    assert got == ITEMS


@pytest.mark.parametrize("read", READ)
async def test_half_an_item_at_the_end_is_a_break(streams: UnixStreams, read: Any) -> None:
    with pytest.raises(ConnectionLost, match="in the middle of an item"):
        await read(Stream(await streams.new_stream_unix(b"1\n23"), format="lines"))


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("lines", [b"1\n{]\n", b"\n", b"\xff\n"])
async def test_an_item_that_is_no_json_is_an_error(streams: UnixStreams, read: Any, lines: bytes) -> None:
    with pytest.raises(BadRequest, match="an item of the stream"):
        await read(Stream(await streams.new_stream_unix(lines), format="lines"))
    await streams.drained()


@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("data", [b"1\n" + b"9" * 2000 + b"\n", b"9" * 2000])
async def test_an_item_has_a_largest_size(
    streams: UnixStreams, monkeypatch: pytest.MonkeyPatch, read: Any, data: bytes
) -> None:
    monkeypatch.setattr(itemstream, "MAX_ITEM", 1000)
    with pytest.raises(TooLarge, match="longer than 1000 bytes"):
        await read(Stream(await streams.new_stream_unix(data), format="lines"))


@pytest.mark.parametrize("read", READ)
async def test_a_stream_that_is_not_there(folder: Path, read: Any) -> None:
    stream = Stream(f"unix://{folder}/none.sock")
    with pytest.raises(ConnectionLost, match="cannot reach"):
        await read(stream)
    with pytest.raises(BadRequest):
        Stream("ftp://x")


@pytest.mark.parametrize("first", READ)
@pytest.mark.parametrize("second", READ)
async def test_a_stream_is_read_once(streams: UnixStreams, first: Any, second: Any) -> None:
    stream = Stream(await streams.new_stream_unix(b"1\n"), format="lines")
    assert await first(stream) == [1]
    with pytest.raises(RuntimeError, match="read once"):
        await second(stream)
    with pytest.raises(RuntimeError, match="read once"):
        stream.read()


async def test_read_gives_the_bytes_whatever_the_format(streams: UnixStreams) -> None:
    stream = Stream(await streams.new_stream_unix(LINES), format="lines")

    def read() -> None:
        assert stream.read(3) == LINES[:3]
        assert stream.read(0) == b""
        assert not stream.closed
        with pytest.raises(RuntimeError, match="read once"):
            iter(stream)
        assert stream.read() == LINES[3:]
        assert stream.closed
        assert stream.read() == stream.read(1) == b""

    await asyncio.to_thread(read)
    await streams.drained()
    assert ends(streams) == FINISHED


async def test_a_broken_stream_fails_a_read(streams: UnixStreams) -> None:
    stream = Stream(await streams.new_stream_unix(fails_after(b"x")))
    with pytest.raises(ConnectionLost):
        await asyncio.to_thread(stream.read)


async def test_one_that_is_silent_for_too_long(streams: UnixStreams) -> None:
    for read in READ:
        stream = Stream(await streams.new_stream_unix(Steps(b"x")))
        stream.timeout = 0.05
        with pytest.raises(ConnectionLost, match="in time"):
            await read(stream)


# -- leaving early --------------------------------------------------------------------------------------


async def test_the_end_of_a_loop_lets_the_producer_go(streams: UnixStreams) -> None:
    source = Steps(b"1\n", b"2\n")
    source.go.release()
    stream = Stream(await streams.new_stream_unix(source), format="lines")
    async for item in stream:
        assert item == 1
        break
    await streams.drained()
    assert stream.closed
    assert ends(streams) == ABANDONED


async def test_the_end_of_a_loop_in_a_thread_does_too(streams: UnixStreams) -> None:
    source = Steps(b"1\n", b"2\n")
    source.go.release()
    stream = Stream(await streams.new_stream_unix(source), format="lines")

    def first() -> None:
        for item in stream:
            assert item == 1
            break

    await asyncio.to_thread(first)
    await streams.drained()
    assert stream.closed
    assert ends(streams) == ABANDONED


@pytest.mark.parametrize("how", ["unread", "iterated", "read", "in the loop"])
async def test_with_closes_what_is_left(streams: UnixStreams, how: str) -> None:
    source = Steps(b"1\n", b"2\n")
    source.go.release()
    stream = Stream(await streams.new_stream_unix(source), format="lines")
    if how == "in the loop":
        async with stream:
            items = aiter(stream)
            assert await anext(items) == 1
        with pytest.raises(ConnectionLost, match="closed here"):
            await anext(items)
    else:
        with stream:
            if how == "iterated":
                assert await asyncio.to_thread(next, iter(stream)) == 1
            elif how == "read":
                assert await asyncio.to_thread(stream.read, 1) == b"1"
    assert stream.closed
    await streams.drained()
    assert ends(streams) == ABANDONED
    stream.close()
    if how == "unread":
        with pytest.raises(RuntimeError, match="closed before it was read"):
            iter(stream)


async def test_a_task_that_waits_is_told_that_its_stream_was_closed(streams: UnixStreams) -> None:
    """From its own loop, and from another thread."""
    for close_by in ("loop", "thread"):
        source = Steps(b"1\n", b"2\n")
        source.go.release()
        stream = Stream(await streams.new_stream_unix(source), format="lines")
        items = aiter(stream)
        assert await anext(items) == 1
        waiting = asyncio.ensure_future(anext(items))
        await asyncio.sleep(0)
        if close_by == "loop":
            await stream.aclose()
        else:
            await asyncio.to_thread(stream.close)
        with pytest.raises(ConnectionLost, match="closed here"):
            await waiting
        await streams.drained()
    assert ends(streams) == (0, 0, 2, 0)


async def test_cancelling_whoever_reads_lets_the_producer_go(streams: UnixStreams) -> None:
    stream = Stream(await streams.new_stream_unix(Steps(b"1\n")), format="lines")
    task = asyncio.create_task(in_loop(stream))
    async with asyncio.timeout(WAIT):
        while stream._cut is None:
            await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await streams.drained()
    assert ends(streams) == ABANDONED


@pytest.mark.parametrize("use", [next, lambda items: list(items)])
async def test_a_thread_that_waits_is_told_that_its_stream_was_closed(
    streams: UnixStreams, use: Callable[[Iterator[Any]], Any]
) -> None:
    source = Steps(b"1\n", b"2\n")
    source.go.release()
    stream = Stream(await streams.new_stream_unix(source), format="lines")
    started = threading.Event()

    def read() -> Any:
        items = iter(stream)
        assert next(items) == 1
        started.set()
        return use(items)

    reading = asyncio.create_task(asyncio.to_thread(read))
    await asyncio.to_thread(started.wait)
    stream.close()
    with pytest.raises(ConnectionLost, match="closed here"):
        await reading
    await streams.drained()
    assert ends(streams) == ABANDONED


async def test_closing_races_with_reading(streams: UnixStreams) -> None:
    """In all their orders, a thread reads all of it, or is told that it was closed."""
    for number in range(60):
        stream = Stream(await streams.new_stream_unix(LINES * 2000), format="lines")
        go = threading.Barrier(2)

        def read(stream: Stream = stream, go: threading.Barrier = go) -> int:
            go.wait(WAIT)
            with contextlib.suppress(RuntimeError):
                return len(list(stream))
            return -1

        def close(stream: Stream = stream, go: threading.Barrier = go, number: int = number) -> None:
            go.wait(WAIT)
            for _ in range(number * 50):
                pass
            stream.close()

        reading = asyncio.create_task(asyncio.to_thread(read))
        await asyncio.to_thread(close)
        try:
            assert await reading in (-1, 6000)
        except ConnectionLost as error:
            assert "closed here" in str(error)
        await streams.drained()
    assert streams.broken == streams.expired == 0


async def test_a_stream_that_is_forgotten_while_it_is_read_lets_its_producer_go(
    streams: UnixStreams,
) -> None:
    source = Steps(b"1\n", b"2\n")
    source.go.release()
    items = iter(Stream(await streams.new_stream_unix(source), format="lines"))
    assert await asyncio.to_thread(next, items) == 1
    del items
    gc.collect()
    await streams.drained()
    assert ends(streams) == ABANDONED


async def test_whoever_made_it_is_told_of_its_end_and_whether_it_was_read(streams: UnixStreams) -> None:
    told: list[bool] = []
    stream = Stream(await streams.new_stream_unix(b""), on_close=told.append)
    stream.close()
    stream.close()
    assert told == [False]
    assert await in_loop(Stream(await streams.new_stream_unix(b""), on_close=told.append)) == []
    assert told == [False, True]
    stream = Stream("http://127.0.0.1:1/", on_close=told.append)
    stream.close()
    assert told == [False, True, False]
    assert repr(stream) == "<Stream http://127.0.0.1:1/, bytes, closed>"
