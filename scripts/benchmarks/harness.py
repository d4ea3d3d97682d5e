"""Rounds, medians and ratios: how a row is measured, whatever it measures.

A row has cases (how many calls are in flight) and contenders. In each round every case is measured with
every contender, one right after the other, so that a machine that drifts drifts for all of them; the order
rotates from round to round, so that no contender always runs in another's wake. Ratios are taken within a
round, and it is their median that counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, TypeVar

T = TypeVar("T")

Figures = dict[str, float]
"""What one measurement found, by unit: {"calls/s": 31000.0}."""

Measure = Callable[[int, int], Figures]
"""(calls in flight, calls to make) -> figures. It checks every result, and raises for a wrong one."""


@dataclass(frozen=True)
class Contender:
    """Something that makes calls. `ours` is compared with each contender that is not."""

    name: str
    measure: Measure
    ours: bool = False


@dataclass(frozen=True)
class Row:
    """One line of `scripts/bench --list`.

    `open` starts the processes of all contenders, for as long as its context lasts. Each measurement
    makes `calls` calls, or as many as take `seconds`.
    """

    name: str
    about: str
    open: Callable[[], AbstractContextManager[Sequence[Contender]]]
    in_flight: tuple[int, ...]
    calls: int = 0
    seconds: float = 0.5


class Sample(NamedTuple):
    """One measurement."""

    row: str
    round: int
    in_flight: int
    contender: str
    ours: bool
    unit: str
    value: float


class Spread(NamedTuple):
    """The middle of some rounds, and their extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(median(values), min(values), max(values))


_CALIBRATION = 300
"""Calls before the first round; from their rate follows how many make a measurement."""


def measure(row: Row, rounds: int, tell: Callable[[str], None]) -> list[Sample]:
    """All samples of a row. `tell` gets a line about what is under way."""
    samples: list[Sample] = []
    tell(f"{row.name}: starting the contenders")
    with row.open() as contenders:
        plan = {
            (case, contender.name): row.calls or _calls_for(row.seconds, contender, case)
            for case in row.in_flight
            for contender in contenders
        }
        for number in range(rounds):
            for case in row.in_flight:
                tell(f"{row.name}: round {number + 1} of {rounds}, {case} in flight")
                for contender in rotated(contenders, number):
                    for unit, value in contender.measure(case, plan[case, contender.name]).items():
                        sample = (row.name, number, case, contender.name, contender.ours, unit, value)
                        samples.append(Sample(*sample))
    return samples


def _calls_for(seconds: float, contender: Contender, in_flight: int) -> int:
    """How many calls take about `seconds`, by a trial that warms the contender up as well."""
    calls = max(_CALIBRATION, 8 * in_flight)
    contender.measure(in_flight, calls)
    rate = contender.measure(in_flight, calls)["calls/s"]
    return max(calls, int(rate * seconds))


def rotated(contenders: Sequence[T], by: int) -> list[T]:
    by %= len(contenders)
    return [*contenders[by:], *contenders[:by]]


def percentiles(seconds: Sequence[float]) -> Figures:
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return {"µs p50": 1e6 * ordered[last // 2], "µs p99": 1e6 * ordered[round(last * 0.99)]}


class Line(NamedTuple):
    """A line of the table. `ratios` holds, for one of ours, each baseline's name and ours / theirs."""

    row: str
    in_flight: int
    unit: str
    contender: str
    figure: Spread
    ratios: dict[str, Spread]


def summarise(samples: Sequence[Sample]) -> Iterator[Line]:
    """The table's lines, in the order in which they were measured."""
    found: dict[tuple[str, int, str, str], dict[int, float]] = {}
    ours: dict[str, bool] = {}
    # By round first, so that the first round's order, which nothing has rotated, is the table's.
    for sample in sorted(samples, key=lambda sample: sample.round):
        key = (sample.row, sample.in_flight, sample.unit, sample.contender)
        found.setdefault(key, {})[sample.round] = sample.value
        ours[sample.contender] = sample.ours
    cases = dict.fromkeys(key[:3] for key in found)
    for case in cases:
        names = [key[3] for key in found if key[:3] == case]
        for name in names:
            values = found[*case, name]
            ratios = {}
            for other in names if ours[name] else ():
                if not ours[other]:
                    theirs = found[*case, other]
                    ratios[other] = Spread.of([values[number] / theirs[number] for number in values])
            yield Line(*case, name, Spread.of(list(values.values())), ratios)
