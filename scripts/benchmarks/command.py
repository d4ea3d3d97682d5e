"""The command: reads words, measures rows, prints a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version

from benchmarks.harness import Line, Sample, Spread, measure, summarise
from benchmarks.rows import ROWS, NotInstalled

FEWEST_ROUNDS = 5
"""Fewer have no median to speak of on a machine that does other things too."""


POOL = "pool"
"""Not a row: a comparison with tables of its own, which takes longer than all rows."""

OVERLOAD = "overload"
"""Not a row either: it fills the machine with peers, and is one table."""

RECOVERY = "recovery"
"""Nor this: one supervisor at its start."""


def run(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    if arguments[:1] == [POOL]:
        from benchmarks.pools.command import run as compare_pools

        return compare_pools(arguments[1:], machine(), _tell)
    if arguments[:1] == [OVERLOAD]:
        from benchmarks.overload import run as overload

        return overload(arguments[1:], machine())
    if arguments[:1] == [RECOVERY]:
        from benchmarks.recovery import run as recovery

        return recovery(arguments[1:], machine())
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure, as ratios within one run.")
    parser.add_argument(
        "row",
        nargs="*",
        metavar="ROW",
        help="which rows to measure (default: all); pool, with options of its own, is apart",
    )
    parser.add_argument("--list", action="store_true", help="name the rows, and end")
    parser.add_argument("--rounds", type=int, default=FEWEST_ROUNDS, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", metavar="FILE", help="write every round's figures")
    given = parser.parse_args(arguments)
    if given.list:
        for row in ROWS.values():
            print(f"{row.name:10} {row.about}")
        print(f"{POOL:10} process pools side by side, in many respects; see scripts/bench {POOL} --help")
        print(f"{OVERLOAD:10} honest callers among 10,000 slow peers, and without descriptors")
        print(f"{RECOVERY:10} a supervisor that finds a million unfinished requests in its journal")
        return 0
    for apart in (POOL, OVERLOAD, RECOVERY):
        if apart in given.row:
            parser.error(f"{apart} is measured by itself: scripts/bench {apart} [OPTION...]")
    unknown = [name for name in given.row if name not in ROWS]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if given.rounds < 1:
        parser.error("--rounds must be 1 or more")
    samples: list[Sample] = []
    print(machine(), flush=True)
    for row in [ROWS[name] for name in given.row] or ROWS.values():
        try:
            samples += measure(row, given.rounds, _tell)
        except NotInstalled as error:
            parser.error(f"row {row.name}: {error}")
    _tell("")
    print_table(list(summarise(samples)), given.rounds)
    if given.json:
        with open(given.json, "w") as file:
            json.dump({"machine": machine(), "samples": [s._asdict() for s in samples]}, file, indent=1)
    return 0


def machine() -> str:
    """What was measured on, in one line."""
    cpus = len(os.sched_getaffinity(0))
    system = f"{platform.system()} {platform.release().partition('-')[0]}"
    packages = ", ".join(f"{name} {version(name)}" for name in ("pyzmq", "msgspec", "uvloop"))
    return f"{cpus} cores, {system}, Python {platform.python_version()}, {packages}"


def _tell(what: str) -> None:
    """Progress: one line that is written over on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def print_table(lines: Sequence[Line], rounds: int) -> None:
    if sys.stdout.isatty():
        _print_rich(lines, rounds)
        return
    print(f"median of {rounds} rounds (least - most); a ratio is ours divided by theirs")
    for line in lines:
        ratios = "".join(f"; {_ratio(ratio)} of {name}" for name, ratio in line.ratios.items())
        print(f"{line.row} {line.in_flight:>4} {line.contender:22} {_figure(line)}{ratios}")


def _print_rich(lines: Iterable[Line], rounds: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"median of {rounds} rounds (least - most); a ratio is ours divided by theirs"
    table = Table("row", "in flight", "contender", "", "ratio", box=box.SIMPLE, title=title)
    before = None
    for line in lines:
        case = (line.row, line.in_flight, line.unit)
        if before not in (None, case):
            table.add_section()
        before = case
        ratios = "\n".join(f"{_ratio(ratio)} of {name}" for name, ratio in line.ratios.items())
        table.add_row(line.row, str(line.in_flight), line.contender, _figure(line), ratios)
    Console().print(table)


def _figure(line: Line) -> str:
    return f"{_spread(line.figure, ',.0f')} {line.unit}"


def _ratio(ratio: Spread) -> str:
    return _spread(ratio, ".2f")


def _spread(spread: Spread, form: str) -> str:
    return f"{spread.median:{form}} ({spread.low:{form}} - {spread.high:{form}})"
