"""How calls that overlap share the workers with those that do not. Pure.

A worker holds calls of one kind at a time: plain ones as its window allows, or many that overlap.

* While no plain call waits, calls that overlap spread over all workers: each goes to the one with the fewest.
* While plain calls wait, they get each worker that falls idle, and calls that overlap have one worker, their
  home: no other one gets more of them, so the others fall idle.
* If no worker has calls that overlap, the first of them gets the next one that falls idle when its turn
  comes, and no plain call behind it goes before. A single worker takes turns like that both ways, and
  so does one whose fellows are full of calls that last.
* Of several workers, calls that may last (longer than BRIEF, or nobody knows yet) always leave one alone.

So each kind has a worker while it has calls, and plain calls wait for calls that last only if there is a
single worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from workers.calls import Call
from workers.lanes import Lanes, turn

BRIEF = 1.0
"""Seconds that a plain call may have to wait for those that overlap, if these are on all workers."""

LASTING = 1.0
"""What a call that overlaps and may last adds to its worker's load; a brief one adds nothing. Whole, so that
what is added can be taken away again."""


class Holder(Protocol):
    """A worker, as far as this is about it. `overlaps` says of which kind the calls are that it holds, and
    `asked` holds those that it was asked to cancel.
    """

    @property
    def id(self) -> int: ...
    @property
    def left(self) -> int: ...
    @property
    def load(self) -> float: ...
    @property
    def calls(self) -> dict[int, Call]: ...
    @property
    def overlaps(self) -> bool: ...
    @property
    def asked(self) -> object: ...


W = TypeVar("W", bound=Holder)


def goes_first(
    lanes: Lanes, plain: Call | None, workers: Sequence[Holder], most: int, cost: Callable[[Call], float]
) -> bool:
    """Whether a call that overlaps is to have a worker before `plain`, the first of the others, and what
    follows that: it is older, and none of `workers` has such calls, which it could join.
    """
    if plain is None or any(_joinable(worker, most) for worker in workers):
        return False
    first = lanes.first() if _spare(workers) else _first_brief(lanes, cost)
    return first is not None and turn(first) < turn(plain)


def cost(predicted: float | None) -> float:
    """What a call that overlaps adds to its worker's load."""
    return 0.0 if predicted is not None and predicted <= BRIEF else LASTING


def share(
    lanes: Lanes,
    plain: Call | None,
    workers: Sequence[W],
    most: int,
    now: float,
    cost: Callable[[Call], float],
) -> Iterator[tuple[W, Call]]:
    """Which call of `lanes` goes to which worker, one by one: take each from its lane, and give it to the
    worker, before asking for the next. `workers` are all those that may be given calls, each `most` that
    overlap; `plain` is the first plain call that waits.
    """
    targets = [worker for worker in workers if worker.overlaps or not worker.calls]
    if plain is not None:
        targets = _home([worker for worker in targets if worker.load < most], now)
    alone = sum(not (worker.overlaps and worker.load >= most) for worker in workers) == 1
    while lanes.open:
        call = lanes.first()
        lasting = cost(call)
        worker = _place(targets, workers, most, lasting)
        if worker is None and lasting:
            brief = _first_brief(lanes, cost)  # it need not wait for the other
            if brief is not None:
                call, worker = brief, _place(targets, workers, most, 0.0)
        if worker is None or (plain is not None and alone and turn(plain) < turn(call)):
            return
        yield worker, call


def unplaced(
    calls: Sequence[Call], workers: Sequence[Holder], most: int, cost: Callable[[Call], float]
) -> list[Call]:
    """Of waiting calls that overlap those that find no room in workers that have such calls already."""
    spare = _spare(workers)
    brief = lasting = 0
    for worker in workers:
        if worker.overlaps and worker.calls:
            room = max(0, most - len(worker.calls))
            room = room if worker.left < 0 else min(room, worker.left)
            if spare or _lasts(worker):
                lasting += room
            else:
                brief += room
    left = []
    for call in calls:
        if lasting and (cost(call) or not brief):
            lasting -= 1
        elif brief and not cost(call):
            brief -= 1
        else:
            left.append(call)
    return left


def _home(targets: list[W], now: float) -> list[W]:
    """The worker that keeps getting calls that overlap while plain ones wait: one that would not fall idle
    soon, else the fullest, as the others are the sooner idle. If none has such calls, one that is idle.
    """

    def late(worker: W) -> tuple[bool, bool, int]:
        oldest = next(iter(worker.calls.values()), None)
        return worker.load > 0, oldest is not None and now - oldest.sent > BRIEF, len(worker.calls)

    return [max(targets, key=late)] if targets else []


def _place(targets: list[W], workers: Sequence[W], most: int, lasting: float) -> W | None:
    """The one of `targets` with the fewest calls that has room, and for a call that may last is not the last
    one without such calls.
    """
    spare = not lasting or _spare(workers)
    fits = [
        worker for worker in targets if worker.left and len(worker.calls) < most and (spare or _lasts(worker))
    ]
    # Who does not cancel what it was asked to cancel may be stuck, and die for it.
    return min(fits, key=lambda worker: (bool(worker.asked), len(worker.calls), worker.id), default=None)


def _lasts(worker: Holder) -> bool:
    """Whether it has calls that overlap and may last."""
    return worker.overlaps and worker.load > 0


def _joinable(worker: Holder, most: int) -> bool:
    """Whether it has calls that overlap and has room, or will have soon."""
    return bool(worker.overlaps and worker.calls) and worker.load < most


def _spare(workers: Sequence[Holder]) -> bool:
    """Whether a worker without calls that may last can be given some."""
    return len(workers) == 1 or sum(not _lasts(worker) for worker in workers) > 1


def _first_brief(lanes: Lanes, cost: Callable[[Call], float]) -> Call | None:
    firsts = (lane.first() for lane in lanes.open.values())
    return min((first for first in firsts if not cost(first)), key=turn, default=None)
