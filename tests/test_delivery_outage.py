"""Hooks that are away for an hour, by a clock of the test's own; and one that swallows all among many."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from peers import WAIT, GoPeer, ack, frame

from acomm import Response, unixchannel
from acomm.channel import Channels
from acomm.delivery import GIVE_UP_AFTER, LONGEST_BACKOFF, Delivery
from acomm.errors import AcommError, ConnectionLost
from acomm.origin import Origin
from acomm.outgoing import Outgoing

BOTH_LOOPS = True
HOUR = 3600.0
DAY = 24 * HOUR


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer on a busy machine may take longer than we wait to hear whether it grants."""
    monkeypatch.setattr(unixchannel, "_VERDICT_WAIT", WAIT)


class Counting(Channels):
    """Counts the tries."""

    posts = 0

    def post(self, url: str, message: Outgoing, origin: Origin | None = None) -> None:
        self.posts += 1
        super().post(url, message, origin)


@pytest.fixture
async def channels() -> AsyncIterator[Counting]:
    made = Counting(timeout=WAIT)
    yield made
    await made.close()


class Timer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class Time:
    """A clock that goes when it is told to, and its timers."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._numbers = itertools.count()
        self._timers: list[tuple[float, int, Timer]] = []
        self._set = asyncio.Event()

    def __call__(self) -> float:
        return self.now

    def call_later(self, seconds: float, call: Callable[[], None]) -> Timer:
        timer = Timer(call)
        heapq.heappush(self._timers, (self.now + seconds, next(self._numbers), timer))
        self._set.set()
        return timer

    async def next(self) -> None:
        """Go on to the next timer, which is set when the tries under way have failed."""
        async with asyncio.timeout(WAIT):
            while True:
                while not self._timers:
                    self._set.clear()
                    await self._set.wait()
                when, _, timer = heapq.heappop(self._timers)
                if timer.call is not None:
                    break
        self.now = max(self.now, when)
        timer.call()

    async def until_drained(self, deliveries: Delivery) -> None:
        drained = asyncio.ensure_future(deliveries.drained())
        while not drained.done():
            rings = asyncio.ensure_future(self.next())
            await asyncio.wait({drained, rings}, return_when=asyncio.FIRST_COMPLETED)
            if not rings.done():
                rings.cancel()
                await asyncio.wait({rings})
            else:
                rings.result()


class Owed:
    """`count` responses for each of some hooks, which are not there, and what is told of them."""

    def __init__(
        self, channels: Counting, folder: Path, give_up_after: float, hooks: int, count: int
    ) -> None:
        self.time = Time()
        self.deliveries = Delivery(
            channels, give_up_after=give_up_after, clock=self.time, call_later=self.time.call_later
        )
        self.paths = [folder / f"{number}.sock" for number in range(hooks)]
        self.told: list[AcommError | None] = []
        self.ids = {str(path): [f"{path.stem}-{number}" for number in range(count)] for path in self.paths}
        for path, ids in self.ids.items():
            for id in ids:
                self.deliveries.post(f"unix://{path}", Response(id), 3, finished=self.told.append)


async def test_after_an_hour_every_answer_is_delivered(tmp_path: Path, channels: Counting) -> None:
    """With a day's patience, as a supervisor with a journal has it."""
    owed = Owed(channels, tmp_path, DAY, hooks=3, count=40)
    end = owed.time.now + HOUR
    while owed.time.now < end:
        await owed.time.next()
    assert owed.told == []
    # Nobody knocks at a hook more often than the pauses say, however many responses wait for it.
    assert channels.posts < 120 + 3 * (HOUR / (LONGEST_BACKOFF / 2) + 20)
    async with AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(GoPeer(path, lambda received: ack())) for path in owed.paths]
        await owed.time.until_drained(owed.deliveries)
        for peer in peers:
            assert sorted(message["id"] for message in peer.messages) == sorted(owed.ids[peer.path])
    assert owed.told == [None] * 120
    # They have come with the first pause that ended: nobody has waited for a further one.
    assert owed.time.now < end + 2 * LONGEST_BACKOFF


async def test_without_a_journal_patience_ends_before_and_all_are_told(
    tmp_path: Path, channels: Counting
) -> None:
    owed = Owed(channels, tmp_path, GIVE_UP_AFTER, hooks=3, count=40)
    began = owed.time.now
    await owed.time.until_drained(owed.deliveries)
    assert GIVE_UP_AFTER <= owed.time.now - began <= GIVE_UP_AFTER + 2 * LONGEST_BACKOFF
    assert len(owed.told) == 120
    assert all(isinstance(error, ConnectionLost) for error in owed.told)


async def test_one_that_swallows_all_holds_up_none_of_many(tmp_path: Path, channels: Counting) -> None:
    """It lets us connect, and is silent; all others have their answers while it has not failed once."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                (size,) = struct.unpack(">I", await reader.readexactly(4))
                await reader.readexactly(size)
                writer.write(frame(ack(acomm=1)))
        except asyncio.IncompleteReadError:
            writer.close()

    deliveries = Delivery(channels)
    swallowed: list[AcommError | None] = []
    delivered: list[AcommError | None] = []
    async with AsyncExitStack() as stack:
        hole = stack.enter_context(socket.socket(socket.AF_UNIX))
        hole.bind(str(tmp_path / "hole.sock"))
        hole.listen(0)
        paths = [tmp_path / f"{number}.sock" for number in range(200)]
        for path in paths:
            await stack.enter_async_context(await asyncio.start_unix_server(serve, path))
        done = asyncio.Event()

        def finished(error: AcommError | None) -> None:
            delivered.append(error)
            if len(delivered) == 10 * len(paths):
                done.set()

        for round in range(10):
            for number in range(10):
                response = Response(f"hole-{round}-{number}")
                deliveries.post(f"unix://{tmp_path}/hole.sock", response, 3, finished=swallowed.append)
            for path in paths:
                deliveries.post(f"unix://{path}", Response(f"{path.stem}-{round}"), 3, finished=finished)
        async with asyncio.timeout(WAIT):
            await done.wait()
        assert delivered == [None] * 2000
        assert (deliveries.pending, swallowed) == (100, [])
        deliveries.stop()
        await channels.close()
