"""`scripts/bench pool`: reads words, compares, and shows, writes or draws what was found."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.pools.cases import CASES, Case
from benchmarks.pools.comparison import Failed, compare
from benchmarks.pools.contenders import CONTENDERS, NOT_INSTALLED
from benchmarks.pools.plot import draw
from benchmarks.pools.report import Results, markdown, show
from benchmarks.pools.samples import Sample
from benchmarks.pools.speed import turns_of

BEGIN, END = "<!-- scripts/bench pool: begin -->\n", "<!-- scripts/bench pool: end -->\n"
"""Between these lines of a document the tables are replaced."""

ROUNDS = 5
WORK = 0.02
"""Seconds of processor time of a call, in the cases where it has work to do."""


def run(arguments: Sequence[str], machine: str, tell: Callable[[str], None]) -> int:
    """Returns the exit status. `machine` is what is measured on, in a line; `tell` gets what is under way."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: run scripts/setup bench")
    failures: list[Failed] = []
    if given.again:
        try:
            found = _read(Path(given.again))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--again {given.again} is nothing that --json has written: {error}")
    else:
        command = shlex.join(["scripts/bench", "pool", *arguments])
        rounds = given.rounds or (1 if given.quick else ROUNDS)
        cases = [CASES[name] for name in given.case or CASES]
        names = [name for name in CONTENDERS if name in (given.contender or CONTENDERS)]
        samples, failures = compare(cases, names, rounds, _size(given.quick), turns_of(WORK), tell)
        tell("")
        found = Found(command, machine, rounds, samples)
    _tell_all(found, given)
    for failure in failures:
        print(f"{parser.prog}: a measurement failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


class Found(NamedTuple):
    """A whole comparison: what `--json` writes and `--again` reads."""

    command: str
    machine: str
    rounds: int
    samples: list[Sample]


def _read(path: Path) -> Found:
    """Raises OSError, ValueError, KeyError or TypeError for what is no such file."""
    said = json.loads(path.read_text())
    samples = [Sample(**sample) for sample in said["samples"]]
    return Found(said["command"], said["machine"], said["rounds"], samples)


def _tell_all(found: Found, given: argparse.Namespace) -> None:
    """Show it, and write and draw what is asked for."""
    results = Results(found.samples)
    print(found.machine)
    show(results)
    if any(sample.note == NOT_INSTALLED for sample in found.samples):
        print("scripts/setup bench installs what is missing")
    if given.json:
        all_of_it = {**found._asdict(), "samples": [sample._asdict() for sample in found.samples]}
        Path(given.json).write_text(json.dumps(all_of_it, indent=1) + "\n")
    if given.markdown:
        said = f"`{found.command}`: {found.machine}; {_rounds(found.rounds)}."
        write(Path(given.markdown), f"{said}\n\n{markdown(results)}")
    if given.plot:
        draw(results, given.plot, found.machine)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench pool", description="Process pools side by side, two workers each."
    )
    parser.add_argument("--rounds", type=_at_least_one, metavar="N", help=f"default: {ROUNDS}, 1 if --quick")
    parser.add_argument("--quick", action="store_true", help="less of everything, and no large cases")
    parser.add_argument("--case", action="append", choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument(
        "--contender", action="append", choices=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS)
    )
    parser.add_argument("--json", metavar="FILE", help="write every round's figures")
    parser.add_argument(
        "--markdown", metavar="FILE", help="write the tables, between their marks if FILE has them"
    )
    parser.add_argument("--again", metavar="FILE", help="measure nothing: show what --json has written")
    parser.add_argument("--plot", metavar="FILE.png", help="draw them")
    return parser


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"a number of rounds, 1 or more, is needed, not {text!r}")
    return number


def _size(quick: bool) -> Callable[[Case], int]:
    return lambda case: case.sizes.quick if quick else case.sizes.full


def _rounds(rounds: int) -> str:
    return "one round" if rounds == 1 else f"median of {rounds} rounds (least - most)"


def write(path: Path, text: str) -> None:
    """Replace what stands between the marks in `path`, or all of it if it has none."""
    before = path.read_text() if path.exists() else ""
    if BEGIN in before and END in before:
        head, _, rest = before.partition(BEGIN)
        text = f"{head}{BEGIN}{text}{END}{rest.partition(END)[2]}"
    path.write_text(text)
