"""`scripts/bench pool`: reads words, compares, and shows, writes or draws what was found."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from benchmarks.pools.cases import CASES, Case
from benchmarks.pools.comparison import compare
from benchmarks.pools.contenders import CONTENDERS
from benchmarks.pools.plot import draw
from benchmarks.pools.report import Results, markdown, show
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
    rounds = given.rounds or (1 if given.quick else ROUNDS)
    cases = [CASES[name] for name in given.case or CASES]
    names = [name for name in CONTENDERS if name in (given.contender or CONTENDERS)]
    print(machine, flush=True)
    samples, failures = compare(cases, names, rounds, _size(given.quick), turns_of(WORK), tell)
    tell("")
    results = Results(samples)
    show(results)
    missing = [name for name in names if CONTENDERS[name].missing()]
    if missing:
        print(f"not installed: {', '.join(missing)}; scripts/setup bench installs them")
    if given.json:
        found = {"machine": machine, "samples": [sample._asdict() for sample in samples]}
        Path(given.json).write_text(json.dumps(found, indent=1) + "\n")
    if given.markdown:
        said = f"`{shlex.join(['scripts/bench', 'pool', *arguments])}`: {machine}; {_rounds(rounds)}."
        write(Path(given.markdown), f"{said}\n\n{markdown(results)}")
    if given.plot:
        draw(results, given.plot, machine)
    for failure in failures:
        print(f"{parser.prog}: a measurement failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


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
    parser.add_argument("--plot", metavar="FILE.png", help="draw them")
    return parser


def _at_least_one(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("1 or more is needed")
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
