"""`map` in the program: items wait, travel in parts as long as the workers like, and come out in order.

    items --> waiting --Part--> workers (workers.mapped) --values, errors--> Batch --in order--> iterator
                 ^                 |
                 +--- what a part has not run, or was lost with it

A part begins with one item and doubles while it stays below PART seconds, by what items have just taken; long
items go alone, and large ones, through shared memory as any call's. Parts are sent as others come back, from
the driver's thread.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Any

from workers import mapped
from workers.buffers import Stored
from workers.calls import Call
from workers.driver import BrokenPool, CallLost, Driver
from workers.futures import Future
from workers.pickling import Functions, Prepared, dump
from workers.segments import Arena

PART = 0.0009
"""Seconds that a part should take: a worker then holds two, and never waits for the next."""

MAX_ITEMS = 4096
"""Items of a part: a larger one saves nothing more."""

MAX_BYTES = 2**20
"""Bytes that the arguments of a part should not exceed."""

LEARNING = 0.5
"""Weight of the newest part: it stands for many items."""

FORGETTING = 1 / 16
"""Weight of the size of a single item's arguments, which say nothing of its result."""

_ONE = Functions().prepare(mapped.run_one).head
_SEVERAL = Functions().prepare(mapped.run_part).head


class Sender:
    """Sends the items of `function`, whose pickling may have `failed`. A call has its name, but times of its
    own.
    """

    def __init__(
        self, driver: Driver, functions: Functions, function: Callable[..., Any], arena: Arena | None
    ) -> None:
        self.failed: BaseException | None = None
        self.command = driver.command
        self._driver = driver
        self._arena = arena
        try:
            prepared = functions.prepare(function)
            self._fresh = not prepared.head
            self._function = dump(function) if self._fresh else prepared.head[4:]
        except (Exception, SystemExit) as error:
            self.failed = error
            return
        name = f"{prepared.name}, in a map"
        self._one = Prepared(mapped.run_one, name, _ONE)
        self._several = Prepared(mapped.run_part, name, _SEVERAL)

    def one(self, args: tuple[Any, ...]) -> bytes | Stored:
        """Raises what pickling raises."""
        return self._one.call((self._function, self._fresh, args), {}, self._arena)

    def several(self, items: list[tuple[Any, ...]]) -> tuple[bytes, dict[int, BaseException]]:
        """With the errors of those that cannot be pickled."""
        packed, errors = mapped.pack(items)
        data = self._several.call((self._function, self._fresh, packed), {}, None)
        assert type(data) is bytes
        return data, errors

    def send(
        self, data: bytes | Stored, ended: Callable[[concurrent.futures.Future[Any]], None], begun: bool
    ) -> Future[Any]:
        """Calls `ended` with the future. `begun`: the map's items are accepted though no others are any more.
        Raises as a submit does.
        """
        future: Future[Any] = Future(self._driver)
        future.add_done_callback(ended)
        if isinstance(data, Stored):
            future.call = call = Call(self._one.name, data.data, tag=future)
            self._driver.submit_stored(call, data.segment, begun)
        else:
            future.call = call = Call(self._one.name, data, tag=future)
            self._driver.submit(call, begun)
        return future


class Batch:
    """Items that went out together, and their results, by position."""

    __slots__ = ("errors", "items", "missing", "values")

    def __init__(self, items: list[tuple[Any, ...]]) -> None:
        self.items = items
        self.values: list[Any] = [None] * len(items)
        self.errors: dict[int, BaseException] = {}
        self.missing = len(items)

    def take(self, position: int) -> Any:
        if position in self.errors:
            raise self.errors.pop(position)
        value, self.values[position] = self.values[position], None
        return value


class Size:
    """How many items a part should have, by what others took. Pure."""

    def __init__(self, largest: int) -> None:
        self.items = 1
        self._largest = largest
        self._seconds: float | None = None
        self._bytes = 1.0

    def learn(self, items: int, seconds: float, size: int) -> None:
        """A part of so many items, with arguments or results of `size` bytes, took so long. The results of a
        single one are not known: only several tell for sure that they are small.
        """
        each = max(seconds, 1e-7) / items
        known = self._seconds
        self._seconds = each if known is None else known + (each - known) * LEARNING
        change = size / items - self._bytes
        self._bytes += change if items > 1 or change > 0 else change * FORGETTING
        fit = min(PART / self._seconds, MAX_BYTES / max(self._bytes, 1), self._largest)
        self.items = max(1, min(int(fit), max(2 * items, self.items)))


class Part:
    """The items from `start` to `stop` of a batch, under way. `size` is of their arguments, in bytes."""

    __slots__ = ("batch", "size", "start", "stop")

    def __init__(self, batch: Batch, start: int, stop: int) -> None:
        self.batch = batch
        self.start = start
        self.stop = stop
        self.size = 0

    def __len__(self) -> int:
        return self.stop - self.start


