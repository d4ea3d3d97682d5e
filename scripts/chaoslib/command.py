"""The command: reads words, runs, prints the report."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from random import SystemRandom

from chaoslib.checker import Violation, check, figures, story
from chaoslib.disk import NoDisk
from chaoslib.history import History
from chaoslib.keeper import NotReady
from chaoslib.runner import Run, Settings
from chaoslib.schedule import ABOUT, NEED_A_JOURNAL
from chaoslib.shim import NoCompiler

TOLD = 10
"""Ids of each kind of breach whose history is printed."""


def run(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    faults = tuple(given.faults.split(",")) if given.faults else tuple(ABOUT)
    if unknown := [fault for fault in faults if fault not in ABOUT]:
        parser.error(f"no fault {', '.join(unknown)}; there are {', '.join(ABOUT)}")
    if given.minutes <= 0 or given.rate <= 0:
        parser.error("--minutes and --rate must be more than 0")
    if given.no_journal:
        faults = tuple(fault for fault in faults if given.faults or fault not in NEED_A_JOURNAL)
        if "disk" in faults:
            parser.error("a full disk is the journal's: leave out --no-journal, or the fault")
    folder = Path(given.keep or tempfile.mkdtemp(prefix="acomm-chaos-"))
    if given.keep:
        folder.mkdir(mode=0o700)
    settings = Settings(
        given.seed if given.seed is not None else SystemRandom().randrange(2**32),
        given.minutes * 60,
        faults,
        folder,
        journal=not given.no_journal,
        durability=given.durability,
        workers=given.workers,
        rate=given.rate,
        settle=given.settle,
        fault_rate=given.fault_rate,
    )
    if given.supervisor:
        settings = settings._replace(supervisor=(sys.executable, given.supervisor, "serve"))
    return _run(settings, keep=bool(given.keep))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Break a supervisor by a seeded schedule, and check what it had promised.",
        epilog="faults:\n" + "\n".join(f"  {name:12}{about}" for name, about in ABOUT.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=1.0, metavar="M", help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, metavar="S", help="of the schedule (default: a new one, which is told)"
    )
    parser.add_argument("--faults", metavar="A,B,C", help="which faults (default: all)")
    parser.add_argument(
        "--no-journal", action="store_true", help="no journal; supervisors are not killed, unless asked for"
    )
    parser.add_argument("--durability", choices=("power", "process"), default="power", help="of the journal")
    parser.add_argument(
        "--rate", type=float, default=500.0, metavar="N", help="requests a second (%(default)g)"
    )
    parser.add_argument(
        "--fault-rate", type=float, default=1.0, metavar="X", help="multiplies how often faults strike"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="worker processes (%(default)s)")
    parser.add_argument(
        "--settle", type=float, default=120.0, metavar="S", help="seconds for the end (%(default)g)"
    )
    parser.add_argument("--keep", metavar="DIR", help="a new folder for the history, which stays")
    parser.add_argument(
        "--supervisor", metavar="FILE", help="a program to run in place of `-m workers`: for tests"
    )
    return parser


def _run(settings: Settings, *, keep: bool) -> int:
    print(f"seed {settings.seed}: {settings.seconds:g} s of {', '.join(settings.faults)}", flush=True)
    run = Run(settings, _tell)
    try:
        history = asyncio.run(run.run())
    except (NoDisk, NoCompiler, NotReady, RuntimeError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2  # what there is of a history may tell why
    finally:
        run.close()
    violations = check(history, durable=settings.journal)
    report(history, violations, settings)
    if violations or keep:
        print(f"the history is in {settings.folder}")
    else:
        shutil.rmtree(settings.folder)
    return 1 if violations else 0


def report(history: History, violations: Sequence[Violation], settings: Settings) -> None:
    found = figures(history)
    found["acknowledged a second"] = round(found["acknowledged"] / settings.seconds)
    for name, value in found.items():
        print(f"{name:40} {value:>12,}")
    for kind, count in Counter(violation.kind for violation in violations).items():
        print(f"\n{kind}: {count}")
        of_kind = [violation for violation in violations if violation.kind == kind]
        for violation in of_kind[:TOLD]:
            print(f"  {violation.id}: {violation.what}")
            call = history.calls.get(violation.id)
            for line in story(call) if call is not None else ():
                print(f"    {line}")
    print(f"\nseed {settings.seed}: {len(violations) or 'no'} breaches", flush=True)


def _tell(what: str) -> None:
    """Progress: one line that is written over on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)
