"""A program's side of the shared memory of its pool: arguments out, results in, and whose death frees what.

    submit: arena.store --> lend(call, segment) ... a worker opens it ... ended(call) --> free, or late
    answer: find(place) --> Reader --> views of the program's; the worker that wrote it sees them end

A segment with arguments stays as it is until its call has ended *and* no worker holds it: one that was given
up while it waited in a worker's window may yet be opened there. A call that is sent again has its arguments.

A worker's file of results is the program's, too, from before the fork until the worker's death is settled:
what it has answered last can be read. Views of it hold their memory themselves.

All but `arena` belongs to the driver's thread.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress

from workers.calls import Call
from workers.errors import WorkerLost
from workers.pickling import place_in
from workers.segments import Arena, Place, Reader, Segment, new_file

_OURS = 1
"""The number of the program's arena; a worker's is larger."""


def number_of(identity: bytes) -> int:
    """A worker's number, as a reader of arguments and a writer of results, from its random identity."""
    return int.from_bytes(b"\1" + identity[1:8])


class Exchange:
    """At most `limit` bytes of shared memory: half for arguments, half for the results of `workers`, each of
    which may take `share`. `dead` are the workers to `bury` once all that they have answered is settled.
    """

    def __init__(self, limit: int, workers: int) -> None:
        self.share = limit // 2 // workers
        self.dead: list[int] = []
        self.arena = Arena(new_file(), limit // 2, _OURS)
        self._readers: dict[int, tuple[int, Reader]] = {}
        self.lent: dict[Call, Segment] = {}
        self._late: list[tuple[int, Segment]] = []
        _exchanges.add(self)

    def __repr__(self) -> str:
        return f"<Exchange {len(self.lent)} lent, {len(self._readers)} workers, {self.arena!r}>"

    # -- the pool's

    def fds(self, identity: bytes) -> list[int]:
        """For a new worker: where it reads, where it writes. Raises OSError."""
        number = number_of(identity)
        fd = new_file()
        try:
            self._readers[number] = fd, Reader(fd, number, private=False)
        except BaseException:
            os.close(fd)
            raise
        return [self.arena.fd, fd]

    def unclaimed(self, result: bytes) -> None:
        """An answer to a call that nobody waits for any more."""
        place = place_in(result)
        if place is not None and place.writer in self._readers:
            self.find(place).give_back(place.index)

    def died(self, identity: bytes) -> None:
        """A worker is dead, and has said its last."""
        self.dead.append(number_of(identity))

    # -- the driver's

    def lend(self, call: Call, segment: Segment) -> None:
        """The arguments of `call`, which is submitted now, by any thread, lie there."""
        self.lent[call] = segment

    def ended(self, call: Call, holder: Callable[[int], int | None]) -> None:
        """`call` has ended, or was never submitted; `holder` tells who holds the call of a number."""
        segment = self.lent.pop(call, None)
        if segment is None:
            return
        if holder(call.number) is None:
            self.arena.end(segment)
        else:
            self._late.append((call.number, segment))

    def find(self, place: Place) -> Reader:
        """The reader of a worker's results."""
        found = self._readers.get(place.writer)
        if found is None:
            raise WorkerLost("the memory with the result is gone with its worker")
        return found[1]

    def tidy(self, now: float, holder: Callable[[int], int | None]) -> None:
        """See what is free meanwhile."""
        if self._late:
            late, self._late = self._late, []
            for number, segment in late:
                if holder(number) is None:
                    self.arena.end(segment)
                else:
                    self._late.append((number, segment))
        if self.arena.due is not None and self.arena.due <= now:
            self.arena.trim(now)

    def bury(self, dead: list[int]) -> None:
        """Workers are dead, and what they had answered is settled."""
        for number in dead:
            self.arena.mourn(number)
            found = self._readers.pop(number, None)
            if found is not None:
                os.close(found[0])

    def close(self) -> None:
        """All workers are dead, or there was none."""
        _exchanges.discard(self)
        self.arena.close()
        self.bury(list(self._readers))


_exchanges: weakref.WeakSet[Exchange] = weakref.WeakSet()


def _abandon_all() -> None:
    """In a fork of the program: hold no memory of a pool that is not ours."""
    for exchange in list(_exchanges):
        with suppress(OSError):
            exchange.arena.abandon()
            for fd, _ in exchange._readers.values():
                os.close(fd)
        exchange._readers.clear()
    _exchanges.clear()


os.register_at_fork(after_in_child=_abandon_all)