class Mapping:
    """One `map` under way. `ahead` parts are out at a time, of `largest` items at most."""

    def __init__(self, sender: Sender, ahead: int, largest: int) -> None:
        self._sender = sender
        self._ahead = ahead
        self._size = Size(min(largest, MAX_ITEMS))
        # Reentrant, as a future that is cancelled calls back at once.
        self._changed = threading.Condition(threading.RLock())
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._again: deque[Part] = deque()
        self._order: deque[Batch] = deque()
        self._out: dict[concurrent.futures.Future[Any], Part] = {}
        self._given_up: BaseException | None = None
        self._awaited: Batch | None = None  # the one that has left the order

    # -- the caller's thread

    def add(self, items: Iterator[tuple[Any, ...]], *, begun: bool) -> None:
        """Take items. Raises what sending raises."""
        taken = list(items)  # which may take as long as it likes
        with self._changed:
            self._waiting.extend(taken)
            if self._given_up is None:
                self._feed(begun)

    def results(self, end: float | None, more: Iterator[tuple[Any, ...]], ahead: int | None) -> Iterator[Any]:
        """The results in order; an item's exception is raised in its place, and TimeoutError at `end`. For
        each item that leaves another is taken of `more`, if `ahead` of them are to be under way.
        """
        try:
            while (batch := self._next()) is not None:
                self._wait(batch, end)
                for position in range(len(batch.items)):
                    if ahead is not None:
                        self.add(itertools.islice(more, 1), begun=False)
                    yield batch.take(position)  # of which we keep nothing
                del batch
        finally:
            self._leave()

    def _leave(self) -> None:
        # Not waiting for the lock: this may be a collection, amid a submit for which the lock's holder waits.
        if self._changed.acquire(blocking=False):
            try:
                self.give_up(CancelledError())
            finally:
                self._changed.release()
        else:
            self._sender.command(self.give_up, CancelledError())

    def _next(self) -> Batch | None:
        with self._changed:
            if not self._order and self._waiting and self._given_up is not None:
                raise self._given_up
            self._awaited = self._order.popleft() if self._order else None
            return self._awaited

    def _wait(self, batch: Batch, end: float | None) -> None:
        with self._changed:
            while batch.missing:
                left = None if end is None else end - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                self._changed.wait(left)

    def give_up(self, error: BaseException) -> None:
        """What has not ended fails with `error`; what has not begun is not run."""
        with self._changed:
            if self._given_up is None:
                self._given_up = error
            self._again.clear()
            for batch in (self._awaited, *self._order):
                if batch is not None and batch.missing:
                    self._fail(batch, self._given_up)
            out = list(self._out)
            self._out.clear()
            self._changed.notify_all()
        for future in out:
            future.cancel()

    def _fail(self, batch: Batch, error: BaseException) -> None:
        """What is missing of a batch, from its first item on: that is all that anybody gets to see."""
        batch.errors.setdefault(0, error)
        batch.missing = 0

    # -- any thread, under the lock

    def _feed(self, begun: bool) -> None:
        while len(self._out) < self._ahead:
            if self._again:
                part = self._again.popleft()
            elif self._waiting:
                count = min(self._size.items, len(self._waiting))
                batch = Batch([self._waiting.popleft() for _ in range(count)])
                self._order.append(batch)
                part = Part(batch, 0, count)
            else:
                return
            items = part.batch.items[part.start : part.stop]
            if len(items) == 1:
                try:
                    data = self._sender.one(items[0])
                except (Exception, SystemExit) as error:
                    self._charge(part.batch, part.start, error)
                    continue
            else:
                data, failed = self._sender.several(items)
                for position, why in failed.items():
                    part.batch.errors[part.start + position] = why
            part.size = MAX_BYTES if isinstance(data, Stored) else len(data)
            self._out[self._sender.send(data, self._ended, begun)] = part

    def _ended(self, future: concurrent.futures.Future[Any]) -> None:
        with self._changed:
            part = self._out.pop(future, None)
            if part is None:
                return
            try:
                self._settle(part, future)
                if self._given_up is None:
                    self._feed(True)
            except Exception as error:
                self.give_up(error)
            if self._awaited is not None and not self._awaited.missing:
                self._awaited = None
                self._changed.notify_all()

    def _settle(self, part: Part, future: concurrent.futures.Future[Any]) -> None:
        error = future.exception(0)  # raises CancelledError
        if error is None:
            self._arrived(part, future.result(0))
        elif isinstance(error, BrokenPool):
            raise error
        elif len(part) == 1:
            self._charge(part.batch, part.start, error)
        elif isinstance(error, CallLost) and 1 <= (ran := _ran(error)) <= len(part):
            at = part.start + ran - 1
            self._charge(part.batch, at, error)
            self._resend(part.batch, [range(part.start, at), range(at + 1, part.stop)])
        else:  # nobody knows whose fault it is, until each has gone alone
            self._resend(part.batch, [range(n, n + 1) for n in range(part.start, part.stop)])

    def _arrived(self, part: Part, answer: mapped.Answer) -> None:
        batch, start = part.batch, part.start
        if answer.plain is not None:
            count = len(answer.plain)
            batch.values[start : start + count] = answer.plain
        else:
            assert answer.alone is not None
            count = len(answer.alone)
            for position, data in enumerate(answer.alone, start):
                if data is not None:
                    batch.values[position], error = mapped.load_value(data)
                    if error is not None:
                        batch.errors.setdefault(position, error)
        for position, failed in answer.errors.items():
            batch.errors.setdefault(start + position, mapped.load_error(failed))
        batch.missing -= count
        self._size.learn(count, answer.seconds, max(part.size * count // len(part), answer.size))
        if count < len(part):
            size = self._size.items
            cuts = range(start + count, part.stop, size)
            self._resend(batch, [range(n, min(n + size, part.stop)) for n in cuts])

    def _charge(self, batch: Batch, position: int, error: BaseException) -> None:
        batch.errors.setdefault(position, error)
        batch.missing -= 1

    def _resend(self, batch: Batch, ranges: list[range]) -> None:
        self._again.extendleft(Part(batch, r.start, r.stop) for r in reversed(ranges) if r)


def _ran(error: CallLost) -> int:
    """Which item of its part a worker ran when it died, from 1; 0 if that is not known."""
    progress = (error.receipt or {}).get("progress") or {}
    return int(progress.get("done") or 0)
