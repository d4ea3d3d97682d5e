"""The cases: what is measured, in which table it stands, and how much of it at each scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from benchmarks.pools import costs, deaths, speed
from benchmarks.pools.contenders import Contender
from benchmarks.pools.samples import Figures

PIPE_PING, ZMQ_PING, BARE = "pipe ping", "pyzmq ping", "two bare processes"


class Table(NamedTuple):
    title: str
    about: str


class Column(NamedTuple):
    """A figure: its name, where it stands and how it is read. With `note`, the cell shows what else there is
    to say of it.
    """

    table: Table
    name: str
    heading: str
    more_is_better: bool = False
    form: str = ",.0f"
    note: bool = False


class Sizes(NamedTuple):
    """How much a case does; 0 leaves it out."""

    full: int
    quick: int
    least: int


Measure = Callable[[Contender, int, int], Figures]
"""(contender, size, turns of `spin` in 20 ms)"""


@dataclass(frozen=True)
class Case:
    """`size` is what `measure` makes of it: calls, repeats, kills. `floors` run beside the contenders.

    `rounds` are the most that it takes part in. `after` is the smaller case that tells whether this one
    would take too long, and `growth` how many times as long it may be expected to take.
    """

    name: str
    columns: tuple[Column, ...]
    measure: Measure
    sizes: Sizes
    floors: Mapping[str, Callable[[int, int], Figures]] = field(default_factory=dict)
    rounds: int = 1000
    after: str = ""
    growth: int = 10


CALLS = Table("Calls per second", "no-ops; more is better")
TRIP = Table("Round trip", "µs of a no-op with nothing else under way; less is better")
ECHO = Table("Big arguments and results", "ms for a numpy array there and back; less is better")
MEMORY = Table("Idle memory", "MB, shared pages by their share (PSS); less is better")
START = Table("Start", "ms until the first result, or the end; less is better")
WORK = Table("Processor time", "calls/s of 20 ms of work each; more is better")
QUEUED = Table("Queued calls", "calls/s, when so many are queued before the first can run; more is better")
WEIGHT = Table("Memory of queued calls", "bytes each, when so many are queued; less is better")
REPLACED = Table("A killed worker's successor", "ms until it begins a call; less is better")
GOODPUT = Table(
    "A kill every 50 ms", "calls/s of 5 ms of work each, and what is left of them; more is better"
)


def _plain(measure: Callable[[Contender, int], Figures]) -> Measure:
    return lambda contender, size, turns: measure(contender, size)


def _calls(name: str, measure: Callable[[Contender, int], Figures], column: Column) -> Case:
    return Case(name, (column,), _plain(measure), Sizes(20_000, 4_000, 100))


def _echo(megabytes: int, repeats: int) -> Case:
    return Case(
        f"echo-{megabytes}",
        (Column(ECHO, f"{megabytes} MB", f"{megabytes} MB", form=",.2f"),),
        _plain(partial(speed.echo, megabytes=megabytes)),
        Sizes(repeats, min(repeats, 3), 1 if megabytes == 1 else 0),
    )


def _queue(calls: int, before: int) -> Case:
    return Case(
        f"queue-{calls}",
        (
            Column(QUEUED, f"calls/s of {calls}", f"{calls:,}", True),
            Column(WEIGHT, f"bytes each of {calls}", f"{calls:,}"),
        ),
        _plain(costs.growth),
        Sizes(calls, calls if calls <= 10_000 else 0, calls if calls <= 1_000 else 0),
        rounds=3 if calls <= 100_000 else 1,
        after=f"queue-{before}" if before else "",
    )


_QUEUED = (1_000, 10_000, 100_000, 1_000_000)

CASES = {
    case.name: case
    for case in (
        _calls("submit", speed.submit, Column(CALLS, "submit", "submit", True)),
        _calls("window", speed.window, Column(CALLS, "window", f"{speed.IN_FLIGHT} in flight", True)),
        _calls("map", speed.map_by_default, Column(CALLS, "map", "map", True)),
        _calls("chunks", speed.map_in_chunks, Column(CALLS, "chunks", "map, best chunk", True, note=True)),
        Case(
            "trip",
            (Column(TRIP, "p50", "p50"), Column(TRIP, "p99", "p99")),
            _plain(speed.round_trip),
            Sizes(2_000, 500, 20),
            floors={
                PIPE_PING: lambda size, turns: speed.pipe_round_trip(size),
                ZMQ_PING: lambda size, turns: speed.zmq_round_trip(size),
            },
        ),
        _echo(1, 20),
        _echo(10, 10),
        _echo(100, 4),
        Case(
            "memory",
            (
                Column(MEMORY, "pool", "workers and helpers", form=",.1f", note=True),
                Column(MEMORY, "all", "with the program", form=",.1f"),
            ),
            _plain(costs.memory),
            Sizes(300, 300, 1),
        ),
        Case(
            "start",
            (
                Column(START, "interpreter", "from a new interpreter"),
                Column(START, "constructor", "from the constructor"),
                Column(START, "program", "the whole program"),
            ),
            _plain(costs.start),
            Sizes(5, 3, 1),
        ),
        Case(
            "work",
            (Column(WORK, "work", "calls/s", True, ",.1f"),),
            lambda contender, size, turns: speed.work(contender, size, turns=turns),
            Sizes(200, 60, 4),
            floors={BARE: lambda size, turns: speed.bare_work(size, turns=turns)},
        ),
        *(_queue(calls, before) for before, calls in zip((0, *_QUEUED), _QUEUED, strict=False)),
        Case(
            "replacement",
            (
                Column(REPLACED, "replaced", "median", form=",.1f"),
                Column(REPLACED, "replaced, worst", "worst", form=",.1f"),
            ),
            deaths.replacement,
            Sizes(20, 5, 2),
        ),
        Case(
            "goodput",
            (
                Column(GOODPUT, "undisturbed", "without kills, calls/s", True),
                Column(GOODPUT, "disturbed", "with kills, calls/s", True),
                Column(GOODPUT, "goodput", "%", True, note=True),
            ),
            deaths.goodput,
            Sizes(2_000, 1_000, 300),
        ),
    )
}
